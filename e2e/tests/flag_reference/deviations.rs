//! What we do otherwise than a reference evaluator, with the reason, and with a document that shows it.

use crate::generator::{Ask, Case};
use crate::outcome::Outcome;
use crate::reference::Reference::{self, JavaScript, Python};
use serde_json::{Value, json};

/// One answer that is not the same.
pub struct Situation<'s> {
    pub case: &'s Case,
    pub ask: &'s Ask,
    pub theirs: &'s Outcome,
}

/// Something that we do otherwise.
pub struct Deviation {
    pub name: &'static str,
    pub why: &'static str,
    /// The evaluators that do it otherwise.
    pub of: &'static [Reference],
    /// Whether it can be the reason of what was found.
    pub explains: fn(&Situation<'_>) -> bool,
    /// The targeting rule that shows it, in a flag with the variants on, off, true and false, of which off is the default.
    pub rule: &'static str,
    /// The rules that it may refer to.
    pub shared: &'static str,
    /// For whom.
    pub context: &'static str,
}

impl Deviation {
    /// The document that shows it.
    pub fn case(&self) -> Case {
        let rule: Value = serde_json::from_str(self.rule).unwrap();
        let flag = json!({
            "state": "ENABLED", "defaultVariant": "off", "targeting": rule,
            "variants": {"on": true, "off": false, "true": true, "false": false},
        });
        let context = serde_json::from_str(self.context).unwrap();
        let ask = Ask { key: "flag".to_owned(), type_: "boolean", context };
        let shared: Value = serde_json::from_str(self.shared).unwrap();
        Case { document: json!({"flags": {"flag": flag}, "$evaluators": shared}), asks: vec![ask] }
    }
}

impl Situation<'_> {
    /// Whether the rule, or the context, has a text with other characters than those of ASCII.
    fn has_more_than_ascii(&self) -> bool {
        let flag = &self.case.document["flags"][&self.ask.key];
        [flag, &self.case.document["$evaluators"], &self.ask.context].iter().any(|value| !value.to_string().is_ascii())
    }

    /// Whether the rule has one of these operators, itself or in what it refers to.
    fn has(&self, operators: &[&str]) -> bool {
        let mut open = vec![&self.case.document["flags"][&self.ask.key]["targeting"]];
        while let Some(value) = open.pop() {
            match value {
                Value::Array(items) => open.extend(items),
                Value::Object(members) => {
                    if members.keys().any(|name| operators.contains(&name.as_str())) {
                        return true;
                    }
                    let shared = members.get("$ref").and_then(Value::as_str);
                    open.extend(shared.and_then(|name| self.case.document["$evaluators"].get(name)));
                    open.extend(members.values());
                }
                _ => {}
            }
        }
        false
    }
}

/// Operators that compare, compute or look for something.
const ON_VALUES: &[&str] = &[
    "==", "!=", "<", "<=", ">", ">=", "+", "-", "*", "/", "%", "min", "max", "in", "substr", "reduce", "map", "filter",
];

