//! What the runs of a check say together. Pure.

use super::service::{MAX_ENDPOINTS, NotAsked};
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
/// Intervals after which it does not even count that it failed before: it would have to fail as often as if it were new.
const FORGOTTEN_AFTER: i32 = 10;
/// Words alone change no more often: each change is written into the status, and the peer chooses many of them.
const WORDS_LAST: SignedDuration = SignedDuration::from_secs(10);

/// What one endpoint gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The pod that was asked.
    pub pod: Pod,
    /// What recovery calls the workload that it belongs to, if that is one of the policy's.
    pub target: Option<String>,
    /// Why it fails, if it does.
    pub failure: Option<String>,
    /// It did not answer in time.
    pub silent: bool,
}

/// What a person should know of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// What it is about, whatever names and numbers the text has.
    pub kind: &'static str,
    /// The sentence.
    pub text: String,
}

impl From<NotAsked> for Remark {
    fn from(why: NotAsked) -> Self {
        Self { kind: why.kind(), text: why.to_string() }
    }
}

/// What came of one run of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// Endpoints were asked.
    Asked {
        /// What each gave; at least one.
        answers: Vec<Answer>,
        /// Uids of those that were to be asked and were not: there was no time.
        unasked: Vec<String>,
        /// What recovery calls the workload that a check of scope Workload is about.
        about: String,
        /// What a person should know of how they were chosen.
        note: Option<Remark>,
    },
    /// Nobody was asked, for this reason.
    NotAsked(Remark),
}

/// What was found of one check so far.
#[derive(Debug, Default)]
pub struct CheckResults {
    pods: BTreeMap<String, PodResult>,
    workload: Option<WorkloadResult>,
    remark: Option<Remarked>,
    /// Uids of the pods that did not answer in time.
    silent: BTreeSet<String>,
    /// Runs that it takes to ask all that are to be asked, less one.
    further_runs: i32,
    /// What was current after the last run; with it a result that has aged is seen as news.
    shown: Shown,
}

/// A remark, and since when it has these words, and when it was made last.
#[derive(Debug)]
struct Remarked {
    remark: Remark,
    worded_at: Timestamp,
    last: Timestamp,
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
    /// Since when the evaluation has its words.
    worded_at: Option<Timestamp>,
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

/// How a run of a check is taken in.
#[derive(Clone, Copy)]
struct Rules {
    thresholds: Thresholds,
    /// From one time that a subject is asked to the next.
    every: SignedDuration,
    now: Timestamp,
}

impl Rules {
    fn new(settings: &CheckSettings, further_runs: i32, now: Timestamp) -> Self {
        let interval = SignedDuration::try_from(settings.interval).unwrap_or(SignedDuration::MAX);
        let runs = if settings.scope == CheckScope::Pod { further_runs.saturating_add(1) } else { 1 };
        Self { thresholds: settings.thresholds, every: interval.saturating_mul(runs), now }
    }

    fn is_within(self, seen_at: Timestamp, times: i32) -> bool {
        self.now.duration_since(seen_at) <= self.every.saturating_mul(times)
    }

