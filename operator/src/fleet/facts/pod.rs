//! Pods.

use super::{Facts, LabelHashes, RawCondition, RawMeta, Uid, label_hashes};
use crate::fleet::pod_signals::{self, RawContainerStatus};
use contract::{admin, signing};
use engine::signals::PodSignals;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Time};
use serde::Deserialize;
use std::{net::IpAddr, sync::Arc};

/// Most named ports of a pod that are kept.
const MAX_NAMED_PORTS: usize = 16;
/// Longest name of a port that is kept, in bytes; the API server takes none that is longer.
const MAX_PORT_NAME: usize = 15;
/// Port of a pod that serves the public when no container names one.
const DEFAULT_PUBLIC_PORT: u16 = 8080;
/// Label of a pod to which nothing is to be done.
const EXCLUDE_LABEL: &str = "resilience.ticketwave.io/exclude-from-recovery";

/// The controller of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodOwner {
    /// A ReplicaSet, most likely of a Deployment.
    ReplicaSet,
    /// A StatefulSet.
    StatefulSet,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct PodFacts {
    /// Which pod.
    pub uid: Uid,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// What controls it: by owner references, never by labels, which anybody can give a pod.
    pub owner: Option<(PodOwner, Uid)>,
    /// Its labels.
    pub labels: LabelHashes,
    /// Its address.
    pub ip: Option<IpAddr>,
    /// Port of its admin server.
    pub admin_port: u16,
    /// Port on which it serves the public.
    pub public_port: u16,
    /// Its TCP ports that have a name.
    pub named_ports: Box<[(Box<str>, u16)]>,
    /// Its address is its node's, where anything may listen.
    pub host_network: bool,
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// Whether the kubelet calls it ready, or ever did.
    pub readiness: Readiness,
    /// It runs, or will: it is neither being deleted nor over.
    pub alive: bool,
    /// Its annotation says that it understands signed requests: it is never sent a token.
    pub signs: bool,
    /// Its label says that nothing is to be done to it.
    pub excluded: bool,
    /// What the kubelet says of it.
    pub signals: PodSignals,
}

/// Whether a kubelet calls a pod ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It never has.
    Never,
    /// It has, and does not now.
    NotNow,
    /// It does.
    Ready,
}

impl PodFacts {
    /// Whether the kubelet calls it ready.
    pub fn is_ready(&self) -> bool {
        self.readiness == Readiness::Ready
    }

    /// The TCP port of that name.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        self.named_ports.iter().find(|(known, _)| **known == *name).map(|(_, port)| *port)
    }
}

/// The parts of a pod that are read.
#[derive(Deserialize)]
pub struct RawPod {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    spec: RawPodSpec,
    #[serde(default)]
    status: RawPodStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPodSpec {
    containers: Vec<RawContainer>,
    init_containers: Vec<RawContainer>,
    host_network: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainer {
    #[serde(default)]
    ports: Vec<RawPort>,
    restart_policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    container_port: i32,
    protocol: Option<String>,
}

/// The named TCP ports of the containers, and of those init containers that go on beside them; of two of one name the first,
/// as for a Service.
fn named_ports(spec: &RawPodSpec) -> Box<[(Box<str>, u16)]> {
    let goes_on = |container: &&RawContainer| container.restart_policy.as_deref() == Some("Always");
    let containers = spec.containers.iter().chain(spec.init_containers.iter().filter(goes_on));
    let ports = containers.flat_map(|container| &container.ports);
    let tcp = ports.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
    let named = tcp.filter_map(|port| {
        let name = port.name.as_deref().filter(|name| name.len() <= MAX_PORT_NAME)?;
        Some((name.into(), u16::try_from(port.container_port).ok()?))
    });
    named.take(MAX_NAMED_PORTS).collect()
}

/// The parts of a pod's status that are read.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct RawPodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    start_time: Option<Time>,
    conditions: Option<Vec<RawCondition>>,
    pub(in crate::fleet) init_container_statuses: Option<Vec<RawContainerStatus>>,
    pub(in crate::fleet) container_statuses: Option<Vec<RawContainerStatus>>,
}

/// How long after a pod was taken up by its kubelet that may call it not ready for the first time.
const FIRST_WORD: SignedDuration = SignedDuration::from_secs(2);

impl RawPodStatus {
    pub(in crate::fleet) fn condition(&self, type_: &str) -> Option<&RawCondition> {
        self.conditions.iter().flatten().find(|condition| condition.type_ == type_)
    }

