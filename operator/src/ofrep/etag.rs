//! The tag of an answer: what it says, hashed. So it changes with the flags, with the context, and with what the time does to
//! either, and with nothing else.

use super::compiled::Hash;
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// Bytes of the hash that stand in a tag.
const BYTES: usize = 16;

/// The tag of a body, in quotes.
pub fn of(body: &[u8]) -> String {
    of_hash(&Sha256::digest(body).into())
}

/// The tag of something with this hash, in quotes.
pub fn of_hash(hash: &Hash) -> String {
    let mut tag = String::with_capacity(2 * BYTES + 2);
    tag.push('"');
    for byte in hash.iter().take(BYTES) {
        // Writing to a text cannot fail.
        let _ = write!(tag, "{byte:02x}");
    }
    tag.push('"');
    tag
}

/// Whether the header `If-None-Match` names `tag`: a list, of weak tags too, and of tags without their quotes, as some clients
/// send them.
pub fn is_named(tag: &str, if_none_match: &str) -> bool {
    let bare = |tag: &str| {
        let tag = tag.trim();
        tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"').to_owned()
    };
    let wanted = bare(tag);
    if_none_match.split(',').any(|one| bare(one) == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_quoted_and_tells_bodies_apart() {
        assert_eq!(of(b"a").len(), 34);
        assert!(of(b"a").starts_with('"') && of(b"a").ends_with('"') && of(b"a") != of(b"b"));
    }

    #[rstest::rstest]
    #[case("\"t\"", true)]
    #[case("W/\"t\"", true)]
    #[case("t", true)]
    #[case("\"a\", W/\"t\"", true)]
    #[case("\"a\"", false)]
    #[case("", false)]
    #[case::a_post_has_no_star("*", false)]
    fn names(#[case] header: &str, #[case] expected: bool) {
        assert_eq!(is_named("\"t\"", header), expected);
    }
}
