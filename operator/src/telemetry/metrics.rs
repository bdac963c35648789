//! Metrics of the operator. Every label has few, fixed values or the name of a resource that a person made.

use super::process::ProcessCollector;
use crate::fleet::index::ObjectKey;
use contract::WorkloadId;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

/// What all names begin with.
const PREFIX: &str = "resilience_operator";

/// Declares the metrics: name and help of each, once.
macro_rules! metric_names {
    ($($variant:ident = $name:literal: $help:literal,)+) => {
        /// Names of the metrics. `docs/metrics.md` has a row for each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum MetricName {
            $(#[doc = $help] $variant,)+
        }

        impl MetricName {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its name without the prefix, and without the suffix that its type brings.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// What it says, in a line.
            pub const fn help(self) -> &'static str {
                match self {
                    $(Self::$variant => $help,)+
                }
            }
        }
    };
}

metric_names! {
    Reconciliations = "reconciliations": "Reconciles over objects, by kind and result",
    ReconcileDurationSeconds = "reconcile_duration_seconds": "Time of a reconcile",
    Pods = "pods": "Ready pods of a workload",
    PodsInSync = "pods_in_sync": "Ready pods that run what is published",
    PodsUnreachable = "pods_unreachable": "Pods whose admin port does not answer",
    PodsReportsRejected = "pods_reports_rejected": "Pods whose answers cannot be true",
    PodsUnowned = "pods_unowned": "Pods with a workload's labels that are not its own",
    DegradedModeActive = "degraded_mode_active": "1 while the fleet of a policy is in a stage of degraded mode",
    CircuitOpenPods = "circuit_open_pods": "Pods whose circuit is not closed",
    Publications = "publications": "Configurations published",
    PodCalls = "pod_calls": "Calls to pods, by call and result",
    CheckAsks = "check_asks": "Endpoints asked for http and tcp checks, by probe and result",
    AcknowledgeDurationSeconds = "acknowledge_duration_seconds": "From publishing to a pod's acknowledgement",
    RecoveryActions = "recovery_actions": "Recovery actions, by outcome",
    RecoveryWithheld = "recovery_withheld": "Recovery steps that a gate holds back, by reason",
    OfrepRequests = "ofrep_requests": "OFREP requests, by call and result",
    OfrepRequestDurationSeconds = "ofrep_request_duration_seconds": "Time to answer an OFREP request",
    OfrepStreams = "ofrep_streams": "Open streams of changes over OFREP",
    OfrepStreamEnds = "ofrep_stream_ends": "Streams of changes over OFREP that ended, by reason",
    OfrepEvents = "ofrep_events": "Changes told over OFREP, once for each stream",
    OfrepCertificateReads = "ofrep_certificate_reads": "Certificates of OFREP read, by result",
    FlagSyncCertificateReads = "flag_sync_certificate_reads": "Certificates of flagd.sync.v1 read, by result",
    FlagSyncCalls = "flag_sync_calls": "Calls of flagd.sync.v1, by call and result",
    FlagSyncStreams = "flag_sync_streams": "Streams of flag documents that are open",
    FlagSyncStreamsEnded = "flag_sync_streams_ended": "Streams of flag documents that have ended, by reason",
    FlagSyncDocuments = "flag_sync_documents": "Documents sent over streams",
    Leader = "leader": "1 while this replica leads",
}

impl MetricName {
    /// Its name with the prefix.
    pub fn full(self) -> String {
        format!("{PREFIX}_{}", self.as_str())
    }
}

/// Which kind of object a reconcile was over.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ReconcileLabels {
    /// `workload`, `policy` or `flag`.
    pub kind: &'static str,
    /// `ok`, `conflict`, `error`, `timeout` or `panic`.
    pub result: &'static str,
}

/// Which kind of object.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct KindLabels {
    /// `workload`, `policy` or `flag`.
    pub kind: &'static str,
}

/// A workload.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct WorkloadLabels {
    /// Its namespace.
    pub namespace: String,
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub workload: String,
}

/// Steps that a policy holds back for one reason.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct WithheldLabels {
    /// Namespace of the policy.
    pub namespace: String,
    /// Name of the policy.
    pub policy: String,
    /// The reason, as the status gives it.
    pub reason: &'static str,
}

/// A stage of degraded mode that the fleet of a policy is in.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct DegradedLabels {
    /// Namespace of the policy.
    pub namespace: String,
    /// Name of the policy.
    pub policy: String,
    /// Name of the stage.
    pub stage: String,
}

