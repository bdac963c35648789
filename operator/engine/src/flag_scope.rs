//! The flags that a caller over the network sees: those of a workload, or all of a namespace. They are merged as for the pods.

use crate::{
    compile::{CompileError, FlagSetInput, Input, compile, merge_flags},
    json_size::json_bytes,
};
use contract::{DOCUMENT_VERSION, FlagsSettings, RuntimeConfig, Section, WorkloadId};

/// The flags of a scope.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FlagScope {
    /// The flags, and which set each is from.
    pub flags: Section<FlagsSettings>,
    /// Names of the sets that do not fit beside the others.
    pub left_out: Vec<String>,
    /// About how many bytes the others have, in JSON.
    pub bytes: usize,
}

/// The flags of a workload, as its pods get them. `before` supplies what a set that is invalid now gave last.
pub fn of_workload(sets: &[FlagSetInput], before: Option<&Section<FlagsSettings>>) -> Result<FlagScope, CompileError> {
    let bytes = sets.iter().map(|set| size(set, before)).sum();
    let live = before.map(|flags| RuntimeConfig {
        contract_version: DOCUMENT_VERSION,
        workload: WorkloadId::deployment("", ""),
        revision: 0,
        content_hash: String::new(),
        policy: Section::default(),
        flags: flags.clone(),
    });
    let compiled = compile(None, sets, live.as_ref())?;
    Ok(FlagScope { flags: compiled.flags, left_out: compiled.left_out, bytes })
}

/// The flags of a namespace: of all its sets, whatever they target. Together the sets may have about `max_bytes` bytes; the
/// youngest that are too much are left out. `before` supplies what a set that is invalid now gave last.
pub fn of_namespace(
    mut sets: Vec<FlagSetInput>,
    before: Option<&Section<FlagsSettings>>,
    max_bytes: usize,
) -> FlagScope {
    sets.sort_by(|a, b| (a.created_at, &a.source.name).cmp(&(b.created_at, &b.source.name)));
    let (mut bytes, mut left_out) = (0, Vec::new());
    sets.retain(|set| {
        let size = size(set, before);
        let fits = size <= max_bytes - bytes;
        if fits {
            bytes += size;
        } else {
            left_out.push(set.source.name.clone());
        }
        fits
    });
    FlagScope { flags: merge_flags(sets, before), left_out, bytes }
}

/// Bytes of what a set contributes.
fn size(set: &FlagSetInput, before: Option<&Section<FlagsSettings>>) -> usize {
    match &set.settings {
        Input::Valid(_) => set.bytes,
        Input::KeepLive => {
            let Some(before) = before else { return 0 };
            let live = |key: &String| before.settings.flags.get(key);
            let source = before.sources.iter().find(|source| source.uid == set.source.uid);
            let flags: Vec<_> = source.iter().flat_map(|source| &source.keys).filter_map(live).collect();
            // Nobody knows any more which rules that flags share are of which set.
            let has_rule = flags.iter().any(|flag| flag.targeting.is_some());
            let rules = if has_rule { json_bytes(&before.settings.evaluators) } else { 0 };
            flags.into_iter().map(json_bytes).sum::<usize>() + rules
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::Source;
    use jiff::Timestamp;
    use serde_json::json;

    fn set(name: &str, priority: i32, created: i64, flags: &serde_json::Value) -> FlagSetInput {
        FlagSetInput {
            source: Source { name: name.into(), uid: format!("uid-{name}"), generation: 1, ..Source::default() },
            priority,
            created_at: Timestamp::from_second(created).unwrap(),
            settings: Input::Valid(serde_json::from_value(json!({ "flags": flags })).unwrap()),
            bytes: flags.to_string().len(),
        }
    }

    fn flag(value: &serde_json::Value) -> serde_json::Value {
        json!({"state": "ENABLED", "variants": {"v": value}, "defaultVariant": "v"})
    }

    fn value(scope: &FlagScope, key: &str) -> Option<serde_json::Value> {
        scope.flags.settings.flags.get(key)?.value(0).cloned()
    }

    #[test]
    fn the_higher_set_wins_a_key_and_the_older_one_among_equals() {
        let sets = vec![
            set("young", 0, 2, &json!({"a": flag(&json!(1)), "b": flag(&json!(1))})),
            set("old", 0, 1, &json!({"b": flag(&json!(2)), "c": flag(&json!(2))})),
            set("high", 1, 3, &json!({"c": flag(&json!(3))})),
        ];
        let expected = [("a", 1), ("b", 2), ("c", 3)].map(|(key, value)| (key, Some(json!(value))));
        for scope in [of_namespace(sets.clone(), None, 1 << 20), of_workload(&sets, None).unwrap()] {
            assert_eq!(expected.clone().map(|(key, _)| (key, value(&scope, key))), expected);
            assert!(scope.left_out.is_empty());
        }
    }

    #[test]
    fn what_an_invalid_set_gave_last_stays_and_hides_nothing_else() {
        let sets = |b: i32| {
            vec![set("one", 0, 1, &json!({"a": flag(&json!(1))})), set("two", 0, 2, &json!({"b": flag(&json!(b))}))]
        };
        let first = of_namespace(sets(1), None, 1 << 20);
        let mut second = sets(2);
        second[0].settings = Input::KeepLive;
        let scopes = [
            of_namespace(second.clone(), Some(&first.flags), 1 << 20),
            of_workload(&second, Some(&first.flags)).unwrap(),
        ];
        for scope in scopes {
            assert_eq!((value(&scope, "a"), value(&scope, "b")), (Some(json!(1)), Some(json!(2))));
        }
        let unknown = of_namespace(second, None, 1 << 20);
        assert_eq!((value(&unknown, "a"), value(&unknown, "b")), (None, Some(json!(2))));
    }

    #[test]
    fn the_youngest_sets_that_are_too_much_are_left_out() {
        let big = |name: &str, created| set(name, 0, created, &json!({name: flag(&json!("x".repeat(1_000)))}));
        let small = set("small", 0, 9, &json!({"small": flag(&json!(1))}));
        let scope = of_namespace(vec![big("c", 3), big("a", 1), small, big("b", 2)], None, 2_500);
        assert_eq!(scope.left_out, ["c"]);
        assert_eq!(scope.flags.settings.flags.keys().collect::<Vec<_>>(), ["a", "b", "small"]);
        let mut kept = big("a", 1);
        kept.settings = Input::KeepLive;
        assert_eq!(of_namespace(vec![kept], Some(&scope.flags), 500).left_out, ["a"], "what it keeps counts");
    }
}
