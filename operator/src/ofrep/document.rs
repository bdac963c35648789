//! The flags of a scope, compiled: what answers are made from.

use crate::{
    fleet::{degradations::Degradations, index::FlagSet},
    kubernetes::meta::created_at,
    spec,
};
use contract::{FlagDegradation, FlagsSettings, Section, Source};
use crds::{FeatureFlag, feature_flag::FlagSpec};
use engine::{
    compile::{self, CompileError, FlagSetInput, Input},
    flag_scope::{self, FlagScope},
};
use kube::{Resource, ResourceExt};
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use tracing::warn;

/// Most bytes of all flag sets of a namespace together.
pub const MAX_NAMESPACE_BYTES: usize = 4 * 1024 * 1024;

/// The flags of a scope.
#[derive(Debug, Default)]
pub struct Document {
    /// What they are made from, which stays of a set that becomes invalid.
    pub section: Section<FlagsSettings>,
    /// Ready to be evaluated.
    pub flags: flags::FlagSet,
    /// About how many bytes they have.
    pub bytes: usize,
    metadata: Metadata,
}

/// The set of each flag, and its metadata.
type Metadata = HashMap<String, Arc<SetMetadata>>;

/// Metadata of one set and its flags.
#[derive(Debug, Default)]
struct SetMetadata {
    /// Namespace and name of the set.
    id: String,
    all: Map<String, Value>,
    by_flag: BTreeMap<String, Map<String, Value>>,
}

impl Document {
    /// The flags of all sets of a namespace. `before` is the last document of the same scope.
    pub fn of_namespace(sets: &[Arc<FlagSet>], before: Option<&Self>) -> Self {
        let live = before.map(|before| &before.section);
        Self::new(flag_scope::of_namespace(inputs(sets, live), live, MAX_NAMESPACE_BYTES), sets, before)
    }

    /// The flags of the sets that target one workload. `before` is the last document of the same scope; without one, `published`
    /// is what the workload's pods have.
    pub fn of_workload(
        sets: &[Arc<FlagSet>],
        before: Option<&Self>,
        published: Option<&Section<FlagsSettings>>,
    ) -> Result<Self, CompileError> {
        let live = before.map(|before| &before.section).or(published);
        Ok(Self::new(flag_scope::of_workload(&inputs(sets, live), live)?, sets, before))
    }

    fn new(FlagScope { flags: section, left_out }: FlagScope, sets: &[Arc<FlagSet>], before: Option<&Self>) -> Self {
        if !left_out.is_empty() {
            warn!(sets = %left_out.join(", "), "too many flags for one scope: the youngest sets are not served over OFREP");
        }
        let mut metadata = Metadata::new();
        for source in &section.sources {
            let set = sets.iter().filter_map(|set| set.0.as_ref().ok()).find(|set| set.name_any() == source.name);
            let own = set.map(|set| Arc::new(SetMetadata::of(set)));
            for key in &source.keys {
                // Of a set that cannot be read any more.
                let known = own.as_ref().or_else(|| before?.metadata.get(key));
                if let Some(known) = known {
                    metadata.insert(key.clone(), Arc::clone(known));
                }
            }
        }
        let bytes = serde_json::to_vec(&section).map_or(0, |bytes| bytes.len());
        let flags = flags::FlagSet::compile(section.settings.clone());
        Self { section, flags, bytes, metadata }
    }

    /// The same while fleets are degraded, of which `degraded` is what they say of flags.
    #[must_use]
    pub fn degraded(mut self, degraded: &Degradations) -> Self {
        let is_said = |(key, flag): (&String, &FlagDegradation)| {
            let known = self.section.settings.flags.get(key);
            known.is_some_and(|known| known.variants.contains_key(&flag.variant))
        };
        if degraded.iter().any(is_said) {
            compile::degrade(&mut self.section.settings, degraded);
            self.flags = flags::FlagSet::compile(self.section.settings.clone());
        }
        self
    }

    /// The metadata of a flag: its own above those of its set, and which set it is from.
    pub fn metadata(&self, key: &str) -> Option<FlagMetadata<'_>> {
        let set = self.metadata.get(key)?;
        Some(FlagMetadata { set, own: set.by_flag.get(key) })
    }
}

/// Metadata of one flag. They are borrowed: those of a set belong to each of its flags.
#[derive(Debug)]
pub struct FlagMetadata<'a> {
    set: &'a SetMetadata,
    own: Option<&'a Map<String, Value>>,
}

/// Which set a flag is from, unless its metadata say so themselves.
const SET_ID: &str = "flagSetId";

