//! Which pods are asked for a Service. Pure.
//!
//! A Service is a tenant's object, and so is what it points at. The operator can reach more than a tenant can, so it decides
//! itself whom it asks: pods of the Service's own namespace that its selector finds, at the address that the API server has
//! of each, and never one where the operator itself, its node or the link could answer.

use crate::fleet::facts::{Facts, MAX_LABELS, PodFacts, RawMeta, label_hashes};
use contract::WorkloadId;
use k8s_openapi::{api::core::v1::Service, apimachinery::pkg::util::intstr::IntOrString};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// Most pods that are asked in one run of a check.
pub const MAX_ENDPOINTS: usize = 100;
/// Most checks of one namespace that are asked, those of dry runs among them.
pub const MAX_CHECKS: usize = 256;
/// Most ports of a Service that are named in a message.
const MAX_NAMED: usize = 5;

/// Where AWS tells a machine its credentials over IPv6.
const CLOUD_METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// What is kept of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceFacts {
    /// The labels by which it selects its pods.
    selector: BTreeMap<String, String>,
    /// It is a name of something outside the cluster.
    is_external_name: bool,
    ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ServicePort {
    port: i32,
    is_tcp: bool,
    target: TargetPort,
}

/// Where a port of a Service leads in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
enum TargetPort {
    Number(i32),
    Name(String),
}

/// The parts of a Service that are read.
#[derive(Deserialize)]
pub struct RawService {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    spec: RawSpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSpec {
    #[serde(rename = "type")]
    type_: Option<String>,
    selector: Option<BTreeMap<String, String>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    port: i32,
    protocol: Option<String>,
    target_port: Option<IntOrString>,
}

impl Facts for ServiceFacts {
    type Kind = Service;
    type Raw = RawService;

    fn pick(raw: RawService) -> (RawMeta, Self) {
        let RawService { metadata, spec } = raw;
        let port = |raw: RawPort| ServicePort {
            port: raw.port,
            is_tcp: raw.protocol.is_none_or(|protocol| protocol == "TCP"),
            target: match raw.target_port {
                Some(IntOrString::String(name)) => TargetPort::Name(name),
                Some(IntOrString::Int(number)) if number != 0 => TargetPort::Number(number),
                _ => TargetPort::Number(raw.port),
            },
        };
        let facts = Self {
            selector: spec.selector.unwrap_or_default(),
            is_external_name: spec.type_.as_deref() == Some("ExternalName"),
            ports: spec.ports.unwrap_or_default().into_iter().map(port).collect(),
        };
        (metadata, facts)
    }
}

/// Why nobody is asked. It says nothing of the health of anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAsked {
    /// There is no such Service.
    #[error("there is no Service {0}")]
    NoService(String),
    /// It cannot be read.
    #[error("the Service {service} cannot be read: {why}")]
    Unreadable {
        /// Name of the Service.
        service: String,
        /// The API server's words.
        why: String,
    },
    /// It leads out of the cluster.
    #[error("the Service {0} is of type ExternalName; only pods of this namespace are asked")]
    ExternalName(String),
    /// Its endpoints are made by hand.
    #[error("the Service {0} has no selector; endpoints that were made by hand are not asked")]
    NoSelector(String),
    /// Its selector cannot be compared.
    #[error("the selector of Service {0} has more than {MAX_LABELS} labels")]
    LargeSelector(String),
    /// It has no such port.
    #[error("the Service {service} has no TCP port {port}; it has {ports}")]
    NoPort {
        /// Name of the Service.
        service: String,
        /// The port that the check names.
        port: u16,
        /// The ports that there are.
        ports: String,
    },
    /// Its selector finds no pod.
    #[error("the selector of Service {0} finds no pod")]
    NoPods(String),
    /// None of its pods can be asked.
    #[error("none of the {pods} pods of Service {service} can be asked: {why}")]
    NoEndpoint {
        /// Name of the Service.
        service: String,
        /// Pods that the selector finds.
        pods: usize,
        /// What is in the way.
        why: String,
    },
    /// The certificates to verify against are not there.
    #[error("the certificates to verify against are missing: {0}")]
    NoCa(String),
    /// What is known of pods may be too old: an address may be another pod's by now.
    #[error(
        "the operator has heard nothing new from the API server for too long; pods are not asked at addresses that old"
    )]
    Stale,
    /// The operator itself has no way to the pods.
    #[error(
        "several pods of different workloads cannot be reached and no check of any namespace reaches one, so it is likely that the operator itself is cut off; that nobody answers it is not taken for a failure"
    )]
    CutOff,
    /// The namespace has too many checks.
    #[error("this namespace has more than {MAX_CHECKS} checks that the operator asks; this one is not asked")]
    TooManyChecks,
    /// Other checks of the namespace were in the way.
    #[error("it could not begin within the interval: other checks of this namespace take too long")]
    NoTurn,
    /// What has to be known first could not be read in time.
    #[error("what has to be known of its Service {0} could not be read in time")]
    LateLookup(String),
    /// There was no time for any of them.
    #[error(
        "none of its {0} pods could be asked within the interval: too many endpoints of this namespace give no answer"
    )]
    TooBusy(usize),
    /// The operator reaches pods in a way in which they cannot be asked.
    #[error(
        "the operator reaches pods through the API server (podTransport: apiserver-proxy), and http and tcp checks are asked straight at the pods' addresses"
    )]
    Transport,
}

