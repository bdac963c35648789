//! What pods find wrong with the flags of a set: rules that they cannot use, and values of another type than their code reads.

use crate::{
    fleet::flag_problems::FlagTrouble,
    kubernetes::meta::cut,
    status::{conditions::Verdict, target::Target},
};
use contract::FlagProblemKind;
use crds::{ConditionStatus, ConditionType, FeatureFlag, Reason, feature_flag::FlagFinding};
use kube::ResourceExt;

/// Most flags that a status lists.
const MOST: usize = 500;
/// Most flags that a message lists.
const MAX_LISTED: usize = 10;
/// Longest message of a finding, in bytes.
const MAX_MESSAGE: usize = 1000;

/// What pods of `held` say of flags that `set` holds there.
fn troubles<'a>(
    set: &FeatureFlag,
    held: &'a [&'a Target],
) -> impl Iterator<Item = (&'a Target, &'a FlagTrouble)> + use<'a> {
    let uid = set.uid();
    held.iter().flat_map(move |target| {
        let uid = uid.clone();
        let of_set = move |trouble: &&FlagTrouble| uid.as_deref() == Some(trouble.set.as_str());
        target.flag_troubles.iter().filter(of_set).map(|trouble| (*target, trouble))
    })
}

/// The same in words: `booking: code reads a boolean, … (2 of 3 pods)`.
fn described((target, trouble): (&Target, &FlagTrouble)) -> String {
    let FlagTrouble { message, pods, .. } = trouble;
    format!("{}: {message} ({pods} of {} pods)", target.name, target.acknowledged.ready)
}

/// The first few of a kind, with their flags, in words; empty if there is none.
fn listed(set: &FeatureFlag, held: &[&Target], kind: FlagProblemKind) -> String {
    let found = troubles(set, held).filter(|(_, trouble)| trouble.kind == kind);
    let mut words: Vec<_> =
        found.take(MAX_LISTED + 1).map(|found| format!("{}: {}", found.1.key, described(found))).collect();
    if words.len() > MAX_LISTED {
        words.truncate(MAX_LISTED);
        words.push("…".to_owned());
    }
    words.join("; ")
}

/// The flags of the set with which pods have a problem.
pub fn findings(set: &FeatureFlag, held: &[&Target]) -> Vec<FlagFinding> {
    let finding = |found: (&Target, &FlagTrouble)| FlagFinding {
        key: found.1.key.clone(),
        source: if found.1.kind == FlagProblemKind::TypeMismatch { "Code" } else { "Spec" }.to_owned(),
        message: Some(cut(&described(found), MAX_MESSAGE).to_owned()),
        ..FlagFinding::default()
    };
    troubles(set, held).map(finding).collect()
}

/// These before all other flags of the set, of which those that are overridden are there as well.
pub fn first(mut troubled: Vec<FlagFinding>, mut others: Vec<FlagFinding>) -> Vec<FlagFinding> {
    for finding in &mut troubled {
        let same = others.iter().position(|other| other.key == finding.key);
        finding.type_ = same.and_then(|index| others[index].type_.clone());
        finding.unread = same.and_then(|index| others[index].unread);
        if let Some(index) = same.filter(|index| others[*index].source != "Override") {
            others.remove(index);
        }
    }
    troubled.into_iter().chain(others).take(MOST).collect()
}

/// Whether code reads another type than some flag has.
pub fn verdict(set: &FeatureFlag, held: &[&Target]) -> Verdict {
    let listed = listed(set, held, FlagProblemKind::TypeMismatch);
    let reason = if listed.is_empty() { Reason::NoTypeMismatch } else { Reason::TypeMismatch };
    Verdict::new(ConditionType::TypeMismatch, !listed.is_empty(), reason, listed)
}

