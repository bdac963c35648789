//! The flags of a scope as flagd's schema has them, for evaluators that are not ours: what our pods work out themselves (overrides
//! with an end, rules that do not compile) is worked into it, so that they give the same values. Pure.

use super::document::Document;
use crate::fleet::set_metadata::FlagMetadata;
use contract::{FlagSettings, FlagState, FlagsSettings};
use flags::targeting::FRACTIONAL_V2;
use serde::Serialize;
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Write},
};

/// Most values that rules may have together once what they share stands in each of them.
const MAX_RULE_VALUES: usize = 500_000;

/// A document is too large to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the document is too large")]
pub struct TooLarge;

/// The document of `flags` at `now_ms`, in JSON, if it has at most `max_bytes` bytes.
pub fn at(flags: &Document, now_ms: i64, max_bytes: usize) -> Result<String, TooLarge> {
    let settings = &flags.section.settings;
    let mut rules = SharedRules {
        rules: &settings.evaluators,
        // Evaluators of flagd put shared rules in place by searching the whole text.
        are_kept: !settings.flags.values().flat_map(|flag| flag.variants.values()).any(mentions_reference),
        judged: HashMap::new(),
        kept: BTreeMap::new(),
        values_left: MAX_RULE_VALUES,
    };
    let mut definitions = BTreeMap::new();
    for (key, flag) in &settings.flags {
        let compiles = flags.flags.find(key).is_some_and(|flag| flag.rule_error().is_none());
        let now = Now::of(flag, compiles, now_ms);
        let targeting = now.targeting.map(|rule| rules.resolve(rule, true)).transpose()?;
        let Now { state, default_variant, .. } = now;
        let metadata = flags.metadata(key);
        definitions.insert(key, Definition { state, variants: &flag.variants, default_variant, targeting, metadata });
    }
    let mut bounded = Bounded { text: Vec::new(), max_bytes };
    let evaluators = std::mem::take(&mut rules.kept);
    // There is nothing in it that has no spelling.
    serde_json::to_writer(&mut bounded, &FlagdDocument { schema: SCHEMA, flags: definitions, evaluators })
        .map_err(|_| TooLarge)?;
    String::from_utf8(bounded.text).map_err(|_| TooLarge)
}

/// When the document is another one than at `now_ms` even if nobody edits anything, in milliseconds since the Unix epoch: an override
/// ends, or the degradation of a fleet of which nobody says any more that it lasts. None: never.
pub fn changes_at(settings: &FlagsSettings, now_ms: i64) -> Option<i64> {
    settings.flags.values().filter_map(|flag| flag.set_variant_changes_at(now_ms)).min()
}

/// What decides about a flag at a moment.
struct Now<'a> {
    state: FlagState,
    default_variant: Option<&'a str>,
    targeting: Option<&'a Value>,
}

impl<'a> Now<'a> {
    /// The same precedence as in `flags::Flag::resolve`: an override, then what a degraded fleet says, then the definition. A default variant that the flag does not
    /// have is none, as there: evaluators of flagd would give the whole document up for it.
    fn of(flag: &'a FlagSettings, compiles: bool, now_ms: i64) -> Self {
        let known = |name: &'a str| flag.variants.contains_key(name).then_some(name);
        if let Some(variant) = flag.set_variant(now_ms) {
            return Self { state: FlagState::Enabled, default_variant: known(variant), targeting: None };
        }
        let state = if flag.state == FlagState::Enabled { FlagState::Enabled } else { FlagState::Disabled };
        let targeting = flag.targeting.as_deref().filter(|_| compiles);
        Self { state, default_variant: flag.default_variant.as_deref().and_then(known), targeting }
    }
}

/// Where the schema of such documents is.
const SCHEMA: &str = "https://flagd.dev/schema/v0/flags.json";

/// A document of flagd.
#[derive(Serialize)]
struct FlagdDocument<'a> {
    #[serde(rename = "$schema")]
    schema: &'static str,
    flags: BTreeMap<&'a String, Definition<'a>>,
    #[serde(rename = "$evaluators", skip_serializing_if = "BTreeMap::is_empty")]
    evaluators: BTreeMap<&'a str, Value>,
}

/// A flag of flagd.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Definition<'a> {
    state: FlagState,
    variants: &'a BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_variant: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    targeting: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<FlagMetadata<'a>>,
}

/// The rules that flags share by `$ref`.
///
/// Evaluators of flagd put them in place by replacing text, each rule once, in an order of their own. So a rule that is kept apart
/// refers to none itself, and has a name and a text that survive this; all others stand where they are needed.
struct SharedRules<'a> {
    rules: &'a BTreeMap<String, Value>,
    /// Whether any may be kept apart.
    are_kept: bool,
    /// Of each that was looked at, whether it is kept apart.
    judged: HashMap<&'a str, bool>,
    kept: BTreeMap<&'a str, Value>,
    values_left: usize,
}

