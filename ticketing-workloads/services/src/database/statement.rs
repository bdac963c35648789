//! Statements on a connection from the pool.
//!
//! Where a session is the connection's own, statements are prepared once and kept. Behind PgBouncer in transaction mode
//! the next transaction may get another session, which knows nothing of them and may know others under their names: there
//! each statement goes with its text, unnamed, in one round trip.

use super::loan::Connection;
use super::settings::Sessions;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{ToSql, Type, WrongType};
use tokio_postgres::{Client, Error, Row, Statement};

/// A value of a parameter.
type Value<'a> = &'a (dyn ToSql + Sync);

/// A statement that is made again and again.
pub enum Prepared {
    /// The session knows it.
    Kept(Statement),
    /// Its text goes along each time.
    Text(String),
}

/// What can be executed: a text, or what was prepared.
pub trait AsStatement {
    /// The statement, or its text.
    fn as_statement(&self) -> Result<&Statement, &str>;
}

impl AsStatement for Prepared {
    fn as_statement(&self) -> Result<&Statement, &str> {
        match self {
            Self::Kept(statement) => Ok(statement),
            Self::Text(text) => Err(text),
        }
    }
}

impl AsStatement for str {
    fn as_statement(&self) -> Result<&Statement, &str> {
        Err(self)
    }
}

impl AsStatement for String {
    fn as_statement(&self) -> Result<&Statement, &str> {
        Err(self)
    }
}

impl Connection {
    /// Prepares a statement, once for each session that keeps it.
    pub async fn prepare_cached(&self, text: &str) -> Result<Prepared, Error> {
        match self.sessions() {
            Sessions::Own => Ok(Prepared::Kept(self.client().prepare_cached(text).await?)),
            Sessions::Shared => Ok(Prepared::Text(text.to_owned())),
        }
    }

    /// All rows.
    pub async fn query(
        &self,
        statement: &(impl AsStatement + ?Sized),
        values: &[Value<'_>],
    ) -> Result<Vec<Row>, Error> {
        match (statement.as_statement(), self.sessions()) {
            (Ok(statement), _) => self.client().query(statement, values).await,
            (Err(text), sessions) => query(self.client(), sessions, text, values).await,
        }
    }

    /// The one row that there is, if there is one.
    pub async fn query_opt(
        &self,
        statement: &(impl AsStatement + ?Sized),
        values: &[Value<'_>],
    ) -> Result<Option<Row>, Error> {
        match (statement.as_statement(), self.sessions()) {
            (Ok(statement), _) => self.client().query_opt(statement, values).await,
            (Err(text), Sessions::Own) => self.client().query_opt(text, values).await,
            (Err(text), Sessions::Shared) => self.client().query_typed_opt(text, &with_types(values)).await,
        }
    }

    /// The one row that there has to be.
    pub async fn query_one(&self, statement: &(impl AsStatement + ?Sized), values: &[Value<'_>]) -> Result<Row, Error> {
        match (statement.as_statement(), self.sessions()) {
            (Ok(statement), _) => self.client().query_one(statement, values).await,
            (Err(text), Sessions::Own) => self.client().query_one(text, values).await,
            (Err(text), Sessions::Shared) => self.client().query_typed_one(text, &with_types(values)).await,
        }
    }

    /// How many rows it has changed.
    pub async fn execute(&self, statement: &(impl AsStatement + ?Sized), values: &[Value<'_>]) -> Result<u64, Error> {
        match (statement.as_statement(), self.sessions()) {
            (Ok(statement), _) => self.client().execute(statement, values).await,
            (Err(text), Sessions::Own) => self.client().execute(text, values).await,
            (Err(text), Sessions::Shared) => self.client().execute_typed(text, &with_types(values)).await,
        }
    }
}

/// All rows, over any connection.
pub async fn query(client: &Client, sessions: Sessions, text: &str, values: &[Value<'_>]) -> Result<Vec<Row>, Error> {
    match sessions {
        Sessions::Own => client.query(text, values).await,
        Sessions::Shared => client.query_typed(text, &with_types(values)).await,
    }
}

/// How many rows were changed, over any connection.
pub async fn execute(client: &Client, sessions: Sessions, text: &str, values: &[Value<'_>]) -> Result<u64, Error> {
    match sessions {
        Sessions::Own => client.execute(text, values).await,
        Sessions::Shared => client.execute_typed(text, &with_types(values)).await,
    }
}

fn with_types<'a>(values: &[Value<'a>]) -> Vec<(Value<'a>, Type)> {
    values.iter().map(|value| (*value, type_of(*value))).collect()
}

/// The type of a value, which the server is not asked for: the first one that takes it.
fn type_of(value: Value<'_>) -> Type {
    let types = [
        Type::TEXT,
        Type::UUID,
        Type::INT4,
        Type::INT8,
        Type::FLOAT8,
        Type::BOOL,
        Type::TEXT_ARRAY,
        Type::UUID_ARRAY,
        Type::INT4_ARRAY,
        Type::INT8_ARRAY,
    ];
    let takes_it =
        |one: &Type| value.to_sql_checked(one, &mut BytesMut::new()).err().is_none_or(|error| !error.is::<WrongType>());
    // Of another one the driver says that it does not fit.
    types.into_iter().find(takes_it).unwrap_or(Type::UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn every_kind_of_value_has_its_type() {
        let some_uuids = vec![Uuid::nil()];
        let cases: [(Value<'_>, Type); 12] = [
            (&"text", Type::TEXT),
            (&None::<&str>, Type::TEXT),
            (&Some("text".to_owned()), Type::TEXT),
            (&Uuid::nil(), Type::UUID),
            (&1_i32, Type::INT4),
            (&1_i64, Type::INT8),
            (&1.5_f64, Type::FLOAT8),
            (&None::<f64>, Type::FLOAT8),
            (&true, Type::BOOL),
            (&["a", "b"].as_slice(), Type::TEXT_ARRAY),
            (&some_uuids, Type::UUID_ARRAY),
            (&Vec::<i64>::new(), Type::INT8_ARRAY),
        ];
        for (value, expected) in cases {
            assert_eq!(type_of(value), expected, "{value:?}");
        }
    }
}