    fn is_fresh(self, seen_at: Timestamp) -> bool {
        self.is_within(seen_at, STALE_AFTER)
    }
}

impl Runs {
    /// Takes in one more run. As long as it has neither passed nor failed often enough, nothing is known of it: so a failure
    /// that a new leader finds is one that began before, as it is when pods count the runs themselves.
    fn take(&mut self, failure: Option<String>, rules: Rules) {
        let now = rules.now;
        if let Some(last) = self.last.filter(|last| !rules.is_fresh(*last)) {
            // What was well then may not have been since; and failures in a row have no gap.
            let is_known = rules.is_within(last, FORGOTTEN_AFTER);
            self.failures = 0;
            self.evaluation = self.evaluation.take().filter(|evaluation| is_known && !evaluation.healthy);
        }
        self.last = Some(now);
        self.count += 1;
        self.failures = if failure.is_some() { self.failures.saturating_add(1) } else { 0 };
        if self.evaluation.is_none() && failure.is_some() && self.failures < rules.thresholds.unhealthy {
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
        let before = self.evaluation.take();
        let mut after = evaluate(before.as_ref(), &report, rules.thresholds, now);
        let same = before.filter(|before| before.healthy == after.healthy && !before.message.is_empty());
        match same {
            Some(before) if !after.message.is_empty() && is_recent(self.worded_at, now) => {
                after.message = before.message;
            }
            Some(before) if before.message == after.message => {}
            _ => self.worded_at = Some(now),
        }
        self.evaluation = Some(after);
    }

    fn current(&self, rules: Rules) -> Option<&Evaluation> {
        self.evaluation.as_ref().filter(|evaluation| rules.is_fresh(evaluation.seen_at))
    }
}

/// Whether words are so new that they stay.
fn is_recent(worded_at: Option<Timestamp>, now: Timestamp) -> bool {
    worded_at.is_some_and(|at| now.duration_since(at) < WORDS_LAST)
}

/// Runs that it takes to ask all, less one.
fn further_runs(asked: usize, unasked: usize) -> i32 {
    i32::try_from(unasked.div_ceil(asked.max(1))).unwrap_or(i32::MAX)
}

impl CheckResults {
    /// Takes in one more run. The value says whether what there is to say has changed.
    pub fn take(&mut self, run: Run, settings: &CheckSettings, now: Timestamp) -> bool {
        match run {
            Run::NotAsked(why) => self.take_remark(Some(why), now),
            Run::Asked { answers, unasked, about, note } => {
                self.take_remark(note, now);
                self.note_silence(&answers);
                self.further_runs = further_runs(answers.len(), unasked.len());
                let rules = Rules::new(settings, self.further_runs, now);
                match settings.scope {
                    CheckScope::Pod => self.take_pods(answers, rules),
                    CheckScope::Workload => self.take_workload(&answers, &unasked, about, rules),
                }
            }
        }
        // A pod that is not asked any more is gone, or soon says nothing.
        let rules = Rules::new(settings, self.further_runs, now);
        self.pods.retain(|_, pod| pod.runs.last.is_some_and(|last| rules.is_fresh(last)));
        let shown = self.shown(settings, now);
        let news = shown != self.shown;
        self.shown = shown;
        news
    }