/// `programmed`, as far as pods can use all of it: a rule that some pod cannot use is not programmed. A value of another type is;
/// the message tells of it.
pub fn programmed(set: &FeatureFlag, held: &[&Target], programmed: (Verdict, bool)) -> (Verdict, bool) {
    let (mut verdict, stalled) = programmed;
    if verdict.status != ConditionStatus::True {
        return (verdict, stalled);
    }
    let broken = listed(set, held, FlagProblemKind::InvalidRule);
    if !broken.is_empty() {
        let message = format!("{}, but not all of it can be used: {broken}", verdict.message);
        return (Verdict::new(ConditionType::Programmed, false, Reason::PartiallyProgrammed, message), stalled);
    }
    if troubles(set, held).any(|(_, trouble)| trouble.kind == FlagProblemKind::TypeMismatch) {
        verdict.message += "; code reads another type than some flags have: see the condition TypeMismatch";
    }
    (verdict, stalled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::WorkloadId;
    use engine::ack::Acknowledged;
    use engine::compile::{FlagSetInput, Input, compile};
    use jiff::Timestamp;
    use serde_json::{Value, json};

    fn set(uid: &str) -> FeatureFlag {
        serde_json::from_value(json!({
            "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
            "metadata": {"name": uid, "uid": uid}, "spec": {"flagSpec": {"flags": {}}},
        }))
        .unwrap()
    }

    fn trouble(key: &str, kind: FlagProblemKind, set: &str) -> FlagTrouble {
        FlagTrouble { key: key.into(), kind, message: "is wrong".into(), pods: 2, set: set.into() }
    }

    fn target(flag_troubles: Vec<FlagTrouble>) -> Target {
        let acknowledged = Acknowledged { ready: 3, in_sync: 3, ..Acknowledged::default() };
        Target { name: "booking".into(), found: true, acknowledged, flag_troubles, ..Target::default() }
    }

    fn live() -> (Verdict, bool) {
        (Verdict::new(ConditionType::Programmed, true, Reason::Programmed, "live in 3 of 3 pods"), false)
    }

    #[test]
    fn a_value_of_another_type_is_programmed_and_told() {
        let target = target(vec![trouble("pdf", FlagProblemKind::TypeMismatch, "a")]);
        let (verdict, stalled) = programmed(&set("a"), &[&target], live());
        assert_eq!((verdict.status, verdict.reason, stalled), (ConditionStatus::True, Reason::Programmed, false));
        assert!(verdict.message.starts_with("live in 3 of 3 pods; code reads"), "{}", verdict.message);
        let verdict = super::verdict(&set("a"), &[&target]);
        assert_eq!((verdict.status, verdict.reason), (ConditionStatus::True, Reason::TypeMismatch));
        assert_eq!(verdict.message, "pdf: booking: is wrong (2 of 3 pods)");
        let found = findings(&set("a"), &[&target]).remove(0);
        assert_eq!((found.key.as_str(), found.source.as_str()), ("pdf", "Code"));
        assert_eq!(found.message.as_deref(), Some("booking: is wrong (2 of 3 pods)"));
    }

    #[test]
    fn a_rule_that_a_pod_cannot_use_is_not_programmed() {
        let target = target(vec![trouble("vip", FlagProblemKind::InvalidRule, "a")]);
        let (verdict, _) = programmed(&set("a"), &[&target], live());
        assert_eq!((verdict.status, verdict.reason), (ConditionStatus::False, Reason::PartiallyProgrammed));
        assert!(verdict.message.ends_with("vip: booking: is wrong (2 of 3 pods)"), "{}", verdict.message);
        assert_eq!(super::verdict(&set("a"), &[&target]).reason, Reason::NoTypeMismatch);
        assert_eq!(findings(&set("a"), &[&target])[0].source, "Spec");
    }

    #[test]
    fn flags_with_a_problem_come_first_and_once() {
        let finding = |key: &str, source: &str| FlagFinding {
            key: key.to_owned(),
            source: source.to_owned(),
            type_: (source != "Code").then(|| "string".to_owned()),
            ..FlagFinding::default()
        };
        let others = vec![finding("a", "Override"), finding("b", "Spec"), finding("c", "Spec")];
        let all = first(vec![finding("c", "Code"), finding("a", "Code"), finding("gone", "Code")], others);
        let lines: Vec<_> = all.iter().map(|one| format!("{} {} {:?}", one.key, one.source, one.type_)).collect();
        let string = r#"Some("string")"#;
        let expected = [
            format!("c Code {string}"),
            format!("a Code {string}"),
            "gone Code None".to_owned(),
            format!("a Override {string}"),
            format!("b Spec {string}"),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn flags_of_another_set_are_its_own_matter() {
        let kinds = [FlagProblemKind::TypeMismatch, FlagProblemKind::InvalidRule, FlagProblemKind::Unknown];
        let target = target(kinds.map(|kind| trouble("x", kind, "b")).into());
        assert_eq!(programmed(&set("a"), &[&target], live()), live());
        assert_eq!(super::verdict(&set("a"), &[&target]).reason, Reason::NoTypeMismatch);
        assert_eq!(findings(&set("a"), &[&target]), []);
        assert_eq!(findings(&set("b"), &[&target]).len(), 3, "also what a later version of a pod reports");
    }

    #[test]
    fn what_is_not_programmed_yet_stays_so_and_lists_are_short() {
        let publishing = || (Verdict::new(ConditionType::Programmed, false, Reason::Publishing, "soon"), false);
        let many = (0..100).map(|nth| trouble(&format!("f{nth}"), FlagProblemKind::InvalidRule, "a")).collect();
        let target = target(many);
        assert_eq!(programmed(&set("a"), &[&target], publishing()), publishing());
        let (verdict, _) = programmed(&set("a"), &[&target], live());
        assert_eq!(verdict.message.matches("is wrong").count(), MAX_LISTED);
        assert!(verdict.message.ends_with('…'), "{}", verdict.message);
    }

    /// Sets are validated one by one. That together they cannot be more than a pod compiles follows from this: what bounds a
    /// rule does not count other rules, and names do not matter.
    #[test]
    fn what_compiles_in_each_set_compiles_in_one_document() {
        let deepest = |inner: Value| (0..60).fold(inner, |rule, _| json!({ "!": rule }));
        let widest = || json!({"in": [{"var": "a"}, vec![1; flags::targeting::MAX_NODES - 10]]});
        let input = |name: &str, created: i64, shared: Value| {
            let flag = json!({
                "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on",
                "targeting": {"if": [{"or": [{"$ref": "shared"}, {"$ref": "other"}, widest()]}, "off"]},
            });
            let keys = (0..20).map(|nth| (format!("{name}-{nth}"), flag.clone()));
            let settings = json!({
                "flags": keys.collect::<serde_json::Map<_, _>>(), "evaluators": {"shared": shared, "other": widest()},
            });
            FlagSetInput {
                source: contract::Source {
                    name: name.into(),
                    uid: name.into(),
                    generation: 1,
                    ..contract::Source::default()
                },
                priority: 0,
                created_at: Timestamp::from_second(created).unwrap(),
                bytes: settings.to_string().len(),
                settings: Input::Valid(serde_json::from_value(settings).unwrap()),
            }
        };
        let sets = [input("a", 1, deepest(json!({"var": "a"}))), input("b", 2, deepest(json!({"var": "b"})))];
        let compiled = compile(None, &sets, None).unwrap();
        let document = compiled.document(WorkloadId::deployment("n", "w"), 1);
        assert_eq!((document.flags.settings.flags.len(), document.flags.settings.evaluators.len()), (40, 4));
        let together = flags::FlagSet::compile(document.flags.settings);
        assert_eq!(together.iter().find_map(|(_, flag)| flag.rule_error()), None);
    }
}
