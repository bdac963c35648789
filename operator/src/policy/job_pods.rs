//! What the pod of a cleanup Job says: which container failed, or that the main one is done while others run on. Pure.

use k8s_openapi::api::core::v1::{Container, ContainerStateTerminated, ContainerStatus, Pod};
use regex::Regex;
use std::{borrow::Cow, sync::LazyLock};

/// Annotation that names the main container, as kubectl reads it.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// A container that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedContainer {
    /// Its name.
    pub name: String,
    /// In words, such as "container cleanup exited with 3".
    pub told: String,
}

/// The container that failed first. One that only accompanies others is named if nothing else failed.
pub fn failed(pod: &Pod) -> Option<FailedContainer> {
    let status = pod.status.as_ref()?;
    let sidecars = sidecars(pod);
    let of_init = status.init_container_statuses.iter().flatten().map(|one| (one, true));
    let all = of_init.chain(status.container_statuses.iter().flatten().map(|one| (one, false)));
    let failed = all.filter_map(|(one, init)| Some((ended(one).filter(|ended| ended.exit_code != 0)?, one, init)));
    let (ended, container, init) = failed.min_by_key(|(ended, one, _)| {
        (sidecars.contains(&one.name.as_str()), ended.finished_at.as_ref().map(|at| at.0))
    })?;
    let kind = if init { "init container" } else { "container" };
    let name = container.name.clone();
    let why = ended.reason.as_deref().filter(|reason| *reason != "Error");
    let why = why.map(|reason| format!(" ({reason})")).unwrap_or_default();
    Some(FailedContainer { told: format!("{kind} {name} exited with {}{why}", ended.exit_code), name })
}

/// Whether the main container is done and went well, whatever else still runs.
pub fn main_is_done(pod: &Pod) -> bool {
    main_ended(pod).is_some_and(|ended| ended.exit_code == 0)
}

/// Whether the main container has failed and is not started again, whatever else still runs.
pub fn main_has_failed(pod: &Pod) -> bool {
    let stays = pod.spec.as_ref().is_some_and(|spec| spec.restart_policy.as_deref() == Some("Never"));
    stays && main_ended(pod).is_some_and(|ended| ended.exit_code != 0)
}

fn main_ended(pod: &Pod) -> Option<&ContainerStateTerminated> {
    let main = main_container(pod);
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses.filter(|one| Some(one.name.as_str()) == main).find_map(ended)
}

/// The one that the annotation names, or else the first.
fn main_container(pod: &Pod) -> Option<&str> {
    let containers = || pod.spec.iter().flat_map(|spec| &spec.containers).map(|one| one.name.as_str());
    let named = pod.metadata.annotations.as_ref().and_then(|all| all.get(DEFAULT_CONTAINER));
    let named = named.map(String::as_str).filter(|name| containers().any(|one| one == *name));
    named.or_else(|| containers().next())
}

fn sidecars(pod: &Pod) -> Vec<&str> {
    let init = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    let runs_on = |one: &&Container| one.restart_policy.as_deref() == Some("Always");
    init.filter(runs_on).map(|one| one.name.as_str()).collect()
}

/// How a container ended: now, or before it was started again.
fn ended(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let states = [&status.state, &status.last_state];
    states.into_iter().flatten().find_map(|state| state.terminated.as_ref())
}

/// What takes the place of a secret.
const MASK: &str = "***";