impl Serialize for FlagMetadata<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let is_own = |name: &str| self.own.is_some_and(|own| own.contains_key(name));
        let mut map = serializer.serialize_map(None)?;
        if !is_own(SET_ID) && !self.set.all.contains_key(SET_ID) {
            map.serialize_entry(SET_ID, &self.set.id)?;
        }
        for (name, value) in self.set.all.iter().filter(|(name, _)| !is_own(name)).chain(self.own.into_iter().flatten())
        {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl SetMetadata {
    fn of(set: &FeatureFlag) -> Self {
        let FlagSpec { flags, metadata, .. } = &set.spec.flag_spec;
        let own = flags.iter().map(|(key, flag)| (key.clone(), plain(flag.metadata.as_ref())));
        Self {
            id: format!("{}/{}", set.namespace().unwrap_or_default(), set.name_any()),
            all: plain(metadata.as_ref()),
            by_flag: own.filter(|(_, metadata)| !metadata.is_empty()).collect(),
        }
    }
}

/// Metadata may only be texts, numbers and Booleans.
fn plain(metadata: Option<&Map<String, Value>>) -> Map<String, Value> {
    let members =
        metadata.into_iter().flatten().filter(|(_, value)| !(value.is_null() || value.is_array() || value.is_object()));
    members.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// What each set contributes. As for a workload: one that cannot be read keeps the keys and the rank that it had.
fn inputs(sets: &[Arc<FlagSet>], live: Option<&Section<FlagsSettings>>) -> Vec<FlagSetInput> {
    let held = |uid: &str| live?.sources.iter().find(|source| source.uid == uid);
    let input = |set: &Arc<FlagSet>| {
        let meta = set.meta();
        let source = Source {
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            generation: meta.generation.unwrap_or_default(),
            ..Source::default()
        };
        let created_at = created_at(set.as_ref());
        let Ok(set) = &set.0 else {
            let priority = held(&source.uid)?.priority;
            return Some(FlagSetInput { source, priority, created_at, settings: Input::KeepLive });
        };
        let settings = spec::flags::flags(&set.spec).map_or(Input::KeepLive, Input::Valid);
        Some(FlagSetInput { source, priority: set.spec.priority, created_at, settings })
    };
    sets.iter().filter_map(input).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
            let document = make(&sets, None).degraded(&said("a"));
            let at = |key: &str, now_ms: i64| {
                let flag = document.flags.find(key).unwrap();
                flag.evaluate(key, &flags::Inputs::default(), || now_ms).unwrap().and_then(Value::as_bool)
            };
            assert_eq!((at("a", 999), at("a", 1_000), at("b", 0)), (Some(false), Some(true), Some(true)));
            // One that is invalid now keeps what it gave, and nothing else.
            let broken = [set("a", "no-such-variant", false), set("b", "on", false)];
            assert_eq!(value(&make(&broken, Some(&document)), "a"), Some(true));
            assert_eq!(value(&make(&broken, Some(&document)).degraded(&said("a")), "a"), Some(false));
            assert_eq!(value(&make(&sets, None).degraded(&said("c")), "a"), Some(true));
        }
    }

    type Make = fn(&[Arc<FlagSet>], Option<&Document>) -> Document;
    const MAKERS: [Make; 2] = [Document::of_namespace, of_workload];

    fn of_workload(sets: &[Arc<FlagSet>], before: Option<&Document>) -> Document {
        Document::of_workload(sets, before, None).unwrap()
    }

    #[rstest::rstest]
    #[case::invalid("no-such-variant", false)]
    #[case::unreadable("off", true)]
    fn a_set_that_breaks_keeps_its_flags_and_hides_nothing(#[case] default: &str, #[case] unreadable: bool) {
        let first = [set("a", "on", false), set("b", "on", false)];
        let second = [set("a", default, unreadable), set("b", "off", false)];
        for make in MAKERS {
            let before = make(&first, None);
            let after = make(&second, Some(&before));
            assert_eq!((value(&after, "a"), value(&after, "b")), (Some(true), Some(false)));
            assert_eq!(json!(after.metadata("a"))["of"], "a", "its metadata, too");
            let anew = make(&second, None);
            assert_eq!((value(&anew, "a"), value(&anew, "b")), (None, Some(false)));
        }
        let published = of_workload(&first, None).section;
        let anew = Document::of_workload(&second, None, Some(&published)).unwrap();
        assert_eq!((value(&anew, "a"), value(&anew, "b")), (Some(true), Some(false)), "as the pods have them");
    }
}
