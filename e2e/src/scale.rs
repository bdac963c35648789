//! How the operator does at scale: a real API server, thousands of fake pods, and another operator beside it.
//!
//! Nothing here asserts: the report has figures, ratios to what the API server alone takes in the same run, and the goals.

mod api;
mod audit_tail;
mod fake_pod;
mod fleet;
mod listener;
mod measure;
pub mod ofrep;
mod operator_process;
mod policy_watch;
mod report;
mod results;
mod statistics;
mod usage;

use crate::apiserver::ApiServerError;
use crate::binaries::KUBERNETES_VERSION;
use crate::checkout;
use crate::command::{CommandError, Run as Program};
use crate::progress::Progress;
use fleet::{CROWD, SILENT, Size};
use measure::Measure;
use operator_process::Contender;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Open files beyond one connection for each pod.
const OTHER_FILES: u64 = 1_000;
/// Pods of each workload.
const PODS_EACH: usize = 10;

/// It could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ScaleError {
    /// The API server.
    #[error(transparent)]
    ApiServer(#[from] ApiServerError),
    /// The build of the operator.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A call of the API server.
    #[error(transparent)]
    Kube(#[from] kube::Error),
    /// Its kubeconfig.
    #[error(transparent)]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// A file, a port or a limit.
    #[error("failed to {what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Something that did not come in time.
    #[error("{0}")]
    Waited(String),
    /// More pods than this process may have connections.
    #[error(
        "{pods} pods need {needed} open files and this process may have {limit}: raise the limit (ulimit -Hn), or use fewer policies"
    )]
    Files {
        /// Pods.
        pods: usize,
        /// Files.
        needed: u64,
        /// The hard limit.
        limit: u64,
    },
}

/// What is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many policies, one run for each number; each has a workload of ten pods
    #[arg(long, env = "POLICIES", value_delimiter = ',', default_values_t = [100, 1_000])]
    pub policies: Vec<u16>,
    /// A built operator [default: a release build of the working tree]
    #[arg(long, env = "OPERATOR", value_name = "PATH")]
    pub operator: Option<PathBuf>,
    /// Another operator to measure in the same way: a command that runs it with KUBECONFIG in its environment; {identity}, {port} and {port2} in it are replaced
    #[arg(long, env = "PEER", value_name = "COMMAND")]
    pub peer: Option<String>,
    /// A tenth of the samples, and 20 policies unless said otherwise: to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Only what an event costs
    #[arg(long)]
    pub events: bool,
}

/// How much is done in each measurement.
#[derive(Clone, Debug)]
struct Effort {
    /// Changes of a policy.
    changes: usize,
    /// Pods that fail one after the other.
    failures: usize,
    /// How long nothing happens.
    rest: Duration,
    /// Statuses of pods that say nothing new.
    events: usize,
    /// Pods that turn not ready and ready again.
    flips: usize,
    /// How long it is watched while pods misbehave.
    window: Duration,
    /// Only what an event costs.
    only_events: bool,
}

impl Options {
    fn sizes(&self) -> Vec<Size> {
        let usual = self.policies == [100, 1_000];
        let policies = if self.quick && usual { &[20][..] } else { &self.policies };
        policies.iter().map(|count| Size { policies: usize::from(*count).max(1), pods_each: PODS_EACH }).collect()
    }

    fn effort(&self) -> Effort {
        if self.quick {
            Effort {
                changes: 20,
                failures: 20,
                rest: Duration::from_secs(8),
                events: 1_000,
                flips: 40,
                window: Duration::from_secs(10),
                only_events: self.events,
            }
        } else {
            Effort {
                changes: 200,
                failures: 200,
                rest: Duration::from_secs(30),
                events: 20_000,
                flips: 1_000,
                window: Duration::from_secs(30),
                only_events: self.events,
            }
        }
    }
}

