//! Policy and flag sets of one workload, compiled into what its pods run by.

use crate::shared_rules::{self, Rules};
use contract::{
    ConfigError, FlagSettings, FlagsSettings, MAX_CONFIG_BYTES, PolicySettings, RuntimeConfig, Section, Source,
};
use jiff::Timestamp;
use std::collections::BTreeMap;

/// What a resource contributes.
#[derive(Clone, Debug, PartialEq)]
pub enum Input<T> {
    /// It is valid: this is what it says.
    Valid(T),
    /// It is invalid or suspended: what is live from it stays.
    KeepLive,
}

/// A policy that has the workload.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyInput {
    /// The resource.
    pub source: Source,
    /// What it says.
    pub settings: Input<PolicySettings>,
}

/// A flag set that names the workload.
#[derive(Clone, Debug, PartialEq)]
pub struct FlagSetInput {
    /// The resource; `keys` is ignored.
    pub source: Source,
    /// Higher wins.
    pub priority: i32,
    /// Among equals, the older wins.
    pub created_at: Timestamp,
    /// What it says.
    pub settings: Input<FlagsSettings>,
}

/// Both sections of a document, and their meaning.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    /// Resilience settings.
    pub policy: Section<PolicySettings>,
    /// Flags.
    pub flags: Section<FlagsSettings>,
    /// Hash of what both mean.
    pub content_hash: String,
    /// Flag sets that do not fit beside the others: only what was live from them is here.
    pub left_out: Vec<String>,
}

/// Why nothing could be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// Everything together is too much for one document.
    #[error(
        "policy and flags together have {0} bytes, more than the {MAX_CONFIG_BYTES} that a ConfigMap can carry: target fewer or smaller flag sets at this workload. The last valid configuration stays in effect"
    )]
    TooLarge(usize),
    /// The document cannot be written.
    #[error("the configuration cannot be written: {0}")]
    Unwritable(String),
}

/// Compiles. `live` is the document that is published now; it supplies what an invalid or suspended resource last gave.
///
/// When everything together is too much, the youngest flag sets stay as they are live, and policy and older sets go on:
/// nobody's flags may block somebody else's policy or kill switch.
pub fn compile(
    policy: Option<PolicyInput>,
    flag_sets: &[FlagSetInput],
    live: Option<&RuntimeConfig>,
) -> Result<Compiled, CompileError> {
    let policy = match policy {
        None => Section::default(),
        Some(PolicyInput { source, settings: Input::Valid(settings) }) => Section { sources: vec![source], settings },
        Some(PolicyInput { settings: Input::KeepLive, .. }) => live.map(|live| live.policy.clone()).unwrap_or_default(),
    };
    let (flags, left_out) = match merge(&policy, flag_sets.to_vec(), live) {
        Ok(flags) => (flags, Vec::new()),
        Err(CompileError::TooLarge(_)) => fit(&policy, flag_sets, live)?,
        Err(other) => return Err(other),
    };
    let content_hash = RuntimeConfig::hash(&policy.settings, &flags.settings);
    Ok(Compiled { policy, flags, content_hash, left_out })
}

/// Merges the sets, if the result fits into a document together with the policy.
fn merge(
    policy: &Section<PolicySettings>,
    flag_sets: Vec<FlagSetInput>,
    live: Option<&RuntimeConfig>,
) -> Result<Section<FlagsSettings>, CompileError> {
    let flags = merge_flags(flag_sets, live.map(|live| &live.flags));
    // The size is judged on a whole document, with the longest revision and workload and a hash of the right length.
    let compiled = Compiled { policy: policy.clone(), flags, content_hash: "0".repeat(64), left_out: Vec::new() };
    let longest = contract::WorkloadId::new("n".repeat(63), contract::WorkloadKind::StatefulSet, "n".repeat(63));
    match compiled.document(longest, i64::MIN).to_bytes() {
        Ok(_) => Ok(compiled.flags),
        Err(ConfigError::TooLarge(bytes)) => Err(CompileError::TooLarge(bytes)),
        Err(other) => Err(CompileError::Unwritable(other.to_string())),
    }
}