impl<'a> SharedRules<'a> {
    /// `rule` without references, or, if it may `refer`, with only those to rules that are kept apart. A rule that compiles is of
    /// bounded depth, with what it refers to.
    fn resolve(&mut self, rule: &'a Value, refer: bool) -> Result<Value, TooLarge> {
        self.values_left = self.values_left.checked_sub(1).ok_or(TooLarge)?;
        Ok(match rule {
            Value::Array(items) => {
                Value::Array(items.iter().map(|item| self.resolve(item, refer)).collect::<Result<_, _>>()?)
            }
            Value::Object(members) => {
                let shared = reference(members).and_then(|name| self.rules.get_key_value(name));
                if let Some((name, shared)) = shared {
                    if refer && self.is_kept(name, shared)? { rule.clone() } else { self.resolve(shared, refer)? }
                } else {
                    let members = members
                        .iter()
                        .map(|(name, value)| Ok((elsewhere(name).to_owned(), self.resolve(value, refer)?)));
                    Value::Object(members.collect::<Result<_, _>>()?)
                }
            }
            other => other.clone(),
        })
    }

    fn is_kept(&mut self, name: &'a str, rule: &'a Value) -> Result<bool, TooLarge> {
        if !self.are_kept || !is_plain(name) {
            return Ok(false);
        }
        if let Some(known) = self.judged.get(name) {
            return Ok(*known);
        }
        let resolved = self.resolve(rule, false)?;
        let is_kept = survives_replacing(&resolved);
        self.judged.insert(name, is_kept);
        if is_kept {
            self.kept.insert(name, resolved);
        }
        Ok(is_kept)
    }
}

/// How evaluators of flagd call an operator. Who writes the name of an older version has evaluators that know no newer one.
fn elsewhere(operator: &str) -> &str {
    if operator == FRACTIONAL_V2 { "fractional" } else { operator }
}

/// What an operation refers to, if it is a reference.
fn reference(members: &Map<String, Value>) -> Option<&str> {
    members.get("$ref").filter(|_| members.len() == 1).and_then(Value::as_str)
}

/// Whether a name is spelled in JSON as it is, by all who spell it.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-./:@#".contains(&byte))
}

/// Whether a rule comes through the replacing: flagd takes none that is short, and in JavaScript a `$` before some characters is more
/// than itself.
fn survives_replacing(rule: &Value) -> bool {
    let is_operation = rule.as_object().is_some_and(|members| !members.is_empty());
    let text = rule.to_string();
    is_operation && !["$$", "$&", "$`", "$'"].iter().any(|special| text.contains(special))
}

/// Whether there is what looks like a reference, at whatever depth.
fn mentions_reference(value: &Value) -> bool {
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(members) if members.contains_key("$ref") => return true,
            Value::Object(members) => open.extend(members.values()),
            _ => {}
        }
    }
    false
}

/// Takes so many bytes and no more.
struct Bounded {
    text: Vec<u8>,
    max_bytes: usize,
}

impl Write for Bounded {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if self.text.len() + part.len() > self.max_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::compiled::CompiledFlags;
    use super::*;
    use crate::fleet::{degradations::Degradations, flag_set::FlagSet};
    use contract::FlagDegradation;
    use serde_json::json;
    use std::sync::Arc;

    const MANY: usize = 1 << 20;

    fn set(spec: &Value) -> Arc<FlagSet> {
        let meta = json!({"namespace": "n", "name": "s", "uid": "u", "generation": 1});
        Arc::new(serde_json::from_str(&json!({ "metadata": meta, "spec": spec }).to_string()).unwrap())
    }

    fn of(spec: &Value) -> Document {
        degraded(spec, &Degradations::new())
    }

    fn degraded(spec: &Value, degraded: &Degradations) -> Document {
        Document::of_namespace(&[set(spec)], degraded, None)
    }

    fn read(document: &Document, now_ms: i64) -> Value {
        serde_json::from_str(&at(document, now_ms, MANY).unwrap()).unwrap()
    }

    fn switch(more: &Value) -> Value {
        let mut flag = json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on"});
        for (name, value) in more.as_object().unwrap() {
            flag[name] = value.clone();
        }
        flag
    }