/// A circuit of a workload.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CircuitLabels {
    /// Namespace of the workload.
    pub namespace: String,
    /// Its kind.
    pub kind: &'static str,
    /// Name of the workload.
    pub workload: String,
    /// Name of the dependency.
    pub dependency: String,
}

/// Something that happened in recovery.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RecoveryLabels {
    /// Namespace of the policy.
    pub namespace: String,
    /// Name of the policy.
    pub policy: String,
    /// The action.
    pub action: &'static str,
    /// `started`, `succeeded`, `failed`, `cancelled` or `simulated`.
    pub outcome: &'static str,
}

/// Outcome of a call to a pod.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct PodCallLabels {
    /// `push`, `health`, `action` or `effective`.
    pub call: &'static str,
    /// `ok`, `refused`, `unreachable` or `invalid`.
    pub result: &'static str,
}

/// What an endpoint gave that was asked for a check.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CheckAskLabels {
    /// `http` or `tcp`.
    pub probe: &'static str,
    /// `ok`, `status`, `timeout`, `unreachable`, `tls` or `invalid`.
    pub result: &'static str,
}

/// An OFREP request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct OfrepLabels {
    /// `single`, `bulk`, `events`, `document` or `other`.
    pub call: &'static str,
    /// `ok`, `not_modified`, `invalid`, `not_found`, `unauthorized`, `forbidden`, `limited`, `unavailable` or `error`.
    pub result: &'static str,
}

/// Why a stream of changes ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct OfrepStreamEndLabels {
    /// `closed`, `age`, `forbidden`, `slow`, `shutdown` or `error`.
    pub reason: &'static str,
}

/// How the reading of a certificate ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CertificateLabels {
    /// `ok` or `error`.
    pub result: &'static str,
}

impl CertificateLabels {
    /// Whether the certificate can be used.
    pub const fn new(usable: bool) -> Self {
        Self { result: if usable { "ok" } else { "error" } }
    }
}

/// Which kind of OFREP request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct OfrepCallLabels {
    /// `single`, `bulk`, `events`, `document` or `other`.
    pub call: &'static str,
}

/// A call of `flagd.sync.v1`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct FlagSyncLabels {
    /// `sync`, `fetch`, `metadata` or `other`.
    pub call: &'static str,
    /// `ok`, `invalid`, `not_found`, `unauthorized`, `forbidden`, `limited`, `unavailable` or `error`.
    pub result: &'static str,
}

/// The end of a stream of flag documents.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct FlagSyncEndLabels {
    /// `client`, `slow`, `rights`, `stopping` or `error`.
    pub reason: &'static str,
}

/// All metrics.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    shown_circuits: Arc<Mutex<HashMap<WorkloadId, BTreeSet<String>>>>,
    shown_withheld: Arc<Mutex<HashMap<ObjectKey, BTreeMap<&'static str, i64>>>>,
    shown_degraded: Arc<Mutex<HashMap<ObjectKey, String>>>,
    /// Reconciles over objects.
    pub reconciliations: Family<ReconcileLabels, Counter>,
    /// Time of a reconcile, in seconds.
    pub reconcile_seconds: Family<KindLabels, Histogram, fn() -> Histogram>,
    /// Ready pods.
    pub pods: Family<WorkloadLabels, Gauge>,
    /// Ready pods that run what is published.
    pub pods_in_sync: Family<WorkloadLabels, Gauge>,
    /// Pods whose admin port does not answer.
    pub pods_unreachable: Family<WorkloadLabels, Gauge>,
    /// Pods whose answers cannot be true.
    pub pods_reports_rejected: Family<WorkloadLabels, Gauge>,
    /// Pods with the workload's labels that are not its own.
    pub pods_unowned: Family<WorkloadLabels, Gauge>,
    /// 1 for the stage that the fleet of a policy is in.
    pub degraded_mode: Family<DegradedLabels, Gauge>,
    /// Pods whose circuit is not closed.
    pub circuit_open_pods: Family<CircuitLabels, Gauge>,
    /// Documents published.
    pub publications: Counter,
    /// Calls to pods.
    pub pod_calls: Family<PodCallLabels, Counter>,
    /// Endpoints asked for checks of the operator's own.
    pub check_asks: Family<CheckAskLabels, Counter>,
    /// Time from publishing a document to a pod's acknowledgement, in seconds.
    pub acknowledge_seconds: Histogram,
    /// Recovery actions by outcome.
    pub recovery_actions: Family<RecoveryLabels, Counter>,
    /// Recovery steps that are held back.
    pub recovery_withheld: Family<WithheldLabels, Gauge>,
    /// OFREP requests.
    pub ofrep_requests: Family<OfrepLabels, Counter>,
    /// Time to answer an OFREP request, in seconds.
    pub ofrep_request_seconds: Family<OfrepCallLabels, Histogram, fn() -> Histogram>,
    /// Open streams of changes over OFREP.
    pub ofrep_streams: Gauge,
    /// Streams of changes over OFREP that ended.
    pub ofrep_stream_ends: Family<OfrepStreamEndLabels, Counter>,
    /// Changes told over OFREP.
    pub ofrep_events: Counter,
    /// Certificates of OFREP that were read.
    pub ofrep_certificate_reads: Family<CertificateLabels, Counter>,
    /// Certificates of `flagd.sync.v1` that were read.
    pub flag_sync_certificate_reads: Family<CertificateLabels, Counter>,
    /// Calls of `flagd.sync.v1`.
    pub flag_sync_calls: Family<FlagSyncLabels, Counter>,
    /// Streams of flag documents that are open.
    pub flag_sync_streams: Gauge,
    /// Streams of flag documents that have ended.
    pub flag_sync_streams_ended: Family<FlagSyncEndLabels, Counter>,
    /// Documents sent over streams.
    pub flag_sync_documents: Counter,
    /// 1 while this replica leads.
    pub leader: Gauge,
}