/// Starts from what is live, and takes in set after set, the oldest first, as long as everything fits. The second value
/// names the sets that did not.
fn fit(
    policy: &Section<PolicySettings>,
    wanted: &[FlagSetInput],
    live: Option<&RuntimeConfig>,
) -> Result<(Section<FlagsSettings>, Vec<String>), CompileError> {
    let mut sets: Vec<_> = wanted.iter().map(|set| FlagSetInput { settings: Input::KeepLive, ..set.clone() }).collect();
    let mut merged = merge(policy, sets.clone(), live)?;
    let mut by_age: Vec<_> = (0..sets.len()).collect();
    by_age.sort_by_key(|index| (wanted[*index].created_at, &wanted[*index].source.name));
    let mut left_out = Vec::new();
    for index in by_age {
        sets[index].settings = wanted[index].settings.clone();
        match merge(policy, sets.clone(), live) {
            Ok(larger) => merged = larger,
            Err(CompileError::TooLarge(_)) => {
                sets[index].settings = Input::KeepLive;
                left_out.push(wanted[index].source.name.clone());
            }
            Err(other) => return Err(other),
        }
    }
    Ok((merged, left_out))
}

impl Compiled {
    /// The document of these sections under a revision.
    pub fn document(&self, workload: contract::WorkloadId, revision: i64) -> RuntimeConfig {
        RuntimeConfig {
            contract_version: contract::DOCUMENT_VERSION,
            workload,
            revision,
            content_hash: self.content_hash.clone(),
            policy: self.policy.clone(),
            flags: self.flags.clone(),
        }
    }
}

/// Merges flag sets key by key: the higher priority wins, then the older set, then the name.
pub(crate) fn merge_flags(
    mut sets: Vec<FlagSetInput>,
    live: Option<&Section<FlagsSettings>>,
) -> Section<FlagsSettings> {
    sets.sort_by(|a, b| (b.priority, a.created_at, &a.source.name).cmp(&(a.priority, b.created_at, &b.source.name)));
    let mut merged = Section::<FlagsSettings>::default();
    for set in sets {
        let (mut flags, evaluators) = match set.settings {
            Input::Valid(settings) => (settings.flags, settings.evaluators),
            Input::KeepLive => live_part(live, &set.source),
        };
        flags.retain(|key, _| !merged.settings.flags.contains_key(key));
        shared_rules::publish(&set.source.name, &mut flags, &evaluators, &mut merged.settings.evaluators);
        let keys = flags.keys().cloned().collect();
        merged.settings.flags.extend(flags);
        merged.sources.push(Source { keys, ..set.source });
    }
    merged
}

