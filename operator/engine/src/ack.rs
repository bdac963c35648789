//! Whether the pods of a workload really run what was published.

use contract::{Applied, CONTRACT_VERSION};

/// A pod, as far as acknowledgement goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodView<'a> {
    /// Name.
    pub name: &'a str,
    /// Whether Kubernetes calls it Ready.
    pub ready: bool,
    /// What it last said that it runs; absent: it never answered.
    pub applied: Option<&'a Applied>,
    /// Why its admin port does not answer, if it does not.
    pub unreachable: Option<&'a str>,
    /// Why nothing that it says is believed, if so.
    pub rejected: Option<&'a str>,
    /// Why it refused what was last pushed, if it did.
    pub refused: Option<&'a str>,
}

/// Count over the pods of one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// Ready pods.
    pub ready: usize,
    /// Ready pods that run the published meaning and understood all of it.
    pub in_sync: usize,
    /// Pods, ready or not, whose admin port does not answer.
    pub unreachable: usize,
    /// Those of them that speak an older contract, and run by a form of the document in which what the policy leaves
    /// unsaid is the ADR's number and not the workload's built-in value.
    pub older: usize,
    /// Why the first few of the others are not in sync, each with the pod's name.
    pub lagging: Vec<String>,
}

/// Most reasons that are kept: what fits into a condition's message.
const MAX_REASONS: usize = 10;
/// Most characters of one.
const MAX_REASON: usize = 300;

impl Acknowledged {
    /// Whether every ready pod is in sync (so too when there is none).
    pub fn complete(&self) -> bool {
        self.in_sync == self.ready
    }
}

/// Counts who runs a document.
pub struct Counter<'a> {
    content_hash: &'a str,
    result: Acknowledged,
}

impl<'a> Counter<'a> {
    /// Counts who runs `content_hash`.
    pub fn new(content_hash: &'a str) -> Self {
        Self { content_hash, result: Acknowledged::default() }
    }

    /// Counts one pod.
    pub fn count(&mut self, pod: &PodView<'_>) {
        let result = &mut self.result;
        result.unreachable += usize::from(pod.unreachable.is_some() || pod.rejected.is_some());
        if !pod.ready {
            return;
        }
        result.ready += 1;
        match lag(pod, self.content_hash, result.lagging.len() < MAX_REASONS) {
            Lag::None => {
                result.in_sync += 1;
                // What is left is what it finds in another form: everything else would be lag.
                result.older += usize::from(pod.applied.is_some_and(|applied| !applied.unsupported.is_empty()));
            }
            Lag::Told(reason) => {
                // Part of it may be the pod's own words.
                let reason: String = reason.chars().take(MAX_REASON).collect();
                result.lagging.push(format!("{}: {reason}", pod.name));
            }
            Lag::Untold => {}
        }
    }

    /// The count.
    pub fn done(self) -> Acknowledged {
        self.result
    }
}

/// Whether a pod is in sync.
enum Lag {
    None,
    Told(String),
    Untold,
}

/// Whether a pod is in sync; why not, only if that is `wanted`.
fn lag(pod: &PodView<'_>, content_hash: &str, wanted: bool) -> Lag {
    let runs_all = pod.applied.is_some_and(|applied| {
        applied.content_hash == content_hash
            && lost(applied).next().is_none()
            && applied.unknown_dependencies.is_empty()
    });
    match (pod.rejected.is_none() && runs_all, wanted) {
        (true, _) => Lag::None,
        (false, true) => Lag::Told(why(pod, content_hash)),
        (false, false) => Lag::Untold,
    }
}

/// The paths of the document that a pod does not know and does not find in another form either.
fn lost(applied: &Applied) -> impl Iterator<Item = &str> {
    let speaks = applied.contract_version;
    applied.unsupported.iter().map(String::as_str).filter(move |path| !contract::is_said_otherwise(speaks, path))
}