    /// One of another kind is told at once. Other words for the same are told after a while, and so is that it is over: it may
    /// come and go.
    fn take_remark(&mut self, remark: Option<Remark>, now: Timestamp) {
        let Some(mut remark) = remark else {
            self.remark = self.remark.take().filter(|before| is_recent(Some(before.last), now));
            return;
        };
        remark.text.truncate(cut(&remark.text, MAX_TEXT).len());
        match &mut self.remark {
            Some(before) if before.remark.kind == remark.kind => {
                before.last = now;
                if before.remark.text != remark.text && !is_recent(Some(before.worded_at), now) {
                    (before.remark, before.worded_at) = (remark, now);
                }
            }
            other => *other = Some(Remarked { remark, worded_at: now, last: now }),
        }
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

    fn take_pods(&mut self, answers: Vec<Answer>, rules: Rules) {
        for Answer { pod, target, failure, .. } in answers {
            let Some(target) = target else { continue };
            let known = self.pods.entry(pod.uid);
            let known = known.or_insert_with(|| PodResult { target: target.clone(), runs: Runs::default() });
            if known.target != target {
                *known = PodResult { target, runs: Runs::default() };
            }
            known.runs.take(failure, rules);
        }
    }

    /// More than half of those that were to be asked decide. One that there was no time for fails if it gave no answer the last
    /// time; of the others nobody knows. So a few that were asked do not speak for many: then this run says nothing.
    fn take_workload(&mut self, answers: &[Answer], unasked: &[String], about: String, rules: Rules) {
        let told: Vec<_> = answers.iter().filter_map(|one| Some((one, one.failure.as_ref()?))).collect();
        let chosen = answers.len() + unasked.len();
        let failing = told.len() + unasked.iter().filter(|uid| self.silent.contains(*uid)).count();
        let passing = answers.len() - told.len();
        let failure = if failing * 2 > chosen {
            let why = told.first().map(|(one, why)| format!("{}: {why}", one.pod.name));
            let why = why.unwrap_or_else(|| "they gave no answer when they were asked last".to_owned());
            Some(format!("{failing} of {chosen} endpoints fail; {why}"))
        } else if passing * 2 >= chosen {
            None
        } else {
            return;
        };
        // What was found of another workload says nothing of this one.
        let known = self.workload.take().filter(|known| known.target == about);
        let mut known = known.unwrap_or_else(|| WorkloadResult { target: about, runs: Runs::default() });
        known.runs.take(failure, rules);
        self.workload = Some(known);
    }

    fn shown(&self, settings: &CheckSettings, now: Timestamp) -> Shown {
        let rules = Rules::new(settings, self.further_runs, now);
        let verdict = |uid: Option<&String>, runs: &Runs| {
            let one = runs.current(rules)?;
            Some((uid.cloned(), one.healthy, one.since, one.well_since))
        };
        let pods = self.pods.iter().filter_map(|(uid, pod)| verdict(Some(uid), &pod.runs));
        let workload = self.workload.iter().filter_map(|one| verdict(None, &one.runs));
        Shown { verdicts: pods.chain(workload).collect(), remark: self.remark() }
    }

    fn remark(&self) -> Option<String> {
        self.remark.as_ref().map(|remarked| remarked.remark.text.clone())
    }

    /// What it says now. What was found more than three intervals ago says nothing; of a pod, if not all can be asked in one run,
    /// more than three rounds.
    pub fn current(&self, settings: &CheckSettings, now: Timestamp) -> Current {
        let rules = Rules::new(settings, self.further_runs, now);
        let said = |target: &String, runs: &Runs| Some((target.clone(), runs.current(rules)?.clone()));
        let pods = self.pods.iter().filter_map(|(uid, one)| Some((uid.clone(), said(&one.target, &one.runs)?)));
        let workload = self.workload.as_ref().and_then(|one| said(&one.target, &one.runs));
        Current { pods: pods.collect(), workload, remark: self.remark() }
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
        with(answers)
    }

    fn with(answers: Vec<Answer>) -> Run {
        Run::Asked { answers, unasked: Vec::new(), about: "booking".to_owned(), note: None }
    }

    fn not_asked() -> Run {
        Run::NotAsked(NotAsked::Stale.into())
    }

    /// What the check says after these runs, one each second from 1 on: the endpoints that pass (+) and fail (-), or nobody (.).
    fn after(scope: CheckScope, runs: &str) -> Current {
        let (mut results, settings) = (CheckResults::default(), settings(scope));
        let mut now = at(0);
        for (second, run) in (1..).zip(runs.split_whitespace()) {
            now = at(second);
            let answers: Vec<_> = run.chars().map(|one| one == '+').collect();
            let run = if run == "." { not_asked() } else { asked(&answers) };
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
    #[case::unhealthy_before_a_long_gap("- - . . . . . . . . . . -", None)]
    #[case::and_often_enough_after_it("- - . . . . . . . . . . - -", Some((false, 14)))]
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
        assert!(take(not_asked(), 6), "nobody is asked");
        assert!(!take(not_asked(), 7));
        assert!(take(not_asked(), 9), "what was found is stale");
        assert!(!take(not_asked(), 10));
    }

    #[test]
    fn words_of_an_endpoint_are_cut() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Pod));
        let long = Answer { failure: Some("ü".repeat(5_000)), silent: true, ..answer("a", false) };
        for second in 1..=2 {
            results.take(with(vec![long.clone()]), &settings, at(second));
        }
        assert!(results.current(&settings, at(2)).pods["uid-a"].1.message.len() <= MAX_TEXT);
    }

    /// What a run says of a workload of ten endpoints, of which so many pass and fail, so many are not asked and gave no answer
    /// before, and the others are not asked.
    #[rstest::rstest]
    #[case::all_pass(10, 0, 0, Some(true))]
    #[case::all_fail(0, 10, 0, Some(false))]
    #[case::half_pass(5, 5, 0, Some(true))]
    #[case::half_pass_and_nobody_knows_of_the_others(5, 0, 0, Some(true))]
    #[case::few_fail_and_nobody_knows_of_the_others(0, 3, 0, None)]
    #[case::few_pass_and_nobody_knows_of_the_others(3, 0, 0, None)]
    #[case::few_pass_and_the_others_were_silent(3, 0, 7, Some(false))]
    #[case::few_fail_and_many_were_silent(2, 2, 4, Some(false))]
    #[case::not_quite(2, 2, 3, None)]
    fn few_do_not_speak_for_many(
        #[case] passing: usize,
        #[case] failing: usize,
        #[case] silent: usize,
        #[case] expected: Option<bool>,
    ) {
        let (mut results, mut settings) = (CheckResults::default(), settings(CheckScope::Workload));
        settings.thresholds.unhealthy = 1;
        let name = |number: usize| number.to_string();
        results.silent = (10 - silent..10).map(|number| answer(&name(number), true).pod.uid).collect();
        let asked = passing + failing;
        let answers = (0..asked).map(|number| answer(&name(number), number < passing)).collect();
        let unasked = (asked..10).map(|number| answer(&name(number), true).pod.uid).collect();
        results.take(Run::Asked { answers, unasked, about: "booking".to_owned(), note: None }, &settings, at(1));
        let said = results.current(&settings, at(1)).workload;
        assert_eq!(said.map(|(_, one)| one.healthy), expected);
    }

