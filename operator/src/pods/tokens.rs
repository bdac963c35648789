//! Tokens of the pods' admin ports.
//!
//! A workload's token is an HMAC of its uid and an epoch under a master key that never leaves the operator's own
//! namespace. It is written to one Secret per workload, as `current` and `previous`, so that it can change without a
//! gap. The operator may write Secrets elsewhere, but not read them: it computes the token whenever it needs it.

use crate::kubernetes::{
    clients::{ApiError, Clients, call},
    meta::{FIELD_MANAGER, owner_reference},
};
use hmac::{Hmac, Mac};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::api::{Api, PostParams};
use serde_json::json;
use sha2::Sha256;
use std::collections::BTreeMap;
use tracing::info;

/// Name of the Secret with the master key, in the operator's namespace.
pub const KEY_SECRET: &str = "resilience-operator-key";
/// Type of the Secrets with the pods' tokens.
pub const TOKEN_SECRET_TYPE: &str = "resilience.ticketwave.io/admin-token";

/// Why there is no master key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The Secret cannot be read or made.
    #[error(
        "the Secret {KEY_SECRET} in namespace {namespace} cannot be read or made: {source}; check the operator's Role there"
    )]
    Api {
        /// The operator's namespace.
        namespace: String,
        /// The API server's words.
        source: ApiError,
    },
    /// The Secret holds no usable key.
    #[error(
        "the Secret {KEY_SECRET} in namespace {namespace} has no key of at least 32 bytes under `key`: delete it, and a new one is made; pods then get new tokens"
    )]
    Unusable {
        /// The operator's namespace.
        namespace: String,
    },
}

/// Makes tokens.
#[derive(Clone)]
pub struct Tokens {
    key: Vec<u8>,
    epoch: u64,
}

impl Tokens {
    /// Makes tokens under `key`.
    pub fn new(key: Vec<u8>, epoch: u64) -> Self {
        Self { key, epoch }
    }

    /// Reads the master key, or makes one if there is none yet.
    pub async fn load(clients: &Clients, namespace: &str) -> Result<Self, KeyError> {
        let api: Api<Secret> = Api::namespaced(clients.act.clone(), namespace);
        let failed = |source| KeyError::Api { namespace: namespace.to_owned(), source };
        let secret = match call(api.get(KEY_SECRET)).await {
            Ok(secret) => secret,
            Err(error) if error.is_not_found() => {
                let key: [u8; 32] = rand::random();
                let mut secret = Secret::default();
                secret.metadata.name = Some(KEY_SECRET.to_owned());
                secret.data = Some(BTreeMap::from([
                    ("key".into(), ByteString(key.to_vec())),
                    ("epoch".into(), ByteString(b"1".to_vec())),
                ]));
                match call(api.create(&PostParams::default(), &secret)).await {
                    Ok(secret) => secret,
                    // Another replica was faster: its key counts.
                    Err(error) if error.is_conflict() => call(api.get(KEY_SECRET)).await.map_err(failed)?,
                    Err(error) => return Err(failed(error)),
                }
            }
            Err(error) => return Err(failed(error)),
        };
        let data = secret.data.unwrap_or_default();
        let epoch =
            data.get("epoch").and_then(|value| std::str::from_utf8(&value.0).ok()?.trim().parse().ok()).unwrap_or(1);
        match data.get("key") {
            Some(key) if key.0.len() >= 32 => Ok(Self::new(key.0.clone(), epoch)),
            _ => Err(KeyError::Unusable { namespace: namespace.to_owned() }),
        }
    }

    /// A key for something else, of which nothing leads back to the master key. All replicas get the same. `purpose` has no slash, so
    /// that the key is no workload's token.
    pub fn derived_key(&self, purpose: &'static str) -> [u8; 32] {
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else { return rand::random() };
        mac.update(purpose.as_bytes());
        mac.finalize().into_bytes().into()
    }

    /// The token of a workload in an epoch.
    fn token(&self, workload_uid: &str, epoch: u64) -> String {
        // HMAC takes keys of any length; the error type is there for ciphers that do not.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else { return String::new() };
        mac.update(format!("{workload_uid}/{epoch}").as_bytes());
        contract::canonical::hex(&mac.finalize().into_bytes())
    }

    /// The token of a workload now.
    pub fn current(&self, workload_uid: &str) -> String {
        self.token(workload_uid, self.epoch)
    }

    /// Writes the Secret of a workload. The Secret is owned by the workload, so it goes with it.
    ///
    /// It is replaced as a whole and never patched, because a patch reads: its answer, and the errors of one that is
    /// refused, can hold what the Secret held. The type is the fence: the API server lets nobody change the type of a
    /// Secret, so one that somebody else made is refused, and left as it is.
    pub async fn write(&self, clients: &Clients, workload: &contract::WorkloadId, uid: &str) -> Result<(), ApiError> {
        let name = contract::token_secret_name(workload.kind, &workload.name);
        let [current, previous] = contract::admin::TOKEN_KEYS;
        let secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "type": TOKEN_SECRET_TYPE,
            "metadata": {
                "name": name,
                "namespace": workload.namespace,
                "labels": { "app.kubernetes.io/managed-by": FIELD_MANAGER },
                "ownerReferences": [owner_reference(workload, uid)],
            },
            "data": {
                current: ByteString(self.current(uid).into_bytes()),
                previous: ByteString(self.token(uid, self.epoch.saturating_sub(1)).into_bytes()),
            },
        });
        let api: Api<Secret> = Api::namespaced(clients.act.clone(), &workload.namespace);
        let secret: Secret =
            serde_json::from_value(secret).map_err(|error| ApiError::Kube(kube::Error::SerdeError(error)))?;
        let how = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        match call(api.create(&how, &secret)).await {
            Err(error) if error.is_conflict() => {}
            result => return result.map(drop),
        }
        match call(api.replace(&name, &how, &secret)).await {
            // Version 0.1 made them without a type of their own, and of the same key: those are as good.
            Err(error) if error.code() == Some(422) => {
                info!(
                    %workload,
                    secret = name,
                    "the token Secret was made by version 0.1 or by somebody else, and stays as it is; if the pods do not take the operator's token, delete it"
                );
                Ok(())
            }
            result => result.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_by_workload_key_and_epoch() {
        let tokens = Tokens::new(vec![1; 32], 2);
        let all = [
            tokens.current("a"),
            tokens.current("b"),
            Tokens::new(vec![2; 32], 2).current("a"),
            Tokens::new(vec![1; 32], 3).current("a"),
        ];
        assert!(all.iter().all(|token| token.len() == 64));
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        assert_eq!(Tokens::new(vec![1; 32], 3).token("a", 2), all[0], "the epoch before is the previous token");
    }
}
