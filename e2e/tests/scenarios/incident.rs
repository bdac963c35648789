//! Incidents that pods recover from, and what can be seen of the recovery from outside: in the pods' own counters and in the
//! API server's audit log.

use crate::common::SOON;
use crds::{ConditionType, ResiliencePolicy};
use e2e::{
    pod_admin::PodAdmin,
    sabotage::{HungCalls, PATIENT, StoppedBackends, sql},
    testbed::{TICKETING, Testbed, is_true, phase, until},
};
use kube::ResourceExt;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// What goes wrong, and by which step it is to recover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incident {
    /// All of a pod's connections hang while they are in use; the pod gives them up.
    Reset,
    /// All of a pod's connections hang while they are in use; the pod is evicted.
    Restart,
    /// The books do not add up; a Job puts them right.
    Cleanup,
}

impl Incident {
    pub const ALL: [Self; 3] = [Self::Reset, Self::Cleanup, Self::Restart];

    fn ladder(self) -> Value {
        let (check, mut step) = match self {
            Self::Reset => ("database", json!({ "action": "ResetConnections" })),
            Self::Restart => ("database", json!({ "action": "RestartPod" })),
            Self::Cleanup => (
                "booking-consistency",
                json!({ "action": "RunCleanupJob", "cronJobRef": { "name": "booking-cleanup" } }),
            ),
        };
        step["timeout"] = json!("3m");
        json!([{ "check": check, "steps": [step] }])
    }
}

/// What the booking pods do about connections on which nothing answers.
#[derive(Clone, Copy, Debug)]
pub struct Pods {
    /// `request` and `perTry` of their calls to the database.
    pub timeout: (&'static str, &'static str),
    /// Whether their pool replaces such connections by itself, so that only calls that hang on all of them need an action.
    pub replace_silent: bool,
    /// Whether the operator that gets their policy knows `startupGrace`.
    pub startup_grace: bool,
}

impl Pods {
    /// Those of this version.
    pub const CURRENT: Self = Self { timeout: PATIENT, replace_silent: true, startup_grace: true };
}

/// What hangs in a pod.
enum Hung {
    Calls(Box<HungCalls>),
    Connections(StoppedBackends),
}

impl Hung {
    async fn of(testbed: &Testbed, pod: &str, pods: Pods) -> Self {
        if pods.replace_silent {
            Self::Calls(Box::new(HungCalls::of(testbed, pod).await.unwrap()))
        } else {
            Self::Connections(StoppedBackends::of(testbed, &[pod]).await.unwrap())
        }
    }

    async fn resume(&self, testbed: &Testbed) {
        let resumed = match self {
            Self::Calls(calls) => calls.resume(testbed).await,
            Self::Connections(connections) => connections.resume(testbed).await,
        };
        resumed.unwrap();
    }
}

/// Everything that was seen before an incident.
pub struct Before {
    ids: BTreeSet<String>,
    /// How often each pod gave its connections up.
    pub resets: BTreeMap<String, u64>,
    pub evictions: usize,
    pub jobs: usize,
    /// Uids.
    pub pods: BTreeSet<String>,
}

/// An incident that was brought about.
pub struct Broken {
    pub incident: Incident,
    victim: Option<String>,
    hung: Option<Hung>,
    before: Before,
}

/// Applies a policy that recovers from this kind of incident without limits that would get in the way; an action has
/// succeeded when the check was healthy for `healthy_delay`.
pub async fn prepare(testbed: &Testbed, incident: Incident, pods: Pods, healthy_delay: &str) {
    let mut policy = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": "booking", "namespace": TICKETING },
        "spec": {
            "targetRefs": [{ "name": "booking" }],
            "dependencies": [{ "name": "database", "timeout": { "request": pods.timeout.0, "perTry": pods.timeout.1 }, "retry": { "numRetries": 1, "backOff": { "baseInterval": "200ms" } } }],
            "healthChecks": [
                { "name": "database", "interval": "1s", "unhealthyThreshold": 1 },
                { "name": "booking-consistency", "scope": "Workload", "interval": "1s", "unhealthyThreshold": 1 },
            ],
            "recovery": {
                "ladders": incident.ladder(),
                "limits": { "cooldown": "0s", "budget": { "actions": 20, "interval": "1s" } },
                "healthyDelay": healthy_delay,
            },
        },
    });
    if pods.startup_grace {
        policy["spec"]["recovery"]["startupGrace"] = json!("0s");
    }
    testbed.kubectl.apply(&policy.to_string()).await.unwrap();
}

impl Broken {
    /// Brings the incident about in pod number `index`.
    pub async fn bring_about(testbed: &Testbed, incident: Incident, kind: Pods, index: usize) -> Self {
        let before = Before::look(testbed).await;
        let pods = testbed.booking_pods().await.unwrap();
        let victim = (incident != Incident::Cleanup).then(|| pods[index % pods.len()].name_any());
        let hung = if let Some(pod) = &victim {
            Some(Hung::of(testbed, pod, kind).await)
        } else {
            sql(testbed, "update events set available = available - 1").await.unwrap();
            None
        };
        Self { incident, victim, hung, before }
    }

