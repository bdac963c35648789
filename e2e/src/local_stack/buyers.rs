//! Buyers of the local stack: the gateway takes tokens that are made here, so that each order can be somebody else's.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use serde_json::json;
use sha2::Sha256;
use std::path::{Path, PathBuf};

/// How long a token is good, in seconds: longer than anything is measured here.
const GOOD_FOR: i64 = 24 * 3_600;

/// Makes tokens for buyers, as `ticketing token` does.
#[derive(Clone)]
pub struct Buyers {
    secret: String,
    secrets: PathBuf,
    session_keys: PathBuf,
}

impl Buyers {
    /// With new secrets in this folder.
    pub(super) fn new(folder: &Path) -> std::io::Result<Self> {
        let new = || Ok::<_, std::io::Error>(crate::token::random()? + &crate::token::random()?);
        let (secrets, session_keys) = (folder.join("buyers"), folder.join("sessions"));
        let secret = new()?;
        std::fs::write(&secrets, &secret)?;
        std::fs::write(&session_keys, new()?)?;
        Ok(Self { secret, secrets, session_keys })
    }

    /// The file with the secret that signs tokens.
    pub fn secrets(&self) -> &Path {
        &self.secrets
    }

    /// The gateway's settings. All buyers come from this machine: what limits a network would limit all of them together.
    pub(super) fn settings(&self) -> Vec<(&'static str, String)> {
        let file = |path: &Path| path.display().to_string();
        let unlimited = ["REQUESTS_PER_NETWORK", "NEW_SESSIONS_PER_NETWORK", "EVENT_REQUESTS_PER_NETWORK"];
        let files = [("TOKEN_HMAC_FILE", file(&self.secrets)), ("SESSION_KEY_FILE", file(&self.session_keys))];
        files.into_iter().chain(unlimited.map(|name| (name, "0".to_owned()))).collect()
    }

    /// A token for a buyer, from now on.
    pub fn token(&self, subject: &str) -> String {
        let now = jiff::Timestamp::now().as_second();
        let claims = json!({"iss": "ticketing-local", "sub": subject, "iat": now, "exp": now + GOOD_FOR});
        let signed =
            [json!({"alg": "HS256", "typ": "JWT"}), claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
        let signed = signed.join(".");
        // Keys of HMAC may have any length.
        let mac = Hmac::<Sha256>::new_from_slice(self.secret.as_bytes());
        let signature = mac.map(|mac| mac.chain_update(&signed).finalize().into_bytes()).unwrap_or_default();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}