/// What is live from one set: its flags, and the rules that they need are among those.
fn live_part(live: Option<&Section<FlagsSettings>>, source: &Source) -> (BTreeMap<String, FlagSettings>, Rules) {
    let Some(live) = live else { return (BTreeMap::new(), Rules::new()) };
    let keys = live.sources.iter().find(|old| old.uid == source.uid).map(|old| old.keys.as_slice()).unwrap_or_default();
    let flags =
        keys.iter().filter_map(|key| live.settings.flags.get_key_value(key)).map(|(k, v)| (k.clone(), v.clone()));
    (flags.collect(), live.settings.evaluators.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{DependencySettings, FlagState};
    use proptest::prelude::*;
    use serde_json::json;

    fn source(name: &str) -> Source {
        Source { name: name.into(), uid: format!("uid-{name}"), generation: 1, keys: vec![] }
    }

    fn policy(request_ms: u64) -> PolicySettings {
        let mut dependency = DependencySettings::default();
        dependency.timeout.request_ms = request_ms;
        PolicySettings { dependencies: BTreeMap::from([("database".into(), dependency)]), ..Default::default() }
    }

    fn flag(value: bool) -> FlagSettings {
        FlagSettings {
            state: FlagState::Enabled,
            variants: BTreeMap::from([("v".into(), json!(value))]),
            default_variant: Some("v".into()),
            targeting: None,
            kill_switch: None,
        }
    }

    fn set(name: &str, priority: i32, created: i64, keys: &[(&str, bool)]) -> FlagSetInput {
        FlagSetInput {
            source: source(name),
            priority,
            created_at: Timestamp::from_second(created).unwrap(),
            settings: Input::Valid(FlagsSettings {
                flags: keys.iter().map(|(key, value)| ((*key).to_owned(), flag(*value))).collect(),
                evaluators: BTreeMap::new(),
            }),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "it stands where an optional policy is expected")]
    fn valid(settings: PolicySettings) -> Option<PolicyInput> {
        Some(PolicyInput { source: source("p"), settings: Input::Valid(settings) })
    }

    fn live(compiled: &Compiled) -> RuntimeConfig {
        compiled.document(contract::WorkloadId::deployment("n", "w"), 5)
    }

    #[test]
    fn no_policy_means_the_defaults() {
        let compiled = compile(None, &[], None).unwrap();
        assert_eq!(compiled.policy.settings, PolicySettings::default());
        assert!(compiled.policy.sources.is_empty());
    }

    #[test]
    fn an_invalid_policy_keeps_what_is_live_and_does_not_hold_flags_back() {
        let before = live(&compile(valid(policy(5_000)), &[set("f", 0, 1, &[("a", true)])], None).unwrap());
        let broken = PolicyInput { source: source("p"), settings: Input::KeepLive };
        let after = compile(Some(broken), &[set("f", 0, 1, &[("a", false)])], Some(&before)).unwrap();
        assert_eq!(after.policy, before.policy);
        assert_eq!(after.flags.settings.flags["a"], flag(false));
        assert_ne!(after.content_hash, before.content_hash);
    }

    #[test]
    fn an_invalid_flag_set_keeps_its_own_flags_only() {
        let first = compile(valid(policy(1)), &[set("f", 0, 1, &[("a", true)]), set("g", 0, 2, &[("b", true)])], None);
        let before = live(&first.unwrap());
        let broken = FlagSetInput { settings: Input::KeepLive, ..set("f", 0, 1, &[]) };
        let after = compile(valid(policy(1)), &[broken, set("g", 0, 2, &[("b", false)])], Some(&before)).unwrap();
        assert_eq!(after.flags.settings.flags, BTreeMap::from([("a".into(), flag(true)), ("b".into(), flag(false))]));
        assert_eq!(after.flags.sources[0].keys, ["a"], "it must still be known whose flag it is");
    }

    #[rstest::rstest]
    #[case::priority(set("x", 1, 9, &[("a", true)]), set("y", 0, 1, &[("a", false)]), true)]
    #[case::age(set("x", 0, 1, &[("a", true)]), set("y", 0, 2, &[("a", false)]), true)]
    #[case::name(set("y", 0, 1, &[("a", false)]), set("x", 0, 1, &[("a", true)]), true)]
    fn one_set_wins_a_key(#[case] one: FlagSetInput, #[case] other: FlagSetInput, #[case] expected: bool) {
        for sets in [vec![one.clone(), other.clone()], vec![other.clone(), one.clone()]] {
            let compiled = compile(None, &sets, None).unwrap();
            assert_eq!(compiled.flags.settings.flags["a"], flag(expected));
        }
    }

    /// A set with one flag by a rule that is shared, `vip`.
    fn by_vip(name: &str, created: i64, key: &str, vip: &serde_json::Value) -> FlagSetInput {
        let flag = FlagSettings { targeting: Some(json!({"if": [{"$ref": "vip"}, "v"]})), ..flag(true) };
        let flags = BTreeMap::from([(key.to_owned(), flag)]);
        let evaluators = BTreeMap::from([("vip".to_owned(), vip.clone())]);
        FlagSetInput { settings: Input::Valid(FlagsSettings { flags, evaluators }), ..set(name, 0, created, &[]) }
    }

    /// A set that is kept holds back no edit of another one, and keeps its own rule.
    #[test]
    fn a_set_that_is_kept_freezes_no_other_ones_rules() {
        let [old, before, after] = [json!("old"), json!(["gbp"]), json!(["gbp", "eur"])];
        let first = compile(None, &[by_vip("a", 1, "one", &old), by_vip("b", 2, "two", &before)], None).unwrap();
        let kept = || FlagSetInput { settings: Input::KeepLive, ..set("a", 0, 1, &[]) };
        let mut document = live(&first);
        for rule in [&after, &before] {
            let next = compile(None, &[kept(), by_vip("b", 2, "two", rule)], Some(&document)).unwrap();
            assert_eq!(json!(next.flags.settings.evaluators), json!({"vip": old, "b/vip": rule}));
            assert_eq!(next.flags.settings.flags["one"], first.flags.settings.flags["one"]);
            document = live(&next);
        }
        // The other way round: b is kept, with the name that its rule has.
        let kept = FlagSetInput { settings: Input::KeepLive, ..set("b", 0, 2, &[]) };
        let next = compile(None, &[by_vip("a", 1, "one", &after), kept], Some(&document)).unwrap();
        assert_eq!(json!(next.flags.settings.evaluators), json!({"vip": after, "b/vip": before}));
    }

    #[test]
    fn a_set_without_rules_of_its_own_has_none_of_others() {
        let before =
            live(&compile(None, &[by_vip("a", 1, "one", &json!(1)), set("b", 0, 2, &[("two", true)])], None).unwrap());
        let kept = FlagSetInput { settings: Input::KeepLive, ..set("b", 0, 2, &[]) };
        let after = compile(None, &[kept], Some(&before)).unwrap();
        assert_eq!(after.flags.settings.evaluators, BTreeMap::new());
        assert_eq!(after.flags.settings.flags.len(), 1);
    }

    fn big(name: &str, created: i64, bytes: usize) -> FlagSetInput {
        let mut big = flag(true);
        big.variants.insert("v".into(), json!("x".repeat(bytes)));
        let flags = FlagsSettings { flags: BTreeMap::from([(name.into(), big)]), ..Default::default() };
        FlagSetInput { settings: Input::Valid(flags), ..set(name, 0, created, &[]) }
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_holds_nobody_up() {
        let sets = |a: bool| {
            vec![
                big("young", 3, MAX_CONFIG_BYTES / 2),
                set("f", 0, 4, &[("a", a)]),
                big("old", 2, MAX_CONFIG_BYTES / 2),
            ]
        };
        let first = compile(valid(policy(1)), &sets(true), None).unwrap();
        assert_eq!(first.left_out, ["young"]);
        assert_eq!(first.flags.settings.flags.keys().collect::<Vec<_>>(), ["a", "old"]);
        let second = compile(valid(policy(2)), &sets(false), Some(&live(&first))).unwrap();
        assert_eq!((second.policy.settings, second.flags.settings.flags["a"].clone()), (policy(2), flag(false)));
    }

    #[test]
    fn a_set_that_grows_too_large_keeps_what_was_live() {
        let before = live(&compile(valid(policy(1)), &[set("f", 0, 1, &[("a", true)])], None).unwrap());
        let grown = FlagSetInput { source: source("f"), ..big("a", 1, MAX_CONFIG_BYTES) };
        let after = compile(valid(policy(1)), &[grown], Some(&before)).unwrap();
        assert_eq!(
            (after.left_out.as_slice(), &after.flags.settings),
            (["f".to_owned()].as_slice(), &before.flags.settings)
        );
    }

    proptest! {
        #[test]
        fn the_hash_changes_exactly_when_the_meaning_does(a in 1u64..4, b in 1u64..4, x in any::<bool>(), y in any::<bool>(), generation in 1i64..9) {
            let one = compile(valid(policy(a)), &[set("f", 0, 1, &[("k", x)])], None).unwrap();
            let mut other_policy = valid(policy(b)).unwrap();
            other_policy.source.generation = generation;
            let other = compile(Some(other_policy), &[set("f", 0, 1, &[("k", y)])], None).unwrap();
            prop_assert_eq!(one.content_hash == other.content_hash, a == b && x == y);
        }
    }
}
