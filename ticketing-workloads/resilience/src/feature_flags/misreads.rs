//! Flags that code asks for another type than their value has.
//!
//! Nothing of this is looked at while the types agree. A flag that is misread over and over again costs a look into a short list
//! each time, without a lock.

use super::value::{ValueType, description};
use crate::sync::lock;
use arc_swap::ArcSwap;
use contract::flag_problem::{FlagProblem, FlagProblemKind, MAX_FLAG_PROBLEMS};
use flags::{Flag, FlagSet};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A flag that was asked for a type that its value does not have.
#[derive(Clone, Debug)]
struct Misread {
    key: Box<str>,
    wanted: ValueType,
    /// The variant that had another type.
    variant: Box<str>,
    /// Whether it was logged since the last configuration.
    logged: bool,
}

/// Those that are known, at most [`MAX_FLAG_PROBLEMS`].
#[derive(Default)]
pub(super) struct Misreads {
    known: ArcSwap<Vec<Misread>>,
    /// Held while the list is changed.
    change: Mutex<()>,
}

impl Misreads {
    /// Notes that `variant` of the flag `key` has `value`, which is not `wanted`.
    #[cold]
    pub(super) fn note(&self, key: &str, wanted: ValueType, variant: &str, value: &Value) {
        let is_settled = |known: &[Misread]| match known.iter().find(|one| one.is(key, wanted)) {
            Some(known) => known.logged,
            None => known.len() >= MAX_FLAG_PROBLEMS,
        };
        if is_settled(&self.known.load()) {
            return;
        }
        let _changing = lock(&self.change);
        let mut known = Vec::clone(&self.known.load());
        if is_settled(&known) {
            return;
        }
        if let Some(one) = known.iter_mut().find(|one| one.is(key, wanted)) {
            one.logged = true;
        } else {
            known.push(Misread { key: key.into(), wanted, variant: variant.into(), logged: true });
        }
        self.known.store(Arc::new(known));
        tracing::warn!(
            flag = %key,
            %variant,
            wanted = wanted.name(),
            found = description(value),
            "the value of a flag is not of the type that the code reads; the code's default applies"
        );
    }

    /// Forgets those that `set` makes right. What stays is logged once more when it is misread again.
    pub(super) fn configured(&self, set: &FlagSet, degraded: &BTreeMap<String, String>, now_ms: i64) {
        let _changing = lock(&self.change);
        let known = self.known.load();
        if known.is_empty() {
            return;
        }
        let left = known.iter().filter(|one| one.wrong_value(set, degraded, now_ms).is_some());
        self.known.store(Arc::new(left.map(|one| Misread { logged: false, ..one.clone() }).collect()));
    }

    /// Those that are still so, by key.
    pub(super) fn problems(
        &self,
        set: &FlagSet,
        degraded: &BTreeMap<String, String>,
        now_ms: i64,
    ) -> BTreeMap<Box<str>, FlagProblem> {
        let mut problems = BTreeMap::new();
        for one in self.known.load().iter() {
            let Some((variant, value)) = one.wrong_value(set, degraded, now_ms) else { continue };
            problems.entry(one.key.clone()).or_insert_with(|| FlagProblem {
                key: one.key.to_string(),
                kind: FlagProblemKind::TypeMismatch,
                message: format!(
                    "code reads {}, the variant {variant} is {}; the code's default is used",
                    one.wanted.name(),
                    description(value)
                ),
            });
        }
        problems
    }
}

impl Misread {
    fn is(&self, key: &str, wanted: ValueType) -> bool {
        *self.key == *key && self.wanted == wanted
    }

    /// The variant and the value that it would be misread as now. A flag whose rule decides is looked at for the variant that
    /// was misread, for all who may get it.
    fn wrong_value<'a>(
        &'a self,
        set: &'a FlagSet,
        degraded: &BTreeMap<String, String>,
        now_ms: i64,
    ) -> Option<(&'a str, &'a Value)> {
        let flag: &Flag = set.find(&self.key)?;
        let found = match flag.for_every_request(degraded.get(&*self.key).map(String::as_str), now_ms) {
            Some(settled) => settled.variant.zip(settled.value),
            None => flag.variant(&self.variant).map(|value| (&*self.variant, value)),
        };
        found.filter(|(_, value)| !self.wanted.fits(value))
    }
}