    /// A kubelet calls a pod not ready as it takes it up, and notes when it last changed its mind: later than that only if it
    /// has called it ready meanwhile. Both times are of one clock.
    fn readiness(&self) -> Readiness {
        let ready = self.condition("Ready");
        if ready.is_some_and(|ready| ready.status == "True") {
            return Readiness::Ready;
        }
        let changed_at = ready.and_then(|ready| ready.last_transition_time.as_ref());
        let times = self.start_time.as_ref().zip(changed_at);
        let changed = times.is_some_and(|(start, changed)| changed.0.duration_since(start.0) > FIRST_WORD);
        if changed { Readiness::NotNow } else { Readiness::Never }
    }
}

impl Facts for PodFacts {
    type Kind = Pod;
    type Raw = RawPod;

    fn pick(raw: RawPod) -> (RawMeta, Self) {
        let RawPod { metadata, spec, status } = raw;
        let owner = metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        let owner = owner.and_then(|owner| match owner.kind.as_str() {
            "ReplicaSet" => Some((PodOwner::ReplicaSet, owner.uid.as_str().into())),
            "StatefulSet" => Some((PodOwner::StatefulSet, owner.uid.as_str().into())),
            _ => None,
        });
        let port = |name: &str, otherwise: u16| {
            let mut named = spec.containers.iter().flat_map(|container| &container.ports);
            let port = named.find(|port| port.name.as_deref() == Some(name));
            port.and_then(|port| u16::try_from(port.container_port).ok()).unwrap_or(otherwise)
        };
        let readiness = status.readiness();
        let signals = pod_signals::pick(&status, metadata.created_at());
        let facts = Self {
            uid: metadata.shared_uid(),
            namespace: metadata.namespace.as_deref().unwrap_or_default().into(),
            name: metadata.name.as_deref().unwrap_or_default().into(),
            owner,
            labels: label_hashes(metadata.namespace.as_deref(), metadata.labels.as_ref()),
            ip: status.pod_ip.and_then(|ip| ip.parse().ok()),
            admin_port: port(admin::PORT_NAME, admin::DEFAULT_PORT),
            public_port: port("http", DEFAULT_PUBLIC_PORT),
            named_ports: named_ports(&spec),
            host_network: spec.host_network == Some(true),
            created_at: metadata.created_at(),
            readiness,
            alive: metadata.deletion_timestamp.is_none()
                && !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            signs: metadata.annotations.admin_auth.as_deref() == Some(signing::SCHEME),
            excluded: metadata.labels.iter().flatten().any(|(key, value)| key == EXCLUDE_LABEL && value == "true"),
            signals,
        };
        (metadata, facts)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::read, *};
    use serde_json::{Value, json};

    #[test]
    fn the_named_ports_of_a_pod_are_few_and_of_tcp() {
        let mut ports = vec![
            json!({ "name": "dns", "containerPort": 53, "protocol": "UDP" }),
            json!({ "containerPort": 1 }),
            json!({ "name": "web", "containerPort": 8080, "protocol": "TCP" }),
            json!({ "name": "web", "containerPort": 8081 }),
            json!({ "name": "x".repeat(100), "containerPort": 2 }),
        ];
        ports.extend((0..100).map(|number| json!({ "name": format!("p{number}"), "containerPort": 100 + number })));
        let spec = json!({ "hostNetwork": true, "containers": [{ "name": "app", "ports": ports }] });
        let facts = read::<PodFacts>(&json!({ "metadata": { "name": "p" }, "spec": spec })).facts;
        let init = json!([
            { "name": "once", "ports": [{ "name": "once", "containerPort": 3 }] },
            { "name": "sidecar", "restartPolicy": "Always", "ports": [{ "name": "beside", "containerPort": 4 }] },
        ]);
        let spec = json!({ "containers": [], "initContainers": init });
        let sidecar = read::<PodFacts>(&json!({ "metadata": { "name": "p" }, "spec": spec })).facts;
        assert_eq!(["once", "beside"].map(|name| sidecar.named_port(name)), [None, Some(4)]);
        assert_eq!(["dns", "web", "p1", "p99"].map(|name| facts.named_port(name)), [None, Some(8080), Some(101), None]);
        assert_eq!(facts.named_ports.len(), MAX_NAMED_PORTS);
        assert!(facts.host_network);
        assert!(!read::<PodFacts>(&json!({ "metadata": { "name": "p" } })).facts.host_network);
    }

