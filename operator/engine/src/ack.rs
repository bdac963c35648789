//! Whether the pods of a workload really run what was published.

use contract::{Applied, CONTRACT_VERSION};

/// A pod, as far as acknowledgement goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// Name.
    pub name: String,
    /// Whether Kubernetes calls it Ready.
    pub ready: bool,
    /// What it last said that it runs; absent: it never answered.
    pub applied: Option<Applied>,
    /// Why its admin port does not answer, if it does not.
    pub unreachable: Option<String>,
    /// Why nothing that it says is believed, if so.
    pub rejected: Option<String>,
    /// Why it refused what was last pushed, if it did.
    pub refused: Option<String>,
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

/// Counts who runs `content_hash`.
pub fn count(pods: &[PodView], content_hash: &str) -> Acknowledged {
    let mut result = Acknowledged::default();
    for pod in pods {
        result.unreachable += usize::from(pod.unreachable.is_some() || pod.rejected.is_some());
        if !pod.ready {
            continue;
        }
        result.ready += 1;
        match lag(pod, content_hash) {
            None => result.in_sync += 1,
            Some(reason) if result.lagging.len() < MAX_REASONS => {
                // Part of it may be the pod's own words.
                let reason: String = reason.chars().take(MAX_REASON).collect();
                result.lagging.push(format!("{}: {reason}", pod.name));
            }
            Some(_) => {}
        }
    }
    result
}

/// Why a pod is not in sync.
fn lag(pod: &PodView, content_hash: &str) -> Option<String> {
    if pod.rejected.is_some() {
        return pod.rejected.clone();
    }
    let Some(applied) = &pod.applied else {
        return Some(pod.unreachable.clone().unwrap_or_else(|| "has not answered yet".to_owned()));
    };
    if applied.content_hash != content_hash {
        let runs = match applied.content_hash.get(..6) {
            Some(hash) => format!("still runs {hash}"),
            None => "still runs its built-in defaults".to_owned(),
        };
        return Some(match pod.unreachable.as_ref().or(pod.refused.as_ref()) {
            Some(why) => format!("{runs}; {why}; the push is repeated"),
            None => format!("{runs}; the push is repeated"),
        });
    }
    if !applied.unsupported.is_empty() {
        let speaks = applied.contract_version;
        return Some(format!(
            "does not know {} (it speaks contract {speaks}, the operator {CONTRACT_VERSION}): upgrade the workload",
            applied.unsupported.join(", ")
        ));
    }
    if !applied.unknown_dependencies.is_empty() {
        return Some(format!("has no dependency named {}", applied.unknown_dependencies.join(", ")));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(ready: bool, hash: Option<&str>) -> PodView {
        let applied = hash.map(|hash| Applied { content_hash: hash.into(), ..Applied::default() });
        PodView { name: "p".into(), ready, applied, unreachable: None, rejected: None, refused: None }
    }

    #[rstest::rstest]
    #[case::no_pods(vec![], 0, 0)]
    #[case::in_sync(vec![pod(true, Some("abcdef1"))], 1, 1)]
    #[case::other_hash(vec![pod(true, Some("1234567"))], 1, 0)]
    #[case::built_in(vec![pod(true, Some(""))], 1, 0)]
    #[case::silent(vec![pod(true, None)], 1, 0)]
    #[case::not_ready_does_not_count(vec![pod(false, None), pod(true, Some("abcdef1"))], 1, 1)]
    fn counts(#[case] pods: Vec<PodView>, #[case] ready: usize, #[case] in_sync: usize) {
        let result = count(&pods, "abcdef1");
        assert_eq!((result.ready, result.in_sync), (ready, in_sync));
        assert_eq!(result.complete(), result.lagging.is_empty());
    }

    #[test]
    fn running_it_without_understanding_it_is_not_in_sync() {
        let mut older = pod(true, Some("abcdef1"));
        older.applied.as_mut().unwrap().unsupported = vec!["policy.settings.hedging".into()];
        let mut other = pod(true, Some("abcdef1"));
        other.applied.as_mut().unwrap().unknown_dependencies = vec!["paymnet".into()];
        let result = count(&[older, other], "abcdef1");
        assert_eq!(result.in_sync, 0);
        assert!(result.lagging[0].contains("policy.settings.hedging") && result.lagging[1].contains("paymnet"));
    }

    #[test]
    fn a_pod_that_is_not_believed_does_not_count() {
        let pod = PodView { rejected: Some("it makes no sense".into()), ..pod(true, Some("abcdef1")) };
        let result = count(&[pod], "abcdef1");
        assert_eq!((result.in_sync, result.unreachable), (0, 1));
        assert_eq!(result.lagging, ["p: it makes no sense"]);
    }

    #[test]
    fn an_unreachable_pod_that_is_in_sync_still_counts() {
        let pod = PodView { unreachable: Some("no answer within 2 s".into()), ..pod(true, Some("abcdef1")) };
        let result = count(&[pod], "abcdef1");
        assert_eq!((result.in_sync, result.unreachable), (1, 1));
    }
}
