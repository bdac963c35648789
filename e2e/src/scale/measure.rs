//! The measurements of one operator at one size, one after the other, each with a deadline that says what it waited for.

use super::api::{ApiClient, at_rate, for_all};
use super::audit_tail::{AuditTail, Writes};
use super::fleet::{BARE_NAMESPACE, Fleet, PROBE_SECONDS, SILENT, Size, Workload, policies_path, policy, policy_path};
use super::listener::{Counts, Told, What};
use super::operator_process::{Contender, OperatorProcess};
use super::policy_watch::PolicyWatch;
use super::results::{
    Actions, Bare, Changes, Disturbed, Events, Failover, Hour, PerEvent, Phase, Programmed, Rest, Run,
};
use super::statistics::Spread;
use super::usage::{self, Memory};
use super::{Effort, ScaleError};
use crate::apiserver::TestApiServer;
use crate::progress::Progress;
use serde::Deserialize;
use serde_json::json;
use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

/// The user that operators run as.
const USER: &str = "operator";
/// Namespace of their leases.
pub(super) const HOME: &str = "resilience-system";
/// Longest wait for something that takes a while at 10,000 pods.
const LONG: Duration = Duration::from_secs(600);
/// Longest wait for anything else.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest wait for a change to arrive; a sample that takes longer counts as this long.
const CHANGE_PATIENCE: Duration = Duration::from_secs(30);
/// Without a write and without a push for this long, an operator has settled.
const QUIET: Duration = Duration::from_secs(3);
/// Pause between two changes.
const BETWEEN_CHANGES: Duration = Duration::from_millis(100);
/// Pods that begin to fail in a second.
const FAILURES_PER_SECOND: u32 = 5;
/// Statuses of pods that are written in a second.
const EVENTS_PER_SECOND: u32 = 1_000;
/// Pods that turn ready or not in a second.
const READY_PER_SECOND: u32 = 100;
/// Workloads whose pods the events are about: the same at every size, so that only the size of the cluster differs.
const EVENT_WORKLOADS: usize = 100;
/// In how many parts the events come, each beside as many other writes: so what drifts meanwhile counts on both sides.
const EVENT_ROUNDS: usize = 4;
/// Single writes whose time is taken.
const SINGLE_WRITES: usize = 200;

/// One operator at one size, with an API server of its own.
pub struct Measure<'a> {
    effort: &'a Effort,
    progress: &'a Progress,
    contender: &'a Contender,
    fleet: Fleet,
    /// The administrator.
    api: ApiClient,
    /// The operator's own user, for the bare writes.
    as_operator: ApiClient,
    kubeconfig: PathBuf,
    logs: PathBuf,
    watch: PolicyWatch,
    audit: AuditTail,
    process: Option<OperatorProcess>,
    /// Raised for every change, so that each means something new.
    request_ms: u64,
    listening: JoinHandle<()>,
    // Last: what talks to it goes first.
    _server: TestApiServer,
}

impl Drop for Measure<'_> {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

pub(super) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> ScaleError {
    move |source| ScaleError::Io { what, source }
}

pub(super) fn waited(what: impl Into<String>) -> ScaleError {
    ScaleError::Waited(what.into())
}

