//! The metadata of flags, which belong to their flag sets.

use crds::{FeatureFlag, feature_flag::FlagSpec};
use kube::ResourceExt;
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Which set a flag is from, unless its metadata say so themselves.
const SET_ID: &str = "flagSetId";

/// Metadata of one set and its flags.
#[derive(Debug, Default)]
pub struct SetMetadata {
    /// The uid of the set.
    pub uid: String,
    /// Namespace and name of the set.
    pub id: String,
    /// Which edit of it.
    pub generation: i64,
    all: Map<String, Value>,
    by_flag: BTreeMap<String, Map<String, Value>>,
}

/// Metadata of one flag. They are borrowed: those of a set belong to each of its flags.
#[derive(Debug)]
pub struct FlagMetadata<'a> {
    set: &'a SetMetadata,
    own: Option<&'a Map<String, Value>>,
}

impl SetMetadata {
    /// The metadata of `set`.
    pub fn of(set: &FeatureFlag) -> Self {
        let FlagSpec { flags, metadata, .. } = &set.spec.flag_spec;
        let own = flags.iter().map(|(key, flag)| (key.clone(), plain(flag.metadata.as_ref())));
        Self {
            uid: set.uid().unwrap_or_default(),
            id: format!("{}/{}", set.namespace().unwrap_or_default(), set.name_any()),
            generation: set.metadata.generation.unwrap_or_default(),
            all: plain(metadata.as_ref()),
            by_flag: own.filter(|(_, metadata)| !metadata.is_empty()).collect(),
        }
    }

    /// The metadata of a flag: its own above those of its set, and which set it is from.
    pub fn of_flag(&self, key: &str) -> FlagMetadata<'_> {
        FlagMetadata { set: self, own: self.by_flag.get(key) }
    }
}

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

/// Metadata may only be texts, numbers and Booleans.
fn plain(metadata: Option<&Map<String, Value>>) -> Map<String, Value> {
    let members =
        metadata.into_iter().flatten().filter(|(_, value)| !(value.is_null() || value.is_array() || value.is_object()));
    members.map(|(name, value)| (name.clone(), value.clone())).collect()
}
