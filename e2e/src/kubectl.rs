//! Talks to a cluster through kubectl.

use crate::command::{CommandError, Run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// kubectl and the cluster it talks to.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: Option<PathBuf>,
}

impl Kubectl {
    /// `kubeconfig: None` means the current context of the user.
    pub fn new(program: PathBuf, kubeconfig: Option<PathBuf>) -> Self {
        Self { program, kubeconfig }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    fn command(&self) -> Run {
        let run = Run::new(&self.program);
        match &self.kubeconfig {
            Some(file) => run.arg("--kubeconfig").arg(file),
            None => run,
        }
    }

    /// Runs kubectl with these words and returns what it printed.
    pub async fn run(&self, words: &str) -> Result<String, CommandError> {
        self.command().words(words).output().await
    }

    /// Runs kubectl with these arguments and returns what it printed.
    pub async fn args(&self, args: &[&str]) -> Result<String, CommandError> {
        self.command().args(args).output().await
    }

    /// Applies a manifest (YAML or JSON) as the server-side field manager `ticketwave-e2e`.
    pub async fn apply(&self, manifest: &str) -> Result<String, CommandError> {
        let words = "apply --server-side --force-conflicts --field-manager=ticketwave-e2e -f -";
        self.command().words(words).input(manifest).output().await
    }

    /// Gets objects as JSON; an object that is not there is `Null`.
    pub async fn get(&self, words: &str) -> Result<Value, CommandError> {
        let text = self.command().words("get --ignore-not-found -o json").words(words).output().await?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Whether the API server answers that it is ready.
    pub async fn server_ready(&self) -> bool {
        self.run("get --raw /readyz --request-timeout=2s").await.is_ok()
    }

    /// Asks again and again until `check` is content with the objects; returns the last answer if it never is.
    pub async fn wait_until(
        &self,
        words: &str,
        limit: Duration,
        check: impl Fn(&Value) -> bool,
    ) -> Result<Value, Value> {
        let begin = Instant::now();
        loop {
            let seen = self.get(words).await.unwrap_or(Value::Null);
            if check(&seen) {
                return Ok(seen);
            }
            if begin.elapsed() > limit {
                return Err(seen);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// The status of a condition of an object, such as `Ready` of a node.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    let conditions = object["status"]["conditions"].as_array()?;
    conditions.iter().find(|c| c["type"] == kind)?["status"].as_str()
}

/// The items of a list.
pub fn items(list: &Value) -> &[Value] {
    list["items"].as_array().map_or(&[], Vec::as_slice)
}
