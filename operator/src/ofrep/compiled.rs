//! Flags that are compiled once for each edit of theirs, however often the others of their scope are edited.

use contract::{FlagSettings, FlagsSettings};
use flags::{ByKey, Flag, targeting::Evaluators};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::{cell::LazyCell, io, sync::Arc};

/// A SHA-256 hash.
pub type Hash = [u8; 32];

/// The flags of a scope, ready to be evaluated.
#[derive(Debug, Default)]
pub struct CompiledFlags(ByKey<Arc<CompiledFlag>>);

/// One flag.
#[derive(Debug)]
pub struct CompiledFlag {
    settings: Arc<FlagSettings>,
    flag: Flag,
    /// Of what its definition says.
    hash: Hash,
}

impl CompiledFlags {
    /// Compiles what is not in `before`. That was compiled from other settings, of which `same_rules` says whether the rules that
    /// flags share are the same.
    pub fn compile(settings: &FlagsSettings, before: Option<&Self>, same_rules: bool) -> Self {
        let evaluators = LazyCell::new(|| Evaluators::compile_leniently(&settings.evaluators));
        let compiled = settings.flags.iter().map(|(key, flag)| {
            // The very same: of two that are equal one may have -0.0 for 0.0.
            let is_known = |known: &&Arc<CompiledFlag>| {
                (same_rules || flag.targeting.is_none()) && Arc::ptr_eq(&known.settings, flag)
            };
            let known = before.and_then(|before| before.0.find(key)).filter(is_known);
            let compiled = known.cloned().unwrap_or_else(|| Arc::new(CompiledFlag::new(flag, &evaluators)));
            (key.clone(), compiled)
        });
        Self(compiled.collect())
    }

    /// The flag of that key, if there is one.
    pub fn find(&self, key: &str) -> Option<&Flag> {
        self.0.find(key).map(|compiled| &compiled.flag)
    }

    /// A hash of what the definition of a flag says: its state, its variants, its default variant and its rule.
    pub fn hash(&self, key: &str) -> Option<&Hash> {
        self.0.find(key).map(|compiled| &compiled.hash)
    }

    /// All flags with their keys, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Flag)> {
        self.0.iter().map(|(key, compiled)| (key, &compiled.flag))
    }
}

impl CompiledFlag {
    fn new(settings: &Arc<FlagSettings>, evaluators: &Evaluators) -> Self {
        // What stands over a definition has an end, and is looked at when somebody asks.
        let FlagSettings { state, variants, default_variant, targeting, kill_switch: _, degraded: _ } = &**settings;
        Self {
            settings: Arc::clone(settings),
            flag: Flag::compile(FlagSettings::clone(settings), evaluators),
            hash: hash_of(&(state, variants, default_variant, targeting)),
        }
    }
}

/// A hash of a value, by its spelling in JSON.
pub fn hash_of(value: &impl Serialize) -> Hash {
    let mut hasher = Hasher(Sha256::new());
    // There is nothing in flags that has no spelling.
    let _ = serde_json::to_writer(&mut hasher, value);
    hasher.0.finalize().into()
}

struct Hasher(Sha256);

impl io::Write for Hasher {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.0.update(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn settings(one: bool, vip: &Value) -> FlagsSettings {
        let flag = |default: &str, targeting: Value| {
            json!({
                "state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": default, "targeting": targeting,
            })
        };
        let by_rule = json!({"if": [{"$ref": "vip"}, "on", "off"]});
        let settings = json!({
            "flags": {
                "one": flag(if one { "on" } else { "off" }, Value::Null), "two": flag("on", Value::Null), "vip": flag("on", by_rule),
            },
            "evaluators": {"vip": vip},
        });
        serde_json::from_value(settings).unwrap()
    }

    /// Which flags are the very same as before.
    fn kept(before: &CompiledFlags, after: &CompiledFlags) -> Vec<&'static str> {
        let is_same = |key: &&str| Arc::ptr_eq(before.0.find(key).unwrap(), after.0.find(key).unwrap());
        ["one", "two", "vip"].into_iter().filter(is_same).collect()
    }

    #[test]
    fn a_flag_is_compiled_again_if_it_is_another_one_or_a_rule_that_it_may_need() {
        let first = settings(true, &json!(true));
        let before = CompiledFlags::compile(&first, None, false);
        let other = settings(false, &json!(false));
        let edited = FlagsSettings {
            flags: first
                .flags
                .clone()
                .into_iter()
                .chain([("one".to_owned(), Arc::clone(&other.flags["one"]))])
                .collect(),
            ..first.clone()
        };
        let cases = [
            (first.clone(), true, vec!["one", "two", "vip"]),
            (edited, true, vec!["two", "vip"]),
            (FlagsSettings { evaluators: other.evaluators, ..first.clone() }, false, vec!["one", "two"]),
        ];
        for (settings, same_rules, expected) in cases {
            let after = CompiledFlags::compile(&settings, Some(&before), same_rules);
            assert_eq!(kept(&before, &after), expected);
            let value = |key: &str| {
                let value = after.find(key).unwrap().evaluate(key, &flags::Inputs::default(), || 0).unwrap();
                value.and_then(Value::as_bool)
            };
            let expected = [settings.flags["one"].value(0).and_then(Value::as_bool), Some(true)];
            assert_eq!([value("one"), value("two")], expected);
            assert_eq!(value("vip"), settings.evaluators["vip"].as_bool());
            assert_eq!(after.hash("one") == before.hash("one"), settings.flags["one"] == first.flags["one"]);
        }
    }
}
