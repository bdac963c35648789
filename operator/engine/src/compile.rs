//! Policy and flag sets of one workload, compiled into what its pods run by.

use crate::shared_rules;
use contract::{
    ConfigError, FlagDegradation, FlagsSettings, MAX_CONFIG_BYTES, PolicySettings, RuntimeConfig, Section, Source,
};
use jiff::Timestamp;
use std::{collections::BTreeMap, sync::Arc};

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
    pub settings: Input<Arc<FlagsSettings>>,
    /// About how many bytes that has, in JSON; of no meaning for a set that keeps what is live.
    pub bytes: usize,
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
    compile_degraded(policy, flag_sets, live, &BTreeMap::new())
}

/// The same while fleets are degraded: `degraded` is what they say of flags, by key. Where there is no room for that, it is left out,
/// and everything else goes on.
pub fn compile_degraded(
    policy: Option<PolicyInput>,
    flag_sets: &[FlagSetInput],
    live: Option<&RuntimeConfig>,
    degraded: &BTreeMap<String, FlagDegradation>,
) -> Result<Compiled, CompileError> {
    let policy = match policy {
        None => Section::default(),
        Some(PolicyInput { source, settings: Input::Valid(settings) }) => Section { sources: vec![source], settings },
        Some(PolicyInput { settings: Input::KeepLive, .. }) => live.map(|live| live.policy.clone()).unwrap_or_default(),
    };
    let none = BTreeMap::new();
    let (flags, left_out) = match merge(&policy, flag_sets.to_vec(), live, degraded) {
        Ok(flags) => (flags, Vec::new()),
        Err(CompileError::TooLarge(_)) => match fit(&policy, flag_sets, live, degraded) {
            Err(CompileError::TooLarge(_)) if !degraded.is_empty() => fit(&policy, flag_sets, live, &none)?,
            fitted => fitted?,
        },
        Err(other) => return Err(other),
    };
    let content_hash = RuntimeConfig::hash(&policy.settings, &flags.settings);
    Ok(Compiled { policy, flags, content_hash, left_out })
}

/// Merges the sets, if the result fits into a document together with the policy. What is behind other sets' flags is in nobody's way:
/// of the set with the least say first, it is given up.
fn merge(
    policy: &Section<PolicySettings>,
    flag_sets: Vec<FlagSetInput>,
    live: Option<&RuntimeConfig>,
    degraded: &BTreeMap<String, FlagDegradation>,
) -> Result<Section<FlagsSettings>, CompileError> {
    let mut flags = merge_flags(flag_sets, live.map(|live| &live.flags));
    degrade(&mut flags.settings, degraded);
    // The size is judged on a whole document, with the longest revision and workload and a hash of the right length.
    let compiled = Compiled { policy: policy.clone(), flags, content_hash: "0".repeat(64), left_out: Vec::new() };
    let longest = contract::WorkloadId::new("n".repeat(63), contract::WorkloadKind::StatefulSet, "n".repeat(63));
    let mut document = compiled.document(longest, i64::MIN);
    loop {
        match document.to_bytes() {
            Ok(_) => return Ok(document.flags),
            Err(ConfigError::TooLarge(bytes)) => {
                let least = document.flags.sources.iter_mut().rev().find_map(|source| source.shadowed.take());
                if least.is_none() {
                    return Err(CompileError::TooLarge(bytes));
                }
            }
            Err(other) => return Err(CompileError::Unwritable(other.to_string())),
        }
    }
}

