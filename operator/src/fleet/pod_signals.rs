//! What the kubelet says of a pod's containers, read straight from the API server's answer.

use super::facts::{RawCondition, RawPodStatus};
use crate::kubernetes::meta::cut;
use engine::signals::{Crash, ImageFailure, PodSignals, Ready};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

/// Most containers of a pod that are looked at, those that initialise it and the others.
const MAX_CONTAINERS: usize = 32;
/// Longest text that is kept, in bytes.
const MAX_WORDS: usize = 256;
/// What a kubelet calls it when it cannot start a container because of its image.
const IMAGE_REASONS: [&str; 6] = [
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
];

/// The parts of a container's status that are read.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawContainerStatus {
    name: String,
    image: String,
    restart_count: i32,
    state: RawState,
    last_state: RawState,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawState {
    waiting: Option<RawWaiting>,
    running: Option<RawRunning>,
    terminated: Option<RawTerminated>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawWaiting {
    reason: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawRunning {
    started_at: Option<Time>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawTerminated {
    reason: Option<String>,
    exit_code: i32,
    started_at: Option<Time>,
    finished_at: Option<Time>,
}

impl RawTerminated {
    fn failed(&self) -> bool {
        self.exit_code != 0 || self.out_of_memory()
    }

    fn out_of_memory(&self) -> bool {
        self.reason.as_deref() == Some("OOMKilled")
    }
}

/// Picks what the kubelet says of a pod that was created then.
pub(super) fn pick(status: &RawPodStatus, created_at: Timestamp) -> PodSignals {
    let lists = status.init_container_statuses.iter().chain(&status.container_statuses);
    let containers: Vec<_> = lists.flatten().take(MAX_CONTAINERS).collect();
    // What initialises the pod ends well, and then runs no more.
    let lasting = status.container_statuses.iter().flatten().take(MAX_CONTAINERS);
    let running: Vec<_> = lasting.map(|container| container.state.running.as_ref()?.started_at.as_ref()).collect();
    let all_run = !running.is_empty() && running.iter().all(Option::is_some);
    PodSignals {
        ready: ready(status.condition("Ready")),
        running_since: running.into_iter().flatten().map(|time| time.0).max().filter(|_| all_run),
        crash: containers
            .iter()
            .filter_map(|container| crash(container))
            .max_by_key(|crash| (crash.counts(), crash.at))
            .map(Box::new),
        image: containers.iter().find_map(|container| image(container, created_at)).map(Box::new),
    }
}

fn ready(condition: Option<&RawCondition>) -> Ready {
    let Some((condition, since)) = condition.and_then(|one| Some((one, one.last_transition_time.as_ref()?.0))) else {
        return Ready::Unknown;
    };
    match condition.status.as_str() {
        "True" => Ready::Yes(since),
        // A kubelet always says why. Who does not is the controller that calls every pod of a node not ready when it does not
        // hear the node's kubelet any more.
        "False" => match condition.reason.as_deref().filter(|reason| !reason.is_empty()) {
            Some(reason) => {
                let words = condition.message.as_deref().filter(|words| !words.is_empty()).unwrap_or(reason);
                Ready::No { since, message: cut(words, MAX_WORDS).into() }
            }
            None => Ready::Unknown,
        },
        _ => Ready::Unknown,
    }
}

fn crash(status: &RawContainerStatus) -> Option<Crash> {
    let now = status.state.terminated.as_ref();
    if now.is_some_and(|ended| !ended.failed()) {
        // However often it had to be tried: one that initialises the pod has done it.
        return None;
    }
    let ended = now.or_else(|| status.last_state.terminated.as_ref().filter(|ended| ended.failed()))?;
    let how =
        if ended.out_of_memory() { "was OOMKilled".to_owned() } else { format!("exited with {}", ended.exit_code) };
    let waits_for = status.state.waiting.as_ref().and_then(|waiting| waiting.reason.as_deref());
    Some(Crash {
        container: cut(&status.name, 63).into(),
        how: how.into(),
        out_of_memory: ended.out_of_memory(),
        at: ended.finished_at.as_ref()?.0,
        started_at: ended.started_at.as_ref().map(|at| at.0),
        restarts: u32::try_from(status.restart_count).unwrap_or(0),
        running_since: status.state.running.as_ref().and_then(|running| running.started_at.as_ref()).map(|at| at.0),
        backs_off: waits_for == Some("CrashLoopBackOff"),
    })
}

fn image(status: &RawContainerStatus, created_at: Timestamp) -> Option<ImageFailure> {
    let reason = status.state.waiting.as_ref()?.reason.as_deref().filter(|reason| IMAGE_REASONS.contains(reason))?;
    // The kubelet says the one and the other in turn.
    let reason = if reason == "ImagePullBackOff" { "ErrImagePull" } else { reason };
    let ended = status.last_state.terminated.as_ref().and_then(|ended| ended.finished_at.as_ref());
    let (container, image) = (cut(&status.name, 63), cut(&status.image, MAX_WORDS));
    Some(ImageFailure {
        since: ended.map_or(created_at, |at| at.0.max(created_at)),
        message: format!("container {container}: its image {image} cannot be used ({reason})").into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(status: &Value) -> PodSignals {
        pick(&serde_json::from_value(status.clone()).unwrap(), "2026-11-28T10:00:00Z".parse().unwrap())
    }

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_pod_that_runs_says_since_when() {
        let signals = read(&json!({
            "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-11-28T10:00:09Z" }],
            "initContainerStatuses": [{ "name": "init", "state": { "terminated": { "exitCode": 0, "finishedAt": "2026-11-28T10:00:02Z" } } }],
            "containerStatuses": [
                { "name": "app", "state": { "running": { "startedAt": "2026-11-28T10:00:03Z" } } },
                { "name": "side", "state": { "running": { "startedAt": "2026-11-28T10:00:05Z" } } },
            ],
        }));
        assert_eq!(signals.ready, Ready::Yes(time("2026-11-28T10:00:09Z")));
        assert_eq!(signals.running_since, Some(time("2026-11-28T10:00:05Z")));
        assert_eq!((signals.crash, signals.image), (None, None));
    }

    #[test]
    fn a_container_that_crashes_is_named_whichever_it_is() {
        let ended = |reason: &str, code: i32| json!({ "terminated": { "reason": reason, "exitCode": code, "finishedAt": "2026-11-28T10:05:00Z" } });
        let signals = read(&json!({
            "containerStatuses": [
                { "name": "app", "state": { "running": { "startedAt": "2026-11-28T10:00:03Z" } } },
                { "name": "side", "restartCount": 4, "state": { "waiting": { "reason": "CrashLoopBackOff" } }, "lastState": ended("Error", 1) },
            ],
        }));
        let crash = signals.crash.unwrap();
        assert_eq!(
            (&*crash.container, &*crash.how, crash.restarts, crash.backs_off),
            ("side", "exited with 1", 4, true)
        );
        assert_eq!(signals.running_since, None, "one of them does not run");
        let killed = read(&json!({ "initContainerStatuses": [
            { "name": "init", "restartCount": 1, "state": ended("OOMKilled", 137) },
        ] }));
        let crash = killed.crash.unwrap();
        assert_eq!((&*crash.container, &*crash.how, crash.out_of_memory), ("init", "was OOMKilled", true));
        let completed = read(&json!({ "containerStatuses": [{ "name": "app", "lastState": ended("Completed", 0) }] }));
        assert_eq!(completed.crash, None, "it ended well");
        let done = json!({ "terminated": { "exitCode": 0, "finishedAt": "2026-11-28T10:06:00Z" } });
        let tried = read(&json!({ "initContainerStatuses": [
            { "name": "init", "restartCount": 5, "state": done, "lastState": ended("Error", 1) },
        ] }));
        assert_eq!(tried.crash, None, "it ended well at last");
        let hidden = read(&json!({ "containerStatuses": [
            { "name": "app", "restartCount": 3, "state": { "waiting": { "reason": "CrashLoopBackOff" } }, "lastState": ended("Error", 1) },
            { "name": "side", "restartCount": 1, "state": { "running": { "startedAt": "2026-11-28T10:07:00Z" } },
              "lastState": { "terminated": { "exitCode": 1, "finishedAt": "2026-11-28T10:07:00Z" } } },
        ] }));
        assert_eq!(&*hidden.crash.unwrap().container, "app", "what ended once hides nothing");
    }

    #[rstest::rstest]
    #[case("ErrImagePull")]
    #[case("ImagePullBackOff")]
    fn an_image_that_cannot_be_pulled_is_said_in_the_same_words_each_time(#[case] reason: &str) {
        let signals = read(&json!({ "containerStatuses": [
            { "name": "app", "image": "registry/x:1", "state": { "waiting": { "reason": reason, "message": "changes" } } },
        ] }));
        let image = signals.image.unwrap();
        assert_eq!(&*image.message, "container app: its image registry/x:1 cannot be used (ErrImagePull)");
        assert_eq!(image.since, time("2026-11-28T10:00:00Z"));
    }

    #[test]
    fn a_node_that_is_cut_off_says_nothing() {
        // The node's controller calls its pods not ready, and leaves everything else as the kubelet had it.
        for status in ["False", "Unknown"] {
            let ready = json!({ "type": "Ready", "status": status, "lastTransitionTime": "2026-11-28T10:05:00Z" });
            assert_eq!(read(&json!({ "conditions": [ready] })).ready, Ready::Unknown);
        }
        assert_eq!(read(&json!({})), PodSignals::default());
    }

    #[test]
    fn texts_and_lists_are_bounded() {
        let long = "x".repeat(10_000);
        let many: Vec<_> = (0..1000)
            .map(|_| json!({ "name": long, "image": long, "state": { "waiting": { "reason": "ErrImagePull" } } }))
            .collect();
        let image = read(&json!({ "containerStatuses": many })).image.unwrap();
        assert!(image.message.len() < 500, "{}", image.message.len());
    }
}
