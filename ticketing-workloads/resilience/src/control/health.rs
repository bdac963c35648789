//! Health checks. Each runs in the background at its own pace, so a look at the report costs nothing and touches
//! nothing; what the report shows is at most one interval old.

use crate::clock::{in_words, millis};
use crate::sync::lock;
use crate::workload::Resilience;
use contract::{CheckReport, CheckStatus, HealthCheckSettings};
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use serde_json::Value;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// No check runs more often than this, whatever its settings say.
const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// What one run of a check found.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    status: CheckStatus,
    message: String,
    data: BTreeMap<String, Value>,
    dependency_answers: Option<bool>,
}

impl CheckOutcome {
    /// An outcome with what was found, in words.
    pub fn new(status: CheckStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), data: BTreeMap::new(), dependency_answers: None }
    }

    /// Adds a figure behind it.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.data.insert(name.to_owned(), value);
        self
    }

    /// Adds whether a fresh connection to the dependency answered; `None`: it was not tried.
    #[must_use]
    pub fn dependency_answers(mut self, answers: Option<bool>) -> Self {
        self.dependency_answers = answers;
        self
    }

    /// The status that the run found.
    pub fn status(&self) -> CheckStatus {
        self.status
    }

    /// What it found, in words.
    pub fn message(&self) -> &str {
        &self.message
    }
}

type Probe = Box<dyn Fn(HealthCheckSettings) -> BoxFuture<'static, CheckOutcome> + Send + Sync>;

/// A check that runs at its own interval.
pub struct Check {
    name: String,
    tags: Vec<String>,
    dependency: Option<String>,
    unanswered: CheckStatus,
    probe: Probe,
    last: Mutex<CheckReport>,
    now: Notify,
}

impl Check {
    /// A check that runs `probe` with its settings.
    ///
    /// A probe of a dependency must not go through the [`crate::Dependency`]: while the circuit is open that would
    /// show the circuit, not the dependency.
    pub fn new<F, Fut>(name: &str, tags: &[&str], probe: F) -> Self
    where
        F: Fn(HealthCheckSettings) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = CheckOutcome> + Send + 'static,
    {
        let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        let last = CheckReport {
            status: CheckStatus::Unknown,
            message: "has not run yet".to_owned(),
            tags: tags.clone(),
            dependency: None,
            dependency_answers: None,
            duration_ms: 0,
            consecutive_failures: 0,
            runs: 0,
            data: BTreeMap::new(),
        };
        Self {
            name: name.to_owned(),
            tags,
            dependency: None,
            unanswered: CheckStatus::Unhealthy,
            probe: Box::new(move |settings| probe(settings).boxed()),
            last: Mutex::new(last),
            now: Notify::new(),
        }
    }

    /// Names the dependency whose failure makes the check fail.
    #[must_use]
    pub fn dependency(mut self, name: &str) -> Self {
        self.dependency = Some(name.to_owned());
        lock(&self.last).dependency.clone_from(&self.dependency);
        self
    }

    /// The status of a run that has no answer in time; [`CheckStatus::Unhealthy`] unless said otherwise.
    #[must_use]
    pub fn when_unanswered(mut self, status: CheckStatus) -> Self {
        self.unanswered = status;
        self
    }

    async fn run(&self, settings: HealthCheckSettings) -> CheckReport {
        let started = Instant::now();
        let timeout = Duration::from_millis(settings.timeout_ms);
        let outcome = match tokio::time::timeout(timeout, AssertUnwindSafe((self.probe)(settings)).catch_unwind()).await
        {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => CheckOutcome::new(CheckStatus::Unhealthy, "the check panicked; see the log of the pod"),
            Err(_) => CheckOutcome::new(self.unanswered, format!("timed out after {}", in_words(timeout))),
        };
        let mut last = lock(&self.last);
        let failures = match outcome.status {
            CheckStatus::Healthy => 0,
            CheckStatus::Unhealthy => last.consecutive_failures.saturating_add(1),
            // Neither a failure nor a success: the count stands.
            CheckStatus::Degraded | CheckStatus::Unknown => last.consecutive_failures,
        };
        *last = CheckReport {
            status: outcome.status,
            message: outcome.message,
            tags: self.tags.clone(),
            dependency: self.dependency.clone(),
            dependency_answers: outcome.dependency_answers,
            duration_ms: millis(started.elapsed()),
            consecutive_failures: failures,
            runs: last.runs + 1,
            data: outcome.data,
        };
        last.clone()
    }
}

/// All checks of a workload.
pub struct Checks {
    resilience: Arc<Resilience>,
    checks: BTreeMap<String, Check>,
}

impl Checks {
    /// These checks, not running yet.
    pub fn new(resilience: Arc<Resilience>, checks: impl IntoIterator<Item = Check>) -> Arc<Self> {
        let checks = checks.into_iter().map(|check| (check.name.clone(), check)).collect();
        Arc::new(Self { resilience, checks })
    }