/// Why a pod is not in sync.
fn why(pod: &PodView<'_>, content_hash: &str) -> String {
    if let Some(why) = pod.rejected {
        return why.to_owned();
    }
    let Some(applied) = pod.applied else {
        return pod.unreachable.unwrap_or("has not answered yet").to_owned();
    };
    if applied.content_hash != content_hash {
        let runs = match applied.content_hash.get(..6) {
            Some(hash) => format!("still runs {hash}"),
            None => "still runs its built-in defaults".to_owned(),
        };
        return match pod.unreachable.or(pod.refused) {
            Some(why) => format!("{runs}; {why}; the push is repeated"),
            None => format!("{runs}; the push is repeated"),
        };
    }
    let unknown: Vec<_> = lost(applied).collect();
    if !unknown.is_empty() {
        let speaks = applied.contract_version;
        return format!(
            "does not know {} (it speaks contract {speaks}, the operator {CONTRACT_VERSION}): upgrade the workload",
            unknown.join(", ")
        );
    }
    format!("has no dependency named {}", applied.unknown_dependencies.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(hash: &str) -> Applied {
        Applied { content_hash: hash.into(), ..Applied::default() }
    }

    fn pod(ready: bool, applied: Option<&Applied>) -> PodView<'_> {
        PodView { name: "p", ready, applied, unreachable: None, rejected: None, refused: None }
    }

    fn count(pods: &[PodView<'_>]) -> Acknowledged {
        let mut counter = Counter::new("abcdef1");
        for pod in pods {
            counter.count(pod);
        }
        counter.done()
    }

    #[rstest::rstest]
    #[case::no_pods(&[], 0, 0)]
    #[case::in_sync(&[(true, Some("abcdef1"))], 1, 1)]
    #[case::other_hash(&[(true, Some("1234567"))], 1, 0)]
    #[case::built_in(&[(true, Some(""))], 1, 0)]
    #[case::silent(&[(true, None)], 1, 0)]
    #[case::not_ready_does_not_count(&[(false, None), (true, Some("abcdef1"))], 1, 1)]
    fn counts(#[case] pods: &[(bool, Option<&str>)], #[case] ready: usize, #[case] in_sync: usize) {
        let all: Vec<_> = pods.iter().map(|(ready, hash)| (*ready, hash.map(applied))).collect();
        let result = count(&all.iter().map(|(ready, applied)| pod(*ready, applied.as_ref())).collect::<Vec<_>>());
        assert_eq!((result.ready, result.in_sync), (ready, in_sync));
        assert_eq!(result.complete(), result.lagging.is_empty());
    }

    #[test]
    fn running_it_without_understanding_it_is_not_in_sync() {
        let older = Applied { unsupported: vec!["policy.settings.hedging".into()], ..applied("abcdef1") };
        let other = Applied { unknown_dependencies: vec!["paymnet".into()], ..applied("abcdef1") };
        let result = count(&[pod(true, Some(&older)), pod(true, Some(&other))]);
        assert_eq!(result.in_sync, 0);
        assert!(result.lagging[0].contains("policy.settings.hedging") && result.lagging[1].contains("paymnet"));
    }

    #[test]
    fn a_pod_of_version_0_1_that_runs_the_filled_in_form_is_in_sync_and_counted() {
        let speaking = |contract_version, unsupported: &[&str]| {
            let unsupported = unsupported.iter().map(ToString::to_string).collect();
            Applied { contract_version, unsupported, ..applied("abcdef1") }
        };
        let (older, newest) = (speaking(1, &["policy.settings.dependencyPolicies"]), applied("abcdef1"));
        let result = count(&[pod(true, Some(&older)), pod(true, Some(&newest))]);
        assert_eq!((result.in_sync, result.older), (2, 1));

        let lost = speaking(1, &["policy.settings.dependencyPolicies", "policy.settings.hedging"]);
        let result = count(&[pod(true, Some(&lost))]);
        assert_eq!((result.in_sync, result.older), (0, 0));
        assert!(result.lagging[0].contains("does not know policy.settings.hedging ("), "{:?}", result.lagging);

        let reader_of_2 = speaking(2, &["policy.settings.dependencyPolicies"]);
        assert_eq!(count(&[pod(true, Some(&reader_of_2))]).in_sync, 0, "a reader of contract 2 must know it");
    }

    #[test]
    fn a_pod_whose_report_is_rejected_does_not_count() {
        let applied = applied("abcdef1");
        let result = count(&[PodView { rejected: Some("invalid response"), ..pod(true, Some(&applied)) }]);
        assert_eq!((result.in_sync, result.unreachable), (0, 1));
        assert_eq!(result.lagging, ["p: invalid response"]);
    }

    #[test]
    fn an_unreachable_pod_that_is_in_sync_still_counts() {
        let applied = applied("abcdef1");
        let result = count(&[PodView { unreachable: Some("no answer within 2 s"), ..pod(true, Some(&applied)) }]);
        assert_eq!((result.in_sync, result.unreachable), (1, 1));
    }

    #[test]
    fn only_the_first_reasons_are_told() {
        let result = count(&vec![pod(true, None); 100]);
        assert_eq!((result.ready, result.in_sync, result.lagging.len()), (100, 0, MAX_REASONS));
    }
}
