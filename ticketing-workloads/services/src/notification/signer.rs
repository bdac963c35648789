//! The key that tickets are signed with. Its file is read again and again, so that a key that is replaced is used without a
//! restart. No ticket leaves before its public key is in the table `ticket_keys`, by which it is verified.

use crate::database::{Connection, Database, DatabaseError};
use crate::schema::{self, Schema};
use crate::tickets::{KeyError, MAX_FILE_BYTES, PublicKey, SigningKey};
use contract::CheckStatus;
use resilience::{Check, CheckOutcome};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::time::Instant;

/// How long it is believed that a key is not revoked.
const BELIEVED: Duration = Duration::from_secs(30);

const REGISTER: &str = "
    WITH known AS (SELECT id, revoked_at FROM ticket_keys WHERE id = $1), added AS (
        INSERT INTO ticket_keys (id, public_key) SELECT $1, $2 WHERE NOT EXISTS (SELECT FROM known) ON CONFLICT DO NOTHING
    )
    SELECT EXISTS (SELECT FROM known WHERE revoked_at IS NOT NULL)";

/// Statements that are made all the time.
pub const HOT: &[(&str, &str)] = &[("ticket key", REGISTER)];

/// Why no ticket can be made.
#[derive(Debug, thiserror::Error)]
enum SignerError {
    #[error("TICKET_KEY_FILE is not set: mails go without tickets, which follow once there is a key")]
    NotSet,
    #[error("cannot read {}: {source}; tickets wait", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}; tickets wait", path.display())]
    Key { path: PathBuf, source: KeyError },
    #[error("the key {0} is revoked (table ticket_keys): put another one into TICKET_KEY_FILE; tickets wait")]
    Revoked(String),
}

/// A key whose public half is known to those who verify.
struct Registered {
    key: Arc<SigningKey>,
    until: Instant,
    revoked: bool,
}

/// Has the key of a file.
pub struct Signer {
    path: Option<PathBuf>,
    registered: Mutex<Option<Registered>>,
}

impl Signer {
    pub fn new(path: Option<PathBuf>) -> Arc<Self> {
        let path = path.filter(|path| !path.as_os_str().is_empty());
        Arc::new(Self { path, registered: Mutex::default() })
    }

    /// The key to sign with; `None`: tickets wait, and the check says why.
    pub async fn key(&self, database: &Database, schema: &Schema) -> Option<Arc<SigningKey>> {
        if !schema.has(schema::TICKETS) {
            return None;
        }
        let key = Arc::new(self.read().await.ok()?);
        if let Some(known) = self.known(&key).filter(|known| known.until > Instant::now()) {
            return (!known.revoked).then_some(known.key);
        }
        let public = key.public_key();
        match database.call(|connection| register(connection, &public)).await {
            Ok(revoked) => {
                let known = Registered { key: Arc::clone(&key), until: Instant::now() + BELIEVED, revoked };
                *self.registered.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
                (!revoked).then_some(key)
            }
            Err(error) => {
                tracing::debug!(%error, "failed to register the key of tickets");
                None
            }
        }
    }

    fn known(&self, key: &SigningKey) -> Option<Registered> {
        let registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let known = registered.as_ref().filter(|known| known.key.id() == key.id())?;
        Some(Registered { key: Arc::clone(&known.key), ..*known })
    }

    async fn read(&self) -> Result<SigningKey, SignerError> {
        let path = self.path.as_ref().ok_or(SignerError::NotSet)?;
        let text = read(path).await.map_err(|source| SignerError::Read { path: path.clone(), source })?;
        SigningKey::from_pem(&text).map_err(|source| SignerError::Key { path: path.clone(), source })
    }

    async fn look(&self) -> Result<Arc<SigningKey>, SignerError> {
        let key = Arc::new(self.read().await?);
        match self.known(&key) {
            Some(known) if known.revoked => Err(SignerError::Revoked(key.id().to_string())),
            _ => Ok(key),
        }
    }

    /// `ticket-key`: whether tickets can be signed.
    pub fn check(self: &Arc<Self>) -> Check {
        let own = Arc::clone(self);
        Check::new("ticket-key", &["business"], move |_| {
            let own = Arc::clone(&own);
            async move {
                match own.look().await {
                    Ok(key) => {
                        CheckOutcome::new(CheckStatus::Healthy, format!("tickets are signed with the key {}", key.id()))
                    }
                    Err(error @ SignerError::NotSet) => CheckOutcome::new(CheckStatus::Degraded, error.to_string()),
                    Err(error) => CheckOutcome::new(CheckStatus::Unhealthy, error.to_string()),
                }
            }
        })
    }
}

async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    tokio::fs::File::open(path).await?.take(MAX_FILE_BYTES).read_to_end(&mut text).await?;
    Ok(text)
}

/// Writes the key down for those who verify; the answer is whether it is revoked.
async fn register(connection: Connection, key: &PublicKey) -> Result<bool, DatabaseError> {
    let register = connection.prepare_cached(REGISTER).await?;
    let row = connection.query_one(&register, &[&key.id().to_string(), &key.bytes().as_slice()]).await?;
    Ok(row.try_get(0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_that_is_replaced_is_used_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        let signer = Signer::new(Some(path.clone()));
        assert!(signer.look().await.unwrap_err().to_string().contains("cannot read"));
        std::fs::write(&path, "nothing").unwrap();
        assert!(signer.look().await.unwrap_err().to_string().contains("ticket-key new FILE"));
        let mut seen = Vec::new();
        for _ in 0..2 {
            std::fs::write(&path, crate::tickets::generate().unwrap()).unwrap();
            seen.push(signer.look().await.unwrap().id());
        }
        assert_ne!(seen[0], seen[1]);
        let unset = Signer::new(Some(PathBuf::new()));
        assert!(unset.look().await.unwrap_err().to_string().contains("TICKET_KEY_FILE is not set"));
    }
}