/// Text of a log without what looks like a secret: the values of what is called a password, token, secret or key, what comes
/// after `Bearer` and `Basic`, passwords in addresses, JSON Web Tokens, and long runs of letters and digits that are no words.
pub fn masked(text: &str) -> Cow<'_, str> {
    static PATTERNS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
        const NAMED: &str = r#"(?i)((?:pass(?:word|wd|phrase)?|secret|token|credentials?|api[-_]?key|access[-_]?key|private[-_]?key|authorization)["']?\s*[=:]\s*)(?:"[^"]*"|'[^']*'|[^\s,;&}]+)"#;
        let all = [
            (r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{6,}", "$1 ***"),
            (NAMED, "${1}***"),
            (r"([A-Za-z][A-Za-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+@", "${1}***@"),
            (r"\beyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){1,2}", MASK),
            (r"\b[A-Za-z0-9+/_=-]{40,}", MASK),
        ];
        all.into_iter().filter_map(|(pattern, by)| Some((Regex::new(pattern).ok()?, by))).collect()
    });
    let mut text = Cow::Borrowed(text);
    for (pattern, by) in PATTERNS.iter() {
        if pattern.is_match(&text) {
            text = Cow::Owned(pattern.replace_all(&text, *by).into_owned());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::{Value, json};

    fn exited(name: &str, code: i32, second: u32) -> Value {
        json!({ "name": name, "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": { "terminated": {
            "exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" },
            "finishedAt": format!("2026-01-01T00:00:{second:02}Z"),
        }}})
    }

    fn running(name: &str) -> Value {
        json!({ "name": name, "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
            "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } } })
    }

    /// A pod with the containers `cleanup` and `proxy`, the init container `fetch` and the sidecar `mesh`.
    fn pod(init: &Value, containers: &Value) -> Pod {
        let container = |name: &str| json!({ "name": name, "image": "i" });
        let mut mesh = container("mesh");
        mesh["restartPolicy"] = json!("Always");
        let pod = json!({
            "metadata": { "name": "p" },
            "spec": { "initContainers": [container("fetch"), mesh], "containers": [container("cleanup"), container("proxy")] },
            "status": { "initContainerStatuses": init, "containerStatuses": containers },
        });
        serde_json::from_value(pod).unwrap()
    }

    #[rstest]
    #[case::the_first(json!([]), json!([exited("cleanup", 3, 5)]), Some("container cleanup exited with 3"))]
    #[case::the_second(
        json!([]), json!([exited("cleanup", 0, 5), exited("proxy", 1, 6)]), Some("container proxy exited with 1"))]
    #[case::the_one_that_failed_first(
        json!([]), json!([exited("cleanup", 143, 9), exited("proxy", 1, 6)]), Some("container proxy exited with 1"))]
    #[case::an_init_container(json!([exited("fetch", 2, 1)]), json!([]), Some("init container fetch exited with 2"))]
    #[case::not_the_sidecar(
        json!([exited("fetch", 0, 1), exited("mesh", 1, 2)]), json!([exited("cleanup", 4, 9)]),
        Some("container cleanup exited with 4"))]
    #[case::the_sidecar_if_nothing_else(
        json!([exited("mesh", 1, 2)]), json!([running("cleanup")]), Some("init container mesh exited with 1"))]
    #[case::none(json!([exited("fetch", 0, 1)]), json!([exited("cleanup", 0, 2), running("proxy")]), None)]
    fn the_container_that_failed_is_named(#[case] init: Value, #[case] all: Value, #[case] expected: Option<&str>) {
        assert_eq!(failed(&pod(&init, &all)).map(|one| one.told).as_deref(), expected);
    }

    #[test]
    fn one_that_was_started_again_tells_of_its_last_end() {
        let mut again = running("cleanup");
        again["lastState"] = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } });
        let failed = failed(&pod(&json!([]), &json!([again]))).unwrap();
        assert_eq!(failed.told, "container cleanup exited with 137 (OOMKilled)");
    }

    #[rstest]
    #[case::another_runs_on(json!([exited("cleanup", 0, 2), running("proxy")]), None, true)]
    #[case::it_runs(json!([running("cleanup"), exited("proxy", 0, 2)]), None, false)]
    #[case::it_failed(json!([exited("cleanup", 1, 2), running("proxy")]), None, false)]
    #[case::another_is_the_main_one(json!([exited("cleanup", 0, 2), running("proxy")]), Some("proxy"), false)]
    #[case::one_that_is_not_there(json!([exited("cleanup", 0, 2), running("proxy")]), Some("gone"), true)]
    fn a_job_is_done_when_its_main_container_is(
        #[case] all: Value,
        #[case] annotated: Option<&str>,
        #[case] expected: bool,
    ) {
        let mut pod = pod(&json!([]), &all);
        pod.metadata.annotations =
            annotated.map(|name| [(DEFAULT_CONTAINER.to_owned(), name.to_owned())].into_iter().collect());
        assert_eq!(main_is_done(&pod), expected);
    }

    #[rstest]
    #[case::another_runs_on(json!([exited("cleanup", 1, 2), running("proxy")]), "Never", true)]
    #[case::it_is_started_again(json!([exited("cleanup", 1, 2), running("proxy")]), "OnFailure", false)]
    #[case::it_ended_well(json!([exited("cleanup", 0, 2), running("proxy")]), "Never", false)]
    #[case::another_failed(json!([running("cleanup"), exited("proxy", 1, 2)]), "Never", false)]
    fn a_job_has_failed_when_its_main_container_has(#[case] all: Value, #[case] policy: &str, #[case] expected: bool) {
        let mut pod = pod(&json!([]), &all);
        pod.spec.as_mut().unwrap().restart_policy = Some(policy.to_owned());
        assert_eq!(main_has_failed(&pod), expected);
    }

    #[rstest]
    #[case("password=hunter2, user=a", "password=***, user=a")]
    #[case(r#"{"dbPassword": "hun ter2", "n": 1}"#, r#"{"dbPassword": ***, "n": 1}"#)]
    #[case("PGPASSWORD: 'a b'", "PGPASSWORD: ***")]
    #[case("API_KEY=abc token:def", "API_KEY=*** token:***")]
    #[case("Authorization: Bearer abcdef123456", "Authorization: *** ***")]
    #[case("sent with bearer abcdef123456 to it", "sent with bearer *** to it")]
    #[case("postgresql://shop:hunter2@db:5432/x failed", "postgresql://shop:***@db:5432/x failed")]
    #[case("got eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln back", "got *** back")]
    #[case("key AKIA0123456789abcdefghijABCDEFGHIJ01234567 end", "key *** end")]
    #[case("3 reservations released in 12 ms", "3 reservations released in 12 ms")]
    #[case("booking-7c9d-x2x: no token", "booking-7c9d-x2x: no token")]
    fn what_looks_like_a_secret_is_masked(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(masked(text), expected);
    }
}