pub const DEVIATIONS: &[Deviation] = &[
    Deviation {
        name: "the second fractional hashes UTF-8",
        why: "as flagd's server does; this one hashes what JavaScript keeps of a text, which is the same for ASCII",
        of: &[JavaScript],
        explains: |found| found.has(&["fractional"]) && found.has_more_than_ascii(),
        rule: r#"{"fractional": [{"var": "country"}, ["on", 50], ["off", 50]]}"#,
        shared: "{}",
        context: r#"{"targetingKey": "user-1", "country": "ü水"}"#,
    },
    Deviation {
        name: "what is no number is NaN",
        why: "as JsonLogic has it, where this one gives no answer at all",
        of: &[JavaScript],
        explains: |found| *found.theirs == Outcome::Error && found.has(ON_VALUES),
        rule: r#"{"!!": [{"+": ["abc", 1]}]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "by zero is infinite",
        why: "as JsonLogic has it; a rule that has a use for all others must not fail for some",
        of: &[JavaScript, Python],
        explains: |found| *found.theirs == Outcome::Error && found.has(&["/", "%"]),
        rule: r#"{"!!": [{"/": [1, 0]}]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "null equals nothing but null",
        why: "as in JavaScript and JsonLogic: an attribute that is missing is not 0",
        of: &[JavaScript, Python],
        explains: |found| found.has(&["==", "!="]),
        rule: r#"{"==": [{"var": "absent"}, 0]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "null is nothing in cat",
        why: "as in JsonLogic, which joins lists so: a text with the word null in it is what nobody means",
        of: &[JavaScript, Python],
        explains: |found| found.has(&["cat"]),
        rule: r#"{"==": [{"cat": ["a", {"var": "absent"}]}, "a"]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "lists are compared by content",
        why: "in JavaScript no two lists are equal, which is of no use",
        of: &[JavaScript],
        explains: |found| found.has(&["==", "!=", "===", "!==", "in"]),
        rule: r#"{"===": [{"var": "roles"}, ["AT"]]}"#,
        shared: "{}",
        context: r#"{"roles": ["AT"]}"#,
    },
    Deviation {
        name: "nothing is not all of it",
        why: "as JsonLogic has it for an empty list",
        of: &[JavaScript],
        explains: |found| found.has(&["all"]),
        rule: r#"{"all": [{"var": "absent"}, true]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "a short version may have more behind it",
        why: "1.2-beta is a version before 1.2, as for flagd's evaluator in Python",
        of: &[JavaScript],
        explains: |found| found.has(&["sem_ver"]),
        rule: r#"{"sem_ver": ["1.2-beta", "<", "1.2.0"]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "the empty text is 0",
        why: "as JsonLogic has it, and the evaluator in JavaScript",
        of: &[Python],
        explains: |found| found.has(&["==", "!=", "<", "<=", ">", ">="]),
        rule: r#"{"==": ["", 0]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "the rest has the sign of what is divided",
        why: "as JsonLogic has it, and the evaluator in JavaScript",
        of: &[Python],
        explains: |found| found.has(&["%"]),
        rule: r#"{"==": [{"%": [-7, 3]}, -1]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "true is spelled true",
        why: "as JSON has it; Python says True",
        of: &[Python],
        explains: |found| found.has(&["cat", "substr", "in"]),
        rule: r#"{"==": [{"cat": ["a", true]}, "atrue"]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "between is on both sides",
        why: "null is 0, and so not above 2",
        of: &[Python],
        explains: |found| found.has(&["<", "<="]),
        rule: r#"{"<": [1, 2, {"var": "absent"}]}"#,
        shared: "{}",
        context: "{}",
    },
    Deviation {
        name: "a computed weight may be a float",
        why: "50 - null is 50, which is whole; for this one it is a float",
        of: &[Python],
        explains: |found| found.ask.context.get("percent").is_none() && found.has(&["fractional"]) && found.has(&["-"]),
        rule: r#"{"fractional": [["on", {"-": [50, {"var": "absent"}]}]]}"#,
        shared: "{}",
        context: r#"{"targetingKey": "user-1"}"#,
    },
    Deviation {
        name: "an empty text is missing",
        why: "as JsonLogic has it, and the evaluator in Python",
        of: &[JavaScript],
        explains: |found| found.has(&["missing", "missing_some"]),
        rule: r#"{"!!": [{"missing": ["email"]}]}"#,
        shared: "{}",
        context: r#"{"email": ""}"#,
    },
    Deviation {
        name: "shared rules are no patterns",
        why: "this one puts them in by a regular expression, and cannot read the whole document if one has a letter that it escapes",
        of: &[Python],
        explains: |found| *found.theirs == Outcome::Error && !found.case.document["$evaluators"].to_string().is_ascii(),
        rule: r#"{"$ref": "water"}"#,
        shared: r#"{"water": {"==": [{"var": "name"}, "水"]}}"#,
        context: r#"{"name": "水"}"#,
    },
];
