//! The code of one seat: `TW1.<payload>.<signature>`, both in base64url.
//!
//! The payload has 42 bytes: the id of the key (8), the booking (16), the event (16), the number of the seat (1) and how many
//! seats the booking has (1). Nothing in it is personal. The signature (Ed25519) is over the text before its dot. Each ticket has
//! one spelling: whatever else decodes to the same bytes is no code.

use super::keys::{KeyId, PublicKey, PublicKeys, SigningKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::fmt;
use uuid::Uuid;

/// What a code begins with.
const PREFIX: &str = "TW1.";
/// What the codes of version 0.1 begin with; they are not signed.
const UNSIGNED: &str = "TICKETWAVE:1:";
/// Bytes of a payload.
const PAYLOAD_BYTES: usize = 42;
const SIGNATURE_BYTES: usize = 64;
/// Longest text that is looked at, in bytes: a code has 147.
pub const MAX_CODE_BYTES: usize = 256;

/// What a code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub booking: Uuid,
    pub event: Uuid,
    /// From 1 on.
    pub seat: u8,
    /// Seats of the booking.
    pub of: u8,
}

/// Why a text is no genuine ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    #[error("this is not a ticket's code: that begins with TW1. and has {} characters", 4 + 56 + 1 + 86)]
    NotACode,
    /// Anybody could have written it.
    #[error("this ticket is of version 0.1 and not signed: look its booking up, or have a signed one sent")]
    Unsigned,
    #[error("it is signed with the key {0}, which is not among the public keys: add that key if it is one of yours")]
    UnknownKey(KeyId),
    #[error("the signature is not genuine: the ticket was forged, or changed after it was signed")]
    Forged,
}

/// A code that could be genuine, which only its signature tells.
#[derive(Clone, PartialEq, Eq)]
pub struct Code {
    key: KeyId,
    ticket: Ticket,
    signed: String,
    signature: [u8; SIGNATURE_BYTES],
}

/// Without its signature: who reads it in a log must not get a ticket.
impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Code").field("key", &self.key).field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl Ticket {
    /// The code that the holder of a seat shows.
    pub fn sign(&self, key: &SigningKey) -> String {
        let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
        payload.extend(key.id().bytes());
        payload.extend(self.booking.as_bytes());
        payload.extend(self.event.as_bytes());
        payload.extend([self.seat, self.of]);
        let signed = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(payload));
        let signature = key.sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

impl Code {
    /// Reads a code; whether it is genuine says [`Code::verify`].
    pub fn read(text: &str) -> Result<Self, CodeError> {
        if text.len() > MAX_CODE_BYTES {
            return Err(CodeError::NotACode);
        }
        if text.strip_prefix(UNSIGNED).is_some_and(is_of_version_0_1) {
            return Err(CodeError::Unsigned);
        }
        Self::parse(text).ok_or(CodeError::NotACode)
    }

    fn parse(text: &str) -> Option<Self> {
        let (signed, signature) = text.rsplit_once('.')?;
        let payload: [u8; PAYLOAD_BYTES] = decode(signed.strip_prefix(PREFIX)?)?;
        let (key, rest) = payload.split_first_chunk::<8>()?;
        let (booking, rest) = rest.split_first_chunk::<16>()?;
        let (event, rest) = rest.split_first_chunk::<16>()?;
        let [seat, of] = *<&[u8; 2]>::try_from(rest).ok()?;
        if seat == 0 || seat > of {
            return None;
        }
        let ticket = Ticket { booking: Uuid::from_bytes(*booking), event: Uuid::from_bytes(*event), seat, of };
        Some(Self { key: KeyId::from(*key), ticket, signed: signed.to_owned(), signature: decode(signature)? })
    }

    /// The key that it says it is signed with.
    pub fn key(&self) -> KeyId {
        self.key
    }

    /// What it says, whether that is so or not.
    pub fn claims(&self) -> Ticket {
        self.ticket
    }

    /// What it says, if one of these keys has signed it.
    pub fn verify(&self, keys: &PublicKeys) -> Result<Ticket, CodeError> {
        let key = keys.get(self.key).ok_or(CodeError::UnknownKey(self.key))?;
        self.verify_with(key)
    }

    /// What it says, if this key has signed it.
    pub fn verify_with(&self, key: &PublicKey) -> Result<Ticket, CodeError> {
        let is_genuine = key.id() == self.key && key.has_signed(self.signed.as_bytes(), &self.signature);
        if is_genuine { Ok(self.ticket) } else { Err(CodeError::Forged) }
    }
}

/// Decodes what has exactly so many bytes, in its one spelling.
fn decode<const BYTES: usize>(text: &str) -> Option<[u8; BYTES]> {
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
}

