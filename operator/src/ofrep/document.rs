//! The flags of a scope, compiled: what answers are made from.

use super::{compiled::CompiledFlags, flagd::Version, scopes::Scope};
use crate::fleet::{
    degradations::Degradations,
    flag_inputs::inputs,
    flag_set::FlagSet,
    index::FleetIndex,
    set_metadata::{FlagMetadata, SetMetadata},
};
use contract::{FlagsSettings, Section};
use engine::{
    compile::{self, CompileError},
    flag_scope::{self, FlagScope},
};
use kube::Resource;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tracing::warn;

/// Most bytes of all flag sets of a namespace together.
pub const MAX_NAMESPACE_BYTES: usize = 4 * 1024 * 1024;
/// Most flags, and most bytes, of a document whose flags are evaluated all together at once, without waiting for a turn.
const MAX_LIGHT_FLAGS: usize = 100;
const MAX_LIGHT_BYTES: usize = 64 * 1024;
/// A call that took so long for an evaluation lets the next calls for this document wait for their turn.
const SLOW: Duration = Duration::from_micros(500);

/// The flags of a scope.
#[derive(Debug, Default)]
pub struct Document {
    /// What they are made from, which stays of a set that becomes invalid.
    pub section: Section<FlagsSettings>,
    /// Ready to be evaluated.
    pub flags: CompiledFlags,
    /// About how many bytes they have.
    pub bytes: usize,
    metadata: Metadata,
    /// Something in it was seen to take long.
    is_slow: AtomicBool,
    /// Which version of the flags it is, for as long as that is so.
    version: Mutex<Option<Version>>,
}

/// The set of each flag, and its metadata.
type Metadata = HashMap<String, Arc<SetMetadata>>;

impl Document {
    /// The flags of a scope as the index has them. `before` is the last document of the same scope; without one, `published` is
    /// what the pods of a workload have.
    pub fn of(
        scope: &Scope,
        index: &FleetIndex,
        before: Option<&Self>,
        published: Option<&Section<FlagsSettings>>,
    ) -> Result<Self, CompileError> {
        let degraded = index.degradations_in(scope.namespace());
        let live = before.map(|before| &before.section).or(published);
        let (sets, flags) = match scope {
            Scope::Namespace(namespace) => {
                let sets = index.flag_sets_in(namespace);
                let flags = namespace_flags(&sets, live);
                (sets, flags)
            }
            Scope::Workload(id) => {
                let sources = live.map(|live| live.sources.as_slice()).unwrap_or_default();
                let mut sets = index.flag_sets_of(id);
                sets.extend(index.unreadable_flag_sets(&id.namespace, sources));
                let flags = workload_flags(&sets, live)?;
                (sets, flags)
            }
        };
        Ok(Self::new(flags, &sets, &degraded, before))
    }

    /// The flags of all sets of a namespace, of which degraded fleets say `degraded`. `before` is the last document of the same
    /// scope.
    pub fn of_namespace(sets: &[Arc<FlagSet>], degraded: &Degradations, before: Option<&Self>) -> Self {
        Self::new(namespace_flags(sets, before.map(|before| &before.section)), sets, degraded, before)
    }

    fn new(
        FlagScope { flags: mut section, left_out, bytes }: FlagScope,
        sets: &[Arc<FlagSet>],
        degraded: &Degradations,
        before: Option<&Self>,
    ) -> Self {
        if !left_out.is_empty() {
            warn!(sets = %left_out.join(", "), "too many flags for one scope: the youngest sets are not served over OFREP");
        }
        compile::degrade(&mut section.settings, degraded);
        let by_uid: HashMap<_, _> = sets.iter().filter_map(|set| Some((set.meta().uid.as_deref()?, set))).collect();
        let mut metadata = Metadata::new();
        for source in &section.sources {
            let set = by_uid.get(source.uid.as_str());
            let own = set.and_then(|set| set.metadata());
            let is_in_force = set.and_then(|set| set.reviewed()).is_some_and(|reviewed| reviewed.is_ok());
            for key in &source.keys {
                // Of a set that cannot be used any more its last edit that could be, if that is known.
                let last = before.and_then(|before| before.metadata.get(key)).filter(|last| last.uid == source.uid);
                if let Some(known) = if is_in_force { own } else { last.or(own) } {
                    metadata.insert(key.clone(), Arc::clone(known));
                }
            }
        }
        let same_rules = before.is_some_and(|before| before.section.settings.evaluators == section.settings.evaluators);
        let flags = CompiledFlags::compile(&section.settings, before.map(|before| &before.flags), same_rules);
        Self { section, flags, bytes, metadata, ..Self::default() }
    }