    #[test]
    fn what_was_silent_is_known_until_it_is_asked_again() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Workload));
        results.take(with(vec![Answer { silent: true, ..answer("a", false) }]), &settings, at(1));
        results.take(with(vec![answer("b", true)]), &settings, at(2));
        assert!(results.silent.contains("uid-a"));
        results.take(with(vec![answer("a", true)]), &settings, at(3));
        assert!(results.silent.is_empty());
    }

    #[test]
    fn what_a_pod_says_holds_for_three_rounds() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Pod));
        // Four pods, of which each run asks one.
        for (second, pod) in (1..).zip(["a", "b", "c", "d", "b", "c", "d", "b", "c", "d", "b", "c", "d"]) {
            let unasked = ["x", "y", "z"].map(str::to_owned).to_vec();
            let run = Run::Asked { answers: vec![answer(pod, true)], unasked, about: String::new(), note: None };
            results.take(run, &settings, at(second));
        }
        assert!(results.current(&settings, at(13)).pods.contains_key("uid-a"), "it was asked 12 s ago");
        assert!(!results.current(&settings, at(14)).pods.contains_key("uid-a"));
        assert_eq!(
            [(1, 0), (32, 1), (32, 68), (1, 99), (0, 0)].map(|(one, no)| further_runs(one, no)),
            [0, 1, 3, 99, 0]
        );
    }

    #[test]
    fn what_was_found_of_another_workload_says_nothing() {
        for scope in [CheckScope::Workload, CheckScope::Pod] {
            let (mut results, settings) = (CheckResults::default(), settings(scope));
            let run = |about: &str| {
                let answers = vec![Answer { target: Some(about.to_owned()), ..answer("a", false) }];
                Run::Asked { answers, unasked: Vec::new(), about: about.to_owned(), note: None }
            };
            let mut healthy = |about: &str, second| {
                results.take(run(about), &settings, at(second));
                let current = results.current(&settings, at(second));
                current.workload.into_iter().chain(current.pods.into_values()).map(|(_, one)| one.healthy).next()
            };
            assert_eq!((healthy("one", 1), healthy("one", 2)), (None, Some(false)));
            assert_eq!(
                (healthy("two", 3), healthy("two", 4)),
                (None, Some(false)),
                "it has to fail often enough itself"
            );
        }
    }

    #[test]
    fn words_alone_change_only_now_and_then() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Workload));
        let mut news = Vec::new();
        for second in 1..=25 {
            let number = usize::try_from(second).unwrap();
            if results.take(Run::NotAsked(NotAsked::TooBusy(number).into()), &settings, at(second)) {
                news.push(second);
            }
        }
        assert_eq!(news, [1, 11, 21]);
        assert!(results.take(not_asked(), &settings, at(26)), "another kind is told at once");
        // It comes and goes.
        let mut take = |run, second| results.take(run, &settings, at(second));
        assert!(take(asked(&[true]), 27), "it is well");
        assert!(!take(not_asked(), 28) && !take(asked(&[true]), 29));
        assert_eq!((30..=39).filter(|second| take(asked(&[true]), *second)).collect::<Vec<_>>(), [38]);
    }

    #[test]
    fn the_words_of_a_failure_change_only_now_and_then() {
        let (mut results, settings) = (CheckResults::default(), settings(CheckScope::Workload));
        let mut said = BTreeSet::new();
        for second in 1..=21 {
            let failure = Some(format!("HTTP {second}"));
            results.take(with(vec![Answer { failure, ..answer("a", false) }]), &settings, at(second));
            said.extend(results.current(&settings, at(second)).workload.map(|(_, one)| one.message));
        }
        let words = ["1 of 1 endpoints fail; a: HTTP 12", "1 of 1 endpoints fail; a: HTTP 2"];
        assert_eq!(said.into_iter().collect::<Vec<_>>(), words);
    }
}
