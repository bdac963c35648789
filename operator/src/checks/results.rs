//! What the runs of a check say together. Pure.

use super::service::MAX_ENDPOINTS;
use crate::{kubernetes::meta::cut, spec::asked::CheckSettings};
use contract::{CheckReport, CheckStatus};
use crds::resilience_policy::CheckScope;
use engine::{
    check::{Evaluation, Thresholds, evaluate},
    recovery::Pod,
};
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// Longest text that is kept of an endpoint, in bytes.
const MAX_TEXT: usize = 512;
/// Pods that are remembered as silent; with more, there are some that are gone.
const MAX_SILENT: usize = 2 * MAX_ENDPOINTS;
/// Intervals after which what was found last says nothing any more.
const STALE_AFTER: i32 = 3;

/// What one endpoint gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The pod that was asked.
    pub pod: Pod,
    /// What recovery calls the workload that it belongs to, if that is one of the policy's.
    pub target: Option<String>,
    /// Why it fails, if it does.
    pub failure: Option<String>,
    /// It did not answer in time, and is likely to take as long the next time.
    pub silent: bool,
}

/// What came of one run of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// Endpoints were asked.
    Asked {
        /// What each gave; at least one.
        answers: Vec<Answer>,
        /// What recovery calls the workload that a check of scope Workload is about.
        about: String,
        /// What a person should know of how they were chosen.
        note: Option<String>,
    },
    /// Nobody was asked, for this reason.
    NotAsked(String),
}

/// What was found of one check so far.
#[derive(Debug, Default)]
pub struct CheckResults {
    pods: BTreeMap<String, PodResult>,
    workload: Option<WorkloadResult>,
    remark: Option<String>,
    /// Uids of the pods that did not answer in time.
    silent: BTreeSet<String>,
    /// What was current after the last run; with it a result that has aged is seen as news.
    shown: Shown,
}

#[derive(Debug)]
struct PodResult {
    target: String,
    runs: Runs,
}

#[derive(Debug)]
struct WorkloadResult {
    target: String,
    runs: Runs,
}

/// The runs of one subject.
#[derive(Debug, Default)]
struct Runs {
    count: u64,
    failures: u32,
    last: Option<Timestamp>,
    evaluation: Option<Evaluation>,
}

/// A verdict: of which pod, or of the workload; healthy, since when, and since when it has passed.
type Verdict = (Option<String>, bool, Timestamp, Option<Timestamp>);

#[derive(Debug, Default, PartialEq, Eq)]
struct Shown {
    verdicts: Vec<Verdict>,
    remark: Option<String>,
}

/// What a check says now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Current {
    /// Of scope Pod: what each pod says, by its uid, with what recovery calls its workload.
    pub pods: BTreeMap<String, (String, Evaluation)>,
    /// Of scope Workload: what most endpoints say, with what recovery calls the workload that it is about.
    pub workload: Option<(String, Evaluation)>,
    /// Why nobody knows, or what else a person should know of how it was asked.
    pub remark: Option<String>,
}

/// The checks of a policy that the operator asks, by their names.
pub type CurrentChecks = BTreeMap<String, Current>;

fn is_fresh(seen_at: Timestamp, settings: &CheckSettings, now: Timestamp) -> bool {
    let interval = SignedDuration::try_from(settings.interval).unwrap_or(SignedDuration::MAX);
    now.duration_since(seen_at) <= interval.saturating_mul(STALE_AFTER)
}

impl Runs {
    /// Takes in one more run. As long as it has neither passed nor failed often enough, nothing is known of it: so a failure
    /// that a new leader finds is one that began before, as it is when pods count the runs themselves.
    fn take(&mut self, failure: Option<String>, settings: &CheckSettings, now: Timestamp) {
        if self.last.is_some_and(|last| !is_fresh(last, settings, now)) {
            // What was well then may not have been since; and failures in a row have no gap.
            self.failures = 0;
            self.evaluation = self.evaluation.take().filter(|evaluation| !evaluation.healthy);
        }
        self.last = Some(now);
        self.count += 1;
        self.failures = if failure.is_some() { self.failures.saturating_add(1) } else { 0 };
        let Thresholds { unhealthy, .. } = settings.thresholds;
        if self.evaluation.is_none() && failure.is_some() && self.failures < unhealthy {
            return;
        }
        let report = CheckReport {
            status: if failure.is_some() { CheckStatus::Unhealthy } else { CheckStatus::Healthy },
            message: failure.map(|why| cut(&why, MAX_TEXT).to_owned()).unwrap_or_default(),
            tags: Vec::new(),
            dependency: None,
            dependency_answers: None,
            duration_ms: 0,
            consecutive_failures: self.failures,
            runs: self.count,
            data: BTreeMap::new(),
        };
        self.evaluation = Some(evaluate(self.evaluation.as_ref(), &report, settings.thresholds, now));
    }

    fn current(&self, settings: &CheckSettings, now: Timestamp) -> Option<&Evaluation> {
        self.evaluation.as_ref().filter(|evaluation| is_fresh(evaluation.seen_at, settings, now))
    }
}

