//! What a request carries of a place: its text, and who sends it.

use crate::buyer::{BUYER, BUYER_SESSION, Buyer};
use axum::http::{HeaderMap, HeaderName, header};

/// Header with a place, in requests and answers.
pub const PLACE: HeaderName = HeaderName::from_static("x-place");
/// The same as a cookie.
pub const COOKIE: &str = "ticketwave-place";

/// For whom a place holds, the first one when it is given: the buyer as the gateway knows him, and the session that he had before
/// he logged in. Where the gateway knows nobody, a place is good for everybody who has it.
pub fn holders(headers: &HeaderMap) -> Vec<String> {
    let known = [BUYER, BUYER_SESSION].into_iter().filter_map(|name| Buyer::of(headers, &name));
    let known: Vec<_> = known.map(|buyer| buyer.to_string()).collect();
    if known.is_empty() { vec![String::new()] } else { known }
}

/// Texts that may be the buyer's place.
pub fn places(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let own = headers.get(PLACE).into_iter().filter_map(|value| value.to_str().ok());
    let cookies = headers.get_all(header::COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let cookies = cookies.flat_map(|text| text.split(';')).filter_map(|one| one.trim().split_once('='));
    // Whatever somebody sends: each of them costs a signature.
    own.chain(cookies.filter(|(name, _)| *name == COOKIE).map(|(_, value)| value)).take(3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use uuid::Uuid;

    #[test]
    fn a_place_is_taken_from_the_header_or_the_cookie_and_few_are_looked_at() {
        let headers = |pairs: &[(&str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
            }
            headers
        };
        let found = |pairs: &[(&str, &str)]| places(&headers(pairs)).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(found(&[("x-place", "a"), ("cookie", "x=1; ticketwave-place=b")]), ["a", "b"]);
        assert_eq!(found(&[("cookie", "other=ticketwave-place; ticketwave-placed=c; =; ticketwave-place")]), [""; 0]);
        assert_eq!(found(&[("cookie", &"ticketwave-place=b;".repeat(500))]).len(), 3);
    }

    #[test]
    fn a_place_belongs_to_the_buyer_where_there_is_one() {
        let mut headers = HeaderMap::new();
        assert_eq!(holders(&headers), [""]);
        let session = Buyer::Session(Uuid::from_u128(7));
        headers.insert(BUYER, session.to_header().unwrap());
        assert_eq!(holders(&headers), [session.to_string()]);
        let user = Buyer::user("https://id.example", "ann");
        headers.insert(BUYER, user.to_header().unwrap());
        headers.insert(BUYER_SESSION, session.to_header().unwrap());
        assert_eq!(holders(&headers), [user.to_string(), session.to_string()]);
    }
}