/// `<booking>:<seats>`
fn is_of_version_0_1(rest: &str) -> bool {
    rest.split_once(':').is_some_and(|(booking, seats)| Uuid::parse_str(booking).is_ok() && seats.parse::<u8>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket() -> Ticket {
        Ticket { booking: Uuid::from_u128(0x33), event: Uuid::from_u128(0x11), seat: 2, of: 4 }
    }

    fn keys(of: &[&SigningKey]) -> PublicKeys {
        of.iter().map(|key| key.public_key()).collect()
    }

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_seed(&[seed; 32]).unwrap()
    }

    /// What is printed on tickets must be read by each later version.
    #[test]
    fn the_form_stays_as_it_is() {
        let code = ticket().sign(&key(1));
        assert_eq!(
            code,
            "TW1.NHUPmL1Z_PwAAAAAAAAAAAAAAAAAAAAzAAAAAAAAAAAAAAAAAAAAEQIE.\
             0D6CwdHQrDC8wAPzNeT-GrcpUb5OppDsbb_TvwWKC-OyOIeF3rpisjUleFc-TX6K9qULJTP7sQZNYG_tmRsOCQ"
        );
        assert_eq!(code.len(), 147);
    }

    #[test]
    fn a_code_says_what_was_signed() {
        let (old, new) = (key(1), key(2));
        let code = Code::read(&ticket().sign(&old)).unwrap();
        assert_eq!(code.verify(&keys(&[&new, &old])), Ok(ticket()), "any of several keys");
        assert_eq!(code.verify(&keys(&[&new])), Err(CodeError::UnknownKey(old.id())));
        assert_eq!(code.verify_with(&new.public_key()), Err(CodeError::Forged));
        let said = format!("{code:?}");
        assert!(said.contains("seat: 2") && !said.contains("TW1"), "{said}");
    }

    /// Each byte of a code counts, whatever it is changed to.
    #[test]
    fn whatever_is_changed_is_noticed() {
        let key = key(1);
        let code = ticket().sign(&key);
        let keys = keys(&[&key]);
        for at in 0..code.len() {
            for other in b"AZaz09-_.=+/ \n" {
                let mut bytes = code.clone().into_bytes();
                if bytes[at] == *other {
                    continue;
                }
                bytes[at] = *other;
                let changed = String::from_utf8(bytes).unwrap();
                let read = Code::read(&changed).and_then(|code| code.verify(&keys));
                assert!(read.is_err(), "{changed}");
            }
        }
        for changed in [format!("{code}="), format!("{code}A"), format!(" {code}"), code[..146].to_owned()] {
            assert_eq!(Code::read(&changed), Err(CodeError::NotACode), "{changed}");
        }
    }

    /// Who puts a key id of ours before a signature of his own gets nowhere.
    #[test]
    fn the_id_of_a_key_is_not_the_key() {
        let (ours, theirs) = (key(1), key(2));
        let mut payload = ours.id().bytes().to_vec();
        payload.extend(ticket().booking.as_bytes());
        payload.extend(ticket().event.as_bytes());
        payload.extend([1, 1]);
        let signed = format!("TW1.{}", URL_SAFE_NO_PAD.encode(payload));
        let forged = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(theirs.sign(signed.as_bytes())));
        assert_eq!(Code::read(&forged).unwrap().verify(&keys(&[&ours, &theirs])), Err(CodeError::Forged));
    }

    #[rstest::rstest]
    #[case::of_0_1("TICKETWAVE:1:33333333-3333-4333-8333-333333333333:2", CodeError::Unsigned)]
    #[case::nearly("TICKETWAVE:1:33333333:2", CodeError::NotACode)]
    #[case::nearly("TICKETWAVE:1:33333333-3333-4333-8333-333333333333:many", CodeError::NotACode)]
    #[case::empty("", CodeError::NotACode)]
    #[case::dots("TW1...", CodeError::NotACode)]
    #[case::another_version("TW2.AAAA.AAAA", CodeError::NotACode)]
    #[case::an_address("https://example.com", CodeError::NotACode)]
    fn other_texts_are_no_codes(#[case] text: &str, #[case] why: CodeError) {
        assert_eq!(Code::read(text), Err(why));
    }

    #[test]
    fn seats_are_among_those_of_the_booking() {
        for (seat, of) in [(0, 4), (5, 4), (0, 0)] {
            let code = Ticket { seat, of, ..ticket() }.sign(&key(1));
            assert_eq!(Code::read(&code), Err(CodeError::NotACode));
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in ".{0,300}", tail in "[A-Za-z0-9_.-]{0,200}") {
            prop_assert!(Code::read(&text).is_err());
            let keys = keys(&[&key(1)]);
            let with_prefix = format!("TW1.{tail}");
            prop_assert!(Code::read(&with_prefix).and_then(|code| code.verify(&keys)).is_err());
        }
    }
}