    /// Whether all of its flags are evaluated, and written, in no time worth waiting for.
    pub fn is_light(&self) -> bool {
        self.section.settings.flags.len() <= MAX_LIGHT_FLAGS && self.bytes <= MAX_LIGHT_BYTES && !self.is_slow()
    }

    /// Whether an evaluation was seen to take long.
    pub fn is_slow(&self) -> bool {
        self.is_slow.load(Ordering::Relaxed)
    }

    /// Notes how long an evaluation took.
    pub fn note_time(&self, time: Duration) {
        if time >= SLOW {
            self.is_slow.store(true, Ordering::Relaxed);
        }
    }

    /// Which version of the flags this is at `now_ms`, if that is known already.
    pub fn known_version(&self, now_ms: i64) -> Option<Version> {
        let version = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        version.as_ref().filter(|version| version.holds_at(now_ms)).cloned()
    }

    /// Which version of the flags this is at `now_ms`.
    pub fn version(&self, now_ms: i64) -> Version {
        if let Some(known) = self.known_version(now_ms) {
            return known;
        }
        let version = Version::of(self, now_ms);
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = Some(version.clone());
        version
    }

    /// The set that a flag is from.
    pub fn set_of(&self, key: &str) -> Option<&Arc<SetMetadata>> {
        self.metadata.get(key)
    }

    /// The metadata of a flag: its own above those of its set, and which set it is from.
    pub fn metadata(&self, key: &str) -> Option<FlagMetadata<'_>> {
        self.metadata.get(key).map(|set| set.of_flag(key))
    }
}

fn namespace_flags(sets: &[Arc<FlagSet>], live: Option<&Section<FlagsSettings>>) -> FlagScope {
    flag_scope::of_namespace(inputs(sets, live), live, MAX_NAMESPACE_BYTES)
}

