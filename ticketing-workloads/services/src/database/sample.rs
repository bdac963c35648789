//! A statement of the service itself, by which a session shows that it can be worked with.
//!
//! A session may answer and yet fail what it is asked to do, for as long as it lives, while a new one does well: after a
//! migration that changed the type of a column, a statement that was prepared before it fails ("cached plan must not
//! change result type"). A question for a sign of life does not show that.

use super::loan::Connection;
use super::settings::Sessions;
use super::{DatabaseError, statement};
use resilience::{Failure, FailureKind};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

/// A statement that the service's own calls make, with values for which it reads next to nothing. It is prepared under the
/// same text as theirs: then it is their prepared statement.
#[derive(Clone, Copy)]
pub struct Sample {
    /// Its text. It only reads.
    pub statement: &'static str,
    /// The values of its parameters.
    pub values: &'static [&'static (dyn ToSql + Sync)],
}

impl Sample {
    /// Does it as the service's calls do.
    pub(super) async fn works_in(&self, connection: &Connection) -> Result<(), DatabaseError> {
        let done = async {
            let statement = connection.prepare_cached(self.statement).await?;
            connection.query(&statement, self.values).await
        };
        outcome(done.await)
    }

    /// Does it on a connection that has prepared nothing.
    pub(super) async fn works_on(&self, client: &Client, sessions: Sessions) -> Result<(), DatabaseError> {
        outcome(statement::query(client, sessions, self.statement, self.values).await)
    }
}

/// Having to wait for others says nothing about a session.
fn outcome<T>(done: Result<T, tokio_postgres::Error>) -> Result<(), DatabaseError> {
    match done.map_err(DatabaseError::from) {
        Err(error) if error.kind() != FailureKind::Deadlock => Err(error),
        _ => Ok(()),
    }
}
