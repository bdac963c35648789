//! What the status of a flag set says of each flag.

use super::overriders::overrider;
use crate::fleet::degradations::Degradations;
use contract::{FlagDegradation, FlagSettings, FlagState, FlagsSettings};
use crds::{FeatureFlag, Moment, feature_flag::FlagFinding};
use jiff::Timestamp;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The source of a flag that a degraded fleet sets.
pub const DEGRADATION: &str = "Degradation";
/// Most flags that a set has.
const MOST: usize = 500;

/// The flags that workloads have from another set: which one has each of them where, as in "booking runs by the set platform".
pub type Lost = BTreeMap<String, Vec<String>>;

/// Notes at each finding that is here whether no code reads the flag. `unread` has the flags that no ready pod of a workload reads, for
/// each workload. Where another set has a flag for all of them, it is about that set's flag, which is not noted here.
pub fn note_unread(findings: &mut [FlagFinding], unread: &[&BTreeSet<String>]) {
    if unread.is_empty() {
        return;
    }
    for finding in findings.iter_mut().filter(|finding| finding.source != "OtherSet") {
        let is_unread = unread.iter().all(|keys| keys.contains(&finding.key));
        finding.unread = is_unread.then_some(true);
    }
}

/// All flags of a set that is for so many workloads: first those that are overridden, then those that a degraded fleet sets, then
/// those that it has lost, then the others.
pub fn findings(
    set: &FeatureFlag,
    settings: &FlagsSettings,
    lost: &Lost,
    degraded: &Degradations,
    workloads: usize,
    now_ms: i64,
) -> Vec<FlagFinding> {
    let finding = |(key, flag): (&String, &Arc<FlagSettings>)| {
        let lost = lost.get(key).map(Vec::as_slice).unwrap_or_default();
        let mut finding = match flag.active_override(now_ms) {
            Some(over) if lost.len() < workloads || workloads == 0 => {
                let entries = set.metadata.managed_fields.as_deref().unwrap_or_default();
                // The last moment that there is stands for none.
                let until = over.until_ms.filter(|until| *until < Timestamp::MAX.as_millisecond());
                let until = until.and_then(|until| Timestamp::from_millisecond(until).ok());
                let lasts = until.map_or_else(|| "until a person takes it back".to_owned(), |at| format!("until {at}"));
                let why = if over.reason.is_empty() { String::new() } else { format!(": {}", over.reason) };
                FlagFinding {
                    effective_variant: Some(over.variant.clone()),
                    overridden_by: overrider(entries, key).map(str::to_owned),
                    until: until.map(Moment::from),
                    message: Some(format!("{lasts}{why}")),
                    ..blank(key, "Override")
                }
            }
            _ if !lost.is_empty() && lost.len() >= workloads => blank(key, "OtherSet"),
            _ => by_fleet(key, flag, degraded.get(key), now_ms).unwrap_or_else(|| FlagFinding {
                effective_variant: flag.default_variant.clone().filter(|_| flag.state == FlagState::Enabled),
                message: (flag.state != FlagState::Enabled)
                    .then(|| "disabled: callers get their own default".to_owned()),
                ..blank(key, "Spec")
            }),
        };
        if !lost.is_empty() {
            let said = finding.message.take().into_iter().chain([lost.join(", ")]);
            finding.message = Some(said.collect::<Vec<_>>().join("; "));
        }
        finding.type_ = kind(flag).map(str::to_owned);
        finding
    };
    let mut all: Vec<_> = settings.flags.iter().map(finding).collect();
    // Stable, so by key within each.
    all.sort_by_key(|finding| {
        let first = ["Override", DEGRADATION, "OtherSet"];
        first.iter().position(|source| *source == finding.source).unwrap_or(first.len())
    });
    all.truncate(MOST);
    all
}

/// A flag that a degraded fleet sets, if one does.
fn by_fleet(key: &str, flag: &FlagSettings, said: Option<&FlagDegradation>, now_ms: i64) -> Option<FlagFinding> {
    let said = said.filter(|said| now_ms < said.until_ms && flag.variants.contains_key(&said.variant))?;
    let FlagDegradation { variant, until_ms, by, load_percent } = said;
    Some(FlagFinding {
        effective_variant: Some(variant.clone()),
        degraded_by: Some(by.clone()),
        until: Timestamp::from_millisecond(*until_ms).ok().map(Moment::from),
        message: Some(format!(
            "the fleet of the policy {by} is degraded (stage of {load_percent} %); its end is put off while that lasts"
        )),
        ..blank(key, DEGRADATION)
    })
}

fn blank(key: &str, source: &str) -> FlagFinding {
    FlagFinding { key: key.to_owned(), source: source.to_owned(), ..FlagFinding::default() }
}