/// Asks again and again until there is an answer; what was last seen is told when time is up.
pub(super) async fn until<T, S: Display>(
    patience: Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<Result<T, S>, ScaleError>,
) -> Result<T, ScaleError> {
    let begin = Instant::now();
    loop {
        match probe().await? {
            Ok(value) => return Ok(value),
            Err(last) if begin.elapsed() > patience => {
                return Err(waited(format!("waited {} s for {what}: {last}", patience.as_secs())));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// What an operator used between two moments.
struct Meter {
    at: Instant,
    cpu: Duration,
    tool: Duration,
    told: Counts,
}

impl<'a> Measure<'a> {
    /// Measures everything that `effort` asks for.
    pub async fn all(
        contender: &'a Contender,
        size: Size,
        effort: &'a Effort,
        logs: &Path,
        progress: &'a Progress,
    ) -> Result<Run, ScaleError> {
        let mut run = Run::new(&contender.name, size, usage::load_average().unwrap_or_default());
        let mut measure = Box::pin(Self::prepare(contender, size, effort, logs, progress)).await?;
        run.bare = measure.phase("the API server alone", async |m| m.bare().await).await;
        run.idle = measure.phase("the operator starts", async |m| m.start().await).await;
        run.programmed = measure.phase("all policies at once", async |m| m.program().await).await;
        if run.programmed.done().is_none() {
            return Ok(run);
        }
        if effort.only_events {
            run.events = measure.phase("statuses of pods", async |m| m.events().await).await;
            return Ok(run);
        }
        run.rest = measure.phase("nothing happens", async |m| m.rest().await).await;
        run.write = measure.phase("one bare write after another", async |m| m.single_writes().await).await;
        run.changes = measure.phase("one change after another", async |m| m.changes_until_enough().await).await;
        run.actions = measure.phase("one failure after another", async |m| m.actions().await).await;
        run.events = measure.phase("statuses of pods", async |m| m.events().await).await;
        run.hour = measure.phase("an hour's worth of events", async |m| m.hour().await).await;
        run.failover = measure.phase("the leader is killed", async |m| m.failover().await).await;
        run.crowd = measure.phase("all pods of a workload fail", async |m| m.crowd().await).await;
        run.silent = measure.phase("pods that do not answer", async |m| m.silent().await).await;
        Ok(run)
    }

    /// Runs one measurement. One that fails does not keep the next from being made.
    async fn phase<T>(
        &mut self,
        what: &str,
        measure: impl AsyncFnOnce(&mut Self) -> Result<T, ScaleError>,
    ) -> Phase<T> {
        let progress = self.progress.clone();
        match progress.during(what, Box::pin(measure(self))).await {
            Ok(value) => Phase::Done(value),
            Err(error) => {
                let mut why = error.to_string();
                if let Some(ended) = self.process.as_mut().and_then(OperatorProcess::ended) {
                    why = format!("{why}; {ended}");
                }
                progress.say(format!("  failed: {why}"));
                Phase::Failed(why)
            }
        }
    }

    async fn prepare(
        contender: &'a Contender,
        size: Size,
        effort: &'a Effort,
        logs: &Path,
        progress: &'a Progress,
    ) -> Result<Self, ScaleError> {
        let logs = logs.join(format!("{}x{}", size.policies, size.pods_each));
        let server = progress.during("starting etcd and an API server", TestApiServer::start()).await?;
        let kubeconfig = server.kubeconfig().with_file_name("operator.kubeconfig");
        let ca = server.kubeconfig().with_file_name("ca.crt");
        let token = server.user_token(USER).unwrap_or_default();
        crate::kubeconfig::write(&kubeconfig, "scale", server.url(), &ca, token).map_err(io("write a kubeconfig"))?;
        let api = ApiClient::new(&server.kubeconfig()).await?;
        let as_operator = ApiClient::new(&kubeconfig).await?;
        install(&api).await?;

        let mut fleet = Fleet::new(size);
        let (port, listening) = fleet.pods.serve().map_err(io("listen for the pods"))?;
        let watch = PolicyWatch::start(&api);
        let audit = AuditTail::new(&server.audit_log(), USER).map_err(io("read the audit log"))?;
        let what = format!("writing {} workloads and {} pods", size.policies, size.pods());
        let created = progress.during(&what, fleet.create(&api, port)).await;
        let measure = Self {
            effort,
            progress,
            contender,
            fleet,
            api,
            as_operator,
            kubeconfig,
            logs,
            watch,
            audit,
            process: None,
            request_ms: 5_000,
            listening,
            _server: server,
        };
        created?;
        Ok(measure)
    }

    /// Applying without a listener, and one ConfigMap, status patch and Secret for each policy.
    async fn bare(&mut self) -> Result<Bare, ScaleError> {
        let count = self.fleet.workloads.len();
        let (api, user) = (&self.api, &self.as_operator);
        let begin = Instant::now();
        for_all(count, |number| async move {
            let name = format!("bare-{number}");
            api.apply(&policy_path(BARE_NAMESPACE, &name), &policy(&name, "5s", 5_000)).await
        })
        .await?;
        let applying = begin.elapsed();
        let core = format!("/api/v1/namespaces/{BARE_NAMESPACE}");
        // As long as the document of such a policy.
        let (core, document) = (&core, &"x".repeat(1_500));
        let begin = Instant::now();
        for_all(count, |number| async move {
            let name = format!("bare-{number}");
            let metadata = json!({ "name": name, "labels": { "app": name } });
            let map = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
                "data": { (contract::CONFIG_KEY): document },
            });
            user.create(&format!("{core}/configmaps"), &map).await?;
            let condition = |kind: &str| {
                json!({
                    "type": kind, "status": "True", "reason": kind, "message": "live in 10 of 10 pods",
                    "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z",
                })
            };
            let kinds = ["Ready", "Accepted", "Programmed", "Healthy", "Degraded", "RecoveryAllowed"];
            let conditions = kinds.map(condition);
            let status =
                json!({ "status": { "observedGeneration": 1, "programmed": "10/10", "conditions": conditions } });
            user.merge(&format!("{}/status", policy_path(BARE_NAMESPACE, &name)), &status).await?;
            let secret = json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": metadata,
                "stringData": { "current": "0123456789abcdef0123456789abcdef", "previous": "" },
            });
            user.create(&format!("{core}/secrets"), &secret).await
        })
        .await?;
        let writes = begin.elapsed();
        for collection in [policies_path(BARE_NAMESPACE), format!("{core}/configmaps"), format!("{core}/secrets")] {
            self.api.delete(&collection).await?;
        }
        until(PATIENCE, "the bare policies to be gone", async || {
            let left: List = self.api.get(&policies_path(BARE_NAMESPACE)).await?;
            Ok(if left.items.is_empty() { Ok(()) } else { Err(left.items.len()) })
        })
        .await?;
        self.create_unwatched().await?;
        Ok(Bare { applying, writes })
    }

    /// Starts the operator and waits until its caches are filled: it leads, and has nothing more to do.
    async fn start(&mut self) -> Result<Memory, ScaleError> {
        let process = self.process.insert(self.contender.start("a", &self.kubeconfig, &self.logs)?);
        let api = &self.api;
        until(PATIENCE, "the operator to take its lease", async || {
            if let Some(ended) = process.ended() {
                return Err(waited(ended));
            }
            Ok(if holders(api).await?.is_empty() { Err("nobody holds one") } else { Ok(()) })
        })
        .await?;
        idle(process).await?;
        self.memory()
    }

    async fn program(&mut self) -> Result<Programmed, ScaleError> {
        self.audit.writes().map_err(io("read the audit log"))?;
        let meter = self.meter();
        let begin = Instant::now();
        let (api, fleet, request_ms) = (&self.api, &self.fleet, self.request_ms);
        let wanted = for_all(fleet.workloads.len(), |number| async move {
            let workload = &fleet.workloads[number];
            let made = api.apply(&workload.policy_path(), &workload.policy(request_ms)).await?;
            Ok((workload.key(), made.metadata.generation))
        })
        .await?;
        let applying = begin.elapsed();
        let last = self.watch.all_programmed(&wanted, LONG).await.map_err(waited)?;
        let (_, cpu, tool_cpu) = self.used(&meter);
        let (all, told) = (last.saturating_duration_since(begin), self.fleet.pods.counts().since(meter.told));
        let mut writes = self.audit.writes().map_err(io("read the audit log"))?;
        writes.add_all(&self.quiet().await?);
        Ok(Programmed { applying, all, cpu, tool_cpu, told, writes, memory: self.memory()? })
    }

    async fn rest(&mut self) -> Result<Rest, ScaleError> {
        self.audit.writes().map_err(io("read the audit log"))?;
        let meter = self.meter();
        tokio::time::sleep(self.effort.rest).await;
        let (window, cpu, tool) = self.used(&meter);
        let probes = self.fleet.pods.counts().since(meter.told).probes;
        let writes = self.audit.writes().map_err(io("read the audit log"))?.total();
        let window = window.as_secs_f64();
        Ok(Rest {
            cores: cpu.as_secs_f64() / window,
            tool_cores: tool.as_secs_f64() / window,
            probes_per_second: decimal(probes) / window,
            writes,
        })
    }

    /// What one small write takes while the operator is at rest: nothing that needs a write can be faster.
    async fn single_writes(&mut self) -> Result<Spread, ScaleError> {
        let mut times = Vec::new();
        for number in 0..SINGLE_WRITES {
            let begin = Instant::now();
            write_unwatched(&self.api, number).await?;
            times.push(begin.elapsed());
            tokio::time::sleep(BETWEEN_CHANGES).await;
        }
        Spread::of(times).ok_or_else(|| waited("nothing was written"))
    }

    /// ConfigMaps that no operator looks at.
    async fn create_unwatched(&self) -> Result<(), ScaleError> {
        let api = &self.api;
        for_all(EVENT_WORKLOADS, |number| async move {
            let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": unwatched(number) } });
            api.apply(&format!("{UNWATCHED}/{}", unwatched(number)), &map).await
        })
        .await?;
        Ok(())
    }

    async fn changes_until_enough(&mut self) -> Result<Changes, ScaleError> {
        let enough = self.effort.changes;
        let changes = self.changes(&mut |done, _| done < enough).await?;
        self.quiet().await?;
        Ok(changes)
    }

    /// Edits one policy after another while `more` says so, given how many there were and for how long.
    async fn changes(&mut self, more: &mut dyn FnMut(usize, Duration) -> bool) -> Result<Changes, ScaleError> {
        self.audit.writes().map_err(io("read the audit log"))?;
        let meter = self.meter();
        let (mut pods, mut status, mut late, mut count) = (Vec::new(), Vec::new(), 0, 0);
        while more(count, meter.at.elapsed()) {
            let workload = self.fleet.workloads[scattered(count, self.fleet.workloads.len())].clone();
            let (arrived, said) = self.change(&workload).await?;
            late += arrived.iter().chain([&said]).filter(|took| **took >= CHANGE_PATIENCE).count();
            pods.extend(arrived);
            status.push(said);
            count += 1;
            tokio::time::sleep(BETWEEN_CHANGES).await;
        }
        let (window, cpu, _) = self.used(&meter);
        let writes = self.audit.writes().map_err(io("read the audit log"))?.total();
        let none = || waited("no change was made");
        Ok(Changes {
            pods: Spread::of(pods).ok_or_else(none)?,
            status: Spread::of(status).ok_or_else(none)?,
            cores: cpu.as_secs_f64() / window.as_secs_f64(),
            count: u32::try_from(count).unwrap_or(u32::MAX),
            writes,
            late,
        })
    }

    /// Edits a policy: how long until each of its pods has it, and until its status says so.
    async fn change(&mut self, workload: &Workload) -> Result<(Vec<Duration>, Duration), ScaleError> {
        let mut told = self.fleet.pods.listen_in();
        self.request_ms += 1;
        let answer = self.api.apply(&workload.policy_path(), &workload.policy(self.request_ms)).await?;
        let answered = Instant::now();
        let mut arrived = Vec::new();
        let deadline = tokio::time::Instant::now() + CHANGE_PATIENCE;
        while arrived.len() < workload.pods.len() {
            match tokio::time::timeout_at(deadline, told.recv()).await {
                Ok(Some(Told { pod, at, what: What::NewConfig })) if workload.pods.contains(&pod) => {
                    arrived.push(at.saturating_duration_since(answered));
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        arrived.resize(workload.pods.len(), CHANGE_PATIENCE);
        let said = self.watch.programmed(&workload.key(), answer.metadata.generation, CHANGE_PATIENCE).await;
        Ok((arrived, said.map_or(CHANGE_PATIENCE, |at| at.saturating_duration_since(answered))))
    }

    /// Lets one pod here, one there fail.
    async fn actions(&mut self) -> Result<Actions, ScaleError> {
        let mut told = self.fleet.pods.listen_in();
        let size = self.fleet.workloads.len();
        let each = self.fleet.workloads.first().map_or(1, |workload| workload.pods.len());
        let mut open = std::collections::HashSet::new();
        let mut delays = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1) / FAILURES_PER_SECOND);
        for number in 0..self.effort.failures {
            tick.tick().await;
            // One pod of every workload, then another one of every workload.
            let pod = number % size * each + number / size % each;
            if let Some(mut pod) = self.fleet.pods.pod(pod) {
                pod.fail();
            }
            open.insert(pod);
            self.collect_actions(&mut told, &mut open, &mut delays, Duration::ZERO).await;
        }
        let slowest = Duration::from_secs(u64::from(PROBE_SECONDS) * 4) + Duration::from_secs(60);
        self.collect_actions(&mut told, &mut open, &mut delays, slowest).await;
        for pod in &open {
            if let Some(mut pod) = self.fleet.pods.pod(*pod) {
                pod.behavior = super::fake_pod::Behavior::Healthy;
            }
        }
        let delay = Spread::of(delays).ok_or_else(|| waited("no pod was told to act within 80 s"))?;
        self.quiet().await?;
        Ok(Actions { delay, missing: open.len() })
    }

    /// Takes in the actions that are there, or that come within `patience` while pods are waiting for one.
    async fn collect_actions(
        &self,
        told: &mut UnboundedReceiver<Told>,
        open: &mut std::collections::HashSet<usize>,
        delays: &mut Vec<Duration>,
        patience: Duration,
    ) {
        let deadline = tokio::time::Instant::now() + patience;
        while !open.is_empty() {
            let next = if patience.is_zero() {
                told.try_recv().ok()
            } else {
                tokio::time::timeout_at(deadline, told.recv()).await.ok().flatten()
            };
            let Some(Told { pod, at, what }) = next else { return };
            let third = self.fleet.pods.pod(pod).and_then(|pod| pod.third_failure);
            if let (What::Action, Some(third)) = (what, third)
                && open.remove(&pod)
            {
                delays.push(at.saturating_duration_since(third));
            }
        }
    }

    /// What the status of a pod costs that says nothing new, and what a pod costs that turns ready or not.
    async fn events(&mut self) -> Result<Events, ScaleError> {
        let each = self.fleet.workloads.first().map_or(1, |workload| workload.pods.len());
        let workloads = EVENT_WORKLOADS.min(self.fleet.workloads.len());
        // One pod of every workload, then another one of every workload.
        let pod = |number: usize| number % workloads * each + number / workloads % each;

        let (count, flips) = (self.effort.events, self.effort.flips / EVENT_ROUNDS);
        let plain = self
            .cost(count, EVENTS_PER_SECOND, async |api, fleet, number| {
                let status = json!({ "status": { "message": format!("event {number}") } });
                api.merge(&format!("{}/status", fleet.pod_path(pod(number))), &status).await
            })
            .await?;
        let ready = self
            .cost(2 * flips * EVENT_ROUNDS, READY_PER_SECOND, async |api, fleet, number| {
                // In each part all turn not ready, as when a node is gone, and then ready again.
                let ready = if number / flips % 2 == 0 { "False" } else { "True" };
                let status = json!({ "status": { "conditions": [{ "type": "Ready", "status": ready }] } });
                api.merge(&format!("{}/status", fleet.pod_path(pod(number % flips))), &status).await
            })
            .await?;
        Ok(Events { plain, ready })
    }

    /// CPU of the operator for each of these writes, beyond what it uses while the API server is as busy with writes that the
    /// operator does not look at.
    async fn cost<F>(&mut self, count: usize, per_second: u32, write: F) -> Result<PerEvent, ScaleError>
    where
        F: AsyncFn(&ApiClient, &Fleet, usize) -> kube::Result<super::api::Object>,
    {
        let each = count / EVENT_ROUNDS;
        let mut beyond = 0.0;
        for round in 0..EVENT_ROUNDS {
            let numbers = round * each..(round + 1) * each;
            let unwatched = async |api: &ApiClient, _: &Fleet, number| write_unwatched(api, number).await;
            let (window, without) = self.cpu_during(numbers.clone(), per_second, unwatched).await?;
            let cores = without.as_secs_f64() / window.as_secs_f64();
            let (window, with) = self.cpu_during(numbers, per_second, &write).await?;
            beyond += with.as_secs_f64() - cores * window.as_secs_f64();
        }
        let events = u32::try_from(each * EVENT_ROUNDS).unwrap_or(u32::MAX).max(1);
        Ok(PerEvent { events, micros: beyond.max(0.0) * 1e6 / f64::from(events) })
    }

    async fn cpu_during<F>(
        &mut self,
        numbers: Range<usize>,
        per_second: u32,
        write: F,
    ) -> Result<(Duration, Duration), ScaleError>
    where
        F: AsyncFn(&ApiClient, &Fleet, usize) -> kube::Result<super::api::Object>,
    {
        let (api, fleet, write) = (&self.api, &self.fleet, &write);
        let meter = self.meter();
        let first = numbers.start;
        at_rate(numbers.len(), per_second, |number| async move { write(api, fleet, first + number).await }).await?;
        self.quiet().await?;
        let (window, cpu, _) = self.used(&meter);
        Ok((window, cpu))
    }

    /// What a busy hour brings: every pod's status is written twice, every tenth pod is replaced, every tenth policy is
    /// edited.
    async fn hour(&mut self) -> Result<Hour, ScaleError> {
        let (pods, policies) = (self.fleet.pod_count(), self.fleet.workloads.len());
        let (updates, replaced, edited) = (2 * pods, pods / 10, policies / 10);
        let (api, fleet) = (&self.api, &self.fleet);
        for_all(updates, |number| update_status(api, fleet, number)).await?;
        for_all(replaced, |number| fleet.replace_pod(api, number * 10, 2)).await?;
        self.request_ms += 1;
        let request_ms = self.request_ms;
        let wanted = for_all(edited, |number| async move {
            let workload = &fleet.workloads[number * 10];
            let made = api.apply(&workload.policy_path(), &workload.policy(request_ms)).await?;
            Ok((workload.key(), made.metadata.generation))
        })
        .await?;
        if !wanted.is_empty() {
            self.watch.all_programmed(&wanted, LONG).await.map_err(waited)?;
        }
        self.quiet().await?;
        Ok(Hour { updates, replaced, edited, memory: self.memory()? })
    }

    /// Kills the leader, and watches the replica that takes over.
    async fn failover(&mut self) -> Result<Failover, ScaleError> {
        let mut standby = self.contender.start("b", &self.kubeconfig, &self.logs)?;
        idle(&standby).await?;
        if let Some(ended) = standby.ended() {
            return Err(waited(ended));
        }
        let (before, holder) = (standby.cpu(), holders(&self.api).await?);
        let leader = self.process.replace(standby).ok_or_else(|| waited("there is no leader"))?;
        leader.kill();
        let killed = Instant::now();
        // What the old leader had sent is answered for a moment; the new one waits for the lease meanwhile.
        tokio::time::sleep(Duration::from_millis(300)).await;
        for number in 0..self.fleet.pod_count() {
            if let Some(mut pod) = self.fleet.pods.pod(number) {
                pod.forget_probes();
            }
        }
        let counts = self.fleet.pods.counts();
        let leads = until(PATIENCE, "another replica to take the lease", async || {
            let now = holders(&self.api).await?;
            Ok(if now == holder || now.is_empty() { Err("the dead one still holds it") } else { Ok(Instant::now()) })
        })
        .await?;
        let all = self.fleet.pod_count();
        let (known, cpu) = until(LONG, "the new leader to ask every pod", async || {
            let first = |number| self.fleet.pods.pod(number).and_then(|pod| pod.first_probe);
            let times: Vec<Instant> = (0..all).filter_map(first).collect();
            let cpu = self.process.as_ref().map(OperatorProcess::cpu).unwrap_or_default();
            Ok(match times.iter().max() {
                Some(last) if times.len() == all => Ok((*last, cpu)),
                _ => Err(format!("{} of {all} were asked", times.len())),
            })
        })
        .await?;
        self.quiet().await?;
        Ok(Failover {
            leads: leads.saturating_duration_since(killed),
            knows_all: known.saturating_duration_since(leads),
            cpu: cpu.saturating_sub(before),
            told: self.fleet.pods.counts().since(counts),
            memory: self.memory()?,
        })
    }

    /// All pods of one workload fail at once.
    async fn crowd(&mut self) -> Result<Disturbed, ScaleError> {
        let crowd = self.fleet.crowd.clone();
        self.apply_alone(&crowd).await?;
        self.quiet().await?;
        for number in crowd.pods.clone() {
            if let Some(mut pod) = self.fleet.pods.pod(number) {
                pod.fail();
            }
        }
        // Until here nothing counts as failed; from here all of them come to it within one probe interval.
        let first = until(PATIENCE, "the first of them to fail for the third time", async || {
            let failed = |number| self.fleet.pods.pod(number).is_some_and(|pod| pod.third_failure.is_some());
            Ok(if crowd.pods.clone().any(failed) { Ok(()) } else { Err("none has") })
        })
        .await;
        let disturbed = match first {
            Ok(()) => self.disturbed().await,
            Err(error) => Err(error),
        };
        for number in crowd.pods.clone() {
            if let Some(mut pod) = self.fleet.pods.pod(number) {
                pod.behavior = super::fake_pod::Behavior::Healthy;
            }
        }
        self.api.delete(&crowd.policy_path()).await?;
        self.quiet().await?;
        disturbed
    }

    /// Pods accept connections and never answer.
    async fn silent(&mut self) -> Result<Disturbed, ScaleError> {
        let silent = self.fleet.silent.clone();
        self.request_ms += 1;
        self.api.apply(&silent.policy_path(), &silent.policy(self.request_ms)).await?;
        until(PATIENCE, "every silent pod to be asked", async || {
            let was_asked = |number: &usize| self.fleet.pods.pod(*number).is_some_and(|pod| pod.first_probe.is_some());
            let asked = silent.pods.clone().filter(was_asked).count();
            Ok(if asked == SILENT { Ok(()) } else { Err(format!("{asked} of {SILENT} were asked")) })
        })
        .await?;
        let disturbed = self.disturbed().await;
        self.api.delete(&silent.policy_path()).await?;
        disturbed
    }

    async fn apply_alone(&mut self, workload: &Workload) -> Result<(), ScaleError> {
        self.request_ms += 1;
        let made = self.api.apply(&workload.policy_path(), &workload.policy(self.request_ms)).await?;
        self.watch.programmed(&workload.key(), made.metadata.generation, PATIENCE).await.map_err(waited)?;
        Ok(())
    }

    /// Edits policies elsewhere for a while.
    async fn disturbed(&mut self) -> Result<Disturbed, ScaleError> {
        let (begin, before) = (Instant::now(), self.fleet.pods.counts());
        let window = self.effort.window;
        let changes = self.changes(&mut |done, elapsed| done == 0 || elapsed < window).await?;
        let told = self.fleet.pods.counts().since(before);
        let window = begin.elapsed();
        let expected = decimal_len(self.fleet.pod_count()) / f64::from(PROBE_SECONDS) * window.as_secs_f64();
        Ok(Disturbed { changes, window, heard_percent: decimal(told.probes) / expected * 100.0, actions: told.actions })
    }

    /// Waits until neither a write nor a push comes any more; gives what was written until then.
    async fn quiet(&mut self) -> Result<Writes, ScaleError> {
        let (begin, mut since) = (Instant::now(), Instant::now());
        let mut writes = Writes::default();
        let mut told = self.fleet.pods.counts();
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let new = self.audit.writes().map_err(io("read the audit log"))?;
            let now = self.fleet.pods.counts();
            if new.total() > 0 || (now.pushes, now.actions) != (told.pushes, told.actions) {
                since = Instant::now();
            }
            writes.add_all(&new);
            told = now;
            if since.elapsed() >= QUIET {
                return Ok(writes);
            }
            if begin.elapsed() > PATIENCE {
                let last = format!("{writes}, {} pushes", now.pushes);
                return Err(waited(format!("waited {} s for the operator to settle: {last}", PATIENCE.as_secs())));
            }
        }
    }

    fn meter(&self) -> Meter {
        Meter {
            at: Instant::now(),
            cpu: self.process.as_ref().map(OperatorProcess::cpu).unwrap_or_default(),
            tool: usage::cpu(std::process::id()).unwrap_or_default(),
            told: self.fleet.pods.counts(),
        }
    }

    /// Time, CPU of the operator and CPU of this tool since then.
    fn used(&self, since: &Meter) -> (Duration, Duration, Duration) {
        let now = self.meter();
        (now.at - since.at, now.cpu.saturating_sub(since.cpu), now.tool.saturating_sub(since.tool))
    }

    fn memory(&self) -> Result<Memory, ScaleError> {
        self.process.as_ref().and_then(OperatorProcess::memory).ok_or_else(|| waited("the operator is gone"))
    }
}

