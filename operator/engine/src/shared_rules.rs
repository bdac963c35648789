//! The rules that the flags of a set share by `$ref`, in a document that has flags of several sets: a rule belongs to its set, so
//! that what one team calls `vip` means nothing to the flags of another one.

use contract::FlagSettings;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Shared rules by their names.
pub type Rules = BTreeMap<String, Value>;

/// Takes those of `rules` that `flags` need into `published`. A name that another set has there for something else, or that needs
/// something that is called otherwise there, becomes `<set>/<name>`, in the flags, too.
pub fn publish(set: &str, flags: &mut BTreeMap<String, Arc<FlagSettings>>, rules: &Rules, published: &mut Rules) {
    let needed = needed(flags.values().filter_map(|flag| flag.targeting.as_deref()), rules);
    let is_other = |name: &&str| published.get(*name).is_some_and(|other| *other != rules[*name]);
    let mut names = BTreeMap::new();
    if needed.iter().any(is_other) {
        // With one of them all that are there: what is equal so far may refer to what is not.
        for name in needed.iter().filter(|name| published.contains_key(**name)) {
            names.insert((*name).to_owned(), free_name(set, name, published));
        }
    }
    for name in needed {
        let mut rule = rules[name].clone();
        rename(&mut rule, &names);
        published.insert(names.get(name).cloned().unwrap_or_else(|| name.to_owned()), rule);
    }
    // What is shared is copied only if it has to be another one here.
    let is_renamed = |flag: &&mut Arc<FlagSettings>| !names.is_empty() && flag.targeting.is_some();
    for flag in flags.values_mut().filter(is_renamed) {
        if let Some(targeting) = &mut Arc::make_mut(flag).targeting {
            rename(Arc::make_mut(targeting), &names);
        }
    }
}

/// The names of the rules that these refer to, themselves or by others.
pub fn needed<'r>(by: impl Iterator<Item = &'r Value>, rules: &'r Rules) -> BTreeSet<&'r str> {
    let (mut found, mut open) = (BTreeSet::new(), by.collect::<Vec<_>>());
    while let Some(value) = open.pop() {
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(members) => {
                if let Some((name, rule)) = reference(members).and_then(|name| rules.get_key_value(name)) {
                    if found.insert(name.as_str()) {
                        open.push(rule);
                    }
                } else {
                    open.extend(members.values());
                }
            }
            _ => {}
        }
    }
    found
}

/// What an operation refers to, if it is a reference.
fn reference(members: &serde_json::Map<String, Value>) -> Option<&str> {
    members.get("$ref").filter(|_| members.len() == 1).and_then(Value::as_str)
}

fn free_name(set: &str, name: &str, published: &Rules) -> String {
    let mut free = format!("{set}/{name}");
    while published.contains_key(&free) {
        free = format!("{set}/{free}");
    }
    free
}

/// Without recursion: how deep a live document is nested is somebody else's word.
fn rename(rule: &mut Value, names: &BTreeMap<String, String>) {
    if names.is_empty() {
        return;
    }
    let mut open = vec![rule];
    while let Some(value) = open.pop() {
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(members) => {
                if let Some(name) = reference(members).and_then(|name| names.get(name)) {
                    members.insert("$ref".to_owned(), Value::from(name.as_str()));
                } else {
                    open.extend(members.values_mut());
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rules(value: Value) -> Rules {
        serde_json::from_value(value).unwrap()
    }

    fn flags(targeting: &Value) -> BTreeMap<String, Arc<FlagSettings>> {
        let flag = json!({"state": "ENABLED", "variants": {"on": true}, "targeting": targeting});
        BTreeMap::from([("flag".to_owned(), serde_json::from_value(flag).unwrap())])
    }

    fn published(sets: &[(&str, Value, Value)]) -> (Rules, Vec<Value>) {
        let (mut all, mut targeting) = (Rules::new(), Vec::new());
        for (set, rule, own) in sets {
            let mut flags = flags(rule);
            publish(set, &mut flags, &rules(own.clone()), &mut all);
            targeting.push(flags["flag"].targeting.as_deref().cloned().unwrap());
        }
        (all, targeting)
    }

    #[test]
    fn what_nobody_needs_is_not_published() {
        let own = json!({"a": {"!": {"$ref": "b"}}, "b": true, "c": {"$ref": "a"}, "$ref": 1});
        let (all, targeting) = published(&[("x", json!({"if": [{"$ref": "a"}, "on"]}), own)]);
        assert_eq!(json!(all), json!({"a": {"!": {"$ref": "b"}}, "b": true}));
        assert_eq!(targeting, [json!({"if": [{"$ref": "a"}, "on"]})]);
    }

    #[test]
    fn two_rules_of_one_name_are_two() {
        let by_vip = || json!({"if": [{"$ref": "vip"}, "on"]});
        let (all, targeting) =
            published(&[("x", by_vip(), json!({"vip": true})), ("y", by_vip(), json!({"vip": false}))]);
        assert_eq!(json!(all), json!({"vip": true, "y/vip": false}));
        assert_eq!(targeting, [by_vip(), json!({"if": [{"$ref": "y/vip"}, "on"]})]);
    }

    #[test]
    fn equal_rules_are_one_unless_they_need_different_ones() {
        let own = |deep: bool| json!({"outer": {"!": {"$ref": "inner"}}, "inner": deep});
        let by_outer = || json!({"$ref": "outer"});
        let (all, _) = published(&[("x", by_outer(), own(true)), ("y", by_outer(), own(true))]);
        assert_eq!(json!(all), own(true));
        let (all, targeting) = published(&[("x", by_outer(), own(true)), ("y", by_outer(), own(false))]);
        let expected = json!({
            "outer": {"!": {"$ref": "inner"}}, "inner": true, "y/outer": {"!": {"$ref": "y/inner"}}, "y/inner": false,
        });
        assert_eq!(json!(all), expected);
        assert_eq!(targeting[1], json!({"$ref": "y/outer"}));
    }

    /// Such a document is compiled again, with the names that it has.
    #[test]
    fn a_name_that_is_taken_is_made_longer() {
        let by = |name: &str| json!({"$ref": name});
        let sets = [
            ("x", by("y/vip"), json!({"y/vip": 1})),
            ("z", by("vip"), json!({"vip": 2})),
            ("y", by("vip"), json!({"vip": 3})),
        ];
        let (all, targeting) = published(&sets);
        assert_eq!(json!(all), json!({"y/vip": 1, "vip": 2, "y/y/vip": 3}));
        assert_eq!(targeting[2], by("y/y/vip"));
    }

    #[test]
    fn a_circle_ends() {
        let own = rules(json!({"a": {"$ref": "b"}, "b": {"$ref": "a"}}));
        assert_eq!(needed([json!({"$ref": "a"})].iter(), &own), BTreeSet::from(["a", "b"]));
    }
}