/// Bounds of the histograms: 1 ms doubled up to 16 s.
fn bounds() -> impl Iterator<Item = f64> {
    (0..15).map(|power| 0.001 * f64::from(1 << power))
}

fn histogram() -> Histogram {
    Histogram::new(bounds())
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::default(),
            shown_circuits: Arc::default(),
            shown_withheld: Arc::default(),
            shown_degraded: Arc::default(),
            reconciliations: Family::default(),
            reconcile_seconds: Family::new_with_constructor(histogram),
            pods: Family::default(),
            pods_in_sync: Family::default(),
            pods_unreachable: Family::default(),
            pods_reports_rejected: Family::default(),
            pods_unowned: Family::default(),
            degraded_mode: Family::default(),
            circuit_open_pods: Family::default(),
            publications: Counter::default(),
            pod_calls: Family::default(),
            check_asks: Family::default(),
            acknowledge_seconds: Histogram::new(bounds()),
            recovery_actions: Family::default(),
            recovery_withheld: Family::default(),
            ofrep_requests: Family::default(),
            ofrep_request_seconds: Family::new_with_constructor(histogram),
            ofrep_streams: Gauge::default(),
            ofrep_stream_ends: Family::default(),
            ofrep_events: Counter::default(),
            ofrep_certificate_reads: Family::default(),
            flag_sync_certificate_reads: Family::default(),
            flag_sync_calls: Family::default(),
            flag_sync_streams: Gauge::default(),
            flag_sync_streams_ended: Family::default(),
            flag_sync_documents: Counter::default(),
            leader: Gauge::default(),
        };
        let mut registry = metrics.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register_collector(Box::new(ProcessCollector));
        let prefixed = registry.sub_registry_with_prefix(PREFIX);
        for name in MetricName::ALL {
            metrics.register(*name, prefixed);
        }
        drop(registry);
        metrics
    }
}