/// Nothing is read of a list but how long it is.
#[derive(Deserialize)]
struct List {
    items: Vec<serde::de::IgnoredAny>,
}

/// The definitions, the operators' namespace, and rights for their user.
pub(super) async fn install(api: &ApiClient) -> Result<(), ScaleError> {
    for definition in crds::manifests::definitions() {
        let definition = serde_json::to_value(definition).map_err(kube::Error::SerdeError)?;
        let name = definition["metadata"]["name"].as_str().unwrap_or_default();
        let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}");
        api.apply(&path, &definition).await?;
    }
    until(PATIENCE, "the definitions to be served", async || {
        Ok(match api.get::<List>("/apis/resilience.ticketwave.io/v1alpha1/resiliencepolicies").await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) => Err(status.message),
            Err(error) => return Err(error.into()),
        })
    })
    .await?;
    let home = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": HOME } });
    api.create("/api/v1/namespaces", &home).await?;
    // What the rights of the chart allow and forbid is tested elsewhere.
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": "scale" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin" },
        "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER }],
    });
    api.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await?;
    Ok(())
}

/// Where the ConfigMaps are that no operator looks at.
const UNWATCHED: &str = "/api/v1/namespaces/default/configmaps";

fn unwatched(number: usize) -> String {
    format!("unwatched-{}", number % EVENT_WORKLOADS)
}