impl CheckResults {
    /// Takes in one more run. The value says whether what there is to say has changed.
    pub fn take(&mut self, run: Run, settings: &CheckSettings, now: Timestamp) -> bool {
        match run {
            Run::NotAsked(why) => self.remark = Some(cut(&why, MAX_TEXT).to_owned()),
            Run::Asked { answers, about, note } => {
                self.remark = note;
                self.note_silence(&answers);
                match settings.scope {
                    CheckScope::Pod => self.take_pods(answers, settings, now),
                    CheckScope::Workload => self.take_workload(&answers, about, settings, now),
                }
            }
        }
        // A pod that is not asked any more is gone, or soon says nothing.
        self.pods.retain(|_, pod| pod.runs.last.is_some_and(|last| is_fresh(last, settings, now)));
        let shown = self.shown(settings, now);
        let news = shown != self.shown;
        self.shown = shown;
        news
    }

    /// What is known of those that were not asked this time still holds.
    fn note_silence(&mut self, answers: &[Answer]) {
        if self.silent.len() > MAX_SILENT {
            self.silent.clear();
        }
        for answer in answers {
            if answer.silent {
                self.silent.insert(answer.pod.uid.clone());
            } else {
                self.silent.remove(&answer.pod.uid);
            }
        }
    }

    fn take_pods(&mut self, answers: Vec<Answer>, settings: &CheckSettings, now: Timestamp) {
        for Answer { pod, target, failure, .. } in answers {
            let Some(target) = target else { continue };
            let known = self.pods.entry(pod.uid);
            let known = known.or_insert_with(|| PodResult { target: target.clone(), runs: Runs::default() });
            known.target = target;
            known.runs.take(failure, settings, now);
        }
    }

    /// More than half of the endpoints decide.
    fn take_workload(&mut self, answers: &[Answer], about: String, settings: &CheckSettings, now: Timestamp) {
        let failing: Vec<_> = answers.iter().filter_map(|one| Some((one, one.failure.as_ref()?))).collect();
        let unhealthy = failing.len() * 2 > answers.len();
        let failure = failing.first().filter(|_| unhealthy).map(|(one, why)| {
            format!("{} of {} endpoints fail; {}: {why}", failing.len(), answers.len(), one.pod.name)
        });
        let known =
            self.workload.get_or_insert_with(|| WorkloadResult { target: about.clone(), runs: Runs::default() });
        known.target = about;
        known.runs.take(failure, settings, now);
    }

    /// Whether a pod did not answer in time when it was asked last.
    pub fn was_silent(&self, uid: &str) -> bool {
        self.silent.contains(uid)
    }

    fn shown(&self, settings: &CheckSettings, now: Timestamp) -> Shown {
        let verdict = |uid: Option<&String>, runs: &Runs| {
            let one = runs.current(settings, now)?;
            Some((uid.cloned(), one.healthy, one.since, one.well_since))
        };
        let pods = self.pods.iter().filter_map(|(uid, pod)| verdict(Some(uid), &pod.runs));
        let workload = self.workload.iter().filter_map(|one| verdict(None, &one.runs));
        Shown { verdicts: pods.chain(workload).collect(), remark: self.remark.clone() }
    }

