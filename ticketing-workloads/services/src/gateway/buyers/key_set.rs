//! The keys of an issuer of tokens, as it publishes them (JWKS, RFC 7517).

use super::jwt::{Algorithm, InvalidToken, PublicKey, Unverified};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::Value;

/// Most keys of a set that are looked at: an issuer has a few.
const MAX_KEYS: usize = 100;
/// Bits of RSA keys. Less is not safe; more takes long to verify with.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2_048..=4_096;

/// Why a set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeySetError {
    #[error("it is no set of keys: {0}")]
    Unreadable(#[from] serde_json::Error),
    #[error("it has no key for signatures by RS256 (2048 to 4096 bits), ES256 or EdDSA (Ed25519)")]
    NoKey,
}

/// The keys that tokens may be signed with.
#[derive(Debug)]
pub struct KeySet(Vec<Key>);

#[derive(Debug)]
struct Key {
    id: Option<String>,
    public: PublicKey,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

/// A key as it is published. Others than these fields are not looked at.
#[derive(Deserialize)]
struct Published {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl KeySet {
    /// Reads a set. Keys of other kinds are left out.
    pub fn read(document: &[u8]) -> Result<Self, KeySetError> {
        let document: Document = serde_json::from_slice(document)?;
        let keys: Vec<_> = document.keys.into_iter().take(MAX_KEYS).filter_map(read_key).collect();
        if keys.is_empty() { Err(KeySetError::NoKey) } else { Ok(Self(keys)) }
    }

    /// The key that a token names; without a name the only one that it can mean.
    pub fn of(&self, token: &Unverified<'_>) -> Result<&PublicKey, InvalidToken> {
        if token.algorithm == Algorithm::Hs256 {
            return Err(InvalidToken::Algorithm);
        }
        let named = |key: &&Key| token.key_id.is_none() || key.id == token.key_id;
        let mut found = self.0.iter().filter(named).filter(|key| key.public.algorithm() == token.algorithm);
        match (found.next(), found.next()) {
            (Some(key), None) => Ok(&key.public),
            (Some(key), Some(_)) if token.key_id.is_some() => Ok(&key.public),
            // Known, and not for what the token says that it was used for.
            (None, _) if token.key_id.is_some() && self.0.iter().any(|key| key.id == token.key_id) => {
                Err(InvalidToken::Algorithm)
            }
            _ => Err(InvalidToken::UnknownKey),
        }
    }
}

fn read_key(value: Value) -> Option<Key> {
    let key: Published = serde_json::from_value(value).ok()?;
    let verifies = key.key_ops.is_none_or(|operations| operations.iter().any(|one| one == "verify"));
    if !verifies || key.purpose.is_some_and(|purpose| purpose != "sig") {
        return None;
    }
    let decode = |text: Option<String>| URL_SAFE_NO_PAD.decode(text?).ok();
    let public = match (key.kty.as_str(), key.crv.as_deref()) {
        ("RSA", _) => {
            let (modulus, exponent) = (number(decode(key.n)?), number(decode(key.e)?));
            if !RSA_BITS.contains(&bits(&modulus)) || exponent.is_empty() || exponent.len() > 8 {
                return None;
            }
            PublicKey::Rsa { modulus, exponent }
        }
        ("EC", Some("P-256")) => {
            let (x, y) = (decode(key.x)?, decode(key.y)?);
            if x.len() != 32 || y.len() != 32 {
                return None;
            }
            PublicKey::P256([&[4][..], &x, &y].concat())
        }
        ("OKP", Some("Ed25519")) => PublicKey::Ed25519(decode(key.x).filter(|x| x.len() == 32)?),
        _ => return None,
    };
    let is_for_it = key.alg.is_none_or(|alg| Algorithm::named(&alg) == Some(public.algorithm()));
    is_for_it.then_some(Key { id: key.kid, public })
}

/// A number without the zeros before it.
fn number(bytes: Vec<u8>) -> Vec<u8> {
    bytes.into_iter().skip_while(|byte| *byte == 0).collect()
}

fn bits(number: &[u8]) -> usize {
    number.first().map_or(0, |first| number.len() * 8 - first.leading_zeros() as usize)
}