/// Measures, prints the report, and writes it to `target/scale/report.md`; it is written after each run, so that one that is interrupted leaves
/// what it has.
pub async fn run(options: &Options, progress: &Progress) -> Result<(), ScaleError> {
    let sizes = options.sizes();
    let most = sizes.iter().map(|size| size.pods()).max().unwrap_or_default() + CROWD + SILENT;
    raise_file_limit(most)?;
    let dir = checkout::root().join("target/scale");
    let io = |what| move |source| ScaleError::Io { what, source };
    std::fs::create_dir_all(&dir).map_err(io("make target/scale"))?;
    let mut contenders =
        vec![Contender::operator("resilience-operator", &binary(options.operator.as_deref(), progress).await?)];
    contenders.extend(options.peer.as_deref().filter(|command| !command.trim().is_empty()).map(Contender::peer));
    let (effort, report) = (options.effort(), dir.join("report.md"));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (mut runs, mut text) = (Vec::new(), String::new());
    for size in sizes {
        for contender in &contenders {
            progress.say(format!("{}: {} policies, {} pods", contender.name, size.policies, size.pods()));
            runs.push(Box::pin(Measure::all(contender, size, &effort, &dir, progress)).await?);
            text = report::markdown(&runs, cores, KUBERNETES_VERSION);
            std::fs::write(&report, &text).map_err(io("write the report"))?;
        }
    }
    print!("{text}");
    progress.say(format!("the report is in {}", report.display()));
    Ok(())
}

/// A built operator, or a release build of the working tree.
async fn binary(built: Option<&Path>, progress: &Progress) -> Result<PathBuf, ScaleError> {
    let io = |source| ScaleError::Io { what: "find the operator", source };
    if let Some(path) = built.filter(|path| !path.as_os_str().is_empty()) {
        return std::fs::canonicalize(path).map_err(io);
    }
    let root = checkout::root();
    let build = Program::new("cargo").words("build --release --package resilience-operator").dir(&root);
    progress.during("building the operator", build.run()).await?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
    std::fs::canonicalize(target.join("release/resilience-operator")).map_err(io)
}

/// A connection for each pod, and some more. The operators inherit the limit.
fn raise_file_limit(pods: usize) -> Result<(), ScaleError> {
    let needed = u64::try_from(pods).unwrap_or(u64::MAX).saturating_add(OTHER_FILES);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    // Root may raise the hard limit too.
    let raised = [limit.maximum, Some(needed)].into_iter().any(|maximum| {
        maximum.is_none_or(|maximum| maximum >= needed)
            && setrlimit(Resource::Nofile, Rlimit { current: maximum.or(Some(needed)), maximum }).is_ok()
    });
    if raised { Ok(()) } else { Err(ScaleError::Files { pods, needed, limit: limit.maximum.unwrap_or(needed) }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(policies: &[u16], quick: bool) -> Options {
        Options { policies: policies.to_vec(), operator: None, peer: None, quick, events: false }
    }

    #[test]
    fn quick_is_small_unless_a_size_is_named() {
        let sizes =
            |options: Options| options.sizes().iter().map(|size| (size.policies, size.pods())).collect::<Vec<_>>();
        assert_eq!(sizes(options(&[100, 1_000], false)), [(100, 1_000), (1_000, 10_000)]);
        assert_eq!(sizes(options(&[100, 1_000], true)), [(20, 200)]);
        assert_eq!(sizes(options(&[50], true)), [(50, 500)]);
    }

    #[test]
    fn percentiles_have_samples_enough() {
        let effort = options(&[100], false).effort();
        assert!(effort.changes >= 200 && effort.failures >= 200 && effort.rest >= Duration::from_secs(30));
    }

    #[test]
    fn a_limit_beyond_reach_is_told_with_its_numbers() {
        raise_file_limit(1).unwrap();
        let error = raise_file_limit(usize::MAX).unwrap_err().to_string();
        assert!(error.contains("ulimit -Hn"), "{error}");
    }
}
