//! A place: a number, signed, so that nobody can make one up, change its number, or use somebody else's.
//!
//! It says which row of numbers it is from, and its signature covers its holder, too. When it runs out is said by numbers
//! ([`View::lapsed`](crate::waiting_room::View::lapsed)), not by a time in it.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Bytes of a place: version, epoch, number, signature.
const BYTES: usize = 1 + 16 + 8 + 32;
/// Characters of one.
const LENGTH: usize = (BYTES * 4).div_ceil(3);
const VERSION: u8 = 1;
/// So that nothing else that is signed with the same key is ever a place.
const CONTEXT: &[u8] = b"ticketwave waiting room place";
/// Shortest key, in bytes.
const MIN_KEY: usize = 32;
/// Keys that are tried at most, and bytes of the file with them.
const MAX_KEYS: usize = 4;
const MAX_FILE: u64 = 4 * 1024;

/// A number and the row that it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub epoch: Uuid,
    pub number: u64,
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(
        "WAITING_ROOM_KEY_FILE is not set: name a file with a secret of {MIN_KEY} characters or more, the same for all gateways"
    )]
    NotSet,
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} has more than {MAX_FILE} bytes: one key a line belongs there, at most {MAX_KEYS}", .0.display())]
    TooLarge(PathBuf),
    #[error("{} has no key: write one of {MIN_KEY} characters or more", .0.display())]
    Empty(PathBuf),
    #[error("a key in {} has less than {MIN_KEY} characters: write a longer one", .0.display())]
    TooShort(PathBuf),
}

/// What places are signed with: the first key signs, all of them hold, so that one can be replaced while buyers wait.
pub struct Keys(Vec<Hmac<Sha256>>);

impl Keys {
    /// Reads the file with them, one a line.
    pub fn read(path: Option<&Path>) -> Result<Self, KeyError> {
        let path = path.filter(|path| !path.as_os_str().is_empty()).ok_or(KeyError::NotSet)?;
        let unreadable = |source| KeyError::Unreadable { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_FILE {
            return Err(KeyError::TooLarge(path.to_owned()));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(MAX_KEYS).collect();
        if lines.is_empty() {
            return Err(KeyError::Empty(path.to_owned()));
        }
        if lines.iter().any(|line| line.len() < MIN_KEY) {
            return Err(KeyError::TooShort(path.to_owned()));
        }
        // A key of any length is taken.
        Ok(Self(lines.iter().filter_map(|line| Hmac::new_from_slice(line.as_bytes()).ok()).collect()))
    }

    /// The place as its holder keeps it; `None`: there is no key.
    pub fn sign(&self, place: Place, holder: &str) -> Option<String> {
        let signature = covering(self.0.first()?, place, holder).finalize().into_bytes();
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(place.epoch.as_bytes());
        bytes.extend_from_slice(&place.number.to_be_bytes());
        bytes.extend_from_slice(&signature);
        Some(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The place in `text`, if one of the keys has signed it for one of `holders`.
    pub fn verify(&self, text: &str, holders: &[String]) -> Option<Place> {
        if text.len() != LENGTH {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (version, bytes) = bytes.split_first()?;
        let (epoch, bytes) = bytes.split_first_chunk::<16>()?;
        let (number, signature) = bytes.split_first_chunk::<8>()?;
        let place = Place { epoch: Uuid::from_bytes(*epoch), number: u64::from_be_bytes(*number) };
        let is_signed =
            |holder: &String| self.0.iter().any(|key| covering(key, place, holder).verify_slice(signature).is_ok());
        (*version == VERSION && holders.iter().any(is_signed)).then_some(place)
    }
}

/// The signature over all of a place. Only the holder is of any length, and it comes last.
fn covering(key: &Hmac<Sha256>, place: Place, holder: &str) -> Hmac<Sha256> {
    let Place { epoch, number } = place;
    let signed = key.clone().chain_update(CONTEXT).chain_update([VERSION]).chain_update(epoch.as_bytes());
    signed.chain_update(number.to_be_bytes()).chain_update(holder.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "fedcba9876543210fedcba9876543210";

    fn keys(text: &str) -> Result<Keys, KeyError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Keys::read(Some(file.path()))
    }

    fn holders(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn what_is_signed_holds_for_its_holder_alone() {
        let keys = keys(ONE).unwrap();
        let place = Place { epoch: Uuid::from_u128(5), number: u64::MAX };
        let text = keys.sign(place, "session:ann").unwrap();
        assert_eq!(text.len(), LENGTH);
        assert_eq!(keys.verify(&text, &holders(&["session:ann"])), Some(place));
        assert_eq!(keys.verify(&text, &holders(&["user:ann", "session:ann"])), Some(place), "who has logged in since");
        for other in [&["session:bob"][..], &[""], &[]] {
            assert_eq!(keys.verify(&text, &holders(other)), None);
        }
    }

    #[test]
    fn no_bit_can_be_changed_and_nothing_else_is_a_place() {
        let keys = keys(ONE).unwrap();
        let text = keys.sign(Place { epoch: Uuid::from_u128(5), number: 7 }, "").unwrap();
        let bytes = URL_SAFE_NO_PAD.decode(&text).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut forged = bytes.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(keys.verify(&URL_SAFE_NO_PAD.encode(forged), &holders(&[""])), None, "bit {bit}");
        }
        for other in ["", "a", &text[1..], &format!("{text}A"), &"é".repeat(LENGTH / 2), &"x".repeat(1 << 20)] {
            assert_eq!(keys.verify(other, &holders(&[""])), None);
        }
    }

    #[test]
    fn a_key_can_be_replaced_while_buyers_wait() {
        let place = Place { epoch: Uuid::nil(), number: 3 };
        let before = keys(ONE).unwrap().sign(place, "").unwrap();
        let both = keys(&format!("{OTHER}\n\n  {ONE}  \n")).unwrap();
        assert_eq!(both.verify(&before, &holders(&[""])), Some(place));
        let after = both.sign(place, "").unwrap();
        assert_eq!(keys(OTHER).unwrap().verify(&after, &holders(&[""])), Some(place));
        assert_eq!(keys(OTHER).unwrap().verify(&before, &holders(&[""])), None);
    }

    #[test]
    fn without_a_good_key_it_says_what_is_missing() {
        let why = |result: Result<Keys, KeyError>| result.err().unwrap().to_string();
        assert!(why(Keys::read(None)).contains("is not set"));
        assert!(why(Keys::read(Some(Path::new("")))).contains("is not set"), "as a template without a value gives it");
        assert!(why(Keys::read(Some(Path::new("/nowhere/key")))).starts_with("cannot read /nowhere/key"));
        assert!(why(keys(" \n")).contains("has no key"));
        let short = why(keys("secret"));
        assert!(short.contains("less than 32") && !short.contains("secret"), "{short}");
        assert!(why(keys(&"x".repeat(5_000))).contains("more than 4096 bytes"));
    }
}
