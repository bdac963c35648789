//! JSON Web Tokens: what one says, whether a key has signed it, and whether it is good here and now. No clock and no I/O.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::{Deserialize, Deserializer};
use sha2::Sha256;

/// Largest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// Seconds by which the issuer's clock may be ahead of ours.
const LEEWAY_SECONDS: f64 = 60.0;
/// Kinds of a token that stand for its holder. An issuer signs others with the same key, such as "logout+jwt".
const TYPES: [&str; 2] = ["jwt", "at+jwt"];

/// Why a token is not taken, in words for its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    #[error("the token has more than {MAX_TOKEN_BYTES} bytes")]
    TooLarge,
    #[error("this is no JSON Web Token")]
    Malformed,
    #[error("the token is signed by an algorithm that is not taken; RS256, ES256 and EdDSA are")]
    Algorithm,
    #[error("the token is of another type than JWT")]
    Type,
    #[error("the token has critical extensions, which are not understood")]
    Critical,
    #[error("the token is signed by a key that its issuer does not have; get a new one")]
    UnknownKey,
    #[error("the signature of the token is wrong")]
    Signature,
    #[error("the token does not say when it expires")]
    NoExpiry,
    #[error("the token has expired; get a new one")]
    Expired,
    #[error("the token is not good yet")]
    NotYet,
    #[error("the token is from another issuer")]
    Issuer,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token names no subject")]
    Subject,
}

/// How a token is signed. Each kind of key has one, so that the token cannot choose how its key is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Rs256,
    Es256,
    EdDsa,
    /// With a secret that is shared with its maker.
    Hs256,
}

impl Algorithm {
    /// By the name that it has in tokens and keys.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "RS256" => Some(Self::Rs256),
            "ES256" => Some(Self::Es256),
            "EdDSA" | "Ed25519" => Some(Self::EdDsa),
            "HS256" => Some(Self::Hs256),
            _ => None,
        }
    }
}

/// A public key, as large numbers without leading zeros and as points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicKey {
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

impl PublicKey {
    pub fn algorithm(&self) -> Algorithm {
        match self {
            Self::Rsa { .. } => Algorithm::Rs256,
            Self::P256(_) => Algorithm::Es256,
            Self::Ed25519(_) => Algorithm::EdDsa,
        }
    }

    fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let verified = match self {
            Self::Rsa { modulus, exponent } => RsaPublicKeyComponents { n: modulus, e: exponent }.verify(
                &RSA_PKCS1_2048_8192_SHA256,
                message,
                signature,
            ),
            Self::P256(point) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature),
            Self::Ed25519(point) => UnparsedPublicKey::new(&ED25519, point).verify(message, signature),
        };
        verified.is_ok()
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    /// There at all: names of members that a reader must understand.
    #[serde(default, deserialize_with = "is_there")]
    crit: bool,
}

/// Whether a member is there, whatever it is.
fn is_there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    serde::de::IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// What a token says, as far as it is looked at.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Claims {
    #[serde(default)]
    pub iss: String,
    #[serde(default)]
    pub sub: String,
    #[serde(default)]
    pub aud: Audience,
    /// Seconds since 1970, as the next two.
    pub exp: Option<f64>,
    pub nbf: Option<f64>,
    pub iat: Option<f64>,
}

/// For whom a token is.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Default for Audience {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Audience {
    fn contains(&self, wanted: &str) -> bool {
        match self {
            Self::One(one) => one == wanted,
            Self::Several(several) => several.iter().any(|one| one == wanted),
        }
    }
}

/// Whose tokens are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub issuer: String,
    /// `None`: any.
    pub audience: Option<String>,
}

/// A token of which nothing is known but its form.
pub struct Unverified<'a> {
    pub algorithm: Algorithm,
    /// Name of the key that is said to have signed it.
    pub key_id: Option<String>,
    signed: &'a str,
    claims: &'a str,
    signature: Vec<u8>,
}

impl<'a> Unverified<'a> {
    /// Takes a token apart.
    pub fn read(token: &'a str) -> Result<Self, InvalidToken> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(InvalidToken::TooLarge);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(InvalidToken::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(InvalidToken::Malformed)?;
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidToken::Malformed);
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| InvalidToken::Malformed)?;
        let algorithm = Algorithm::named(&header.alg).ok_or(InvalidToken::Algorithm)?;
        if header.crit {
            return Err(InvalidToken::Critical);
        }
        let is_known = |typ: String| {
            let typ = typ.to_ascii_lowercase();
            TYPES.contains(&typ.strip_prefix("application/").unwrap_or(&typ))
        };
        if !header.typ.is_none_or(is_known) {
            return Err(InvalidToken::Type);
        }
        Ok(Self { algorithm, key_id: header.kid, signed, claims, signature: decode(signature)? })
    }

    /// What it says, if `key` has signed it.
    pub fn verified_by(&self, key: &PublicKey) -> Result<Claims, InvalidToken> {
        if key.algorithm() != self.algorithm {
            return Err(InvalidToken::Algorithm);
        }
        if key.has_signed(self.signed.as_bytes(), &self.signature) {
            self.claims()
        } else {
            Err(InvalidToken::Signature)
        }
    }

    /// The same for one of these secrets.
    pub fn verified_by_secret<'k>(&self, mut secrets: impl Iterator<Item = &'k [u8]>) -> Result<Claims, InvalidToken> {
        if self.algorithm != Algorithm::Hs256 {
            return Err(InvalidToken::Algorithm);
        }
        let has_signed = |secret: &[u8]| {
            let mac = hmac(secret, self.signed);
            mac.is_some_and(|mac| mac.verify_slice(&self.signature).is_ok())
        };
        if secrets.any(has_signed) { self.claims() } else { Err(InvalidToken::Signature) }
    }

    fn claims(&self) -> Result<Claims, InvalidToken> {
        let claims = URL_SAFE_NO_PAD.decode(self.claims).map_err(|_| InvalidToken::Malformed)?;
        serde_json::from_slice(&claims).map_err(|_| InvalidToken::Malformed)
    }
}

/// Whether what a token says makes it good here, `now` seconds after 1970. It is not good a moment after it expires.
pub fn check(claims: &Claims, expected: &Expected, now: f64) -> Result<(), InvalidToken> {
    if claims.exp.ok_or(InvalidToken::NoExpiry)? <= now {
        return Err(InvalidToken::Expired);
    }
    if [claims.nbf, claims.iat].into_iter().flatten().any(|from| from > now + LEEWAY_SECONDS) {
        return Err(InvalidToken::NotYet);
    }
    if claims.iss != expected.issuer {
        return Err(InvalidToken::Issuer);
    }
    if !expected.audience.as_ref().is_none_or(|audience| claims.aud.contains(audience)) {
        return Err(InvalidToken::Audience);
    }
    if claims.sub.is_empty() { Err(InvalidToken::Subject) } else { Ok(()) }
}

/// A token that `secret` has signed.
pub fn signed_with(secret: &[u8], claims: &serde_json::Value) -> Option<String> {
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let signed = format!("{}.{}", encode(br#"{"alg":"HS256","typ":"JWT"}"#), encode(claims.to_string().as_bytes()));
    let signature = hmac(secret, &signed)?.finalize().into_bytes();
    Some(format!("{signed}.{}", encode(&signature)))
}

/// Keys of HMAC may have any length; `None` cannot happen.
fn hmac(secret: &[u8], message: &str) -> Option<Hmac<Sha256>> {
    Some(Hmac::<Sha256>::new_from_slice(secret).ok()?.chain_update(message))
}