impl Metrics {
    fn register(&self, which: MetricName, registry: &mut Registry) {
        let (name, help) = (which.as_str(), which.help());
        match which {
            MetricName::Reconciliations => registry.register(name, help, self.reconciliations.clone()),
            MetricName::ReconcileDurationSeconds => registry.register(name, help, self.reconcile_seconds.clone()),
            MetricName::Pods => registry.register(name, help, self.pods.clone()),
            MetricName::PodsInSync => registry.register(name, help, self.pods_in_sync.clone()),
            MetricName::PodsUnreachable => registry.register(name, help, self.pods_unreachable.clone()),
            MetricName::PodsReportsRejected => registry.register(name, help, self.pods_reports_rejected.clone()),
            MetricName::PodsUnowned => registry.register(name, help, self.pods_unowned.clone()),
            MetricName::DegradedModeActive => registry.register(name, help, self.degraded_mode.clone()),
            MetricName::CircuitOpenPods => registry.register(name, help, self.circuit_open_pods.clone()),
            MetricName::Publications => registry.register(name, help, self.publications.clone()),
            MetricName::PodCalls => registry.register(name, help, self.pod_calls.clone()),
            MetricName::CheckAsks => registry.register(name, help, self.check_asks.clone()),
            MetricName::AcknowledgeDurationSeconds => registry.register(name, help, self.acknowledge_seconds.clone()),
            MetricName::RecoveryActions => registry.register(name, help, self.recovery_actions.clone()),
            MetricName::RecoveryWithheld => registry.register(name, help, self.recovery_withheld.clone()),
            MetricName::OfrepRequests => registry.register(name, help, self.ofrep_requests.clone()),
            MetricName::OfrepRequestDurationSeconds => {
                registry.register(name, help, self.ofrep_request_seconds.clone());
            }
            MetricName::OfrepStreams => registry.register(name, help, self.ofrep_streams.clone()),
            MetricName::OfrepStreamEnds => registry.register(name, help, self.ofrep_stream_ends.clone()),
            MetricName::OfrepEvents => registry.register(name, help, self.ofrep_events.clone()),
            MetricName::OfrepCertificateReads => registry.register(name, help, self.ofrep_certificate_reads.clone()),
            MetricName::FlagSyncCertificateReads => {
                registry.register(name, help, self.flag_sync_certificate_reads.clone());
            }
            MetricName::FlagSyncCalls => registry.register(name, help, self.flag_sync_calls.clone()),
            MetricName::FlagSyncStreams => registry.register(name, help, self.flag_sync_streams.clone()),
            MetricName::FlagSyncStreamsEnded => registry.register(name, help, self.flag_sync_streams_ended.clone()),
            MetricName::FlagSyncDocuments => registry.register(name, help, self.flag_sync_documents.clone()),
            MetricName::Leader => registry.register(name, help, self.leader.clone()),
        }
    }

    /// The metrics as OpenMetrics text.
    pub fn render(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(
            &mut text,
            &self.registry.lock().unwrap_or_else(PoisonError::into_inner),
        )?;
        Ok(text)
    }

    /// Sets the gauges of a workload's circuits, and forgets those that nobody reports any more.
    pub fn set_circuits<'a>(&self, id: &WorkloadId, open: impl Iterator<Item = (&'a str, usize)>) {
        let labels = |dependency: &str| CircuitLabels {
            namespace: id.namespace.clone(),
            kind: id.kind.as_str(),
            workload: id.name.clone(),
            dependency: dependency.to_owned(),
        };
        let mut shown = self.shown_circuits.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shown.remove(id).unwrap_or_default();
        let mut now = BTreeSet::new();
        for (dependency, open) in open {
            self.circuit_open_pods.get_or_create(&labels(dependency)).set(i64::try_from(open).unwrap_or(i64::MAX));
            now.insert(dependency.to_owned());
        }
        for gone in before.difference(&now) {
            self.circuit_open_pods.remove(&labels(gone));
        }
        if !now.is_empty() {
            shown.insert(id.clone(), now);
        }
    }

    /// Sets the gauges of the steps that a policy holds back, by reason, and forgets those of reasons that hold nothing back.
    pub fn set_withheld(&self, policy: &ObjectKey, held: BTreeMap<&'static str, i64>) {
        let labels =
            |reason| WithheldLabels { namespace: policy.namespace.clone(), policy: policy.name.clone(), reason };
        let mut shown = self.shown_withheld.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shown.remove(policy).unwrap_or_default();
        for (reason, steps) in &held {
            self.recovery_withheld.get_or_create(&labels(reason)).set(*steps);
        }
        for gone in before.keys().filter(|reason| !held.contains_key(*reason)) {
            self.recovery_withheld.remove(&labels(gone));
        }
        if !held.is_empty() {
            shown.insert(policy.clone(), held);
        }
    }

    /// Sets the gauge of the stage that the fleet of a policy is in, and forgets that of the one before it.
    pub fn set_degraded(&self, policy: &ObjectKey, stage: Option<&str>) {
        let labels = |stage: &str| DegradedLabels {
            namespace: policy.namespace.clone(),
            policy: policy.name.clone(),
            stage: stage.to_owned(),
        };
        let mut shown = self.shown_degraded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = shown.remove(policy).filter(|before| Some(before.as_str()) != stage) {
            self.degraded_mode.remove(&labels(&before));
        }
        if let Some(stage) = stage {
            self.degraded_mode.get_or_create(&labels(stage)).set(1);
            shown.insert(policy.clone(), stage.to_owned());
        }
    }

    /// Forgets the series of a workload that is gone.
    pub fn forget(&self, id: &WorkloadId) {
        self.set_circuits(id, std::iter::empty());
        let labels = WorkloadLabels::of(id);
        self.pods.remove(&labels);
        self.pods_in_sync.remove(&labels);
        self.pods_unreachable.remove(&labels);
        self.pods_reports_rejected.remove(&labels);
        self.pods_unowned.remove(&labels);
    }
}

