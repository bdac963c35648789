//! What can go wrong with the database, and what kind of failure it is.

use deadpool::managed::{PoolError, TimeoutType};
use resilience::{Failure, FailureKind};
use tokio_postgres::error::{DbError, Severity, SqlState};

/// A failure of the database or of the way to it.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// No connection could be opened.
    #[error("{}", ConnectCause::of(.0).in_words(.0))]
    Connect(#[source] tokio_postgres::Error),
    /// No connection could be opened in time.
    #[error("no connection could be opened in time")]
    ConnectTimeout,
    /// The pool handed none out.
    #[error("no pooled connection: {0}")]
    Pool(String),
    /// The connections were given up while the statement was under way.
    #[error("the connections were reset")]
    GivenUp,
    /// A pooled connection leads to a server that takes no writes.
    #[error("{READ_ONLY}")]
    ReadOnly,
    /// A statement failed.
    #[error("{}", in_full(.0))]
    Statement(#[from] tokio_postgres::Error),
}

impl DatabaseError {
    /// The SQL state, if the server gave one.
    pub fn sql_state(&self) -> Option<&SqlState> {
        match self {
            Self::Connect(error) | Self::Statement(error) => error.code(),
            _ => None,
        }
    }
}

/// What a server that takes no writes is, in words.
const READ_ONLY: &str = "the server is read-only: it is a replica now, or writes to it were stopped";

/// Why no connection could be opened, as far as it makes a difference to what a person does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectCause {
    /// The server knows another password.
    PasswordRefused,
    /// The server asks for a password, and there is none.
    NoPassword,
    /// The server does not let this role in, whatever its password.
    LoginRefused,
    /// The server takes no writes.
    ReadOnly,
    /// Anything else.
    Other,
}

impl ConnectCause {
    pub(super) fn of(error: &tokio_postgres::Error) -> Self {
        // What the driver itself says has no code.
        let said_by_driver =
            |text: &str| std::error::Error::source(error).is_some_and(|source| source.to_string() == text);
        match error.code() {
            Some(state) if *state == SqlState::INVALID_PASSWORD => Self::PasswordRefused,
            Some(state) if *state == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => Self::LoginRefused,
            None if said_by_driver("password missing") => Self::NoPassword,
            None if said_by_driver("database does not allow writes") => Self::ReadOnly,
            _ => Self::Other,
        }
    }

    /// Whether the server has answered, with a "no" to this role.
    pub(super) fn is_refusal(self) -> bool {
        self.needs_other_password() || self == Self::LoginRefused
    }

    /// Whether another password would help.
    pub(super) fn needs_other_password(self) -> bool {
        matches!(self, Self::PasswordRefused | Self::NoPassword)
    }

    pub(super) fn in_words(self, error: &tokio_postgres::Error) -> String {
        match self {
            Self::PasswordRefused => format!("the password was refused: {}", in_full(error)),
            Self::NoPassword => "the server asks for a password, and there is none".to_owned(),
            Self::LoginRefused => format!("the login was refused: {}", in_full(error)),
            Self::ReadOnly => READ_ONLY.to_owned(),
            Self::Other => format!("no connection: {}", in_full(error)),
        }
    }
}

/// What an error means for the connection that it came over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aftermath {
    /// It is as good as before.
    Kept,
    /// It has ended, or is about to.
    Lost,
    /// Its server takes no writes any more, and so do the other connections to it.
    ReadOnly,
}

impl Aftermath {
    /// What the driver's error somewhere in the chain of causes means.
    pub(super) fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut chain = std::iter::successors(Some(error), |error| error.source());
        let driver = chain.find_map(|error| error.downcast_ref::<tokio_postgres::Error>());
        driver.map_or(Self::Kept, |error| match error.as_db_error() {
            Some(server) if *server.code() == SqlState::READ_ONLY_SQL_TRANSACTION => Self::ReadOnly,
            Some(server) if is_lost(server.code()) || is_final(server) => Self::Lost,
            None if error.is_closed() => Self::Lost,
            Some(_) | None => Self::Kept,
        })
    }
}

/// Whether the server has ended the session with this error.
fn is_final(error: &DbError) -> bool {
    matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
}

/// The driver's own text of a server error is only "db error".
fn in_full(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(server), _) => format!("{} (SQL state {})", server.message(), server.code().code()),
        (None, Some(cause)) => format!("{error}: {cause}"),
        (None, None) => error.to_string(),
    }
}

impl From<PoolError<tokio_postgres::Error>> for DatabaseError {
    fn from(error: PoolError<tokio_postgres::Error>) -> Self {
        match error {
            PoolError::Backend(error) => Self::Connect(error),
            PoolError::Timeout(TimeoutType::Create) => Self::ConnectTimeout,
            // A pool is only ever closed by a reset.
            PoolError::Closed => Self::GivenUp,
            other => Self::Pool(other.to_string()),
        }
    }
}

impl Failure for DatabaseError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::GivenUp | Self::ReadOnly => FailureKind::GivenUp,
            Self::Connect(_) | Self::ConnectTimeout | Self::Pool(_) => FailureKind::ConnectFailure,
            Self::Statement(error) => match error.code() {
                Some(state) => kind_of(state),
                // Without a state the server did not say it: the connection broke.
                None => FailureKind::ConnectFailure,
            },
        }
    }
}

/// The server shuts down or starts up, or the connection is broken.
fn is_lost(state: &SqlState) -> bool {
    matches!(state.code(), "57P01" | "57P02" | "57P03") || state.code().starts_with("08")
}

fn kind_of(state: &SqlState) -> FailureKind {
    let contention =
        [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED, SqlState::LOCK_NOT_AVAILABLE];
    if contention.contains(state) {
        // A row that many want is no failure of the database and must not open its circuit.
        FailureKind::Deadlock
    } else if *state == SqlState::QUERY_CANCELED {
        FailureKind::Timeout
    } else if is_lost(state) || *state == SqlState::TOO_MANY_CONNECTIONS {
        FailureKind::ConnectFailure
    } else if *state == SqlState::READ_ONLY_SQL_TRANSACTION {
        // The pool leaves that server. Whether there is one that takes writes, the next attempt finds out: only that one
        // may open the circuit.
        FailureKind::GivenUp
    } else {
        FailureKind::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("40001", FailureKind::Deadlock)]
    #[case("40P01", FailureKind::Deadlock)]
    #[case("55P03", FailureKind::Deadlock)]
    #[case("57014", FailureKind::Timeout)]
    #[case("57P01", FailureKind::ConnectFailure)]
    #[case("08006", FailureKind::ConnectFailure)]
    #[case("53300", FailureKind::ConnectFailure)]
    #[case("25006", FailureKind::GivenUp)]
    #[case("42P01", FailureKind::Other)]
    fn kinds(#[case] code: &str, #[case] expected: FailureKind) {
        assert_eq!(kind_of(&SqlState::from_code(code)), expected);
    }
}