impl NotAsked {
    /// Its kind, by which two reasons are told apart whatever names and numbers they have.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::NoService(_) => "no-service",
            Self::Unreadable { .. } => "unreadable",
            Self::ExternalName(_) => "external-name",
            Self::NoSelector(_) => "no-selector",
            Self::LargeSelector(_) => "large-selector",
            Self::NoPort { .. } => "no-port",
            Self::NoPods(_) => "no-pods",
            Self::NoEndpoint { .. } => "no-endpoint",
            Self::NoCa(_) => "no-ca",
            Self::Stale => "stale",
            Self::CutOff => "cut-off",
            Self::TooManyChecks => "too-many-checks",
            Self::NoTurn => "no-turn",
            Self::LateLookup(_) => "late-lookup",
            Self::TooBusy(_) => "too-busy",
            Self::Transport => "transport",
        }
    }
}

/// A pod that is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Uid of the pod.
    pub uid: Arc<str>,
    /// Its name.
    pub pod: Arc<str>,
    /// Its address and port.
    pub to: SocketAddr,
    /// The workload that it belongs to.
    pub owner: Option<WorkloadId>,
}

/// Whom a run of a check asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The pods, by name, at most [`MAX_ENDPOINTS`].
    pub asked: Vec<Endpoint>,
    /// How many could be asked.
    pub found: usize,
    /// The first of the policy's workloads to which some pod belongs that the selector finds, whether it is asked or not.
    pub first_owner: Option<WorkloadId>,
}

/// Whom to ask.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Name of the Service.
    pub service: &'a str,
    /// The port of it.
    pub port: u16,
    /// The policy's workloads, in its own order.
    pub targets: &'a [WorkloadId],
    /// Ask only pods of those.
    pub only_targets: bool,
    /// Ask at loopback addresses, too, where the pods of tests are.
    pub loopback: bool,
}

impl ServiceFacts {
    /// Hashes of the selector's labels, as the fleet index has them of pods.
    pub fn selector(&self, namespace: &str, service: &str) -> Result<Box<[u64]>, NotAsked> {
        if self.is_external_name {
            return Err(NotAsked::ExternalName(service.to_owned()));
        }
        if self.selector.is_empty() {
            return Err(NotAsked::NoSelector(service.to_owned()));
        }
        // Of a larger one some labels would not be compared, and pods would be asked that it does not select.
        if self.selector.len() > MAX_LABELS {
            return Err(NotAsked::LargeSelector(service.to_owned()));
        }
        Ok(label_hashes(Some(namespace), Some(&self.selector)))
    }

    /// The choice of whom to ask.
    pub fn choice<'a>(&'a self, question: Question<'a>) -> Result<Choice<'a>, NotAsked> {
        let mut tcp = self.ports.iter().filter(|port| port.is_tcp);
        let Some(port) = tcp.clone().find(|port| port.port == i32::from(question.port)) else {
            let ports: Vec<_> = tcp.by_ref().take(MAX_NAMED).map(|port| port.port.to_string()).collect();
            let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(", ") };
            return Err(NotAsked::NoPort { service: question.service.to_owned(), port: question.port, ports });
        };
        Ok(Choice { question, port: &port.target, selected: 0, found: 0, first_owner: None })
    }
}

/// A choice of whom to ask. It looks at every pod that the selector finds, and keeps none of them.
#[derive(Debug)]
pub struct Choice<'a> {
    question: Question<'a>,
    /// Where the port of the Service leads.
    port: &'a TargetPort,
    /// Pods that the selector finds.
    selected: usize,
    /// Those of them that can be asked.
    found: usize,
    /// The first of the policy's workloads to which one belongs.
    first_owner: Option<usize>,
}

