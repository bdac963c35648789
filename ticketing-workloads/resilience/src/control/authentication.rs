//! Who may use the admin port: a caller that signs its requests with the workload's token, and an operator of version 0.1,
//! which sends the token itself.

use crate::control::token::{TokenVerdict, Tokens};
use axum::http::{HeaderMap, Method, Uri};
use contract::admin::TOKEN_HEADER;
use contract::signing::{
    CONTENT_HASH_HEADER, ContentHash, Presented, SIGNATURE_HEADER, SignatureError, TIME_HEADER, audience,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Authenticates requests to the admin port.
pub struct Authentication {
    tokens: Arc<Tokens>,
    audience: String,
    /// Whether this process has received a signed request. Then the operator can sign, and only another party would send a
    /// plain token; so this stays true for the life of the process.
    signed: AtomicBool,
}

/// A request that may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authenticated {
    /// It is signed, and its body must have this hash.
    Signed(ContentHash),
    /// It carries the plain token.
    PlainToken,
}

impl Authenticated {
    /// Whether a body is the one that was signed.
    pub fn covers(self, body: &[u8]) -> bool {
        match self {
            Self::Signed(content) => content == ContentHash::of(body),
            Self::PlainToken => true,
        }
    }
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// This pod has no token yet.
    #[error("no token is mounted in this pod yet; it refuses every call until one is")]
    NoToken,
    /// It carries neither a signature nor a token, or one that is not in force.
    #[error(
        "the request has no {SIGNATURE_HEADER}, and its {TOKEN_HEADER} is missing or holds a token that is not in force in this pod"
    )]
    WrongToken,
    /// It carries a plain token, and this process has received signed requests.
    #[error("this pod has received signed requests, so it accepts no plain token until it is restarted")]
    PlainToken,
    /// Its signature is not good.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

impl Refusal {
    /// The word for programs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoToken => "NoToken",
            Self::WrongToken => "WrongToken",
            Self::PlainToken => "PlainToken",
            Self::Signature(SignatureError::Malformed(_)) => "MalformedSignature",
            Self::Signature(SignatureError::Wrong) => "WrongSignature",
            Self::Signature(SignatureError::ClockSkew { .. }) => "ClockSkew",
        }
    }
}

impl Authentication {
    /// Accepts requests that are signed with one of `tokens` for the pod with this uid (empty: it is not known), this name
    /// and this process.
    pub fn new(tokens: Arc<Tokens>, pod_uid: &str, pod: &str, instance: &str) -> Self {
        Self { tokens, audience: audience(pod_uid, pod, instance), signed: AtomicBool::new(false) }
    }

    /// Whom requests must be signed for.
    pub fn audience(&self) -> &str {
        &self.audience
    }

    /// The tokens that requests are verified with.
    pub fn tokens(&self) -> &Arc<Tokens> {
        &self.tokens
    }

    /// Authenticates a request by its head, at `now_ms` by the wall clock.
    pub fn check(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        now_ms: i64,
    ) -> Result<Authenticated, Refusal> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if !self.tokens.any() {
            return Err(Refusal::NoToken);
        }
        if headers.contains_key(SIGNATURE_HEADER) {
            let presented = Presented {
                method: method.as_str(),
                path: uri.path_and_query().map_or("/", |path| path.as_str()),
                signature: text(SIGNATURE_HEADER),
                time: text(TIME_HEADER),
                content: text(CONTENT_HASH_HEADER),
            };
            let content = self.tokens.verify_signed(presented, &self.audience, now_ms)?;
            if !self.signed.swap(true, Ordering::AcqRel) {
                tracing::info!("received a signed request; plain tokens are refused from now on");
            }
            return Ok(Authenticated::Signed(content));
        }
        let token = headers.get(TOKEN_HEADER).map(axum::http::HeaderValue::as_bytes).unwrap_or_default();
        match self.tokens.verify(token) {
            TokenVerdict::Valid if self.signed.load(Ordering::Acquire) => Err(Refusal::PlainToken),
            TokenVerdict::Valid => Ok(Authenticated::PlainToken),
            TokenVerdict::Invalid => Err(Refusal::WrongToken),
            TokenVerdict::NoToken => Err(Refusal::NoToken),
        }
    }
}
