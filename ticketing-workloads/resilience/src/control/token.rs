//! The tokens of the admin port: `current`, and `previous` while a change is under way.

use crate::control::mount::{Found, MountedFile, POLL_INTERVAL, Trouble};
use arc_swap::ArcSwap;
use contract::admin::TOKEN_KEYS;
use contract::signing::{ContentHash, Presented, SignatureError};
use std::path::Path;
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// Longest token that is read, in bytes; ours have 64.
const MAX_TOKEN_BYTES: usize = 4096;

/// The tokens in force; replaced as a whole when the mounted Secret changes.
#[derive(Default)]
pub struct Tokens {
    /// In the order of [`TOKEN_KEYS`]; empty: there is none.
    values: ArcSwap<[Vec<u8>; TOKEN_KEYS.len()]>,
}

/// Verdict over a presented token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenVerdict {
    /// It is one of the tokens in force.
    Valid,
    /// It is not one of the tokens in force.
    Invalid,
    /// This pod has no token yet, so it accepts none.
    NoToken,
}

impl Tokens {
    /// Sets the tokens; white space around them does not count.
    pub fn set(&self, current: &[u8], previous: &[u8]) {
        self.values.store(Arc::new([current.trim_ascii().to_vec(), previous.trim_ascii().to_vec()]));
    }

    /// Whether there is one.
    pub fn any(&self) -> bool {
        !self.values.load().iter().all(Vec::is_empty)
    }

    /// Verifies the head of a signed request; the answer is the hash that its body must have.
    pub fn verify_signed(
        &self,
        request: Presented<'_>,
        audience: &str,
        now_ms: i64,
    ) -> Result<ContentHash, SignatureError> {
        request.verify(audience, self.values.load().iter().map(Vec::as_slice), now_ms)
    }

    /// Compares a presented token with those in force, in a time that does not depend on how much of it matches.
    pub fn verify(&self, presented: &[u8]) -> TokenVerdict {
        if !self.any() {
            return TokenVerdict::NoToken;
        }
        let values = self.values.load();
        let matches = |value: &Vec<u8>| value.ct_eq(presented) & !Choice::from(u8::from(value.is_empty()));
        let right = values.iter().map(matches).fold(Choice::from(0), |any, one| any | one);
        if right.into() { TokenVerdict::Valid } else { TokenVerdict::Invalid }
    }
}

/// Keeps tokens up to date with the mounted Secret.
pub struct TokenMount {
    files: [MountedFile; TOKEN_KEYS.len()],
    values: [Vec<u8>; TOKEN_KEYS.len()],
    tokens: Arc<Tokens>,
    trouble: Trouble,
}

impl TokenMount {
    /// The Secret mounted at `directory`, which may appear later.
    pub fn new(directory: &Path, tokens: Arc<Tokens>) -> Self {
        let files = TOKEN_KEYS.map(|name| MountedFile::new(directory, name, MAX_TOKEN_BYTES));
        Self { files, values: Default::default(), tokens, trouble: Trouble::default() }
    }

    /// Reads the mount once.
    pub async fn refresh(&mut self) {
        let (mut changed, mut error) = (false, None);
        for (file, value) in self.files.iter_mut().zip(&mut self.values) {
            match file.look().await {
                Ok(Found::Same) => continue,
                Ok(Found::Changed(content)) => *value = content,
                Ok(Found::Gone) => value.clear(),
                Err(failed) => {
                    error = Some(failed);
                    continue;
                }
            }
            changed = true;
        }
        self.trouble.log(error.as_ref(), "failed to read the mounted admin token");
        if changed {
            let [current, previous] = &self.values;
            self.tokens.set(current, previous);
            tracing::info!(current = !current.is_empty(), previous = !previous.is_empty(), "admin tokens read");
        }
    }

    /// Reads the mount every [`POLL_INTERVAL`], for as long as it is polled.
    pub async fn watch(mut self) {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        loop {
            ticks.tick().await;
            self.refresh().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::none("", "", "", TokenVerdict::NoToken)]
    #[case::nothing_is_not_a_token("a", "", "", TokenVerdict::Invalid)]
    #[case::current("a\n", "b", "a", TokenVerdict::Valid)]
    #[case::previous("a", "b", "b", TokenVerdict::Valid)]
    #[case::only_previous("", "b", "b", TokenVerdict::Valid)]
    #[case::part("abc", "", "ab", TokenVerdict::Invalid)]
    #[case::longer("abc", "", "abcd", TokenVerdict::Invalid)]
    fn verdicts(
        #[case] current: &str,
        #[case] previous: &str,
        #[case] presented: &str,
        #[case] expected: TokenVerdict,
    ) {
        let tokens = Tokens::default();
        tokens.set(current.as_bytes(), previous.as_bytes());
        assert_eq!(tokens.verify(presented.as_bytes()), expected);
    }

    #[tokio::test]
    async fn follows_the_mounted_secret() {
        let directory = tempfile::tempdir().unwrap();
        let tokens = Arc::new(Tokens::default());
        let mut mount = TokenMount::new(directory.path(), Arc::clone(&tokens));
        let write = |name: &str, value: &str| std::fs::write(directory.path().join(name), value).unwrap();
        mount.refresh().await;
        assert_eq!(tokens.verify(b"first"), TokenVerdict::NoToken);
        write("current", "first\n");
        mount.refresh().await;
        assert_eq!(tokens.verify(b"first"), TokenVerdict::Valid);
        write("previous", "first");
        write("current", "the second");
        mount.refresh().await;
        assert_eq!([b"first".as_slice(), b"the second"].map(|token| tokens.verify(token)), [TokenVerdict::Valid; 2]);
        std::fs::remove_file(directory.path().join("previous")).unwrap();
        mount.refresh().await;
        assert_eq!(tokens.verify(b"first"), TokenVerdict::Invalid);
    }

    #[tokio::test]
    async fn one_file_that_cannot_be_read_does_not_hide_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let tokens = Arc::new(Tokens::default());
        let mut mount = TokenMount::new(directory.path(), Arc::clone(&tokens));
        std::fs::write(directory.path().join("current"), "first").unwrap();
        std::fs::create_dir(directory.path().join("previous")).unwrap();
        mount.refresh().await;
        assert_eq!(tokens.verify(b"first"), TokenVerdict::Valid);
    }
}