    #[test]
    fn a_pod_is_read_without_what_nobody_needs() {
        let pod = read::<PodFacts>(&json!({
            "metadata": {
                "name": "booking-1", "namespace": "ticketing", "uid": "u1", "resourceVersion": "7",
                "creationTimestamp": "2026-11-28T10:00:00Z", "labels": { "app": "booking" },
                "annotations": { "big": "x".repeat(1000), signing::SCHEME_ANNOTATION: signing::SCHEME }, "managedFields": [{ "manager": "m" }],
                "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "r1", "controller": true }],
            },
            "spec": { "containers": [
                { "name": "sidecar" },
                { "name": "app", "ports": [{ "name": "admin", "containerPort": 9999 }, { "name": "http", "containerPort": 80 }] },
            ]},
            "status": { "phase": "Running", "podIP": "fd00::1", "conditions": [{ "type": "Ready", "status": "True" }] },
        }));
        let facts = pod.facts;
        assert_eq!(
            (facts.admin_port, facts.public_port, facts.readiness, facts.alive),
            (9999, 80, Readiness::Ready, true)
        );
        assert!(facts.signs);
        assert_eq!(facts.owner, Some((PodOwner::ReplicaSet, "r1".into())));
        assert_eq!(facts.ip, Some("fd00::1".parse().unwrap()));
        assert!(pod.metadata.labels.is_none() && pod.metadata.annotations.is_none());
    }

    #[rstest::rstest]
    #[case::ready(json!({ "status": "True", "lastTransitionTime": "2026-11-28T10:00:09Z" }), Readiness::Ready)]
    #[case::starting(json!({ "status": "False", "lastTransitionTime": "2026-11-28T10:00:00Z" }), Readiness::Never)]
    #[case::starting_for_hours(json!({ "status": "False", "lastTransitionTime": "2026-11-28T10:00:01Z", "reason": "ContainersNotReady" }), Readiness::Never)]
    #[case::not_ready_any_more(json!({ "status": "False", "lastTransitionTime": "2026-11-28T10:05:00Z" }), Readiness::NotNow)]
    #[case::unknown_since_its_node_is_cut_off(json!({ "status": "Unknown", "lastTransitionTime": "2026-11-28T10:05:00Z" }), Readiness::NotNow)]
    #[case::no_time(json!({ "status": "False" }), Readiness::Never)]
    fn whether_a_pod_was_ever_ready_is_told_by_when_that_last_changed(
        #[case] mut ready: Value,
        #[case] expected: Readiness,
    ) {
        ready["type"] = json!("Ready");
        let status = json!({ "startTime": "2026-11-28T10:00:00Z", "conditions": [ready] });
        let facts = read::<PodFacts>(&json!({ "metadata": { "name": "p" }, "status": status })).facts;
        assert_eq!(facts.readiness, expected);
    }

    #[test]
    fn a_pod_without_anything_is_read_too() {
        let facts = read::<PodFacts>(&json!({ "metadata": { "name": "p" } })).facts;
        assert_eq!(
            (facts.admin_port, facts.readiness, facts.alive, facts.ip),
            (admin::DEFAULT_PORT, Readiness::Never, true, None)
        );
    }
}
