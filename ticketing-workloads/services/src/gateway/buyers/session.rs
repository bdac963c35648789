//! Sessions of buyers without a login: a cookie with a random id and our signature. Nothing of them is kept here.

use super::key_file::Keys;
use axum::http::{HeaderMap, HeaderValue, header};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use uuid::Uuid;

/// Name of the cookie.
pub const COOKIE: &str = "ticketwave-session";
/// How long a browser keeps it.
const MAX_AGE_SECONDS: u32 = 30 * 24 * 3_600;
/// Cookies of this name that are looked at: a browser may send one for each path and domain.
const MAX_COOKIES: usize = 4;

/// What a key is used for: what it signs for one use is good for no other.
#[derive(Clone, Copy)]
pub enum Use {
    Session,
    Network,
    FirstOrder,
}

/// What `key` makes of `text` for this use.
pub fn keyed_hash(key: &[u8], of: Use, text: &[u8]) -> [u8; 32] {
    mac(key, of, text).map_or([0; 32], |mac| mac.finalize().into_bytes().into())
}

/// Keys of HMAC may have any length; `None` cannot happen.
fn mac(key: &[u8], of: Use, text: &[u8]) -> Option<Hmac<Sha256>> {
    let of: &[u8] = match of {
        Use::Session => b"session\0",
        Use::Network => b"network\0",
        Use::FirstOrder => b"first order\0",
    };
    Some(Hmac::<Sha256>::new_from_slice(key).ok()?.chain_update(of).chain_update(text))
}

/// The value of the cookie of a session.
pub fn value(id: Uuid, keys: &Keys) -> String {
    let signature = keyed_hash(keys.first(), Use::Session, id.as_bytes());
    format!("{}.{}", id.simple(), URL_SAFE_NO_PAD.encode(signature))
}

/// The session that a value of the cookie stands for, if we have signed it.
fn verify(value: &str, keys: &Keys) -> Option<Uuid> {
    let (id, signature) = value.split_once('.')?;
    let id = Uuid::try_parse(id).ok()?;
    let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
    let signed_by =
        |key: &[u8]| mac(key, Use::Session, id.as_bytes()).is_some_and(|mac| mac.verify_slice(&signature).is_ok());
    keys.all().any(signed_by).then_some(id)
}

/// The session of a request. One that is forged is none.
pub fn of(headers: &HeaderMap, keys: &Keys) -> Option<Uuid> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let pairs = cookies.flat_map(|cookies| cookies.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let values = pairs.filter(|(name, _)| *name == COOKIE).map(|(_, value)| value.trim_matches('"'));
    values.take(MAX_COOKIES).find_map(|value| verify(value, keys))
}

/// The session of somebody's first order with a key that nobody can guess. Who does not get the answer to it, and so no cookie,
/// and sends it again, from whatever network, is the same buyer, and the order the same order.
pub fn of_first_order(idempotency_key: Uuid, keys: &Keys) -> Uuid {
    let hash = keyed_hash(keys.first(), Use::FirstOrder, idempotency_key.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// The header that lets a browser keep a session: `secure`: and send it over HTTPS only.
pub fn set_cookie(id: Uuid, keys: &Keys, secure: bool) -> Option<HeaderValue> {
    let secure = if secure { "; Secure" } else { "" };
    let text =
        format!("{COOKIE}={}; Max-Age={MAX_AGE_SECONDS}; Path=/; HttpOnly; SameSite=Lax{secure}", value(id, keys));
    HeaderValue::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(letters: &[&str]) -> Keys {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, letters.iter().map(|one| one.repeat(32) + "\n").collect::<String>()).unwrap();
        super::super::key_file::read(&path).unwrap()
    }

    fn cookie(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::COOKIE, HeaderValue::from_str(text).unwrap())])
    }

    #[test]
    fn a_session_is_read_whatever_else_the_browser_sends() {
        let (id, keys) = (Uuid::from_u128(7), keys(&["a"]));
        let own = format!("{COOKIE}={}", value(id, &keys));
        for text in [own.clone(), format!("a=b; {own}; c"), format!("{COOKIE}=x;{own}"), format!("a={own}; {own}")] {
            assert_eq!(of(&cookie(&text), &keys), Some(id), "{text}");
        }
        let too_many = format!("{COOKIE}=x; ").repeat(MAX_COOKIES) + &own;
        assert_eq!(of(&cookie(&too_many), &keys), None);
        let mut several = cookie("a=b");
        several.append(header::COOKIE, HeaderValue::from_str(&own).unwrap());
        assert_eq!(of(&several, &keys), Some(id));
    }

    #[test]
    fn what_an_older_key_has_signed_holds_until_the_key_is_gone() {
        let id = Uuid::from_u128(7);
        let text = format!("{COOKIE}={}", value(id, &keys(&["a"])));
        assert_eq!(of(&cookie(&text), &keys(&["b", "a"])), Some(id));
        assert_eq!(of(&cookie(&text), &keys(&["b"])), None);
        assert_ne!(value(id, &keys(&["b", "a"])), value(id, &keys(&["a", "b"])), "the first one signs");
    }

    #[test]
    fn what_is_signed_for_another_use_is_no_session() {
        let (id, keys) = (Uuid::from_u128(7), keys(&["a"]));
        let other = keyed_hash(keys.first(), Use::Network, id.as_bytes());
        let text = format!("{COOKIE}={}.{}", id.simple(), URL_SAFE_NO_PAD.encode(other));
        assert_eq!(of(&cookie(&text), &keys), None);
    }

    #[test]
    fn the_cookie_is_kept_from_scripts_and_from_other_sites() {
        let (id, keys) = (Uuid::from_u128(7), keys(&["a"]));
        let plain = set_cookie(id, &keys, false).unwrap();
        let plain = plain.to_str().unwrap();
        assert!(plain.ends_with("; Max-Age=2592000; Path=/; HttpOnly; SameSite=Lax"), "{plain}");
        assert_eq!(set_cookie(id, &keys, true).unwrap().to_str().unwrap(), format!("{plain}; Secure"));
    }

    #[test]
    fn a_first_order_that_is_sent_again_is_of_the_same_session() {
        let keys = keys(&["a"]);
        let session = |key: u128| of_first_order(Uuid::from_u128(key), &keys);
        assert_eq!(session(1), session(1));
        assert_ne!(session(1), session(2));
    }

    proptest! {
        #[test]
        fn nothing_else_is_a_session(text in "[0-9a-f]{32}[.][A-Za-z0-9_-]{43}", id: u128, flip in 0usize..43) {
            let keys = keys(&["a"]);
            prop_assert_eq!(verify(&text, &keys), None);
            let mut own = value(Uuid::from_u128(id), &keys).into_bytes();
            let last = own.len() - 1 - flip;
            own[last] = if own[last] == b'A' { b'Q' } else { b'A' };
            prop_assert_eq!(verify(std::str::from_utf8(&own).unwrap(), &keys), None);
        }
    }
}