    /// What it says now. What was found more than three intervals ago says nothing.
    pub fn current(&self, settings: &CheckSettings, now: Timestamp) -> Current {
        let said = |target: &String, runs: &Runs| Some((target.clone(), runs.current(settings, now)?.clone()));
        let pods = self.pods.iter().filter_map(|(uid, one)| Some((uid.clone(), said(&one.target, &one.runs)?)));
        let workload = self.workload.as_ref().and_then(|one| said(&one.target, &one.runs));
        Current { pods: pods.collect(), workload, remark: self.remark.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::asked::Probe;
    use std::time::Duration;

    fn settings(scope: CheckScope) -> CheckSettings {
        CheckSettings {
            scope,
            service: "web".to_owned(),
            port: 80,
            probe: Probe::Tcp,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            thresholds: Thresholds { unhealthy: 2, healthy: 2 },
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn answer(name: &str, healthy: bool) -> Answer {
        Answer {
            pod: Pod { name: name.to_owned(), uid: format!("uid-{name}") },
            target: Some("booking".to_owned()),
            failure: (!healthy).then(|| "HTTP 503".to_owned()),
            silent: false,
        }
    }

    /// A run in which the pods a, b, c … answer so.
    fn asked(healthy: &[bool]) -> Run {
        let names = ["a", "b", "c", "d"];
        let answers = names.iter().zip(healthy).map(|(name, healthy)| answer(name, *healthy)).collect();
        Run::Asked { answers, about: "booking".to_owned(), note: None }
    }

    /// What the check says after these runs, one each second from 1 on: the endpoints that pass (+) and fail (-), or nobody (.).
    fn after(scope: CheckScope, runs: &str) -> Current {
        let (mut results, settings) = (CheckResults::default(), settings(scope));
        let mut now = at(0);
        for (second, run) in (1..).zip(runs.split_whitespace()) {
            now = at(second);
            let answers: Vec<_> = run.chars().map(|one| one == '+').collect();
            let run = if run == "." { Run::NotAsked("why".to_owned()) } else { asked(&answers) };
            results.take(run, &settings, now);
        }
        results.current(&settings, now)
    }

    #[rstest::rstest]
    #[case::nothing_yet("", None)]
    #[case::one_failure_says_nothing_yet("-", None)]
    #[case::often_enough("- -", Some((false, 2)))]
    #[case::a_good_one_says_it_all("+", Some((true, 1)))]
    #[case::most("+++ --+ -+-", Some((false, 3)))]
    #[case::half_is_not_most("++ -+ +-", Some((true, 1)))]
    #[case::once_is_not_enough("+ -", Some((true, 1)))]
    #[case::not_in_a_row("+ - + -", Some((true, 1)))]
    #[case::healthy_again("- - + +", Some((true, 4)))]
    #[case::not_often_enough_again("- - +", Some((false, 2)))]
    #[case::nobody_asked_for_a_while("+ - . -", Some((false, 4)))]
    #[case::stale("+ . . . .", None)]
    #[case::failures_with_a_gap_are_not_in_a_row("+ - . . . -", None)]
    #[case::unhealthy_before_a_gap_and_after_it("- - . . . -", Some((false, 2)))]
    fn most_endpoints_decide(#[case] runs: &str, #[case] expected: Option<(bool, i64)>) {
        let current = after(CheckScope::Workload, runs);
        let said = current.workload.map(|(_, one)| (one.healthy, one.since));
        assert_eq!(said, expected.map(|(healthy, since)| (healthy, at(since))));
        assert!(current.pods.is_empty());
    }

    #[test]
    fn a_failure_that_is_found_is_older_and_one_that_is_seen_to_begin_is_not() {
        let began_before = |runs: &str| after(CheckScope::Workload, runs).workload.unwrap().1.began_before;
        assert!(began_before("- -"));
        assert!(!began_before("+ - -"));
    }

    #[test]
    fn what_passes_after_a_gap_has_passed_since_then() {
        let well_since = |runs: &str| after(CheckScope::Workload, runs).workload.unwrap().1.well_since;
        assert_eq!(well_since("+ . +"), Some(at(1)));
        assert_eq!(well_since("+ . . . . +"), Some(at(6)));
    }

    #[test]
    fn each_pod_has_its_own_answer() {
        let current = after(CheckScope::Pod, "+- +-");
        let said: Vec<_> = current.pods.iter().map(|(uid, (_, one))| (uid.as_str(), one.healthy)).collect();
        assert_eq!(said, [("uid-a", true), ("uid-b", false)]);
        assert_eq!(current.workload, None);
        assert_eq!(current.pods["uid-b"].1.message, "HTTP 503");
    }

    #[test]
    fn a_pod_that_is_not_asked_any_more_is_forgotten() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Pod));
        results.take(asked(&[true, true]), &settings, at(1));
        for second in 2..=5 {
            results.take(asked(&[true]), &settings, at(second));
        }
        assert_eq!(results.pods.keys().collect::<Vec<_>>(), ["uid-a"]);
    }

    #[test]
    fn failing_endpoints_are_counted_and_the_first_is_named() {
        let (about, said) = after(CheckScope::Workload, "-+- -+-").workload.unwrap();
        assert_eq!((about.as_str(), said.message.as_str()), ("booking", "2 of 3 endpoints fail; a: HTTP 503"));
    }

    #[test]
    fn what_changes_what_there_is_to_say_is_news() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Workload));
        let mut take = |run: Run, second| results.take(run, &settings, at(second));
        assert!(take(asked(&[true]), 1));
        assert!(!take(asked(&[true]), 2), "the same again");
        assert!(take(asked(&[false]), 3), "it is well no more");
        assert!(take(asked(&[false]), 4), "it is unhealthy");
        assert!(!take(asked(&[false]), 5));
        assert!(take(Run::NotAsked("why".to_owned()), 6), "nobody is asked");
        assert!(!take(Run::NotAsked("why".to_owned()), 7));
        assert!(take(Run::NotAsked("why".to_owned()), 9), "what was found is stale");
        assert!(!take(Run::NotAsked("why".to_owned()), 10));
    }

    #[test]
    fn words_of_an_endpoint_are_cut() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Pod));
        let long = Answer { failure: Some("ü".repeat(5_000)), silent: true, ..answer("a", false) };
        for second in 1..=2 {
            let run = Run::Asked { answers: vec![long.clone()], about: String::new(), note: None };
            results.take(run, &settings, at(second));
        }
        assert!(results.current(&settings, at(2)).pods["uid-a"].1.message.len() <= MAX_TEXT);
        assert!(results.was_silent("uid-a"));
        let run = |answer| Run::Asked { answers: vec![answer], about: String::new(), note: None };
        results.take(run(answer("b", true)), &settings, at(3));
        assert!(results.was_silent("uid-a"), "it was not asked again");
        results.take(run(answer("a", true)), &settings, at(4));
        assert!(!results.was_silent("uid-a"));
    }
}