/// As `valueType` has it; one fraction makes all numbers of a flag floats.
fn kind(flag: &FlagSettings) -> Option<&'static str> {
    let is_float = flag.variants.values().any(Value::is_f64);
    flag.variants.values().next().map(|value| match value {
        Value::Bool(_) => "boolean",
        Value::Number(_) if is_float => "float",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Null | Value::Array(_) | Value::Object(_) => "object",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: i64 = 1_000_000;

    fn lines(lost: &[(&str, &[&str])]) -> Vec<String> {
        lines_degraded(lost, &Degradations::new())
    }

    fn lines_degraded(lost: &[(&str, &[&str])], degraded: &Degradations) -> Vec<String> {
        let on_off = json!({"on": true, "off": false});
        let flags = json!({"flags": {
            "a": {"state": "ENABLED", "variants": on_off, "defaultVariant": "on"},
            "b": {"state": "ENABLED", "variants": {"w": 1, "x": 1.5}, "defaultVariant": "x",
                  "override": {"variant": "x", "reason": "fire"}},
            "c": {"state": "DISABLED", "variants": {"x": {"y": 1}}, "defaultVariant": "x"},
            "d": {"state": "ENABLED", "variants": {"x": 1}, "override": {"variant": "x", "untilMs": NOW}},
        }});
        let set = json!({"apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
                         "metadata": {"name": "f"}, "spec": {"flagSpec": {"flags": {}}}});
        let lost = lost.iter().map(|(key, by)| ((*key).to_owned(), by.iter().map(|by| (*by).to_owned()).collect()));
        let (set, flags) = (serde_json::from_value(set).unwrap(), serde_json::from_value(flags).unwrap());
        let line = |finding: FlagFinding| {
            let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            let [type_, variant, message] = [finding.type_, finding.effective_variant, finding.message].map(or_none);
            format!("{} {} {type_} {variant} {message}", finding.key, finding.source)
        };
        findings(&set, &flags, &lost.collect(), degraded, 2, NOW).into_iter().map(line).collect()
    }

    #[test]
    fn each_flag_has_its_type_its_source_and_what_holds() {
        let expected = [
            "b Override float x until a person takes it back: fire",
            "a Spec boolean on -",
            "c Spec object - disabled: callers get their own default",
            "d Spec integer - -",
        ];
        assert_eq!(lines(&[]), expected);
    }

    #[test]
    fn what_a_degraded_fleet_sets_is_said_with_its_policy() {
        let said = |variant: &str, until_ms: i64| FlagDegradation {
            variant: variant.into(),
            until_ms,
            by: "booking".into(),
            load_percent: 90,
        };
        let degraded = [("a", "off", NOW + 1), ("b", "w", NOW + 1), ("c", "absent", NOW + 1), ("d", "x", NOW)]
            .map(|(key, variant, until_ms)| (key.to_owned(), said(variant, until_ms)));
        let all: &[&str] = &["booking runs by the set x", "payment runs by the set y"];
        let words = "the fleet of the policy booking is degraded (stage of 90 %); its end is put off while that lasts";
        let lines = lines_degraded(&[], &degraded.clone().into());
        assert_eq!(
            lines[..2],
            [
                "b Override float x until a person takes it back: fire".to_owned(),
                format!("a Degradation boolean off {words}"),
            ]
        );
        assert!(lines[2].starts_with("c Spec") && lines[3].starts_with("d Spec"), "{lines:?}");
        assert!(lines_degraded(&[("a", all)], &degraded.into())[1].starts_with("a OtherSet"));
    }

    #[test]
    fn a_flag_is_unread_if_no_workload_reads_it() {
        let finding = |key: &str, source: &str| FlagFinding { key: key.to_owned(), ..blank(key, source) };
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<BTreeSet<_>>();
        let noted = |workloads: &[BTreeSet<String>]| {
            let mut all = ["a", "b"].map(|key| finding(key, "Spec")).to_vec();
            all.push(finding("c", "OtherSet"));
            note_unread(&mut all, &workloads.iter().collect::<Vec<_>>());
            all.into_iter().filter(|one| one.unread == Some(true)).map(|one| one.key).collect::<Vec<_>>()
        };
        assert_eq!(noted(&[keys(&["a", "b", "c"]), keys(&["b", "c"])]), ["b"]);
        assert_eq!(noted(&[keys(&["a"]), keys(&[])]), [] as [&str; 0]);
        assert_eq!(noted(&[]), [] as [&str; 0], "nobody was asked");
    }

    #[test]
    fn what_another_set_has_is_said_where() {
        let all: &[&str] = &["booking runs by the set x", "payment runs by the set y"];
        let expected = [
            "a OtherSet boolean - booking runs by the set x, payment runs by the set y",
            "b OtherSet float - booking runs by the set x, payment runs by the set y",
            "c Spec object - disabled: callers get their own default",
            "d Spec integer - booking runs by the set x",
        ];
        assert_eq!(lines(&[("a", all), ("b", all), ("d", &all[..1])]), expected);
        let partly = "b Override float x until a person takes it back: fire; booking runs by the set x";
        assert_eq!(lines(&[("b", &all[..1])])[0], partly);
    }
}
