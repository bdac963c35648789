//! Requests that a page of another site makes a browser send. The browser leaves our cookie out of them (`SameSite=Lax`), so a
//! form elsewhere could order in a new session, whose cookie would take the place of the buyer's own.

use axum::http::{HeaderMap, HeaderName, header};

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// What a form can send without asking us first.
const OF_FORMS: [&str; 3] = ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"];

/// Whether a page of another site may be behind a request that changes something. Programs, which have neither of the
/// headers, are not.
pub fn is_cross_site(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get(FETCH_SITE) {
        return site == "cross-site";
    }
    // Browsers of before 2023 say only where a page is from. What no form can send they would ask us about first.
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let from = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    let is_own = matches!((from, host), (Some(from), Some(host)) if from.eq_ignore_ascii_case(host));
    !is_own && may_be_a_form(headers)
}

fn may_be_a_form(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else { return true };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    OF_FORMS.contains(&kind.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[rstest::rstest]
    #[case::a_program(&[("content-type", "application/x-www-form-urlencoded")], false)]
    #[case::our_page(&[("sec-fetch-site", "same-origin"), ("origin", "https://other")], false)]
    #[case::typed_by_hand(&[("sec-fetch-site", "none")], false)]
    #[case::another_page(&[("sec-fetch-site", "cross-site"), ("content-type", "application/json")], true)]
    #[case::an_old_browser(&[("origin", "https://tickets.example"), ("content-type", "text/plain")], false)]
    #[case::an_old_browser_elsewhere(&[("origin", "https://evil.example"), ("content-type", "text/plain; charset=x")], true)]
    #[case::a_form_without_a_body(&[("origin", "https://evil.example")], true)]
    #[case::from_nowhere(&[("origin", "null"), ("content-type", "multipart/form-data; boundary=x")], true)]
    #[case::what_no_form_sends(&[("origin", "https://app.example"), ("content-type", "application/json")], false)]
    fn another_site(#[case] with: &[(&'static str, &str)], #[case] expected: bool) {
        let mut headers = HeaderMap::from_iter([(header::HOST, HeaderValue::from_static("tickets.example"))]);
        for (name, value) in with {
            headers.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        assert_eq!(is_cross_site(&headers), expected);
    }
}
