//! Static tokens, for callers that have no account in the cluster, such as browsers.
//!
//! Each line of the file is `name token namespace[,namespace...]`. Empty lines and lines that begin with `#` say nothing. Everybody who
//! sees the page sees the token, so it opens nothing but the evaluation of flags in the namespaces that its line names.

use super::Digest;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

/// Largest file, in bytes.
pub const MAX_FILE_BYTES: usize = 64 * 1024;
/// Shortest token, in bytes.
pub const MIN_TOKEN_BYTES: usize = 16;
/// Most tokens.
const MAX_TOKENS: usize = 256;

/// The tokens of a file.
#[derive(Debug, Default)]
pub struct StaticTokens(Vec<StaticToken>);

/// One token: not itself, but its hash.
#[derive(Debug)]
pub struct StaticToken {
    name: String,
    digest: Digest,
    namespaces: Vec<String>,
}

/// Why a file cannot be used. It never quotes a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTokens {
    /// The file is too large.
    #[error("it has more than {MAX_FILE_BYTES} bytes")]
    TooLarge,
    /// It is no text.
    #[error("it is not UTF-8")]
    NoText,
    /// Too many tokens.
    #[error("it has more than {MAX_TOKENS} tokens")]
    TooMany,
    /// A line has another shape.
    #[error("line {0} is not `name token namespace[,namespace...]`")]
    Shape(usize),
    /// A token that can be guessed.
    #[error("the token in line {0} has fewer than {MIN_TOKEN_BYTES} bytes: make it with `openssl rand -base64 24`")]
    TooShort(usize),
    /// A token that is there before.
    #[error("the token in line {0} stands in an earlier line, too")]
    Twice(usize),
}

impl StaticTokens {
    /// Reads a file.
    pub fn parse(file: &[u8]) -> Result<Self, InvalidTokens> {
        if file.len() > MAX_FILE_BYTES {
            return Err(InvalidTokens::TooLarge);
        }
        let text = std::str::from_utf8(file).map_err(|_| InvalidTokens::NoText)?;
        let mut tokens = Self::default();
        for (index, line) in text.lines().enumerate() {
            let (number, line) = (index + 1, line.trim());
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let words: Vec<_> = line.split_whitespace().collect();
            let [name, token, namespaces] = words.as_slice() else { return Err(InvalidTokens::Shape(number)) };
            let namespaces: Vec<_> = namespaces.split(',').map(str::to_owned).collect();
            if namespaces.iter().any(String::is_empty) {
                return Err(InvalidTokens::Shape(number));
            }
            if token.len() < MIN_TOKEN_BYTES {
                return Err(InvalidTokens::TooShort(number));
            }
            let digest = Sha256::digest(token).into();
            if tokens.find(&digest).is_some() {
                return Err(InvalidTokens::Twice(number));
            }
            if tokens.0.len() == MAX_TOKENS {
                return Err(InvalidTokens::TooMany);
            }
            tokens.0.push(StaticToken { name: (*name).to_owned(), digest, namespaces });
        }
        Ok(tokens)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a token whose hash meets this is for a namespace.
    pub fn any_reaches(&self, namespace: &str, is_meant: impl Fn(&Digest) -> bool) -> bool {
        self.0.iter().any(|token| token.reaches(namespace) && is_meant(&token.digest))
    }

    /// The token with this hash. It takes as long whichever it is.
    pub fn find(&self, digest: &Digest) -> Option<&StaticToken> {
        self.0.iter().fold(None, |found, token| if token.digest.ct_eq(digest).into() { Some(token) } else { found })
    }
}

impl StaticToken {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is for a namespace.
    pub fn reaches(&self, namespace: &str) -> bool {
        self.namespaces.iter().any(|own| own == namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "0123456789abcdef";

    fn found<'a>(tokens: &'a StaticTokens, token: &str) -> Option<&'a StaticToken> {
        tokens.find(&Sha256::digest(token).into())
    }

    #[test]
    fn a_token_reaches_the_namespaces_of_its_line() {
        let file = format!("# browsers\n\nweb {ONE} a,b\n  kiosk\tfedcba9876543210   c  \n");
        let tokens = StaticTokens::parse(file.as_bytes()).unwrap();
        let web = found(&tokens, ONE).unwrap();
        assert_eq!((web.name(), ["a", "b", "c"].map(|namespace| web.reaches(namespace))), ("web", [true, true, false]));
        assert!(found(&tokens, "fedcba9876543210").unwrap().reaches("c"));
        let is_web = |digest: &Digest| *digest == <Digest>::from(Sha256::digest(ONE));
        assert_eq!(["a", "b", "c"].map(|namespace| tokens.any_reaches(namespace, is_web)), [true, true, false]);
        assert!(found(&tokens, "0123456789abcdeg").is_none() && found(&tokens, "").is_none());
        assert!(!format!("{tokens:?}").contains(ONE), "the token itself is not kept");
    }

    /// One more than are allowed.
    fn many() -> Vec<u8> {
        let lines: Vec<_> = (0..=MAX_TOKENS).map(|number| format!("n {number:016} a")).collect();
        lines.join("\n").into_bytes()
    }

    #[rstest::rstest]
    #[case(b"web 0123456789abcdef".to_vec(), InvalidTokens::Shape(1))]
    #[case(b"\nweb 0123456789abcdef a b".to_vec(), InvalidTokens::Shape(2))]
    #[case(b"web 0123456789abcdef a,,b".to_vec(), InvalidTokens::Shape(1))]
    #[case(b"web 0123456789abcde a".to_vec(), InvalidTokens::TooShort(1))]
    #[case(b"web 0123456789abcdef a\nkiosk 0123456789abcdef b".to_vec(), InvalidTokens::Twice(2))]
    #[case(vec![0xFF], InvalidTokens::NoText)]
    #[case(vec![b'#'; MAX_FILE_BYTES + 1], InvalidTokens::TooLarge)]
    #[case(many(), InvalidTokens::TooMany)]
    fn a_wrong_file_is_refused_with_its_line(#[case] file: Vec<u8>, #[case] expected: InvalidTokens) {
        assert_eq!(StaticTokens::parse(&file).unwrap_err(), expected);
        assert!(!expected.to_string().contains("0123456789"));
    }
}