/// Starts from what is live, and takes in set after set, the oldest first, as long as everything fits. The second value
/// names the sets that did not.
fn fit(
    policy: &Section<PolicySettings>,
    wanted: &[FlagSetInput],
    live: Option<&RuntimeConfig>,
    degraded: &BTreeMap<String, FlagDegradation>,
) -> Result<(Section<FlagsSettings>, Vec<String>), CompileError> {
    let mut sets: Vec<_> = wanted.iter().map(|set| FlagSetInput { settings: Input::KeepLive, ..set.clone() }).collect();
    let mut merged = merge(policy, sets.clone(), live, degraded)?;
    let mut by_age: Vec<_> = (0..sets.len()).collect();
    by_age.sort_by_key(|index| (wanted[*index].created_at, &wanted[*index].source.name));
    let mut left_out = Vec::new();
    for index in by_age {
        sets[index].settings = wanted[index].settings.clone();
        match merge(policy, sets.clone(), live, degraded) {
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

/// Merges flag sets key by key: the higher priority wins, then the older set, then the name. Flags that lose are with their source.
pub(crate) fn merge_flags(
    mut sets: Vec<FlagSetInput>,
    live: Option<&Section<FlagsSettings>>,
) -> Section<FlagsSettings> {
    sets.sort_by(|a, b| (b.priority, a.created_at, &a.source.name).cmp(&(a.priority, b.created_at, &b.source.name)));
    let mut merged = Section::<FlagsSettings>::default();
    for set in sets {
        let parts = match set.settings {
            Input::Valid(settings) => vec![settings],
            Input::KeepLive => live_parts(live, &set.source).into_iter().map(Arc::new).collect(),
        };
        let name = &set.source.name;
        let (mut keys, mut shadowed) = (Vec::new(), FlagsSettings::default());
        for part in &parts {
            let FlagsSettings { flags, evaluators } = &**part;
            let flags = flags.iter().map(|(key, flag)| (key.clone(), Arc::clone(flag)));
            let (mut lost, mut won): (BTreeMap<_, _>, BTreeMap<_, _>) =
                flags.partition(|(key, _)| merged.settings.flags.contains_key(key));
            shared_rules::publish(name, &mut won, evaluators, &mut merged.settings.evaluators);
            keys.extend(won.keys().cloned());
            merged.settings.flags.extend(won);
            shared_rules::publish(name, &mut lost, evaluators, &mut shadowed.evaluators);
            shadowed.flags.extend(lost);
        }
        keys.sort_unstable();
        let shadowed = (!shadowed.flags.is_empty()).then_some(shadowed);
        merged.sources.push(Source { keys, priority: set.priority, shadowed, ..set.source });
    }
    merged
}

/// Puts over flags what degraded fleets say of them, as far as the flags are there and have the variant.
pub fn degrade(settings: &mut FlagsSettings, degraded: &BTreeMap<String, FlagDegradation>) {
    for (key, said) in degraded {
        if let Some(flag) = settings.flags.get_mut(key).filter(|flag| flag.variants.contains_key(&said.variant)) {
            Arc::make_mut(flag).degraded = Some(said.clone());
        }
    }
}

/// What a set last gave: the flags that are live from it, and those that are behind another set's. Each has the rules that it needs
/// among its own.
fn live_parts(live: Option<&Section<FlagsSettings>>, source: &Source) -> Vec<FlagsSettings> {
    let Some(live) = live else { return Vec::new() };
    let Some(old) = live.sources.iter().find(|old| old.uid == source.uid) else { return Vec::new() };
    let flag = |key: &String| live.settings.flags.get_key_value(key).map(|(key, flag)| (key.clone(), Arc::clone(flag)));
    let mut flags: BTreeMap<_, _> = old.keys.iter().filter_map(flag).collect();
    // No set gives that.
    for flag in flags.values_mut().filter(|flag| flag.degraded.is_some()) {
        Arc::make_mut(flag).degraded = None;
    }
    let in_force = FlagsSettings { flags, evaluators: live.settings.evaluators.clone() };
    [in_force].into_iter().chain(old.shadowed.clone()).collect()
}

/// What is noted of a set: which one it is, its priority, its keys, and what is behind others'.
pub type Note<'a> = (&'a str, i32, &'a [String], Option<&'a FlagsSettings>);

/// What is noted in a document for the operator itself.
pub fn notes(flags: &Section<FlagsSettings>) -> Vec<Note<'_>> {
    let of_use = flags.sources.iter().filter(|source| !source.keys.is_empty() || source.shadowed.is_some());
    of_use.map(|source| (&*source.uid, source.priority, &*source.keys, source.shadowed.as_ref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{DependencySettings, FlagSettings, FlagState};
    use proptest::prelude::*;
    use serde_json::json;

    fn source(name: &str) -> Source {
        Source { name: name.into(), uid: format!("uid-{name}"), generation: 1, ..Source::default() }
    }

    fn policy(request_ms: u64) -> PolicySettings {
        let mut dependency = DependencySettings::default();
        dependency.timeout.request_ms = request_ms;
        PolicySettings { dependencies: BTreeMap::from([("database".into(), dependency)]), ..Default::default() }
    }

    fn flag(value: bool) -> Arc<FlagSettings> {
        Arc::new(FlagSettings {
            state: FlagState::Enabled,
            variants: BTreeMap::from([("v".into(), json!(value))]),
            default_variant: Some("v".into()),
            targeting: None,
            kill_switch: None,
            degraded: None,
        })
    }

    fn set(name: &str, priority: i32, created: i64, keys: &[(&str, bool)]) -> FlagSetInput {
        FlagSetInput {
            source: source(name),
            priority,
            created_at: Timestamp::from_second(created).unwrap(),
            settings: Input::Valid(Arc::new(FlagsSettings {
                flags: keys.iter().map(|(key, value)| ((*key).to_owned(), flag(*value))).collect(),
                evaluators: BTreeMap::new(),
            })),
            bytes: 0,
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

    fn off(variant: &str) -> BTreeMap<String, FlagDegradation> {
        let said = FlagDegradation { variant: variant.into(), until_ms: 7, by: "p".into(), load_percent: 80 };
        BTreeMap::from([("a".to_owned(), said.clone()), ("nobody's".to_owned(), said)])
    }

    #[test]
    fn what_a_fleet_says_of_a_flag_comes_and_goes_and_is_no_sets_own() {
        let sets = [set("f", 1, 1, &[("a", true), ("b", true)]), set("g", 0, 2, &[("a", false)])];
        let plain = compile(None, &sets, None).unwrap();
        let degraded = compile_degraded(None, &sets, Some(&live(&plain)), &off("v")).unwrap();
        let said = |compiled: &Compiled, key: &str| compiled.flags.settings.flags[key].degraded.is_some();
        assert_eq!((said(&degraded, "a"), said(&degraded, "b"), degraded.flags.settings.flags.len()), (true, false, 2));
        assert_ne!(degraded.content_hash, plain.content_hash);
        let shadowed = degraded.flags.sources[1].shadowed.as_ref().unwrap();
        assert_eq!(shadowed.flags["a"].degraded, None, "only what is live");
        // Also of sets of which the live document is all there is.
        let broken = sets.clone().map(kept);
        for (degraded_now, expected) in [(off("v"), true), (BTreeMap::new(), false)] {
            let after = compile_degraded(None, &broken, Some(&live(&degraded)), &degraded_now).unwrap();
            assert_eq!(said(&after, "a"), expected);
        }
        let after = compile(None, &broken, Some(&live(&degraded))).unwrap();
        assert_eq!(after.content_hash, plain.content_hash);
        let absent = compile_degraded(None, &sets, None, &off("absent")).unwrap();
        assert_eq!(absent.content_hash, plain.content_hash, "a variant that it does not have");
    }

    #[test]
    fn what_a_fleet_says_never_keeps_a_document_from_being_published() {
        let mut full = set("f", 1, 1, &[("a", true)]);
        let Input::Valid(settings) = &mut full.settings else { panic!("it is valid") };
        let size = |compiled: &Compiled| live(compiled).to_bytes().map_or(usize::MAX, |bytes| bytes.len());
        let room = MAX_CONFIG_BYTES - 1_000;
        let flag = Arc::make_mut(settings).flags.get_mut("a").unwrap();
        Arc::make_mut(flag).variants.insert("x".into(), json!("x".repeat(room)));
        let plain = compile(None, std::slice::from_ref(&full), None).unwrap();
        let mut much = off("v");
        much.get_mut("a").unwrap().by = "p".repeat(MAX_CONFIG_BYTES - size(&plain));
        let degraded = compile_degraded(None, &[full], Some(&live(&plain)), &much).unwrap();
        assert_eq!(degraded.content_hash, plain.content_hash);
    }

    fn kept(set: FlagSetInput) -> FlagSetInput {
        FlagSetInput { settings: Input::KeepLive, ..set }
    }

    /// The set of an incident takes over a flag of one that is invalid, and goes again.
    #[rstest::rstest]
    fn a_set_that_goes_gives_its_keys_back_to_one_that_is_invalid(
        #[values(false, true)] was_invalid_before: bool,
        #[values(0, 1, 2)] restarts: usize,
    ) {
        let own = || by_vip("own", 1, "a", &json!("own"));
        let incident = || FlagSetInput { priority: 1_000, ..by_vip("incident", 2, "a", &json!("incident")) };
        let mut document = live(&compile(None, &[own()], None).unwrap());
        let first = document.clone();
        if was_invalid_before {
            document = live(&compile(None, &[kept(own())], Some(&document)).unwrap());
        }
        document = live(&compile(None, &[own(), incident()], Some(&document)).unwrap());
        assert_eq!(json!(document.flags.settings.evaluators), json!({"vip": "incident"}));
        for _ in 0..restarts {
            document = live(&compile(None, &[kept(own()), incident()], Some(&document)).unwrap());
            assert_eq!(json!(document.flags.settings.evaluators), json!({"vip": "incident"}));
        }
        let after = compile(None, &[kept(own())], Some(&document)).unwrap();
        assert_eq!(after.flags, first.flags);
        assert_eq!(after.content_hash, first.content_hash);
    }

    /// Whose priority is known when it can be read no more.
    #[test]
    fn a_set_keeps_its_rank_while_it_is_invalid() {
        let own = set("own", 7, 1, &[("a", true), ("b", true)]);
        let before = compile(None, std::slice::from_ref(&own), None).unwrap();
        let source = before.flags.sources[0].clone();
        assert_eq!(source.priority, 7);
        let incident = set("incident", 8, 2, &[("a", false)]);
        let after = compile(None, &[kept(own), incident], Some(&live(&before))).unwrap();
        assert_eq!(after.flags.settings.flags, BTreeMap::from([("a".into(), flag(false)), ("b".into(), flag(true))]));
        let shadowed = after.flags.sources[1].shadowed.as_ref().unwrap();
        assert_eq!(shadowed.flags, BTreeMap::from([("a".into(), flag(true))]));
    }

    /// Two rules of one name, one of which its flag had when another set came before it.
    #[test]
    fn what_is_behind_has_the_rules_that_it_had() {
        let first = || by_vip("first", 1, "a", &json!("first"));
        let own = || by_vip("own", 2, "b", &json!("own"));
        let before = live(&compile(None, &[first(), own()], None).unwrap());
        assert_eq!(
            before.flags.settings.flags["b"].targeting.as_deref(),
            Some(&json!({"if": [{"$ref": "own/vip"}, "v"]}))
        );
        let incident = || set("incident", 9, 3, &[("a", false), ("b", false)]);
        let during = live(&compile(None, &[kept(first()), kept(own()), incident()], Some(&before)).unwrap());
        assert_eq!(during.flags.settings.evaluators, BTreeMap::new());
        let after = compile(None, &[kept(first()), kept(own())], Some(&during)).unwrap();
        let rule = |key: &str| {
            let Some(serde_json::Value::Object(rule)) = after.flags.settings.flags[key].targeting.as_deref() else {
                panic!()
            };
            let name = rule["if"][0]["$ref"].as_str().unwrap();
            after.flags.settings.evaluators[name].clone()
        };
        assert_eq!((rule("a"), rule("b")), (json!("first"), json!("own")));
    }

    #[test]
    fn what_is_behind_is_given_up_before_anything_is_left_out() {
        let behind = FlagSetInput { priority: -1, ..big("a", 1, MAX_CONFIG_BYTES / 2) };
        let more = FlagSetInput { priority: -2, source: source("c"), ..big("a", 1, 1_000) };
        let ahead = FlagSetInput { source: source("b"), ..big("a", 2, MAX_CONFIG_BYTES / 2) };
        let compiled = compile(None, &[behind, more, ahead], None).unwrap();
        assert!(compiled.left_out.is_empty());
        let shadowed: Vec<_> = compiled.flags.sources.iter().map(|source| source.shadowed.is_some()).collect();
        assert_eq!(shadowed, [false, false, false]);
    }

    #[test]
    fn what_is_behind_means_nothing_to_pods() {
        let own = set("own", 0, 1, &[("a", true)]);
        let incident = set("incident", 1, 2, &[("a", false)]);
        let alone = compile(None, std::slice::from_ref(&incident), None).unwrap();
        let both = compile(None, &[incident, own], None).unwrap();
        assert_eq!(alone.content_hash, both.content_hash);
        assert_ne!(notes(&alone.flags), notes(&both.flags), "it has to be written down");
    }

    /// A set with one flag by a rule that is shared, `vip`.
    fn by_vip(name: &str, created: i64, key: &str, vip: &serde_json::Value) -> FlagSetInput {
        let mut flag = flag(true);
        Arc::make_mut(&mut flag).targeting = Some(Arc::new(json!({"if": [{"$ref": "vip"}, "v"]})));
        let flags = BTreeMap::from([(key.to_owned(), flag)]);
        let evaluators = BTreeMap::from([("vip".to_owned(), vip.clone())]);
        let settings = Input::Valid(Arc::new(FlagsSettings { flags, evaluators }));
        FlagSetInput { settings, ..set(name, 0, created, &[]) }
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
        Arc::make_mut(&mut big).variants.insert("v".into(), json!("x".repeat(bytes)));
        let flags = FlagsSettings { flags: BTreeMap::from([(name.into(), big)]), ..Default::default() };
        FlagSetInput { settings: Input::Valid(Arc::new(flags)), ..set(name, 0, created, &[]) }
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