    /// Runs the checks, each at its own pace, for as long as it is polled.
    pub async fn run(&self) {
        join_all(self.checks.values().map(|check| self.repeat(check))).await;
    }

    /// Lets a check run now, and not only when its interval is over.
    pub fn run_now(&self, name: &str) {
        if let Some(check) = self.checks.get(name) {
            check.now.notify_one();
        }
    }

    /// The last outcome of every check, and the worst of those that are known.
    pub fn report(&self) -> (CheckStatus, BTreeMap<String, CheckReport>) {
        let reports: BTreeMap<_, _> =
            self.checks.iter().map(|(name, check)| (name.clone(), lock(&check.last).clone())).collect();
        let known = reports.values().map(|report| report.status).filter(|status| *status != CheckStatus::Unknown);
        (known.max().unwrap_or_default(), reports)
    }

    async fn repeat(&self, check: &Check) {
        let mut changes = self.resilience.changes();
        loop {
            let before = lock(&check.last).status;
            let report = check.run(self.settings(check)).await;
            if report.status == CheckStatus::Unhealthy || report.status == CheckStatus::Degraded {
                self.resilience.metrics().check_failed(&check.name);
            }
            if report.status != before {
                let CheckReport { status, message, .. } = &report;
                tracing::info!(check = %check.name, ?before, ?status, %message, "check changed");
            }
            let next = Instant::now() + Duration::from_millis(self.settings(check).interval_ms).max(MIN_INTERVAL);
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = check.now.notified() => {}
                // New settings may ask for another pace.
                change = changes.changed() => if change.is_err() { return },
            }
        }
    }

    fn settings(&self, check: &Check) -> HealthCheckSettings {
        self.resilience.check_settings(&check.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::WorkloadId;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn resilience() -> Arc<Resilience> {
        Resilience::builder(WorkloadId::deployment("n", "w")).build()
    }

    async fn after(checks: &Arc<Checks>, time: Duration) -> BTreeMap<String, CheckReport> {
        let running = tokio::spawn({
            let checks = Arc::clone(checks);
            async move { checks.run().await }
        });
        tokio::time::sleep(time).await;
        running.abort();
        checks.report().1
    }

    #[tokio::test(start_paused = true)]
    async fn runs_at_its_interval_and_counts_failures_in_a_row() {
        let runs = AtomicU32::new(0);
        let check = Check::new("flaky", &["critical"], move |_| {
            let failed = runs.fetch_add(1, Ordering::SeqCst) >= 2;
            let status = if failed { CheckStatus::Unhealthy } else { CheckStatus::Healthy };
            async move { CheckOutcome::new(status, "so it is") }
        })
        .dependency("database");
        let checks = Checks::new(resilience(), [check]);
        assert_eq!(checks.report().1["flaky"].runs, 0);
        // At 0, 5, 10, 15 and 20 s.
        let report = after(&checks, Duration::from_secs(22)).await.remove("flaky").unwrap();
        assert_eq!((report.runs, report.consecutive_failures, report.status), (5, 3, CheckStatus::Unhealthy));
        assert_eq!((report.tags, report.dependency), (vec!["critical".to_owned()], Some("database".to_owned())));
        assert_eq!(checks.report().0, CheckStatus::Unhealthy);
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_or_panics_harms_only_itself() {
        let hangs = || std::future::pending::<CheckOutcome>();
        let checks = Checks::new(
            resilience(),
            [
                Check::new("hangs", &[], move |_| hangs()),
                Check::new("cannot tell", &[], move |_| hangs()).when_unanswered(CheckStatus::Unknown),
                Check::new("panics", &[], |_| async { panic!("on purpose") }),
                Check::new("works", &[], |_| async { CheckOutcome::new(CheckStatus::Healthy, "") }),
            ],
        );
        let report = after(&checks, Duration::from_secs(7)).await;
        let status = |name: &str| report[name].status;
        assert_eq!((status("hangs"), report["hangs"].duration_ms), (CheckStatus::Unhealthy, 1_000));
        assert_eq!(report["hangs"].message, "timed out after 1 s");
        assert_eq!(status("cannot tell"), CheckStatus::Unknown);
        assert_eq!(status("panics"), CheckStatus::Unhealthy);
        assert_eq!((status("works"), report["works"].runs), (CheckStatus::Healthy, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn runs_at_once_when_asked() {
        let checks = Checks::new(
            resilience(),
            [Check::new("works", &[], |_| async { CheckOutcome::new(CheckStatus::Healthy, "") })],
        );
        checks.run_now("works");
        checks.run_now("no such check");
        assert_eq!(after(&checks, Duration::from_secs(1)).await["works"].runs, 2);
    }
}
