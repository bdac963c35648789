//! Signed requests to a pod's admin port.
//!
//! The operator signs every request with the workload's token, so that the token itself never travels. The signature
//! covers the method, the path with its query, the time, whom the request is for and the hash of the body: a request that
//! was overheard can neither be changed nor sent to another pod, and after [`MAX_CLOCK_SKEW_MS`] it cannot be sent at all.
//!
//! Within that time it can be sent again to the same pod, and that does no harm, so pods remember no requests:
//!
//! * `PUT` of a configuration goes by its revision: an older one is refused, the same one changes nothing.
//! * `POST` of an action goes by its intent id, and names the process that is meant: a process executes each id once, and
//!   one that was started since executes none of the ids before it.
//! * `PUT` of a fault says how much there is of it, not how much more; once more, its lease begins anew.
//! * `GET` changes nothing, and its answer is no secret: the public port gives the same report to everybody.
//!
//! # The string that is signed
//!
//! Six lines, joined by line feeds: [`SCHEME`], the method, the path with its query, the time in milliseconds since the
//! Unix epoch, the audience (see [`audience`]), and the lower-case hex SHA-256 of the body. The signature is its
//! HMAC-SHA-256 under the token, in lower-case hex.

use crate::canonical::hex;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

/// Name of this way of signing. A pod that understands it says so in [`SCHEME_HEADER`].
pub const SCHEME: &str = "hmac-sha256-v1";

/// Of a request: the signature, in lower-case hex.
pub const SIGNATURE_HEADER: &str = "x-resilience-signature";
/// Of a request: when it was signed, in milliseconds since the Unix epoch. Of an answer: the pod's clock.
pub const TIME_HEADER: &str = "x-resilience-time";
/// Of a request: the SHA-256 of its body, in lower-case hex. The head alone can be verified with it, before a body is read.
pub const CONTENT_HASH_HEADER: &str = "x-resilience-content-sha256";
/// Of an answer: [`SCHEME`], if the pod understands signatures. A pod of version 0.1 does not send it.
pub const SCHEME_HEADER: &str = "x-resilience-auth";
/// Of an answer: the audience that the pod wants requests to be signed for.
pub const AUDIENCE_HEADER: &str = "x-resilience-audience";

/// Annotation of a pod that understands signatures; its value is [`SCHEME`]. The operator never sends a plain token to a
/// pod that has it, whatever an answer says.
pub const SCHEME_ANNOTATION: &str = "resilience.ticketwave.io/admin-auth";

/// How far the time of a signature and the pod's clock may be apart, in milliseconds.
pub const MAX_CLOCK_SKEW_MS: i64 = 60 * 1000;

/// Whom requests to a pod are signed for: its uid. A pod that does not know its uid uses its name and the id of its process
/// ([`crate::HealthReport::instance`]), which no other pod has either.
pub fn audience(uid: &str, pod: &str, instance: &str) -> String {
    if uid.is_empty() { format!("{pod}/{instance}") } else { uid.to_owned() }
}

/// SHA-256 of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// The hash of `body`.
    pub fn of(body: &[u8]) -> Self {
        Self(Sha256::digest(body).into())
    }

    fn from_hex(text: &str) -> Option<Self> {
        unhex(text).map(Self)
    }
}

/// Lower-case hex digits.
impl std::fmt::Display for ContentHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// What a signature covers.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    /// Such as `PUT`.
    pub method: &'a str,
    /// The path with its query, as the pod sees it.
    pub path: &'a str,
    /// When it was signed, in milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// Whom it is for; see [`audience`].
    pub audience: &'a str,
    /// The hash of its body; of an empty one if it has none.
    pub content: ContentHash,
}

impl Signed<'_> {
    /// The headers of a request that is signed with `token`.
    pub fn headers(&self, token: &[u8]) -> [(&'static str, String); 3] {
        let signature = self.mac(token).map(|mac| hex(&mac.finalize().into_bytes())).unwrap_or_default();
        [
            (SIGNATURE_HEADER, signature),
            (TIME_HEADER, self.time_ms.to_string()),
            (CONTENT_HASH_HEADER, self.content.to_string()),
        ]
    }

    /// `None` cannot happen: HMAC takes keys of any length.
    fn mac(&self, token: &[u8]) -> Option<Hmac<Sha256>> {
        let Self { method, path, time_ms, audience, content } = self;
        let mut mac = Hmac::<Sha256>::new_from_slice(token).ok()?;
        mac.update(format!("{SCHEME}\n{method}\n{path}\n{time_ms}\n{audience}\n{content}").as_bytes());
        Some(mac)
    }
}