impl WorkloadLabels {
    /// The labels of a workload.
    pub fn of(id: &WorkloadId) -> Self {
        Self { namespace: id.namespace.clone(), kind: id.kind.as_str(), workload: id.name.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::process::METRICS;

    #[test]
    fn every_metric_is_rendered_under_its_name() {
        let metrics = Metrics::default();
        let id = WorkloadId::deployment("n", "w");
        metrics.reconciliations.get_or_create(&ReconcileLabels { kind: "policy", result: "ok" }).inc();
        metrics.reconcile_seconds.get_or_create(&KindLabels { kind: "policy" }).observe(0.1);
        for gauge in [
            &metrics.pods,
            &metrics.pods_in_sync,
            &metrics.pods_unreachable,
            &metrics.pods_reports_rejected,
            &metrics.pods_unowned,
        ] {
            gauge.get_or_create(&WorkloadLabels::of(&id)).set(1);
        }
        metrics.set_circuits(&id, [("database", 1)].into_iter());
        metrics.pod_calls.get_or_create(&PodCallLabels { call: "push", result: "ok" }).inc();
        metrics.check_asks.get_or_create(&CheckAskLabels { probe: "http", result: "ok" }).inc();
        metrics.ofrep_requests.get_or_create(&OfrepLabels { call: "bulk", result: "ok" }).inc();
        metrics.ofrep_request_seconds.get_or_create(&OfrepCallLabels { call: "bulk" }).observe(0.1);
        metrics.ofrep_stream_ends.get_or_create(&OfrepStreamEndLabels { reason: "age" }).inc();
        metrics.ofrep_certificate_reads.get_or_create(&CertificateLabels::new(true)).inc();
        metrics.flag_sync_certificate_reads.get_or_create(&CertificateLabels::new(false)).inc();
        metrics.flag_sync_calls.get_or_create(&FlagSyncLabels { call: "sync", result: "ok" }).inc();
        metrics.flag_sync_streams_ended.get_or_create(&FlagSyncEndLabels { reason: "client" }).inc();
        let action = RecoveryLabels { namespace: "n".into(), policy: "p".into(), action: "a", outcome: "started" };
        metrics.recovery_actions.get_or_create(&action).inc();
        let policy = ObjectKey { namespace: "n".into(), name: "p".into() };
        metrics.set_withheld(&policy, [("Cooldown", 2)].into());
        metrics.set_degraded(&policy, Some("mail"));
        let text = metrics.render().unwrap();
        let shown: BTreeSet<_> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let mut names: Vec<_> = MetricName::ALL.iter().map(|name| name.full()).collect();
        names.extend(METRICS.map(|(name, _)| name.to_owned()));
        assert_eq!(shown, names.iter().map(String::as_str).collect());
    }

    #[test]
    fn a_fleet_is_shown_in_one_stage_or_none() {
        let metrics = Metrics::default();
        let policy = ObjectKey { namespace: "n".into(), name: "p".into() };
        let shown = |stage: Option<&str>| {
            metrics.set_degraded(&policy, stage);
            let text = metrics.render().unwrap();
            let line = text.lines().find(|line| line.starts_with("resilience_operator_degraded_mode_active{"));
            line.map(str::to_owned)
        };
        let line = |stage: &str| {
            format!("resilience_operator_degraded_mode_active{{namespace=\"n\",policy=\"p\",stage=\"{stage}\"}} 1")
        };
        assert_eq!(shown(Some("mail")), Some(line("mail")));
        assert_eq!((shown(Some("cache")), shown(Some("cache"))), (Some(line("cache")), Some(line("cache"))));
        assert_eq!((shown(None), shown(None)), (None, None));
    }

    #[test]
    fn what_is_held_back_no_more_is_shown_no_more() {
        let metrics = Metrics::default();
        let policy = ObjectKey { namespace: "n".into(), name: "p".into() };
        let held = || metrics.render().unwrap().lines().filter(|line| line.contains("withheld{")).count();
        metrics.set_withheld(&policy, [("Cooldown", 2), ("Paused", 1)].into());
        assert_eq!(held(), 2);
        metrics.set_withheld(&policy, [("Paused", 3)].into());
        assert_eq!(held(), 1);
        metrics.set_withheld(&policy, BTreeMap::new());
        assert_eq!(held(), 0);
    }
}
