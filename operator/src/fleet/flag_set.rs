//! A flag set as it was read last, with what is worked out of it once for each edit, for all who need it.

use super::set_metadata::SetMetadata;
use crate::{
    kubernetes::guard::Guard,
    spec::{
        findings::Mistakes,
        flags::{Reviewed, review},
    },
};
use crds::FeatureFlag;
use engine::json_size::json_bytes;
use kube::Resource;
use serde::Deserialize;
use std::{
    ops::Deref,
    sync::{Arc, OnceLock},
};

/// A flag set, or the reason why it cannot be read.
#[derive(Debug, Deserialize)]
#[serde(from = "Guard<FeatureFlag>")]
pub struct FlagSet {
    read: Guard<FeatureFlag>,
    /// Shared with the object that was there before, if only its status is another one.
    known: Arc<Known>,
}

/// What is worked out when somebody first needs it.
#[derive(Debug, Default)]
struct Known {
    reviewed: OnceLock<Result<Reviewed, Mistakes>>,
    bytes: OnceLock<usize>,
    metadata: OnceLock<Arc<SetMetadata>>,
}

impl From<Guard<FeatureFlag>> for FlagSet {
    fn from(read: Guard<FeatureFlag>) -> Self {
        Self { read, known: Arc::default() }
    }
}

impl Deref for FlagSet {
    type Target = Guard<FeatureFlag>;

    fn deref(&self) -> &Self::Target {
        &self.read
    }
}

impl FlagSet {
    /// The same with what is known from `before`, if it is the same edit of the same object.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        let edit = |set: &Self| (set.meta().uid.clone(), set.meta().generation, set.read.0.is_ok());
        if edit(&self) == edit(before) && self.meta().generation.is_some() {
            self.known = Arc::clone(&before.known);
        }
        self
    }

    /// Its flags and what there is to say about it, or all that is wrong with it; `None`: it cannot be read.
    pub fn reviewed(&self) -> Option<Result<&Reviewed, &Mistakes>> {
        let set = self.read.0.as_ref().ok()?;
        Some(self.known.reviewed.get_or_init(|| review(&set.spec)).as_ref())
    }

    /// About how many bytes its flags have in JSON, if they can be used.
    pub fn bytes(&self) -> usize {
        let Some(Ok(Reviewed { settings, .. })) = self.reviewed() else { return 0 };
        *self.known.bytes.get_or_init(|| json_bytes(settings))
    }

    /// The metadata of its flags; `None`: it cannot be read.
    pub fn metadata(&self) -> Option<&Arc<SetMetadata>> {
        let set = self.read.0.as_ref().ok()?;
        Some(self.known.metadata.get_or_init(|| Arc::new(SetMetadata::of(set))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(uid: &str, generation: Option<i64>, default: &str) -> FlagSet {
        let flag = json!({"state": "ENABLED", "variants": {"on": true}, "defaultVariant": default});
        let set = json!({
            "metadata": {"namespace": "n", "name": "s", "uid": uid, "generation": generation},
            "spec": {"flagSpec": {"flags": {"a": flag}}},
        });
        serde_json::from_str(&set.to_string()).unwrap()
    }

    fn settings(set: &FlagSet) -> Option<Arc<contract::FlagsSettings>> {
        set.reviewed()?.ok().map(|reviewed| Arc::clone(&reviewed.settings))
    }

    #[test]
    fn what_is_known_is_of_this_edit_of_this_object() {
        let first = set("u", Some(1), "on");
        let (known, metadata) = (settings(&first).unwrap(), Arc::clone(first.metadata().unwrap()));
        assert!(first.bytes() > 50);
        let same = set("u", Some(1), "on").after(&first);
        assert!(Arc::ptr_eq(&settings(&same).unwrap(), &known) && Arc::ptr_eq(same.metadata().unwrap(), &metadata));
        for other in [set("u", Some(2), "on"), set("v", Some(1), "on"), set("u", None, "on")] {
            let other = other.after(&first);
            assert!(!Arc::ptr_eq(&settings(&other).unwrap(), &known));
        }
        let invalid = set("u", Some(2), "absent").after(&first);
        assert!(invalid.reviewed().is_some_and(|reviewed| reviewed.is_err()) && invalid.bytes() == 0);
        let without = set("u", None, "on");
        assert!(!Arc::ptr_eq(&settings(&set("u", None, "on").after(&without)).unwrap(), &settings(&without).unwrap()));
    }

    #[test]
    fn one_that_cannot_be_read_has_nothing() {
        let set: FlagSet = serde_json::from_str(r#"{"metadata":{"name":"s"},"spec":{"flagSpec":7}}"#).unwrap();
        assert!(set.reviewed().is_none() && set.metadata().is_none() && set.bytes() == 0);
    }
}
