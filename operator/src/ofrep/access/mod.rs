//! Who may read the flags of a namespace: an account that RBAC lets get its FeatureFlags, or the holder of a static token.

pub mod reviews;
pub mod static_tokens;
pub mod token_file;
pub mod verdicts;

use super::rate::Rates;
use http::{HeaderMap, HeaderName, header::AUTHORIZATION};
use reviews::Reviews;
use sha2::{Digest as _, Sha256};
use static_tokens::StaticTokens;
use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};
use tokio::time::Instant;
use verdicts::Verdict;

/// The hash of a token. Nothing else of it is kept.
pub type Digest = [u8; 32];

/// Longest token that is looked at, in bytes.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How often a second, from one address, the API server is asked about tokens that are not known.
const REVIEWS_PER_SECOND: u32 = 10;
/// Most addresses that are remembered for that.
const MAX_ADDRESSES: usize = 4096;

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No token.
    #[error("send a token: the header Authorization: Bearer <token>, or X-API-Key: <token> for a static one")]
    NoToken,
    /// A token that nobody knows.
    #[error("the token is not valid, or has expired")]
    InvalidToken,
    /// A token that does not reach so far.
    #[error("{0}")]
    Forbidden(String),
    /// Too many unknown tokens from there.
    #[error("too many unknown tokens from this address")]
    TooMany(Duration),
    /// The API server cannot be asked.
    #[error("tokens cannot be reviewed now: {0}")]
    Unavailable(String),
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The hash of its token.
    pub digest: Digest,
    /// Whether that is a static one.
    pub is_static: bool,
}

/// The headers that hold a token, and nothing else of a request.
pub fn credentials(headers: &HeaderMap) -> HeaderMap {
    let names = [AUTHORIZATION, HeaderName::from_static("x-api-key")];
    names.into_iter().filter_map(|name| headers.get(&name).cloned().map(|value| (name, value))).collect()
}

/// Decides who may read what.
pub struct Access {
    static_tokens: RwLock<Arc<StaticTokens>>,
    reviews: Reviews,
    addresses: Rates<IpAddr>,
}

impl Access {
    /// Decides by these reviews; there are no static tokens yet.
    pub fn new(reviews: Reviews) -> Self {
        Self { static_tokens: RwLock::default(), reviews, addresses: Rates::new(REVIEWS_PER_SECOND, MAX_ADDRESSES) }
    }

    /// Puts others in place of the static tokens.
    pub fn set_static_tokens(&self, tokens: StaticTokens) {
        *self.static_tokens.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(tokens);
    }

    /// The static tokens as they are now.
    pub fn static_tokens(&self) -> Arc<StaticTokens> {
        Arc::clone(&self.static_tokens.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Who calls, if it may read the flags of `namespace`.
    pub async fn check(&self, headers: &HeaderMap, from: IpAddr, namespace: &str) -> Result<Caller, Refused> {
        self.decide(headers, Some(from), namespace).await
    }

    /// The same about a caller that was let in before. Its token is none that somebody has invented, so what its address asks for
    /// besides is left to others there.
    pub async fn check_again(&self, headers: &HeaderMap, namespace: &str) -> Result<Caller, Refused> {
        self.decide(headers, None, namespace).await
    }

    async fn decide(&self, headers: &HeaderMap, from: Option<IpAddr>, namespace: &str) -> Result<Caller, Refused> {
        let Credential { token, may_be_reviewed } = Credential::of(headers).ok_or(Refused::NoToken)?;
        let digest = Sha256::digest(token).into();
        if let Some(known) = self.static_tokens().find(&digest) {
            return if known.reaches(namespace) {
                Ok(Caller { digest, is_static: true })
            } else {
                Err(Refused::Forbidden(format!("the token {} is not for the namespace {namespace}", known.name())))
            };
        }
        if !may_be_reviewed {
            return Err(Refused::InvalidToken);
        }
        let verdict = if let Some(known) = self.reviews.known(&digest, namespace, Instant::now()) {
            known
        } else {
            // A token is free to invent, an address is not.
            if let Some(from) = from {
                self.addresses.take(network(from), Instant::now()).map_err(Refused::TooMany)?;
            }
            self.reviews.ask(token, &digest, namespace).await?
        };
        match verdict {
            Verdict::Allowed => Ok(Caller { digest, is_static: false }),
            Verdict::Forbidden(user) => Err(Refused::Forbidden(format!(
                "{user} may not get featureflags.resilience.ticketwave.io in the namespace {namespace}: bind a Role that allows it, such as the ClusterRole view"
            ))),
            Verdict::Unauthenticated => Err(Refused::InvalidToken),
        }
    }
}

/// A token as it was sent.
struct Credential<'a> {
    token: &'a str,
    may_be_reviewed: bool,
}

impl<'a> Credential<'a> {
    fn of(headers: &'a HeaderMap) -> Option<Self> {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let bearer = text(AUTHORIZATION.as_str()).and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let (token, may_be_reviewed) = match (bearer, text("x-api-key")) {
            (Some(token), _) => (token, true),
            (None, Some(key)) => (key.trim(), false),
            (None, None) => return None,
        };
        (1..=MAX_TOKEN_BYTES).contains(&token.len()).then_some(Self { token, may_be_reviewed })
    }
}

/// Who owns an address of IPv6 owns at least its network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        four @ IpAddr::V4(_) => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| ((*name).parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[rstest::rstest]
    #[case(&[("authorization", "Bearer abc")], Some(("abc", true)))]
    #[case(&[("authorization", "bearer  abc ")], Some(("abc", true)))]
    #[case(&[("x-api-key", "abc")], Some(("abc", false)))]
    #[case(&[("authorization", "Bearer abc"), ("x-api-key", "def")], Some(("abc", true)))]
    #[case(&[("authorization", "Basic abc"), ("x-api-key", "def")], Some(("def", false)))]
    #[case(&[("authorization", "Basic abc")], None)]
    #[case(&[("authorization", "Bearer ")], None)]
    #[case(&[], None)]
    fn credentials(#[case] pairs: &[(&'static str, &str)], #[case] expected: Option<(&str, bool)>) {
        let headers = headers(pairs);
        let found = Credential::of(&headers).map(|found| (found.token, found.may_be_reviewed));
        assert_eq!(found, expected);
    }

    #[test]
    fn only_tokens_are_kept_of_a_request() {
        let kept =
            super::credentials(&headers(&[("authorization", "Bearer abc"), ("cookie", "a=b"), ("x-api-key", "def")]));
        assert_eq!(kept, headers(&[("authorization", "Bearer abc"), ("x-api-key", "def")]));
        assert!(super::credentials(&headers(&[("cookie", "a=b")])).is_empty());
    }

    #[test]
    fn a_token_of_any_length_is_not_hashed() {
        let long = format!("Bearer {}", "x".repeat(MAX_TOKEN_BYTES + 1));
        assert!(Credential::of(&headers(&[("authorization", &long)])).is_none());
    }

    #[rstest::rstest]
    #[case("10.0.0.7", "10.0.0.7")]
    #[case("::ffff:10.0.0.7", "10.0.0.7")]
    #[case("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::")]
    fn networks(#[case] address: &str, #[case] expected: &str) {
        assert_eq!(network(address.parse().unwrap()), expected.parse::<IpAddr>().unwrap());
    }
}
