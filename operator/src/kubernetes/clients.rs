//! Two clients: one that watches, and one that acts.
//!
//! The acting client never retries by itself: a refused eviction is a 429 with `Retry-After`, and a retry that the
//! caller does not see would hold up everything behind it. Each of its calls has a deadline.

use kube::{Client, Config};
use std::time::Duration;

/// Longest time of a call to the API server.
pub const API_DEADLINE: Duration = Duration::from_secs(10);

/// The clients.
#[derive(Clone)]
pub struct Clients {
    /// For lists and watches: retries, and never times out while a watch is silent.
    pub watch: Client,
    /// For everything else: no retries, and a deadline.
    pub act: Client,
}

impl Clients {
    /// Connects as `config` says.
    pub fn new(config: &Config) -> kube::Result<Self> {
        let watch = Client::try_from(config.clone())?;
        let mut acting = config.clone();
        acting.default_retry = false;
        acting.connect_timeout = Some(Duration::from_secs(5));
        acting.read_timeout = Some(API_DEADLINE);
        acting.write_timeout = Some(API_DEADLINE);
        Ok(Self { watch, act: Client::try_from(acting)? })
    }
}

/// Why a call to the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// No answer in time.
    #[error("the API server did not answer within {} s", API_DEADLINE.as_secs())]
    Deadline,
    /// It answered with an error.
    #[error(transparent)]
    Kube(#[from] kube::Error),
}

impl ApiError {
    /// The server's status code, if it gave one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// What the server said, or why it said nothing.
    pub fn words(&self) -> String {
        match self {
            Self::Kube(kube::Error::Api(status)) => status.message.clone(),
            other => other.to_string(),
        }
    }

    /// Somebody else changed the object first.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// An object of that name is there.
    pub fn is_already_there(&self) -> bool {
        matches!(self, Self::Kube(kube::Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists")
    }

    /// There is no such object.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }
}

/// Puts a call under [`API_DEADLINE`].
pub async fn call<T>(future: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    match tokio::time::timeout(API_DEADLINE, future).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ApiError::Deadline),
    }
}