/// A request as it came to a pod.
#[derive(Clone, Copy, Debug)]
pub struct Presented<'a> {
    /// The method.
    pub method: &'a str,
    /// The path with its query.
    pub path: &'a str,
    /// The value of [`SIGNATURE_HEADER`].
    pub signature: &'a str,
    /// The value of [`TIME_HEADER`].
    pub time: &'a str,
    /// The value of [`CONTENT_HASH_HEADER`].
    pub content: &'a str,
}

/// Why a signed request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// A header is missing or cannot be read.
    #[error("{0} is missing or malformed")]
    Malformed(&'static str),
    /// It was signed with another token or for another pod, or it was changed on its way.
    #[error("the signature does not match the request, this pod and the tokens in force")]
    Wrong,
    /// It was signed too long ago, or by a clock that is too far ahead.
    #[error(
        "the request was signed {} s {} this pod's clock, and at most {} s are allowed", .ahead_ms.unsigned_abs() / 1_000,
        if *.ahead_ms > 0 { "ahead of" } else { "behind" }, MAX_CLOCK_SKEW_MS / 1_000
    )]
    ClockSkew {
        /// How far the time of the signature is ahead of the pod's clock, in milliseconds; negative: behind it.
        ahead_ms: i64,
    },
}

impl Presented<'_> {
    /// Verifies the head of a request that is for `audience`, at `now_ms` by the pod's clock. The answer is the hash that
    /// its body must have: the request is verified only when the body was seen to have it.
    ///
    /// The comparison takes the same time wherever the first difference is, and whichever token fits.
    pub fn verify<'t>(
        &self,
        audience: &str,
        tokens: impl IntoIterator<Item = &'t [u8]>,
        now_ms: i64,
    ) -> Result<ContentHash, SignatureError> {
        let signature = unhex(self.signature).ok_or(SignatureError::Malformed(SIGNATURE_HEADER))?;
        let time_ms: i64 = self.time.parse().map_err(|_| SignatureError::Malformed(TIME_HEADER))?;
        let content = ContentHash::from_hex(self.content).ok_or(SignatureError::Malformed(CONTENT_HASH_HEADER))?;
        let signed = Signed { method: self.method, path: self.path, time_ms, audience, content };
        // An empty token is none: anybody could sign with it.
        let tokens = tokens.into_iter().filter(|token| !token.is_empty());
        let fits = |token| signed.mac(token).is_some_and(|mac| mac.verify_slice(&signature).is_ok());
        if !tokens.map(fits).fold(false, |any, one| any | one) {
            return Err(SignatureError::Wrong);
        }
        let ahead_ms = time_ms.saturating_sub(now_ms);
        if ahead_ms.unsigned_abs() > MAX_CLOCK_SKEW_MS.unsigned_abs() {
            return Err(SignatureError::ClockSkew { ahead_ms });
        }
        Ok(content)
    }
}

/// What a pod's answer says about how it wants requests to be signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertised {
    /// Whom requests are to be signed for.
    pub audience: String,
    /// The pod's clock, in milliseconds since the Unix epoch, if it says so.
    pub time_ms: Option<i64>,
}

impl Advertised {
    /// Reads it from the headers of an answer; `None`: the pod does not understand [`SCHEME`].
    pub fn read<'h>(header: impl Fn(&str) -> Option<&'h str>) -> Option<Self> {
        if header(SCHEME_HEADER) != Some(SCHEME) {
            return None;
        }
        let audience = header(AUDIENCE_HEADER)?.to_owned();
        Some(Self { audience, time_ms: header(TIME_HEADER).and_then(|time| time.parse().ok()) })
    }

    /// The headers of an answer that say it.
    pub fn headers(audience: &str, now_ms: i64) -> [(&'static str, String); 3] {
        [(SCHEME_HEADER, SCHEME.to_owned()), (AUDIENCE_HEADER, audience.to_owned()), (TIME_HEADER, now_ms.to_string())]
    }

    /// Whether the audience is one that the pod with this uid and name may have; see [`audience`].
    pub fn is_of(&self, uid: &str, pod: &str) -> bool {
        let instance = self.audience.strip_prefix(pod).and_then(|rest| rest.strip_prefix('/'));
        self.audience == uid || instance.is_some_and(|instance| !instance.is_empty() && !instance.contains('/'))
    }
}

