//! Who asks for a booking or for seats, by the headers that the gateway sets.
//!
//! A booking belongs to the buyer that made it. To everybody else it is as if it were not there. What somebody booked before
//! its login is its own after it, for as long as the gateway names that session; a reservation that is bought then goes over to
//! the login. Bookings that are nobody's, of version 0.1 or made inside the cluster, are found by everybody who knows their id.
//!
//! A request without these headers comes from inside the cluster, and is allowed everything.

use crate::buyer::{BUYER, BUYER_NETWORK, BUYER_SESSION, Buyer};
use axum::http::HeaderMap;

/// Longest word for a network, in bytes.
const MAX_NETWORK_BYTES: usize = 64;

/// The headers name somebody in words that are not ours. Taken for a request from inside, it would be allowed everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the headers that say who the buyer is cannot be read; only the gateway may set them")]
pub struct UnknownAsker;

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asker {
    owner: Option<String>,
    owners: Option<Vec<String>>,
    network: Option<String>,
    has_login: bool,
}

impl Asker {
    /// Reads the headers.
    pub fn of(headers: &HeaderMap) -> Result<Self, UnknownAsker> {
        if !headers.contains_key(BUYER) {
            return Ok(Self::default());
        }
        let buyer = Buyer::of(headers, &BUYER).ok_or(UnknownAsker)?;
        let has_login = matches!(buyer, Buyer::User(_));
        let mut owners = vec![buyer.to_string()];
        if has_login && headers.contains_key(BUYER_SESSION) {
            match Buyer::of(headers, &BUYER_SESSION) {
                Some(session @ Buyer::Session(_)) => owners.push(session.to_string()),
                _ => return Err(UnknownAsker),
            }
        }
        // They are locked in this order, in which a session comes before the login, as it does for all.
        owners.sort_unstable();
        let network = match headers.get(BUYER_NETWORK) {
            Some(value) if !has_login => Some(network(value.to_str().ok()).ok_or(UnknownAsker)?),
            _ => None,
        };
        Ok(Self { owner: Some(buyer.to_string()), owners: Some(owners), network, has_login })
    }

    /// Whose a booking is that is made for it; nobody's from inside.
    pub fn owner(&self) -> Option<&str> {
        self.owner.as_deref()
    }

    /// Whose bookings it may see and change; everybody's if absent.
    pub fn owners(&self) -> Option<&[String]> {
        self.owners.as_deref()
    }

    /// Where it comes from, if it has no login.
    pub fn network(&self) -> Option<&str> {
        self.network.as_deref()
    }

    /// Whether somebody vouches for who it is.
    pub fn has_login(&self) -> bool {
        self.has_login
    }

    /// What an order with this idempotency key may be stored under: the key as it is, or, where somebody else has taken that,
    /// behind the name of its owner. The key as it is comes first, because pods of version 0.1 know no other.
    pub fn stored_keys(&self, key: &str) -> Vec<String> {
        let scoped = self.owners.iter().flatten().map(|owner| scoped(owner, key));
        std::iter::once(key.to_owned()).chain(scoped).collect()
    }

    /// What an order with a key is stored under that somebody else has taken.
    pub fn own_key(&self, key: &str) -> String {
        self.owner().map_or_else(|| key.to_owned(), |owner| scoped(owner, key))
    }
}

fn scoped(owner: &str, key: &str) -> String {
    format!("{owner} {key}")
}

fn network(value: Option<&str>) -> Option<String> {
    let is_word = |text: &&str| {
        let is_of_word = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=+/.:".contains(&byte);
        (1..=MAX_NETWORK_BYTES).contains(&text.len()) && text.bytes().all(is_of_word)
    };
    value.filter(is_word).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};

    fn asker(headers: &[(&HeaderName, &str)]) -> Result<Asker, UnknownAsker> {
        let all = headers.iter().map(|(name, value)| ((*name).clone(), HeaderValue::from_str(value).unwrap()));
        Asker::of(&all.collect())
    }

    const SESSION: &str = "session:00000000-0000-0000-0000-000000000007";

    fn ann() -> String {
        Buyer::user("https://id.example", "ann").to_string()
    }

    #[test]
    fn who_has_logged_in_owns_what_its_session_booked() {
        let user = asker(&[(&BUYER, &ann()), (&BUYER_SESSION, SESSION), (&BUYER_NETWORK, "n")]).unwrap();
        assert_eq!(user.owner(), Some(ann().as_str()));
        assert_eq!(user.owners().unwrap(), [SESSION.to_owned(), ann()]);
        assert_eq!((user.network(), user.has_login()), (None, true), "a login is no stranger of a network");
        assert_eq!(user.stored_keys("k"), ["k".to_owned(), format!("{SESSION} k"), format!("{} k", ann())]);
        assert_eq!(user.own_key("k"), format!("{} k", ann()));
    }

    #[test]
    fn a_session_owns_what_it_booked_and_nothing_else() {
        let other = "session:00000000-0000-0000-0000-000000000008";
        let session = asker(&[(&BUYER, SESSION), (&BUYER_SESSION, other), (&BUYER_NETWORK, "n")]).unwrap();
        assert_eq!((session.owners().unwrap(), session.network()), ([SESSION.to_owned()].as_slice(), Some("n")));
    }

    #[test]
    fn a_request_from_inside_is_nobodys() {
        let inside = asker(&[(&BUYER_SESSION, SESSION), (&BUYER_NETWORK, "n")]).unwrap();
        assert_eq!(inside, Asker::default());
        assert_eq!((inside.stored_keys("k"), inside.own_key("k")), (vec!["k".to_owned()], "k".to_owned()));
    }

    #[test]
    fn words_that_are_not_ours_are_not_taken_for_a_request_from_inside() {
        let long = "n".repeat(65);
        for headers in [
            [(&BUYER, ""), (&BUYER_NETWORK, "n")],
            [(&BUYER, "admin:x"), (&BUYER_NETWORK, "n")],
            [(&BUYER, SESSION), (&BUYER_NETWORK, "")],
            [(&BUYER, SESSION), (&BUYER_NETWORK, "a b")],
            [(&BUYER, SESSION), (&BUYER_NETWORK, &long)],
            [(&BUYER, &ann()), (&BUYER_SESSION, &ann())],
            [(&BUYER, &ann()), (&BUYER_SESSION, "7")],
        ] {
            assert_eq!(asker(&headers), Err(UnknownAsker), "{headers:?}");
        }
    }
}