impl Choice<'_> {
    /// Takes in a pod that the selector finds. Of two the lesser is to be asked rather, and tells more of what is in the way if
    /// none can be.
    pub fn rank(&mut self, pod: &PodFacts, owner: Option<&WorkloadId>) -> Option<Unaskable> {
        self.selected += 1;
        let place = owner.and_then(|owner| self.question.targets.iter().position(|target| target == owner));
        self.first_owner = self.first_owner.into_iter().chain(place).min();
        let unaskable = endpoint(pod, owner, self.port, self.question).err();
        self.found += usize::from(unaskable.is_none());
        unaskable
    }

    /// Whom to ask of the pods that rank first.
    pub fn of(self, pods: &[(Arc<PodFacts>, Option<WorkloadId>)]) -> Result<Endpoints, NotAsked> {
        let Self { question, port, selected, found, first_owner } = self;
        let service = || question.service.to_owned();
        if selected == 0 {
            return Err(NotAsked::NoPods(service()));
        }
        let mut in_the_way = Vec::new();
        let mut asked = Vec::new();
        for (pod, owner) in pods {
            match endpoint(pod, owner.as_ref(), port, question) {
                Ok(to) => asked.push(Endpoint {
                    uid: Arc::clone(&pod.uid),
                    pod: Arc::clone(&pod.name),
                    to,
                    owner: owner.clone(),
                }),
                Err(why) => in_the_way.push(why),
            }
        }
        if asked.is_empty() {
            let why = in_the_way.iter().min().map(|why| why.told(port)).unwrap_or_default();
            return Err(NotAsked::NoEndpoint { service: service(), pods: selected, why });
        }
        asked.truncate(MAX_ENDPOINTS);
        let first_owner = first_owner.and_then(|place| question.targets.get(place)).cloned();
        Ok(Endpoints { found: found.max(asked.len()), asked, first_owner })
    }
}

/// Why a pod is not asked; the first of them is what a person should hear when there are several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unaskable {
    /// The Service's port leads to none of the pod's.
    NoPort,
    /// It has its node's address.
    HostNetwork,
    /// Its address is not one of a pod.
    Address,
    /// It is not ready.
    NotReady,
    /// It belongs to no workload of the policy, and only those are asked.
    NotOfTargets,
}

impl Unaskable {
    fn told(self, port: &TargetPort) -> String {
        match (self, port) {
            (Self::NoPort, TargetPort::Name(name)) => format!("no container has a TCP port named {name}"),
            (Self::NoPort, TargetPort::Number(number)) => format!("{number} is no port"),
            (Self::HostNetwork, _) => "they have their node's address (hostNetwork)".to_owned(),
            (Self::Address, _) => "their addresses are not those of pods".to_owned(),
            (Self::NotReady, _) => "they are not ready".to_owned(),
            (Self::NotOfTargets, _) => {
                "they do not belong to a workload of this policy, as a check of scope Pod needs it".to_owned()
            }
        }
    }
}

fn endpoint(
    pod: &PodFacts,
    owner: Option<&WorkloadId>,
    port: &TargetPort,
    question: Question<'_>,
) -> Result<SocketAddr, Unaskable> {
    if question.only_targets && !owner.is_some_and(|owner| question.targets.contains(owner)) {
        return Err(Unaskable::NotOfTargets);
    }
    if !pod.is_ready() {
        return Err(Unaskable::NotReady);
    }
    if pod.host_network {
        return Err(Unaskable::HostNetwork);
    }
    let ip = pod.ip.filter(|ip| may_be_asked(*ip, question.loopback)).ok_or(Unaskable::Address)?;
    let number = match port {
        TargetPort::Number(number) => u16::try_from(*number).ok().filter(|number| *number != 0),
        TargetPort::Name(name) => pod.named_port(name),
    };
    number.map(|number| SocketAddr::new(ip, number)).ok_or(Unaskable::NoPort)
}

