//! Which web pages may call: the headers that a browser wants to see.

use http::{
    HeaderMap, HeaderValue,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ORIGIN, VARY,
    },
};

/// Headers that a page may send.
const SENT: HeaderValue =
    HeaderValue::from_static("authorization, cache-control, content-type, if-none-match, last-event-id, x-api-key");
/// Headers that a page may read. Without `ETag` a provider asks for everything again and again.
const READ: HeaderValue = HeaderValue::from_static("etag, retry-after, x-resilience-stale");
/// How long a browser may remember what it was told, in seconds.
const REMEMBERED: HeaderValue = HeaderValue::from_static("600");

/// The origins that may call.
#[derive(Clone, Debug, Default)]
pub struct Cors(Vec<String>);

impl Cors {
    /// These origins; `*`: all.
    pub fn new(origins: &[String]) -> Self {
        let origins = origins.iter().map(|origin| origin.trim().trim_end_matches('/').to_ascii_lowercase());
        Self(origins.filter(|origin| !origin.is_empty()).collect())
    }

    /// The headers of an answer to a request with these headers.
    pub fn answer(&self, request: &HeaderMap, answer: &mut HeaderMap) {
        if self.0.is_empty() {
            return;
        }
        // Caches must not give one page the answer for another.
        answer.append(VARY, HeaderValue::from_static("origin"));
        let Some(origin) = request.get(ORIGIN) else { return };
        let text = origin.to_str().unwrap_or_default();
        if self.0.iter().any(|known| known == "*" || known.eq_ignore_ascii_case(text)) {
            answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, READ);
        }
    }

    /// Besides, those of an answer to a browser that asks before it calls.
    pub fn answer_preflight(&self, request: &HeaderMap, answer: &mut HeaderMap) {
        self.answer(request, answer);
        if answer.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            answer.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
            answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, SENT);
            answer.insert(ACCESS_CONTROL_MAX_AGE, REMEMBERED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(&[], Some("https://shop.example"), false)]
    #[case(&["https://shop.example/"], Some("https://shop.example"), true)]
    #[case(&["https://a.example", " https://Shop.example"], Some("https://shop.example"), true)]
    #[case(&["https://shop.example"], Some("https://shop.example.evil"), false)]
    #[case(&["https://shop.example"], Some("http://shop.example"), false)]
    #[case(&["https://shop.example"], None, false)]
    #[case(&["*"], Some("null"), true)]
    #[case(&[""], Some(""), false)]
    fn origins(#[case] allowed: &[&str], #[case] origin: Option<&str>, #[case] expected: bool) {
        let cors = Cors::new(&allowed.iter().map(|&origin| origin.to_owned()).collect::<Vec<_>>());
        let mut request = HeaderMap::new();
        if let Some(origin) = origin {
            request.insert(ORIGIN, origin.parse().unwrap());
        }
        let (mut answer, mut preflight) = (HeaderMap::new(), HeaderMap::new());
        cors.answer(&request, &mut answer);
        cors.answer_preflight(&request, &mut preflight);
        let shown = answer.get(ACCESS_CONTROL_ALLOW_ORIGIN).map(|value| value.to_str().unwrap());
        assert_eq!(shown, origin.filter(|_| expected));
        assert_eq!(preflight.contains_key(ACCESS_CONTROL_ALLOW_HEADERS), expected);
        assert!(answer.get(ACCESS_CONTROL_EXPOSE_HEADERS).is_none_or(|value| value.to_str().unwrap().contains("etag")));
    }
}