/// The 32 bytes that 64 lower-case hex digits stand for.
fn unhex(text: &str) -> Option<[u8; 32]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    let pairs = text.as_bytes();
    if pairs.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;
    const TOKEN: &[u8] = b"the token in force";
    const BODY: &[u8] = br#"{"intentId":"i"}"#;
    const UID: &str = "5f2c8a3e-0b57-4c61-9d55-0a4f3a1c7b10";

    /// A request, and what the pod that gets it goes by.
    #[derive(Clone)]
    struct Request {
        method: &'static str,
        path: &'static str,
        body: &'static [u8],
        headers: [String; 3],
        audience: &'static str,
        tokens: Vec<&'static [u8]>,
        now_ms: i64,
    }

    impl Request {
        /// A request that is right in every respect.
        fn new() -> Self {
            let (method, path) = ("POST", "/admin/v1/actions?dryRun=false");
            let signed = Signed { method, path, time_ms: NOW, audience: UID, content: ContentHash::of(BODY) };
            let headers = signed.headers(TOKEN).map(|(_, value)| value);
            Self { method, path, body: BODY, headers, audience: UID, tokens: vec![TOKEN, b""], now_ms: NOW }
        }

        fn verify(&self) -> Result<(), SignatureError> {
            let [signature, time, content] = &self.headers;
            let presented = Presented { method: self.method, path: self.path, signature, time, content };
            let content = presented.verify(self.audience, self.tokens.iter().copied(), self.now_ms)?;
            if content == ContentHash::of(self.body) { Ok(()) } else { Err(SignatureError::Wrong) }
        }
    }

    /// What can be wrong with a request, and how it is refused.
    #[rstest::rstest]
    #[case::right(|_: &mut Request| {}, Ok(()))]
    #[case::signed_with_the_previous_token(|request: &mut Request| request.tokens = vec![b"the next one", TOKEN], Ok(()))]
    #[case::method(|request: &mut Request| request.method = "PUT", Err(SignatureError::Wrong))]
    #[case::path(|request: &mut Request| request.path = "/admin/v1/config", Err(SignatureError::Wrong))]
    #[case::query(|request: &mut Request| request.path = "/admin/v1/actions?dryRun=true", Err(SignatureError::Wrong))]
    #[case::body(|request: &mut Request| request.body = br#"{"intentId":"j"}"#, Err(SignatureError::Wrong))]
    #[case::body_and_its_hash(
        |request: &mut Request| {
            request.body = b"{}";
            request.headers[2] = ContentHash::of(b"{}").to_string();
        },
        Err(SignatureError::Wrong)
    )]
    #[case::body_left_out(|request: &mut Request| request.body = b"", Err(SignatureError::Wrong))]
    #[case::time(|request: &mut Request| request.headers[1] = (NOW + 1).to_string(), Err(SignatureError::Wrong))]
    #[case::replayed_to_another_pod(
        |request: &mut Request| request.audience = "0d0c8a3e-0b57-4c61-9d55-0a4f3a1c7b10",
        Err(SignatureError::Wrong)
    )]
    #[case::another_token(|request: &mut Request| request.tokens = vec![b"another token"], Err(SignatureError::Wrong))]
    #[case::no_token(|request: &mut Request| request.tokens = vec![b"", b""], Err(SignatureError::Wrong))]
    #[case::one_digit(
        |request: &mut Request| request.headers[0].replace_range(63.., if request.headers[0].ends_with('0') { "1" } else { "0" }),
        Err(SignatureError::Wrong)
    )]
    #[case::shortened(
        |request: &mut Request| request.headers[0].truncate(62),
        Err(SignatureError::Malformed(SIGNATURE_HEADER))
    )]
    #[case::upper_case(
        |request: &mut Request| request.headers[0] = "A".repeat(64),
        Err(SignatureError::Malformed(SIGNATURE_HEADER))
    )]
    #[case::not_ascii(
        |request: &mut Request| request.headers[0] = "é".repeat(32),
        Err(SignatureError::Malformed(SIGNATURE_HEADER))
    )]
    #[case::no_signature(|request: &mut Request| request.headers[0].clear(), Err(SignatureError::Malformed(SIGNATURE_HEADER)))]
    #[case::no_time(|request: &mut Request| request.headers[1].clear(), Err(SignatureError::Malformed(TIME_HEADER)))]
    #[case::no_hash(|request: &mut Request| request.headers[2].clear(), Err(SignatureError::Malformed(CONTENT_HASH_HEADER)))]
    #[case::as_late_as_may_be(|request: &mut Request| request.now_ms = NOW + MAX_CLOCK_SKEW_MS, Ok(()))]
    #[case::as_early_as_may_be(|request: &mut Request| request.now_ms = NOW - MAX_CLOCK_SKEW_MS, Ok(()))]
    #[case::stale(
        |request: &mut Request| request.now_ms = NOW + MAX_CLOCK_SKEW_MS + 1,
        Err(SignatureError::ClockSkew { ahead_ms: -60_001 })
    )]
    #[case::from_the_future(
        |request: &mut Request| request.now_ms = NOW - MAX_CLOCK_SKEW_MS - 1,
        Err(SignatureError::ClockSkew { ahead_ms: 60_001 })
    )]
    fn verifies(#[case] change: fn(&mut Request), #[case] expected: Result<(), SignatureError>) {
        let mut request = Request::new();
        change(&mut request);
        assert_eq!(request.verify(), expected);
    }

    /// Anybody can sign with an empty token, so it must never be one that is in force.
    #[test]
    fn an_empty_token_opens_nothing() {
        let signed = Signed { method: "GET", path: "/", time_ms: NOW, audience: UID, content: ContentHash::of(b"") };
        let [signature, time, content] = signed.headers(b"").map(|(_, value)| value);
        let presented = Presented { method: "GET", path: "/", signature: &signature, time: &time, content: &content };
        assert_eq!(presented.verify(UID, [&b""[..]], NOW), Err(SignatureError::Wrong));
    }

    /// The extremes of the time arithmetic.
    #[rstest::rstest]
    #[case(i64::MIN, i64::MAX)]
    #[case(i64::MAX, i64::MIN)]
    #[case(i64::MIN, NOW)]
    fn times_never_overflow(#[case] time_ms: i64, #[case] now_ms: i64) {
        let signed = Signed { method: "GET", path: "/", time_ms, audience: UID, content: ContentHash::of(b"") };
        let [signature, time, content] = signed.headers(TOKEN).map(|(_, value)| value);
        let presented = Presented { method: "GET", path: "/", signature: &signature, time: &time, content: &content };
        assert!(matches!(presented.verify(UID, [TOKEN], now_ms), Err(SignatureError::ClockSkew { .. })));
    }

    /// The string is part of the contract: another implementation must come to the same signature. Made with OpenSSL.
    #[test]
    fn the_signature_is_the_documented_one() {
        let signed = Signed {
            method: "PUT",
            path: "/admin/v1/config",
            time_ms: 1_800_000_000_000,
            audience: UID,
            content: ContentHash::of(b"{}"),
        };
        let [signature, time, content] = signed.headers(b"secret");
        assert_eq!(content.1, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
        assert_eq!(time.1, "1800000000000");
        assert_eq!(signature.1, "5e8d50b67a69dfb1967384431bcd24a4cf41fd733e89ebff5c11fabfc535ea32");
    }

    #[rstest::rstest]
    #[case::uid(UID, true)]
    #[case::name_and_process("booking-1/00ff", true)]
    #[case::another_uid("0d0c8a3e-0b57-4c61-9d55-0a4f3a1c7b10", false)]
    #[case::another_name("booking-2/00ff", false)]
    #[case::longer_name("booking-11/00ff", false)]
    #[case::name_alone("booking-1", false)]
    #[case::no_process("booking-1/", false)]
    #[case::more("booking-1/00ff/x", false)]
    #[case::nothing("", false)]
    fn audiences_of_a_pod(#[case] advertised: &str, #[case] expected: bool) {
        let advertised = Advertised { audience: advertised.into(), time_ms: None };
        assert_eq!(advertised.is_of(UID, "booking-1"), expected);
    }

    #[test]
    fn what_a_pod_advertises_is_read_back() {
        let headers = Advertised::headers(&audience("", "booking-1", "00ff"), NOW);
        let find = |name: &str| headers.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
        let read = Advertised { audience: "booking-1/00ff".into(), time_ms: Some(NOW) };
        assert_eq!(Advertised::read(find), Some(read));
        assert_eq!(Advertised::read(|_| None), None, "a pod of version 0.1");
        assert_eq!(Advertised::read(|name| if name == SCHEME_HEADER { Some("v9") } else { find(name) }), None);
        assert_eq!(audience(UID, "booking-1", "00ff"), UID);
    }
}
