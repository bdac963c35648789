//! From flag sets to what each of them contributes, for a workload's document and for callers over the network alike.

use super::flag_set::FlagSet;
use crate::kubernetes::meta::created_at;
use contract::{FlagsSettings, Section, Source};
use engine::compile::{FlagSetInput, Input};
use kube::{Resource, ResourceExt};
use std::sync::Arc;

/// What each set contributes. `live` is the last document that was made from them: of a set that is invalid now, its flags stay; one
/// that cannot even be read keeps the rank that it had, too, and contributes nothing if nothing of it is live.
pub fn inputs(sets: &[Arc<FlagSet>], live: Option<&Section<FlagsSettings>>) -> Vec<FlagSetInput> {
    sets.iter().filter_map(|set| input(set, live)).collect()
}

fn input(read: &FlagSet, live: Option<&Section<FlagsSettings>>) -> Option<FlagSetInput> {
    let created_at = created_at(&**read);
    let Ok(set) = &read.0 else {
        let uid = read.meta().uid.as_deref().unwrap_or_default();
        let source = live?.sources.iter().find(|source| source.uid == uid)?;
        // Its edit and its priority are those that it had when it could be read.
        let (source, priority) = (source.clone(), source.priority);
        return Some(FlagSetInput { source, priority, created_at, settings: Input::KeepLive, bytes: 0 });
    };
    let source = Source {
        name: set.name_any(),
        uid: set.uid().unwrap_or_default(),
        generation: set.meta().generation.unwrap_or_default(),
        ..Source::default()
    };
    let settings = match read.reviewed() {
        Some(Ok(reviewed)) => Input::Valid(Arc::clone(&reviewed.settings)),
        _ => Input::KeepLive,
    };
    Some(FlagSetInput { source, priority: set.spec.priority, created_at, settings, bytes: read.bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::index::FleetIndex;
    use contract::WorkloadId;
    use serde_json::{Value, json};

    fn set(generation: i64, priority: &Value, default: &str) -> FlagSet {
        let flag = json!({"state": "ENABLED", "variants": {"on": true}, "defaultVariant": default});
        let set = json!({
            "metadata": {"namespace": "n", "name": "s", "uid": "u", "generation": generation},
            "spec": {
                "priority": priority, "flagSpec": {"flags": {"a": flag}},
                "targetRefs": [{"group": "apps", "kind": "Deployment", "name": "w"}],
            },
        });
        serde_json::from_str(&set.to_string()).unwrap()
    }

    fn live() -> Section<FlagsSettings> {
        let source = Source { name: "s".into(), uid: "u".into(), generation: 1, priority: 7, ..Source::default() };
        Section { sources: vec![source], settings: FlagsSettings::default() }
    }

    fn of(set: FlagSet, live: Option<&Section<FlagsSettings>>) -> Option<(i64, i32, bool)> {
        let input = inputs(&[Arc::new(set)], live).pop()?;
        Some((input.source.generation, input.priority, input.settings == Input::KeepLive))
    }

    #[test]
    fn a_set_that_breaks_keeps_what_is_live_and_one_that_cannot_be_read_its_rank_too() {
        let live = live();
        assert_eq!(of(set(2, &json!(3), "on"), Some(&live)), Some((2, 3, false)));
        assert_eq!(of(set(2, &json!(3), "absent"), Some(&live)), Some((2, 3, true)));
        assert_eq!(of(set(2, &json!("high"), "on"), Some(&live)), Some((1, 7, true)));
        assert_eq!(of(set(2, &json!("high"), "on"), None), None);
    }

    #[test]
    fn a_set_that_cannot_be_read_is_found_though_it_names_no_workload() {
        let (index, live) = (FleetIndex::default(), live());
        let id = WorkloadId::deployment("n", "w");
        index.put_flag_set(set(1, &json!(7), "on"));
        assert_eq!((index.flag_sets_of(&id).len(), index.unreadable_flag_sets("n", &live.sources).len()), (1, 0));
        index.put_flag_set(set(2, &json!("high"), "on"));
        assert_eq!((index.flag_sets_of(&id).len(), index.unreadable_flag_sets("n", &live.sources).len()), (0, 1));
        assert!(index.unreadable_flag_sets("other", &live.sources).is_empty());
        let other = Source { uid: "another".into(), ..live.sources[0].clone() };
        assert!(index.unreadable_flag_sets("n", &[other]).is_empty(), "another object of that name");
    }
}