/// Whether an address can be that of a pod. Where the operator itself, its node, a neighbour on the link or what a cloud tells its
/// machines could answer, it does not ask; nor at an address of IPv6 that only stands for one of IPv4, and is translated on
/// the way.
pub fn may_be_asked(ip: IpAddr, loopback: bool) -> bool {
    // An IPv4 address can be written as one of IPv6.
    let ip = ip.to_canonical();
    if ip.is_loopback() {
        return loopback;
    }
    match ip {
        IpAddr::V4(ip) => {
            let this_network = ip.octets()[0] == 0;
            !(this_network || ip.is_link_local() || ip.is_multicast() || ip == Ipv4Addr::BROADCAST)
        }
        IpAddr::V6(ip) => {
            let stands_for_ipv4 = match ip.segments() {
                // IPv4-compatible, the unspecified address among them; and NAT64, the usual prefix and those of one's own.
                [0, 0, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 1, ..] => true,
                _ => false,
            };
            !(stands_for_ipv4 || ip == CLOUD_METADATA || ip.is_unicast_link_local() || ip.is_multicast())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::facts::{Readiness, Seen};
    use engine::signals::PodSignals;
    use jiff::Timestamp;
    use serde_json::json;

    fn service(spec: &serde_json::Value) -> ServiceFacts {
        serde_json::from_value::<Seen<ServiceFacts>>(json!({ "metadata": { "name": "web" }, "spec": spec }))
            .unwrap()
            .facts
    }

    fn usual() -> ServiceFacts {
        service(&json!({ "selector": { "app": "web" }, "ports": [
            { "port": 80, "targetPort": "site" }, { "port": 81, "targetPort": 9000 }, { "port": 82 },
            { "port": 53, "protocol": "UDP" },
        ]}))
    }

    impl ServiceFacts {
        /// Whom to ask of these pods, as the fleet index would pick them.
        fn endpoints(
            &self,
            question: Question<'_>,
            pods: &[(Arc<PodFacts>, Option<WorkloadId>)],
        ) -> Result<Endpoints, NotAsked> {
            let mut choice = self.choice(question)?;
            let ranked = pods.iter().map(|one| (choice.rank(&one.0, one.1.as_ref()), Arc::clone(&one.0.name), one));
            let mut ranked: Vec<_> = ranked.collect();
            ranked.sort_by(|(one, name, _), (other, other_name, _)| (one, name).cmp(&(other, other_name)));
            let picked: Vec<_> = ranked.into_iter().take(MAX_ENDPOINTS).map(|(.., one)| one.clone()).collect();
            choice.of(&picked)
        }
    }

    fn target(name: &str) -> WorkloadId {
        WorkloadId::deployment("n", name)
    }

    fn pod(name: &str, owner: Option<&str>, change: fn(&mut PodFacts)) -> (Arc<PodFacts>, Option<WorkloadId>) {
        let mut facts = PodFacts {
            uid: format!("uid-{name}").into(),
            namespace: "n".into(),
            name: name.into(),
            owner: None,
            labels: Box::default(),
            ip: Some("10.1.2.3".parse().unwrap()),
            admin_port: 1,
            public_port: 1,
            named_ports: [("site".into(), 8080)].into(),
            host_network: false,
            created_at: Timestamp::UNIX_EPOCH,
            readiness: Readiness::Ready,
            alive: true,
            signs: false,
            excluded: false,
            signals: PodSignals::default(),
        };
        change(&mut facts);
        (Arc::new(facts), owner.map(target))
    }

    const ASK: Question<'static> =
        Question { service: "web", port: 80, targets: &[], only_targets: false, loopback: false };

    #[rstest::rstest]
    #[case::by_name(80, 8080)]
    #[case::by_number(81, 9000)]
    #[case::the_same(82, 82)]
    fn a_port_of_the_service_leads_to_one_of_the_pod(#[case] port: u16, #[case] expected: u16) {
        let found = usual().endpoints(Question { port, ..ASK }, &[pod("a", None, |_| {})]).unwrap();
        assert_eq!(found.asked[0].to, SocketAddr::new("10.1.2.3".parse().unwrap(), expected));
    }

    #[test]
    fn an_ipv6_address_is_asked_as_one() {
        let found = usual().endpoints(ASK, &[pod("a", None, |pod| pod.ip = "fd00::7".parse().ok())]).unwrap();
        assert_eq!(found.asked[0].to.to_string(), "[fd00::7]:8080");
    }

    #[rstest::rstest]
    #[case::external(json!({ "type": "ExternalName", "externalName": "example.org", "selector": { "a": "b" } }), "is of type ExternalName")]
    #[case::by_hand(json!({ "ports": [{ "port": 80 }] }), "has no selector")]
    #[case::empty(json!({ "selector": {}, "ports": [{ "port": 80 }] }), "has no selector")]
    #[case::large(
        json!({ "selector": (0..33).map(|number| (number.to_string(), json!("x"))).collect::<serde_json::Map<_, _>>() }),
        "has more than 32 labels"
    )]
    fn a_service_that_is_not_asked_says_why(#[case] spec: serde_json::Value, #[case] expected: &str) {
        let error = service(&spec).selector("n", "web").unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[rstest::rstest]
    #[case::no_port(53, vec![], "has no TCP port 53; it has 80, 81, 82")]
    #[case::no_pods(80, vec![], "finds no pod")]
    #[case::not_ready(80, vec![pod("a", None, |pod| pod.readiness = Readiness::NotNow)], "they are not ready")]
    #[case::of_the_node(80, vec![pod("a", None, |pod| pod.host_network = true)], "hostNetwork")]
    #[case::no_address(80, vec![pod("a", None, |pod| pod.ip = None)], "not those of pods")]
    #[case::loopback(80, vec![pod("a", None, |pod| pod.ip = "127.0.0.1".parse().ok())], "not those of pods")]
    #[case::no_named_port(80, vec![pod("a", None, |pod| pod.named_ports = Box::default())], "no container has a TCP port named site")]
    fn nobody_to_ask_is_told(
        #[case] port: u16,
        #[case] pods: Vec<(Arc<PodFacts>, Option<WorkloadId>)>,
        #[case] expected: &str,
    ) {
        let error = usual().endpoints(Question { port, ..ASK }, &pods).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn for_each_pod_only_those_of_the_policys_workloads_are_asked() {
        let pods = [pod("a", Some("web"), |_| {}), pod("b", Some("other"), |_| {}), pod("c", None, |_| {})];
        let targets = [target("web")];
        let question = Question { targets: &targets, only_targets: true, ..ASK };
        let names = |found: &Endpoints| found.asked.iter().map(|one| one.pod.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&usual().endpoints(question, &pods).unwrap()), ["a"]);
        assert_eq!(
            names(&usual().endpoints(Question { only_targets: false, ..question }, &pods).unwrap()),
            ["a", "b", "c"]
        );
        let error = usual().endpoints(question, &pods[1..]).unwrap_err().to_string();
        assert!(error.contains("do not belong to a workload of this policy"), "{error}");
    }

    #[test]
    fn the_workload_that_is_meant_is_the_first_that_the_service_selects_ready_or_not() {
        let pods = [pod("a", Some("second"), |_| {}), pod("b", Some("first"), |pod| pod.readiness = Readiness::Never)];
        let targets = ["zero", "first", "second"].map(target);
        let found = usual().endpoints(Question { targets: &targets, ..ASK }, &pods).unwrap();
        assert_eq!((found.first_owner, found.found), (Some(target("first")), 1));
        assert_eq!(usual().endpoints(ASK, &pods).unwrap().first_owner, None);
    }

    #[test]
    fn only_so_many_are_asked() {
        let pods: Vec<_> = (0..250).map(|number| pod(&format!("{number:03}"), None, |_| {})).collect();
        let found = usual().endpoints(ASK, &pods).unwrap();
        assert_eq!((found.asked.len(), found.found), (MAX_ENDPOINTS, 250));
        assert_eq!(&*found.asked[99].pod, "099");
    }

    #[rstest::rstest]
    #[case("10.0.0.1", true)]
    #[case("100.64.0.1", true)]
    #[case("203.0.113.9", true)]
    #[case("fd00::1", true)]
    #[case("2001:db8::1", true)]
    #[case("127.0.0.1", false)]
    #[case("127.83.0.1", false)]
    #[case("0.0.0.0", false)]
    #[case("0.1.2.3", false)]
    #[case("169.254.169.254", false)]
    #[case("224.0.0.1", false)]
    #[case("255.255.255.255", false)]
    #[case("::", false)]
    #[case("::1", false)]
    #[case("fe80::1", false)]
    #[case("ff02::1", false)]
    #[case("169.254.0.1", false)]
    #[case("239.255.255.255", false)]
    #[case("fd00:ec2::254", false)]
    #[case("fd00:ec2::253", true)]
    #[case("::10.0.0.1", false)]
    #[case("64:ff9b::a00:1", false)]
    #[case("64:ff9b::a9fe:a9fe", false)]
    #[case("64:ff9b:1::a9fe:a9fe", false)]
    #[case("64:ff9c::1", true)]
    #[case("::ffff:10.0.0.1", true)]
    #[case("::ffff:0.1.2.3", false)]
    #[case("::ffff:224.0.0.1", false)]
    #[case("::ffff:255.255.255.255", false)]
    #[case("::ffff:127.0.0.1", false)]
    #[case("::ffff:169.254.169.254", false)]
    fn addresses_that_cannot_be_a_pods_are_not_asked(#[case] ip: IpAddr, #[case] expected: bool) {
        assert_eq!(may_be_asked(ip, false), expected);
        assert_eq!(may_be_asked(ip, true), expected || ip.to_canonical().is_loopback());
    }
}
