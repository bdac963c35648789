//! Who a buyer is, as the gateway says it to the services behind it.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use std::fmt;
use uuid::Uuid;

/// Who asks: a [`Buyer`] in words. The gateway sets it for each request; the edge takes it from nobody.
pub const BUYER: HeaderName = HeaderName::from_static("x-buyer");
/// The session that somebody who has logged in had before, in words: what was booked in it is theirs, too.
pub const BUYER_SESSION: HeaderName = HeaderName::from_static("x-buyer-session");
/// Where somebody without a login comes from, as a hash: who takes one session after the other stays within the limits of
/// one network.
pub const BUYER_NETWORK: HeaderName = HeaderName::from_static("x-buyer-network");

/// One buyer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Buyer {
    /// Somebody with a token: a hash of its issuer and subject, so that nothing personal is stored.
    User(String),
    /// Somebody without one.
    Session(Uuid),
}

impl Buyer {
    /// The holder of a token of `issuer` for `subject`.
    pub fn user(issuer: &str, subject: &str) -> Self {
        let mut hash = Sha256::new();
        // With its length, so that no other pair of texts has the same hash.
        hash.update((issuer.len() as u64).to_be_bytes());
        hash.update(issuer);
        hash.update(subject);
        Self::User(URL_SAFE_NO_PAD.encode(hash.finalize()))
    }

    /// Reads what [`Buyer`] prints.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("user", hash) if URL_SAFE_NO_PAD.decode(hash).is_ok_and(|bytes| bytes.len() == 32) => {
                Some(Self::User(hash.to_owned()))
            }
            ("session", id) => Uuid::parse_str(id).ok().map(Self::Session),
            _ => None,
        }
    }

    /// The buyer that `name` of the headers names.
    pub fn of(headers: &HeaderMap, name: &HeaderName) -> Option<Self> {
        headers.get(name).and_then(|value| Self::parse(value.to_str().ok()?))
    }

    /// As the value of a header.
    pub fn to_header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.to_string()).ok()
    }
}

impl fmt::Display for Buyer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(hash) => write!(formatter, "user:{hash}"),
            Self::Session(id) => write!(formatter, "session:{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        for buyer in [Buyer::user("https://id.example", "ann"), Buyer::Session(Uuid::from_u128(7))] {
            assert_eq!(Buyer::parse(&buyer.to_string()), Some(buyer));
        }
        for other in ["", "ann", "user:", "user:ann", "session:ann", "admin:x", "user:a b"] {
            assert_eq!(Buyer::parse(other), None, "{other}");
        }
    }

    #[test]
    fn one_subject_of_two_issuers_is_two_buyers() {
        assert_ne!(Buyer::user("https://a", "bc"), Buyer::user("https://ab", "c"));
        assert_ne!(Buyer::user("https://a.example", "ann"), Buyer::user("https://b.example", "ann"));
    }
}
