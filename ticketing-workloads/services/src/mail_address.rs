//! A buyer's mail address: one reading of it for where an order is taken and for where its mail is sent, so that what is
//! sold can be mailed.
//!
//! Taken is `name@domain` as people write it. The domain may be an internationalised one (sent as `xn--…`) and the name may
//! have letters of any script (sent by SMTPUTF8, RFC 6531). Not taken, though RFC 5321 has them: quoted names, comments,
//! domains without a dot and addresses of machines in brackets. Hardly anybody has such an address, many mail servers refuse
//! them, and they are nearly always slips.

use idna::AsciiDenyList;
use idna::uts46::{DnsLength, Hyphens, Uts46};
use std::fmt;

/// Longest address, in bytes (RFC 5321 §4.5.3.1.3, without the brackets).
const MAX_BYTES: usize = 254;
/// Longest name before the `@`, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// What may stand in a name beside letters and digits (RFC 5322's atoms), and dots between.
const NAME_SIGNS: &str = "!#$%&'*+-/=?^_`{|}~.";

/// Why a text is not an address that a mail could be sent to. Says what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("must be an address with a name, an @ and a domain, such as ann@example.com")]
    Shape,
    #[error("must be one address of at most {MAX_BYTES} bytes, with at most {MAX_NAME_BYTES} of them before the @")]
    TooLong,
    #[error("must not have spaces or line breaks, neither inside nor around it")]
    Space,
    #[error("must be a single bare address: no list, no display name, no angle brackets")]
    NotBare,
    #[error("must not have quotes, backslashes or comments in parentheses")]
    Quoted,
    #[error("has characters before the @ that no mail address has")]
    Name,
    #[error("must not have a dot at the beginning or end of the name, nor two in a row")]
    NameDots,
    #[error("must have a domain with a dot in it, such as example.com")]
    NoDot,
    #[error("must not have a dot at its end")]
    TrailingDot,
    #[error("must have the name of a domain behind the @: letters, digits and hyphens between dots")]
    Domain,
}

/// An address that a mail can be sent to.
#[derive(Clone, PartialEq, Eq)]
pub struct MailAddress {
    address: lettre::Address,
}

impl MailAddress {
    /// Reads what a buyer gave.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        if text.chars().any(|letter| letter.is_whitespace() || letter.is_control()) {
            return Err(AddressError::Space);
        }
        if text.contains([',', ';', '<', '>']) {
            return Err(AddressError::NotBare);
        }
        if text.contains(['"', '\\', '(', ')']) {
            return Err(AddressError::Quoted);
        }
        let (name, domain) = text.split_once('@').ok_or(AddressError::Shape)?;
        if domain.contains('@') {
            return Err(AddressError::NotBare);
        }
        if name.is_empty() || domain.is_empty() {
            return Err(AddressError::Shape);
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(AddressError::TooLong);
        }
        check_name(name)?;
        let domain = ascii_domain(domain)?;
        if name.len() + 1 + domain.len() > MAX_BYTES {
            return Err(AddressError::TooLong);
        }
        // Its own check knows no marks that are part of a letter, as in Hindi; the one above is stricter in all else.
        Ok(Self { address: lettre::Address::new_dangerous(name, domain) })
    }

    /// As an envelope and a header have it: the domain in lower-case ASCII.
    pub fn address(&self) -> &lettre::Address {
        &self.address
    }
}

/// As logs may show it.
impl fmt::Display for MailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted_address(self.address.as_ref()))
    }
}

impl fmt::Debug for MailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MailAddress({self})")
    }
}

fn check_name(name: &str) -> Result<(), AddressError> {
    let fits = |letter: char| {
        if letter.is_ascii() {
            letter.is_ascii_alphanumeric() || NAME_SIGNS.contains(letter)
        } else {
            !is_unseen(letter)
        }
    };
    if !name.chars().all(fits) {
        return Err(AddressError::Name);
    }
    if name.split('.').any(str::is_empty) {
        return Err(AddressError::NameDots);
    }
    Ok(())
}

/// Letters that a reader cannot see, or that turn the direction of the text: two addresses could look the same.
fn is_unseen(letter: char) -> bool {
    matches!(u32::from(letter),
        0xad | 0x034f | 0x061c | 0x115f..=0x1160 | 0x17b4..=0x17b5 | 0x180b..=0x180f | 0x200b..=0x200f | 0x2028..=0x202e
        | 0x2060..=0x206f | 0x3164 | 0xe000..=0xf8ff | 0xfe00..=0xfe0f | 0xfeff | 0xffa0 | 0xfff0..=0xffff | 0xe0000..)
}

/// A domain with at least one dot, in lower-case ASCII.
pub fn ascii_domain(domain: &str) -> Result<String, AddressError> {
    if domain.ends_with('.') {
        return Err(AddressError::TrailingDot);
    }
    let strict =
        Uts46::new().to_ascii(domain.as_bytes(), AsciiDenyList::STD3, Hyphens::CheckFirstLast, DnsLength::Verify);
    let ascii = strict.map_err(|_| AddressError::Domain)?;
    let (_, last) = ascii.rsplit_once('.').ok_or(AddressError::NoDot)?;
    // Such as 192.0.2.1: no domain at the top has only digits.
    if last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(AddressError::Domain);
    }
    Ok(ascii.into_owned())
}