/// A write that no operator looks at.
async fn write_unwatched(api: &ApiClient, number: usize) -> kube::Result<super::api::Object> {
    let change = json!({ "data": { "number": number.to_string() } });
    api.merge(&format!("{UNWATCHED}/{}", unwatched(number)), &change).await
}

/// Writes a pod's status so that it is new and says nothing new.
fn update_status(
    api: &ApiClient,
    fleet: &Fleet,
    number: usize,
) -> impl Future<Output = kube::Result<super::api::Object>> {
    let path = format!("{}/status", fleet.pod_path(number % fleet.pod_count()));
    let api = api.clone();
    async move { api.merge(&path, &json!({ "status": { "message": format!("event {number}") } })).await }
}

/// The identities that hold leases.
async fn holders(api: &ApiClient) -> Result<Vec<String>, ScaleError> {
    #[derive(Deserialize)]
    struct Leases {
        items: Vec<Lease>,
    }
    #[derive(Deserialize)]
    struct Lease {
        spec: Option<LeaseSpec>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct LeaseSpec {
        holder_identity: Option<String>,
    }
    let leases: Leases = api.get(&format!("/apis/coordination.k8s.io/v1/namespaces/{HOME}/leases")).await?;
    let holders = leases.items.into_iter().filter_map(|lease| lease.spec?.holder_identity);
    Ok(holders.filter(|holder| !holder.is_empty()).collect())
}

/// Waits until a process has used next to no CPU for a while: then its caches are filled.
async fn idle(process: &OperatorProcess) -> Result<(), ScaleError> {
    let begin = Instant::now();
    let mut last = (begin, process.cpu());
    loop {
        tokio::time::sleep(QUIET).await;
        let now = (Instant::now(), process.cpu());
        let cores = (now.1.saturating_sub(last.1)).as_secs_f64() / (now.0 - last.0).as_secs_f64();
        if cores < 0.05 && !now.1.is_zero() {
            return Ok(());
        }
        if begin.elapsed() > PATIENCE {
            return Err(waited(format!("waited {} s for filled caches: it uses {cores:.2} core", PATIENCE.as_secs())));
        }
        last = now;
    }
}

/// The `number`th of `count` in an order in which neighbours are far apart.
fn scattered(number: usize, count: usize) -> usize {
    let stride = if count.is_multiple_of(101) { 1 } else { 101 };
    number * stride % count.max(1)
}

fn decimal(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

fn decimal_len(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