    #[test]
    fn flags_are_as_they_were_written() {
        let rule = json!({"if": [{"==": [{"var": "country"}, "AT"]}, "on", null]});
        let document = of(&json!({"flagSpec": {
            "metadata": {"team": "sales"},
            "flags": {
                "plain": switch(&json!({})),
                "targeted": switch(&json!({"targeting": rule, "metadata": {"owner": "ann"}})),
                "disabled": switch(&json!({"state": "DISABLED"})),
                "no-default": switch(&json!({"defaultVariant": null})),
                "float": {"state": "ENABLED", "valueType": "float", "variants": {"a": 1}, "defaultVariant": "a"},
            },
        }}));
        let read = read(&document, 0);
        let set = json!({"team": "sales", "flagSetId": "n/s"});
        let with = |mut flag: Value, metadata: &Value| {
            flag["metadata"] = metadata.clone();
            flag
        };
        assert_eq!(read["flags"]["plain"], with(switch(&json!({})), &set));
        let own = json!({"team": "sales", "owner": "ann", "flagSetId": "n/s"});
        assert_eq!(read["flags"]["targeted"], with(switch(&json!({"targeting": rule})), &own));
        assert_eq!(read["flags"]["disabled"], with(switch(&json!({"state": "DISABLED"})), &set));
        assert_eq!(read["flags"]["no-default"].get("defaultVariant"), None);
        assert!(at(&document, 0, MANY).unwrap().contains(r#""variants":{"a":1.0}"#), "a float is spelled as one");
        assert_eq!(read.get("$evaluators"), None);
    }

    /// Evaluators elsewhere do not know older versions by name.
    #[test]
    fn an_operator_of_an_older_version_is_written_under_its_own_name() {
        let split = |operator: &str| json!({ operator: [["on", 1], [{"if": [true, {operator: [["off", 1]]}]}, 1]] });
        let rule = |operator: &str| json!({"if": [{"$ref": "half"}, split(operator)]});
        let document = of(&json!({"flagSpec": {
            "flags": {"f": switch(&json!({"targeting": rule(FRACTIONAL_V2)}))},
            "$evaluators": {"half": split(FRACTIONAL_V2)},
        }}));
        let read = read(&document, 0);
        assert_eq!(read["flags"]["f"]["targeting"], rule("fractional"));
        assert_eq!(read["$evaluators"]["half"], split("fractional"));
    }

    /// Above the rule and the state, as in the pods, and only until its end.
    #[test]
    fn an_override_is_worked_in_until_it_ends() {
        let rule = json!({"if": [true, "on"]});
        let document = of(&json!({
            "flagSpec": {"flags": {
                "ruled": switch(&json!({"targeting": rule})),
                "disabled": switch(&json!({"state": "DISABLED"})),
                "forever": switch(&json!({})),
            }},
            "overrides": [
                {"key": "ruled", "variant": "off", "until": "1970-01-01T00:00:02Z"},
                {"key": "disabled", "variant": "off", "until": "1970-01-01T00:00:01Z"},
                {"key": "forever", "variant": "off"},
            ],
        }));
        let decides = |now_ms| {
            let read = read(&document, now_ms);
            ["ruled", "disabled", "forever"].map(|key| {
                let flag = &read["flags"][key];
                let text = |name: &str| flag[name].as_str().unwrap().to_owned();
                (text("state"), text("defaultVariant"), flag.get("targeting").is_some())
            })
        };
        let are = |state: &str, variant: &str, targeting| (state.to_owned(), variant.to_owned(), targeting);
        let over = || are("ENABLED", "off", false);
        assert_eq!(decides(999), [over(), over(), over()]);
        assert_eq!(decides(1_000), [over(), are("DISABLED", "on", false), over()]);
        assert_eq!(decides(2_000), [are("ENABLED", "on", true), are("DISABLED", "on", false), over()]);
        let changes_at = |now_ms| changes_at(&document.section.settings, now_ms);
        assert_eq!([0, 999, 1_000, 2_000].map(changes_at), [Some(1_000), Some(1_000), Some(2_000), None]);
    }

    /// Above the rule and the state, and below a person's word.
    #[test]
    fn what_a_degraded_fleet_says_is_worked_in_until_it_ends() {
        let said = |key: &str| {
            let off =
                FlagDegradation { variant: "off".into(), until_ms: 1_000, by: "booking".into(), load_percent: 80 };
            (key.to_owned(), off)
        };
        let spec = json!({
            "flagSpec": {"flags": {
                "ruled": switch(&json!({"targeting": {"if": [true, "on"]}})),
                "disabled": switch(&json!({"state": "DISABLED"})),
                "over": switch(&json!({})),
            }},
            "overrides": [{"key": "over", "variant": "on"}],
        });
        let document = degraded(&spec, &["ruled", "disabled", "over"].map(said).into());
        let decides = |now_ms| {
            let read = read(&document, now_ms);
            ["ruled", "disabled", "over"].map(|key| {
                let flag = &read["flags"][key];
                (flag["state"] == "ENABLED", flag["defaultVariant"] == "on", flag.get("targeting").is_some())
            })
        };
        assert_eq!(decides(999), [(true, false, false), (true, false, false), (true, true, false)]);
        assert_eq!(decides(1_000), [(true, true, true), (false, true, false), (true, true, false)]);
        let changes_at = |now_ms| changes_at(&document.section.settings, now_ms);
        assert_eq!([999, 1_000].map(changes_at), [Some(1_000), None]);
    }

    /// The settings of a flag that no set can have, but a pod copes with.
    fn odd(flag: &Value) -> Value {
        let mut document = Document::default();
        document.section.settings = serde_json::from_value(json!({"flags": {"f": flag}})).unwrap();
        document.flags = CompiledFlags::compile(&document.section.settings, None, false);
        read(&document, 0)["flags"]["f"].clone()
    }

    #[test]
    fn what_would_spoil_the_whole_document_elsewhere_is_left_out() {
        let flag = odd(&switch(&json!({"defaultVariant": "absent"})));
        assert_eq!(flag.get("defaultVariant"), None);
        let flag = odd(&switch(&json!({"state": "PAUSED"})));
        assert_eq!(flag["state"], "DISABLED");
        let flag = odd(&switch(&json!({"targeting": {"$ref": "nobody"}})));
        assert_eq!((flag.get("targeting"), &flag["defaultVariant"]), (None, &json!("on")));
        let flag = odd(&switch(&json!({"override": {"variant": "absent", "reason": ""}})));
        assert_eq!((flag.get("defaultVariant"), &flag["state"]), (None, &json!("ENABLED")), "the caller's own default");
    }

    fn shared(rules: &Value, targeting: &Value) -> Value {
        let spec =
            json!({"flagSpec": {"$evaluators": rules, "flags": {"f": switch(&json!({"targeting": targeting}))}}});
        read(&of(&spec), 0)
    }

    #[test]
    fn shared_rules_stay_shared_but_refer_to_none_themselves() {
        let vip = json!({"ends_with": [{"var": "email"}, "@vip.example"]});
        let rules = json!({"vip": vip, "not-vip": {"!": {"$ref": "vip"}}, "unused": {"var": "x"}});
        let rule = json!({"if": [{"$ref": "not-vip"}, "off", {"$ref": "vip"}, "on"]});
        let read = shared(&rules, &rule);
        assert_eq!(read["flags"]["f"]["targeting"], rule);
        assert_eq!(read["$evaluators"], json!({"vip": vip, "not-vip": {"!": vip}}));
    }

    #[rstest::rstest]
    #[case::a_name_that_json_escapes("a\"b", json!({"var": "x"}))]
    #[case::a_name_that_go_escapes("a&b", json!({"var": "x"}))]
    #[case::no_operation("a", json!("on"))]
    #[case::a_dollar_of_javascript("a", json!({"==": [{"var": "x"}, "US$&"]}))]
    fn a_shared_rule_that_text_replacing_spoils_stands_where_it_is_needed(#[case] name: &str, #[case] rule: Value) {
        let read = shared(&json!({ name: rule }), &json!({"if": [{"$ref": name}, "on"]}));
        assert_eq!(read["flags"]["f"]["targeting"], json!({"if": [rule, "on"]}));
        assert_eq!(read.get("$evaluators"), None);
    }

    #[test]
    fn a_variant_that_looks_like_a_reference_is_not_replaced() {
        let object = json!({"state": "ENABLED", "variants": {"a": {"$ref": "vip"}}, "defaultVariant": "a"});
        let spec = json!({"flagSpec": {
            "$evaluators": {"vip": {"var": "vip"}},
            "flags": {"f": switch(&json!({"targeting": {"if": [{"$ref": "vip"}, "on"]}})), "object": object},
        }});
        let read = read(&of(&spec), 0);
        assert_eq!(read.get("$evaluators"), None);
        assert_eq!(read["flags"]["object"]["variants"]["a"], json!({"$ref": "vip"}));
        assert_eq!(read["flags"]["f"]["targeting"]["if"][0], json!({"var": "vip"}));
    }

    #[test]
    fn a_document_that_is_too_large_is_none() {
        let document = of(&json!({"flagSpec": {"flags": {"f": switch(&json!({}))}}}));
        let bytes = at(&document, 0, MANY).unwrap().len();
        assert!(at(&document, 0, bytes).is_ok());
        assert_eq!(at(&document, 0, bytes - 1), Err(TooLarge));
    }

    /// Each refers to the one before it ten times: a thousand million values, were they all put in place.
    #[test]
    fn shared_rules_that_multiply_end_in_an_error() {
        let ten = |name: String| json!({"or": vec![json!({ "$ref": name }); 10]});
        let mut rules = json!({"r0": {"var": "x"}});
        for number in 1..10 {
            rules[format!("r{number}")] = ten(format!("r{}", number - 1));
        }
        let spec = json!({"flagSpec": {
            "$evaluators": rules, "flags": {"f": switch(&json!({"targeting": {"if": [{"$ref": "r9"}, "on"]}}))},
        }});
        assert_eq!(at(&of(&spec), 0, MANY), Err(TooLarge));
    }
}
