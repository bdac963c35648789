//! Tokens that are signed with a secret of our own: for the local stack, and wherever there is no issuer.

use super::jwt::{self, Claims, Expected, InvalidToken, Unverified};
use super::key_file::{self, KeyFileError, Keys};
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The issuer that such tokens name. It is no other's: who has the secret can be nobody of another issuer.
const ISSUER: &str = "ticketing-local";

/// What a token says, if one of these secrets has signed it and it is good, `seconds` after 1970.
pub fn verify(token: &Unverified<'_>, secrets: &Keys, seconds: f64) -> Result<Claims, InvalidToken> {
    let claims = token.verified_by_secret(secrets.all())?;
    jwt::check(&claims, &Expected { issuer: ISSUER.to_owned(), audience: None }, seconds)?;
    Ok(claims)
}

/// What `ticketing token` is to make.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// Whom the token is for.
    #[arg(long)]
    pub subject: String,
    /// File with the secret, the gateway's TOKEN_HMAC_FILE.
    #[arg(long, env = "TOKEN_HMAC_FILE")]
    pub hmac_file: PathBuf,
    /// For how long it is good, such as 12h.
    #[arg(long, default_value = "12h", value_parser = crate::payment::reconcile::duration)]
    pub ttl: Duration,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum NoToken {
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    #[error("the subject has to have 1 to 255 bytes")]
    Subject,
    #[error("the secret cannot be used")]
    Secret,
}

/// A token for a subject, from now on.
pub fn make(settings: &Settings) -> Result<String, NoToken> {
    if settings.subject.is_empty() || settings.subject.len() > 255 {
        return Err(NoToken::Subject);
    }
    let secrets = key_file::read(&settings.hmac_file)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    signed(&settings.subject, secrets.first(), now, settings.ttl).ok_or(NoToken::Secret)
}

/// The same, for `ttl` from `now` on.
pub fn signed(subject: &str, secret: &[u8], now: Duration, ttl: Duration) -> Option<String> {
    let (iat, exp) = (now.as_secs(), now.saturating_add(ttl).as_secs());
    jwt::signed_with(secret, &json!({"iss": ISSUER, "sub": subject, "iat": iat, "exp": exp}))
}
