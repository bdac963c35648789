//! Passwords in files.

use arc_swap::ArcSwap;
use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncReadExt;

/// Longest password that is read from a file, in bytes.
const MAX_PASSWORD_BYTES: usize = 4096;

/// A password in a file, such as a mounted Secret. It is read for each connection, so that one that was rotated takes
/// effect without a restart.
pub struct PasswordFile {
    /// What it is, for the log.
    what: &'static str,
    path: PathBuf,
    last: ArcSwap<Read>,
}

/// What the last look at the file found.
#[derive(Default)]
struct Read {
    /// The last password that could be read: while the file is away or half written, it is the best there is.
    password: Option<Vec<u8>>,
    /// What was wrong with the file at the last look.
    trouble: Option<String>,
}

impl PasswordFile {
    /// The file at `path`; `what` is in it, such as "database password".
    pub fn new(path: &Path, what: &'static str) -> Self {
        Self { what, path: path.to_owned(), last: ArcSwap::default() }
    }

    /// The password as it is now, or the last one that could be read.
    pub async fn read(&self) -> Option<Vec<u8>> {
        let last = self.last.load_full();
        let (password, trouble) = match content(&self.path).await {
            Ok(password) => (Some(password), None),
            Err(error) => {
                let trouble = format!("the password file {} cannot be used: {error}", self.path.display());
                (last.password.clone(), Some(trouble))
            }
        };
        if let Some(trouble) = trouble.as_ref().filter(|trouble| last.trouble.as_ref() != Some(trouble)) {
            let kept = if password.is_some() { "; the last one read stays in use" } else { "" };
            tracing::warn!("{trouble}{kept}");
        } else if last.password != password {
            tracing::info!(file = %self.path.display(), "{} read", self.what);
        }
        self.last.store(Arc::new(Read { password: password.clone(), trouble }));
        password
    }

    /// Where the password comes from, for the person on call; never the password.
    pub fn in_words(&self) -> String {
        self.last.load().trouble.clone().unwrap_or_else(|| {
            format!("it is in the file {}, which is read again for each new connection", self.path.display())
        })
    }
}

/// The password in a file: all of it but the end of its last line, which editors and `echo` add.
async fn content(path: &Path) -> Result<Vec<u8>, IoError> {
    let file = tokio::fs::File::open(path).await?;
    let mut content = Vec::new();
    let one_more = u64::try_from(MAX_PASSWORD_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    file.take(one_more).read_to_end(&mut content).await?;
    let invalid = |why: String| Err(IoError::new(ErrorKind::InvalidData, why));
    if content.len() > MAX_PASSWORD_BYTES {
        return invalid(format!("it has more than {MAX_PASSWORD_BYTES} bytes"));
    }
    while content.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        content.pop();
    }
    if content.is_empty() { invalid("it is empty".to_owned()) } else { Ok(content) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::plain("secret", Some("secret"))]
    #[case::with_a_line_end("secret\n", Some("secret"))]
    #[case::of_windows("secret\r\n", Some("secret"))]
    #[case::spaces_belong_to_it(" se cret \n", Some(" se cret "))]
    #[case::empty("", None)]
    #[case::only_a_line_end("\n", None)]
    #[tokio::test]
    async fn reads_a_password(#[case] content: &str, #[case] expected: Option<&str>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        std::fs::write(&path, content).unwrap();
        let file = PasswordFile::new(&path, "password");
        assert_eq!(file.read().await, expected.map(|text| text.as_bytes().to_vec()));
        assert!(!file.in_words().contains("secret"), "{}", file.in_words());
    }

    #[tokio::test]
    async fn keeps_the_last_password_while_the_file_cannot_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let file = PasswordFile::new(&path, "password");
        assert_eq!(file.read().await, None);
        assert!(file.in_words().contains("cannot be used: No such file"), "{}", file.in_words());
        std::fs::write(&path, "first").unwrap();
        assert_eq!(file.read().await.as_deref(), Some(&b"first"[..]));
        for (content, why) in [(Vec::new(), "it is empty"), (vec![b'x'; 4097], "it has more than 4096 bytes")] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(file.read().await.as_deref(), Some(&b"first"[..]));
            assert!(file.in_words().contains(why), "{}", file.in_words());
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.read().await.as_deref(), Some(&b"first"[..]));
        std::fs::write(&path, "second").unwrap();
        assert_eq!(file.read().await.as_deref(), Some(&b"second"[..]));
        assert!(file.in_words().contains("read again for each new connection"), "{}", file.in_words());
    }

    /// As the kubelet does it: the name leads over `..data`, which is swapped.
    #[tokio::test]
    async fn follows_a_mounted_secret_that_is_swapped() {
        use std::os::unix::fs::symlink;
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (version, password) in [("..1", "first"), ("..2", "second")] {
            std::fs::create_dir(at(version)).unwrap();
            std::fs::write(at(version).join("password"), password).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/password", at("password")).unwrap();
        let file = PasswordFile::new(&at("password"), "password");
        assert_eq!(file.read().await.as_deref(), Some(&b"first"[..]));
        symlink("..2", at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert_eq!(file.read().await.as_deref(), Some(&b"second"[..]));
    }
}
