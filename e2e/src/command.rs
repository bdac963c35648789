//! Runs other programs; the error of one that fails says what it printed last.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// A program that could not be run, or that failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not installed.
    #[error("`{program}` was not found; install it or put it on the PATH")]
    Missing {
        /// What was to be run.
        program: String,
    },
    /// The program ran and said no.
    #[error("`{line}` failed ({status}){}", detail(.output))]
    Failed {
        /// The command line, shortened.
        line: String,
        /// How it ended.
        status: String,
        /// The last lines of what it printed.
        output: String,
    },
    /// The operating system could not run it.
    #[error("cannot run `{line}`: {source}")]
    Io {
        /// The command line, shortened.
        line: String,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
}

fn detail(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(":\n{output}") }
}

/// A command line to run.
#[derive(Debug)]
pub struct Run {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(String, String)>,
    without: &'static [&'static str],
    dir: Option<PathBuf>,
    input: Option<Vec<u8>>,
}

impl Run {
    /// A command without arguments so far.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            without: &[],
            dir: None,
            input: None,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds arguments given as one line, split at blanks.
    #[must_use]
    pub fn words(self, line: &str) -> Self {
        self.args(line.split_whitespace())
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Does not pass on the environment variables whose names begin so.
    #[must_use]
    pub fn without_env(mut self, prefixes: &'static [&'static str]) -> Self {
        self.without = prefixes;
        self
    }

    /// Runs in this directory.
    #[must_use]
    pub fn dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    /// Feeds these bytes to standard input.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Runs it and fails unless it succeeds.
    pub async fn run(self) -> Result<(), CommandError> {
        self.output().await.map(|_| ())
    }

    /// Runs it and returns what it printed on standard output.
    pub async fn output(self) -> Result<String, CommandError> {
        // Boxed, because callers wait for many of these.
        Box::pin(self.spawn_and_wait()).await
    }

    async fn spawn_and_wait(self) -> Result<String, CommandError> {
        let line = self.line();
        let io = |source: std::io::Error| CommandError::Io { line: line.clone(), source };
        let mut command = Command::new(&self.program);
        let names = std::env::vars_os().map(|(name, _)| name);
        for name in names.filter(|name| self.without.iter().any(|prefix| name.to_string_lossy().starts_with(prefix))) {
            command.env_remove(name);
        }
        command.args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v)));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        let mut child = command.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                CommandError::Missing { program: self.program.to_string_lossy().into_owned() }
            }
            _ => io(e),
        })?;
        let input = self.input.unwrap_or_default();
        let stdin = child.stdin.take();
        let feed = async move {
            if let Some(mut pipe) = stdin {
                // A program that ends before it has read everything says why by its exit status.
                let _ = pipe.write_all(&input).await;
            }
        };
        let (output, ()) = tokio::join!(child.wait_with_output(), feed);
        let output = output.map_err(io)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.trim().is_empty() {
            said = String::from_utf8_lossy(&output.stdout).into_owned();
        }
        Err(CommandError::Failed { line, status: output.status.to_string(), output: last_lines(&said, 15) })
    }

    fn line(&self) -> String {
        let mut line = self.program.to_string_lossy().into_owned();
        for arg in &self.args {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
            if line.len() > 160 {
                let cut = line.char_indices().map(|(i, _)| i).take_while(|i| *i <= 160).last().unwrap_or(0);
                line.truncate(cut);
                line.push('…');
                break;
            }
        }
        line
    }
}

/// The last `count` lines of a text, without trailing blank ones.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Finds a program on the PATH, or where system programs usually are.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/go/bin"];
    std::env::split_paths(&path)
        .chain(usual.into_iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

/// Whether this is a file that may be run.
pub fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_keeps_the_end() {
        assert_eq!(last_lines("a\nb\nc\n\n", 2), "b\nc");
        assert_eq!(last_lines("a", 5), "a");
    }

    #[tokio::test]
    async fn a_failure_tells_the_line_and_what_was_printed() {
        let error = Run::new("sh").args(["-c", "echo no >&2; exit 3"]).run().await.unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains('3') && error.ends_with("no"), "{error}");
    }

    #[tokio::test]
    async fn input_reaches_the_program() {
        assert_eq!(Run::new("cat").input("hello").output().await.unwrap(), "hello");
    }
}