/// An address as logs may show it: the first letter of its name and the domain.
pub fn redacted_address(address: &str) -> String {
    match address.rsplit_once('@') {
        Some((name, domain)) => {
            let first: String = name.chars().take(1).collect();
            format!("{first}…@{domain}")
        }
        None => "…".to_owned(),
    }
}

/// A text of somebody else, such as a server's answer, with every address in it redacted.
pub fn redacted(text: &str) -> String {
    let is_border = |letter: char| letter.is_whitespace() || "<>()[]{},;:\"'`|=".contains(letter);
    let mut shown = String::with_capacity(text.len());
    for part in text.split_inclusive(is_border) {
        let (word, border) = match part.char_indices().next_back() {
            Some((at, last)) if is_border(last) => part.split_at(at),
            _ => (part, ""),
        };
        if word.contains('@') {
            shown.push_str(&redacted_address(word));
        } else {
            shown.push_str(word);
        }
        shown.push_str(border);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("ann@example.com", "ann@example.com")]
    #[case("Ann.Lee+tickets@Example.COM", "Ann.Lee+tickets@example.com")]
    #[case("o'neil@example.co.uk", "o'neil@example.co.uk")]
    #[case("ann@münchen.example", "ann@xn--mnchen-3ya.example")]
    #[case("ann@MÜNCHEN.example", "ann@xn--mnchen-3ya.example")]
    #[case("ann@xn--mnchen-3ya.example", "ann@xn--mnchen-3ya.example")]
    #[case("änn@例え.テスト", "änn@xn--r8jz45g.xn--zckzah")]
    #[case("उपयोगकर्ता@example.com", "उपयोगकर्ता@example.com")]
    #[case("a@1.example", "a@1.example")]
    #[case("a@ab--cd.example", "a@ab--cd.example")]
    fn reads_what_people_have(#[case] text: &str, #[case] sent_to: &str) {
        let address = MailAddress::parse(text).unwrap();
        assert_eq!(address.address().as_ref() as &str, sent_to);
    }

    #[rstest::rstest]
    #[case("", AddressError::Shape)]
    #[case("nobody", AddressError::Shape)]
    #[case("@example.com", AddressError::Shape)]
    #[case("a@", AddressError::Shape)]
    #[case("a@b", AddressError::NoDot)]
    #[case("a@example.com.", AddressError::TrailingDot)]
    #[case("a b@example.com", AddressError::Space)]
    #[case(" a@example.com", AddressError::Space)]
    #[case("a@example.com\u{a0}", AddressError::Space)]
    #[case("a@example.com\nBcc: c@example.com", AddressError::Space)]
    #[case("a@example.com,b@example.com", AddressError::NotBare)]
    #[case("a@example.com;b@example.com", AddressError::NotBare)]
    #[case("Ann<a@example.com>", AddressError::NotBare)]
    #[case("a@@example.com", AddressError::NotBare)]
    #[case("a@b@example.com", AddressError::NotBare)]
    #[case("\"a\"@example.com", AddressError::Quoted)]
    #[case("a\\b@example.com", AddressError::Quoted)]
    #[case("ann(her)@example.com", AddressError::Quoted)]
    #[case("ann@example.com(work)", AddressError::Quoted)]
    #[case("a..b@example.com", AddressError::NameDots)]
    #[case(".a@example.com", AddressError::NameDots)]
    #[case("a.@example.com", AddressError::NameDots)]
    #[case("a[b@example.com", AddressError::Name)]
    #[case("a:b@example.com", AddressError::Name)]
    #[case("a\u{200b}b@example.com", AddressError::Name)]
    #[case("a\u{202e}b@example.com", AddressError::Name)]
    #[case("a@-example.com", AddressError::Domain)]
    #[case("a@example-.com", AddressError::Domain)]
    #[case("a@exa_mple.com", AddressError::Domain)]
    #[case("a@example..com", AddressError::Domain)]
    #[case("a@.example.com", AddressError::Domain)]
    #[case("a@[192.0.2.1]", AddressError::Domain)]
    #[case("a@192.0.2.1", AddressError::Domain)]
    #[case("a@xn--0.example", AddressError::Domain)]
    fn refuses_the_rest_and_says_why(#[case] text: &str, #[case] why: AddressError) {
        assert_eq!(MailAddress::parse(text), Err(why));
    }

    #[test]
    fn lengths_are_bounded() {
        let long_name = format!("{}@example.com", "a".repeat(65));
        let long_label = format!("a@{}.com", "b".repeat(64));
        let long = format!("{}@{}.com", "a".repeat(64), ["b".repeat(60), "c".repeat(60), "d".repeat(61)].join("."));
        assert_eq!(MailAddress::parse(&long_name), Err(AddressError::TooLong));
        assert_eq!(MailAddress::parse(&long_label), Err(AddressError::Domain));
        assert_eq!(long.len(), 252);
        assert!(MailAddress::parse(&long).is_ok());
        assert_eq!(MailAddress::parse(&long.replacen(".com", ".combined", 1)), Err(AddressError::TooLong));
    }

    #[test]
    fn logs_never_show_an_address_in_full() {
        let address = MailAddress::parse("ann@example.com").unwrap();
        assert_eq!(format!("{address} {address:?}"), "a…@example.com MailAddress(a…@example.com)");
        let said = "550 5.1.1 <ann.lee@example.com>: no such user; to=bob@example.org, änn@example.com (x)";
        let shown = "550 5.1.1 <a…@example.com>: no such user; to=b…@example.org, ä…@example.com (x)";
        assert_eq!(redacted(said), shown);
    }
}