fn workload_flags(sets: &[Arc<FlagSet>], live: Option<&Section<FlagsSettings>>) -> Result<FlagScope, CompileError> {
    flag_scope::of_workload(&inputs(sets, live), live)
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{FlagDegradation, WorkloadId};
    use serde_json::{Value, json};

    fn set(name: &str, default: &str, unreadable: bool) -> Arc<FlagSet> {
        let flag = json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": default});
        let mut set = json!({
            "metadata": {"namespace": "n", "name": name, "uid": name, "generation": 1},
            "spec": {"flagSpec": {"metadata": {"of": name}, "flags": {name: flag}}},
        });
        if unreadable {
            set["spec"]["priority"] = json!("high");
        }
        Arc::new(serde_json::from_str(&set.to_string()).unwrap())
    }

    fn value(document: &Document, key: &str) -> Option<bool> {
        document.section.settings.flags.get(key)?.value(0)?.as_bool()
    }

    #[test]
    fn what_a_degraded_fleet_says_is_answered_until_it_ends_and_is_no_sets_own() {
        let said = |key: &str| {
            let said =
                FlagDegradation { variant: "off".into(), until_ms: 1_000, by: "booking".into(), load_percent: 80 };
            Degradations::from([(key.to_owned(), said)])
        };
        let sets = [set("a", "on", false), set("b", "on", false)];
        for make in MAKERS {
            let document = make(&sets, &said("a"), None);
            let at = |key: &str, now_ms: i64| {
                let flag = document.flags.find(key).unwrap();
                flag.evaluate(key, &flags::Inputs::default(), || now_ms).unwrap().and_then(Value::as_bool)
            };
            assert_eq!((at("a", 999), at("a", 1_000), at("b", 0)), (Some(false), Some(true), Some(true)));
            // One that is invalid now keeps what it gave, and nothing else.
            let broken = [set("a", "no-such-variant", false), set("b", "on", false)];
            assert_eq!(value(&make(&broken, &nobody(), Some(&document)), "a"), Some(true));
            assert_eq!(value(&make(&broken, &said("a"), Some(&document)), "a"), Some(false));
            assert_eq!(value(&make(&sets, &said("c"), None), "a"), Some(true));
        }
    }

    type Make = fn(&[Arc<FlagSet>], &Degradations, Option<&Document>) -> Document;
    const MAKERS: [Make; 2] = [Document::of_namespace, of_workload];

    fn of_workload(sets: &[Arc<FlagSet>], degraded: &Degradations, before: Option<&Document>) -> Document {
        Document::new(workload_flags(sets, before.map(|before| &before.section)).unwrap(), sets, degraded, before)
    }

    fn nobody() -> Degradations {
        Degradations::new()
    }

    #[rstest::rstest]
    #[case::invalid("no-such-variant", false)]
    #[case::unreadable("off", true)]
    fn a_set_that_breaks_keeps_its_flags_and_hides_nothing(#[case] default: &str, #[case] unreadable: bool) {
        let first = [set("a", "on", false), set("b", "on", false)];
        let second = [set("a", default, unreadable), set("b", "off", false)];
        for make in MAKERS {
            let before = make(&first, &nobody(), None);
            let after = make(&second, &nobody(), Some(&before));
            assert_eq!((value(&after, "a"), value(&after, "b")), (Some(true), Some(false)));
            assert_eq!(json!(after.metadata("a"))["of"], "a", "its metadata, too");
            let anew = make(&second, &nobody(), None);
            assert_eq!((value(&anew, "a"), value(&anew, "b")), (None, Some(false)));
        }
        let published = of_workload(&first, &nobody(), None).section;
        let scope = workload_flags(&second, Some(&published)).unwrap();
        let anew = Document::new(scope, &second, &nobody(), None);
        assert_eq!((value(&anew, "a"), value(&anew, "b")), (Some(true), Some(false)), "as the pods have them");
    }

    /// It names no workload any more, for nobody can read which.
    #[test]
    fn a_workload_keeps_the_flags_of_a_set_that_cannot_be_read() {
        let (index, scope) = (FleetIndex::default(), Scope::Workload(WorkloadId::deployment("n", "w")));
        let put = |priority: &Value, generation: i64| {
            let flag = json!({"state": "ENABLED", "variants": {"on": true}, "defaultVariant": "on"});
            let set = json!({
                "metadata": {"namespace": "n", "name": "s", "uid": "s", "generation": generation},
                "spec": {
                    "priority": priority, "flagSpec": {"flags": {"a": flag}},
                    "targetRefs": [{"group": "apps", "kind": "Deployment", "name": "w"}],
                },
            });
            index.put_flag_set(serde_json::from_str(&set.to_string()).unwrap());
        };
        put(&json!(0), 1);
        let first = Document::of(&scope, &index, None, None).unwrap();
        put(&json!("high"), 2);
        let second = Document::of(&scope, &index, Some(&first), None).unwrap();
        let anew = Document::of(&scope, &index, None, Some(&first.section)).unwrap();
        assert_eq!([&first, &second, &anew].map(|document| value(document, "a")), [Some(true); 3]);
    }

    #[test]
    fn what_took_long_is_not_light_any_more() {
        let document = Document::of_namespace(&[set("a", "on", false)], &Degradations::new(), None);
        document.note_time(SLOW / 2);
        assert!(document.is_light() && !document.is_slow());
        document.note_time(SLOW);
        assert!(!document.is_light() && document.is_slow());
    }
}