    /// Waits until an intent for it is in the status.
    pub async fn intended(&self, testbed: &Testbed) {
        let there = |policy: &ResiliencePolicy| {
            let recovery = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
            recovery.is_some_and(|recovery| !recovery.in_flight.is_empty())
        };
        testbed.policy_until("booking", SOON, "an intent", there).await.unwrap();
    }

    /// Waits until it has recovered and nothing is in flight, and checks from outside what was done for it.
    pub async fn recovered_once(self, testbed: &Testbed) {
        let incident = self.incident;
        let recovered = testbed
            .policy_until("booking", SOON * 3, &format!("{incident:?} recovered"), |policy| {
                let recovery = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
                let over = recovery.is_some_and(|recovery| {
                    recovery.in_flight.is_empty() && recovery.last.iter().any(|one| !self.before.ids.contains(&one.id))
                });
                over && is_true(policy, ConditionType::Healthy.as_str())
            })
            .await;
        if let Some(hung) = &self.hung {
            hung.resume(testbed).await;
        }
        recovered.unwrap();
        let mut new = testbed.recoveries().await.unwrap();
        new.retain(|recovery| recovery.spec.intent.as_ref().is_none_or(|id| !self.before.ids.contains(id)));
        assert!(new.iter().all(|recovery| phase(recovery) == "Succeeded"), "{incident:?}: {new:#?}");
        assert_eq!(new.len(), 1, "{incident:?}: one incident, one intent: {new:#?}");

        let after = Before::look(testbed).await;
        let resets = |seen: &Before| seen.resets.clone();
        let gone = self.before.pods.difference(&after.pods).count();
        let what = format!("{incident:?} of {:?}, {new:?}", self.victim);
        match incident {
            Incident::Reset => {
                let mut expected = resets(&self.before);
                *expected.entry(self.victim.clone().unwrap()).or_default() += 1;
                assert_eq!(resets(&after), expected, "{what}");
                assert_eq!(gone, 0, "{what}");
            }
            Incident::Restart => {
                assert_eq!(gone, 1, "{what}");
                assert!(!after.resets.contains_key(self.victim.as_ref().unwrap()), "{what}");
            }
            Incident::Cleanup => assert_eq!((resets(&after), gone), (resets(&self.before), 0), "{what}"),
        }
        let evictions = after.evictions - self.before.evictions;
        let jobs = after.jobs - self.before.jobs;
        if testbed.cluster.audit_log().await.unwrap().is_some() {
            assert_eq!(evictions, usize::from(incident == Incident::Restart), "{what}");
            assert_eq!(jobs, usize::from(incident == Incident::Cleanup), "{what}");
        }
    }
}

impl Before {
    pub async fn look(testbed: &Testbed) -> Self {
        let policy = testbed.policies().get("booking").await.unwrap();
        let recovery = policy.status.and_then(|status| status.recovery).unwrap_or_default();
        // Version 0.1 has all of them in the status.
        let of_0_1 = recovery.in_flight.iter().chain(&recovery.recent).map(|record| record.id.clone());
        let own = testbed.recoveries().await.unwrap().into_iter().filter_map(|recovery| recovery.spec.intent);
        let ids = of_0_1.chain(own).collect();
        let audit = testbed.audit_lines().await.unwrap();
        let made = |resource: &str, subresource: Option<&str>| {
            let of_that = |line: &&Value| {
                let object = &line["objectRef"];
                let code = line["responseStatus"]["code"].as_u64().unwrap_or_default();
                line["verb"] == "create"
                    && object["namespace"] == TICKETING
                    && object["resource"] == resource
                    && object["subresource"].as_str() == subresource
                    && (200..300).contains(&code)
            };
            audit.iter().filter(of_that).count()
        };
        let pods = testbed.booking_pods().await.unwrap().iter().filter_map(ResourceExt::uid).collect();
        Self {
            ids,
            resets: resets(testbed).await,
            evictions: made("pods", Some("eviction")),
            jobs: made("jobs", None),
            pods,
        }
    }
}

/// How often each pod gave its connections up, as the pods themselves count.
async fn resets(testbed: &Testbed) -> BTreeMap<String, u64> {
    until(SOON, "every pod says what it has done", || async {
        let pods = PodAdmin::find(testbed).await?;
        let mut counts = BTreeMap::new();
        for name in &pods.names {
            let done = pods.health(name).await?.actions_done;
            counts.insert(name.clone(), done.get("ResetConnections").copied().unwrap_or_default());
        }
        Ok(Ok(counts))
    })
    .await
    .unwrap()
}
