//! Metrics of the operator. Every label has few, fixed values or the name of a resource that a person made.

use contract::WorkloadId;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

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
    /// `started`, `succeeded`, `failed` or `cancelled`.
    pub outcome: &'static str,
}

/// Outcome of a call to a pod.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct PodCallLabels {
    /// `push`, `health` or `action`.
    pub call: &'static str,
    /// `ok`, `refused`, `unreachable` or `invalid`.
    pub result: &'static str,
}

/// All metrics.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    shown_circuits: Arc<Mutex<HashMap<WorkloadId, BTreeSet<String>>>>,
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
    /// Pods whose circuit is not closed.
    pub circuit_open_pods: Family<CircuitLabels, Gauge>,
    /// Documents published.
    pub publications: Counter,
    /// Calls to pods.
    pub pod_calls: Family<PodCallLabels, Counter>,
    /// Time from publishing a document to a pod's acknowledgement, in seconds.
    pub acknowledge_seconds: Histogram,
    /// Recovery actions by outcome.
    pub recovery_actions: Family<RecoveryLabels, Counter>,
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
            reconciliations: Family::default(),
            reconcile_seconds: Family::new_with_constructor(histogram),
            pods: Family::default(),
            pods_in_sync: Family::default(),
            pods_unreachable: Family::default(),
            pods_reports_rejected: Family::default(),
            pods_unowned: Family::default(),
            circuit_open_pods: Family::default(),
            publications: Counter::default(),
            pod_calls: Family::default(),
            acknowledge_seconds: Histogram::new(bounds()),
            recovery_actions: Family::default(),
            leader: Gauge::default(),
        };
        let mut registry = metrics.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let r = registry.sub_registry_with_prefix("resilience_operator");
        r.register("reconciliations", "Reconciles over objects, by kind and result", metrics.reconciliations.clone());
        r.register("reconcile_duration_seconds", "Time of a reconcile", metrics.reconcile_seconds.clone());
        r.register("pods", "Ready pods of a workload", metrics.pods.clone());
        r.register("pods_in_sync", "Ready pods that run what is published", metrics.pods_in_sync.clone());
        r.register("pods_unreachable", "Pods whose admin port does not answer", metrics.pods_unreachable.clone());
        r.register("pods_reports_rejected", "Pods whose answers cannot be true", metrics.pods_reports_rejected.clone());
        r.register("pods_unowned", "Pods with a workload's labels that are not its own", metrics.pods_unowned.clone());
        r.register("circuit_open_pods", "Pods whose circuit is not closed", metrics.circuit_open_pods.clone());
        r.register("publications", "Configurations published", metrics.publications.clone());
        r.register("pod_calls", "Calls to pods, by call and result", metrics.pod_calls.clone());
        r.register(
            "acknowledge_duration_seconds",
            "From publishing to a pod's acknowledgement",
            metrics.acknowledge_seconds.clone(),
        );
        r.register("recovery_actions", "Recovery actions, by outcome", metrics.recovery_actions.clone());
        r.register("leader", "1 while this replica leads", metrics.leader.clone());
        drop(registry);
        metrics
    }
}

impl Metrics {
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
