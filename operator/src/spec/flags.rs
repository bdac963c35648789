//! From what people write to the flags that pods evaluate. Nothing else turns a `FeatureFlag` into settings.

use super::{
    findings::{Mistakes, Warnings},
    invalid,
};
use contract::flags::MAX_NUMBER;
use contract::{FlagOverride, FlagSettings, FlagState, FlagsSettings};
use crds::{
    FeatureFlagSpec, Moment,
    feature_flag::{
        self, FlagDefinition, MAX_ANNOTATION_BYTES, MAX_DEPTH, MAX_FLAG_SPEC_BYTES, Override, ValueType, validate_name,
    },
};
use engine::json_size::json_bytes;
use flags::targeting::{Evaluators, Rule};
use jiff::Timestamp;
use serde_json::{Map, Number, Value};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Said where somebody may have written on or off without quotes.
const UNQUOTED: &str = "YAML reads an unquoted on, off, yes or no as true or false: write it in quotes";
/// Said where a set is too large for the copy that `kubectl apply` keeps of it.
const SERVER_SIDE: &str = "use kubectl apply --server-side: without it kubectl keeps a copy of the manifest in an annotation, \
                           and all of them together may have 262,144 bytes";
/// What a manifest has around its spec, in bytes: names, labels and the other annotations.
const AROUND_SPEC_BYTES: usize = 2 * 1024;
/// Most names of variants that one rule is told to name in vain; as many as it is told of other mistakes.
const MOST_OF_A_RULE: usize = 21;
/// The first number that code in a pod is not given.
const FIRST_BEYOND: f64 = 9_007_199_254_740_992.0;
/// Names that a message lists.
const NAMES: usize = 10;
/// Characters of a name in a message.
const NAME_LENGTH: usize = 64;

/// A flag set that can be used.
#[derive(Debug)]
pub struct Reviewed {
    /// Its flags, with its overrides in place.
    pub settings: Arc<FlagsSettings>,
    /// What its writer should look at all the same.
    pub warnings: Warnings,
}

/// The flags of a flag set, and what there is to say about it; or all that is wrong with it.
pub fn review(spec: &FeatureFlagSpec) -> Result<Reviewed, Mistakes> {
    let FeatureFlagSpec { flag_spec, overrides, target_refs, .. } = spec;
    let size = json_bytes(flag_spec);
    if size > MAX_FLAG_SPEC_BYTES {
        let message = format!(
            "has {size} bytes, more than the {MAX_FLAG_SPEC_BYTES} that are allowed: split the set; for parts near that size {SERVER_SIDE}"
        );
        return Err(invalid("spec.flagSpec", message).into());
    }
    let mut found = Findings::default();
    let size = size + json_bytes(overrides) + json_bytes(target_refs);
    if size > MAX_ANNOTATION_BYTES - AROUND_SPEC_BYTES {
        found.warn("spec", format!("has {size} bytes; {SERVER_SIDE}"));
    }
    if let Some(Err(error)) = spec.expires_at.as_ref().map(Moment::at) {
        found.mistake("spec.expiresAt", error.to_string());
    }
    found.review_metadata(flag_spec.metadata.as_ref(), "spec.flagSpec.metadata");
    let evaluators = found.compile_evaluators(flag_spec.evaluators.as_ref());
    let mut names = Names::default();
    for (key, definition) in &flag_spec.flags {
        if found.mistakes.is_full() || !evaluators.is_complete() {
            break;
        }
        let path = member("spec.flagSpec.flags", key);
        if let Err(error) = validate_name(key) {
            found.mistake(path.clone(), format!("the key {error}"));
        }
        found.review_flag(definition, &path);
        found.review_targeting(definition, &evaluators, &mut names, &path);
    }
    for (index, over) in overrides.iter().enumerate() {
        if found.mistakes.is_full() {
            break;
        }
        found.review_override(over, &flag_spec.flags, &format!("spec.overrides[{index}]"));
    }
    if names.is_spent() {
        let message = "its rules refer to each other so often that not all answers were compared with the variants";
        found.warn("spec.flagSpec.$evaluators", message);
    }
    let Findings { mistakes, warnings } = found;
    // What is refused is never copied: it may be made to cost much.
    if mistakes.is_empty() { Ok(Reviewed { settings: Arc::new(settings(spec)), warnings }) } else { Err(mistakes) }
}

/// The settings of a set that was found to be in order.
fn settings(spec: &FeatureFlagSpec) -> FlagsSettings {
    let mut flags: BTreeMap<_, _> =
        spec.flag_spec.flags.iter().map(|(key, definition)| (key.clone(), flag_settings(definition))).collect();
    for Override { key, variant, until, reason } in &spec.overrides {
        if let Some(flag) = flags.get_mut(key) {
            let until = until.as_ref().and_then(|until| until.at().ok());
            flag.kill_switch = Some(FlagOverride {
                variant: variant.clone(),
                until_ms: until.map(Timestamp::as_millisecond),
                reason: reason.clone().unwrap_or_default(),
            });
        }
    }
    FlagsSettings {
        flags: flags.into_iter().map(|(key, flag)| (key, Arc::new(flag))).collect(),
        evaluators: spec.flag_spec.evaluators.clone().unwrap_or_default().into_iter().collect(),
    }
}

/// The settings of one flag, without an override.
fn flag_settings(definition: &FlagDefinition) -> FlagSettings {
    // Taken apart as a whole, so that a new member cannot be forgotten. OFREP and flagd's document have the metadata from the set.
    let FlagDefinition { state, value_type, variants, default_variant: _, targeting, metadata: _ } = definition;
    let typed = |value: &Value| {
        let typed = value_type.and_then(|wanted| of_type(value, wanted).ok()).map(Cow::into_owned);
        typed.unwrap_or_else(|| value.clone())
    };
    FlagSettings {
        state: match state {
            feature_flag::FlagState::Enabled => FlagState::Enabled,
            feature_flag::FlagState::Disabled => FlagState::Disabled,
        },
        variants: variants.iter().map(|(name, value)| (name.clone(), typed(value))).collect(),
        default_variant: default_variant_of(definition).cloned(),
        targeting: targeting.clone().filter(|rule| rule.as_object().is_none_or(|rule| !rule.is_empty())),
        kill_switch: None,
        degraded: None,
    }
}

/// The default variant, if there is one: flagd takes an empty name for none.
fn default_variant_of(definition: &FlagDefinition) -> Option<&String> {
    definition.default_variant.as_ref().filter(|name| !name.is_empty())
}

/// What there is to say, gathered on the way through a set.
#[derive(Default)]
struct Findings {
    mistakes: Mistakes,
    warnings: Warnings,
}

impl Findings {
    fn mistake(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.mistakes.add(invalid(path, message));
    }

    fn warn(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.warnings.add(invalid(path, message));
    }

    /// Compiles the shared rules, as the pods will.
    fn compile_evaluators(&mut self, rules: Option<&Map<String, Value>>) -> Evaluators {
        for (name, rule) in rules.into_iter().flatten() {
            let path = || member("spec.flagSpec.$evaluators", name);
            if name.is_empty() {
                self.mistake(path(), "the name must not be empty");
            }
            self.validate_depth(rule, path);
        }
        let compiled = Evaluators::compile(rules.into_iter().flatten());
        for error in compiled.mistakes() {
            if self.mistakes.is_full() {
                break;
            }
            self.mistake(rule_path(&error.path, "spec.flagSpec"), error.mistake.to_string());
        }
        for warning in compiled.warnings() {
            self.warn(rule_path(&warning.path, "spec.flagSpec"), warning.message);
        }
        compiled
    }

    /// Reviews the flag at `path`, without its rule.
    fn review_flag(&mut self, definition: &FlagDefinition, path: &str) {
        self.review_metadata(definition.metadata.as_ref(), &format!("{path}.metadata"));
        for (name, value) in definition.targeting.as_deref().and_then(Value::as_object).into_iter().flatten() {
            self.validate_depth(value, || member(&format!("{path}.targeting"), name));
        }
        let variants = &definition.variants;
        self.review_variants(variants, definition.value_type, &format!("{path}.variants"));
        if let Some(name) = default_variant_of(definition).filter(|name| !variants.contains_key(*name)) {
            self.mistake(format!("{path}.defaultVariant"), not_among(name, "is", variants));
        }
    }

    /// Reviews the variants at `path`, and whether they are of the type that they are said to have.
    fn review_variants(&mut self, variants: &Map<String, Value>, value_type: Option<ValueType>, path: &str) {
        if variants.is_empty() {
            self.mistake(path, "must not be empty");
        }
        for (name, value) in variants {
            let path = || member(path, name);
            if self.mistakes.is_full() {
                break;
            }
            if let Err(error) = validate_name(name) {
                self.mistake(path(), format!("the name {error}"));
            }
            if is_beyond(value) {
                let message = format!(
                    "is {value}: numbers go from -{MAX_NUMBER} to {MAX_NUMBER}, so that every reader of JSON has all their digits"
                );
                self.mistake(path(), message);
                continue;
            }
            self.validate_depth(value, path);
        }
        let Some(value_type) = value_type else { return self.review_kinds(variants, path) };
        for (name, value) in variants {
            if self.mistakes.is_full() {
                break;
            }
            // What is beyond it is told already, in words that fit any type.
            if let Err(message) = of_type(value, value_type)
                && !is_beyond(value)
            {
                self.mistake(member(path, name), message);
            }
        }
    }

    /// Whether variants without a `valueType` have one type all the same.
    fn review_kinds(&mut self, variants: &Map<String, Value>, path: &str) {
        let kinds: BTreeSet<_> = variants.values().map(kind).collect();
        if kinds.len() > 1 || kinds.contains("null") || kinds.contains("array") {
            let unquoted = kinds.contains("boolean") && kinds.contains("string");
            let kinds: Vec<_> = kinds.into_iter().collect();
            let mut message =
                format!("must all be of one type, boolean, string, number or object; found {}", kinds.join(" and "));
            if unquoted {
                message = format!("{message}; {UNQUOTED}");
            }
            return self.mistake(path, message);
        }
        let whole = variants.values().filter(|value| value.is_i64() || value.is_u64()).count();
        if kinds.contains("number") && whole > 0 && whole < variants.len() {
            self.warn(
                path,
                "some are whole numbers and some are not (Kubernetes makes 1 of 1.0): with valueType: float all are floats",
            );
        }
    }

    /// Compiles the targeting rule, as the pods will, and looks for variants that it names and that are not there.
    fn review_targeting(
        &mut self,
        definition: &FlagDefinition,
        evaluators: &Evaluators,
        names: &mut Names,
        path: &str,
    ) {
        let Some(rule) = definition.targeting.as_deref() else { return };
        if !rule.is_object() {
            return self
                .mistake(format!("{path}.targeting"), format!("is of type {}, and must be an object", kind(rule)));
        }
        let review = Rule::review(rule, evaluators);
        for error in &review.mistakes {
            self.mistake(rule_path(&error.path, path), error.mistake.to_string());
        }
        for warning in &review.warnings {
            if self.warnings.is_full() {
                break;
            }
            self.warn(rule_path(&warning.path, path), warning.message);
        }
        let Some(rule) = &review.rule else { return };
        for name in names.absent(rule, &definition.variants) {
            let message = not_among(name, "is an answer, and is", &definition.variants);
            self.mistake(format!("{path}.targeting"), message);
        }
    }

    /// Reviews the override at `path`.
    fn review_override(&mut self, over: &Override, flags: &BTreeMap<String, FlagDefinition>, path: &str) {
        let Override { key, variant, until, reason: _ } = over;
        if let Some(Err(error)) = until.as_ref().map(Moment::at) {
            self.mistake(format!("{path}.until"), error.to_string());
        }
        let Some(flag) = flags.get(key) else {
            return self.mistake(format!("{path}.key"), format!("{} is not a flag of this set", shortened(key)));
        };
        if !flag.variants.contains_key(variant) {
            self.mistake(format!("{path}.variant"), not_among(variant, "is", &flag.variants));
        }
    }

    /// flagd's schema allows plain values only. Sets with others have been taken before, so it is a warning.
    fn review_metadata(&mut self, metadata: Option<&Map<String, Value>>, path: &str) {
        for (name, value) in metadata.into_iter().flatten() {
            if self.warnings.is_full() {
                return;
            }
            if !matches!(value, Value::String(_) | Value::Number(_) | Value::Bool(_)) {
                let message = format!(
                    "is of type {}; readers of flagd documents know strings, numbers and booleans",
                    kind(value)
                );
                self.warn(member(path, name), message);
            }
        }
    }

    fn validate_depth(&mut self, value: &Value, path: impl Fn() -> String) {
        if !is_flat(value, MAX_DEPTH) {
            self.mistake(path(), format!("is nested deeper than {MAX_DEPTH} levels"));
        }
    }
}

/// Looks for names that rules answer with and that are no variants. Rules share parts, so that a small document can have more to
/// look at than time allows.
#[derive(Default)]
struct Names {
    seen: usize,
}

impl Names {
    /// Most parts of rules that are looked at for all flags together. Without what is shared, no set has so many.
    const MOST: usize = 100_000;

    fn is_spent(&self) -> bool {
        self.seen >= Self::MOST
    }

    /// Those of one rule, in their order, at most [`MOST_OF_A_RULE`].
    fn absent<'r>(&mut self, rule: &'r Rule, variants: &Map<String, Value>) -> BTreeSet<&'r str> {
        let mut absent = BTreeSet::new();
        for name in rule.named_variants().take(Self::MOST.saturating_sub(self.seen)) {
            self.seen += 1;
            if let Some(name) = name.filter(|name| !variants.contains_key(*name)) {
                absent.insert(name);
            }
            if absent.len() >= MOST_OF_A_RULE {
                break;
            }
        }
        absent
    }
}

/// Whether it is a number that code in a pod is not given.
fn is_beyond(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number.abs() >= FIRST_BEYOND)
}

/// `value` as one of `wanted`, or why it is none.
fn of_type(value: &Value, wanted: ValueType) -> Result<Cow<'_, Value>, String> {
    match (wanted, value) {
        (ValueType::Boolean, Value::Bool(_))
        | (ValueType::String, Value::String(_))
        | (ValueType::Object, Value::Object(_)) => Ok(Cow::Borrowed(value)),
        (ValueType::Integer, Value::Number(number)) => {
            whole(number).map(|number| Cow::Owned(number.into())).ok_or_else(|| {
                format!(
                    "is {number}, and valueType says integer: must be a whole number that 64 bits with a sign can hold"
                )
            })
        }
        (ValueType::Float, Value::Number(number)) => float(number)
            .map(|number| Cow::Owned(Value::Number(number)))
            .ok_or_else(|| format!("is {number}, and valueType says float: a float does not hold all of its digits")),
        _ => Err(other_type(value, wanted)),
    }
}

fn other_type(value: &Value, wanted: ValueType) -> String {
    let name = match wanted {
        ValueType::Boolean => "boolean",
        ValueType::String => "string",
        ValueType::Integer => "integer",
        ValueType::Float => "float",
        ValueType::Object => "object",
    };
    let message = format!("is of type {}, and valueType says {name}", kind(value));
    if wanted == ValueType::String && value.is_boolean() { format!("{message}; {UNQUOTED}") } else { message }
}

/// A number without a fraction, however it is written.
fn whole(number: &Number) -> Option<i64> {
    number.as_i64().or_else(|| {
        let float = number.as_f64().filter(|float| number.is_f64() && float.fract() == 0.0)?;
        // All digits, so that what is too large for an integer is none.
        format!("{float:.0}").parse().ok()
    })
}

/// The float that a number is. Kubernetes makes `1` of `1.0`.
fn float(number: &Number) -> Option<Number> {
    let float = number.as_f64()?;
    let exact = number.is_f64() || format!("{float:.0}") == number.to_string();
    Number::from_f64(float).filter(|_| exact)
}

/// The place of `name` in the map at `path`. Not every name can stand behind a dot.
fn member(path: &str, name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '$');
    if !name.is_empty() && name.len() <= NAME_LENGTH && name.chars().all(is_plain) {
        format!("{path}.{name}")
    } else {
        format!("{path}[{:?}]", shortened(name))
    }
}

/// The place of something in a rule of the flag at `path`, or in a shared one.
fn rule_path(in_rule: &str, path: &str) -> String {
    let path = if in_rule.starts_with("$evaluators") { "spec.flagSpec" } else { path };
    format!("{path}.{in_rule}")
}

/// That `name` is no variant, with those that there are.
fn not_among(name: &str, is: &str, variants: &Map<String, Value>) -> String {
    let known: Vec<_> = variants.keys().take(NAMES).map(|name| shortened(name)).collect();
    let more = if variants.len() > NAMES { ", …" } else { "" };
    let message = format!("{} {is} not among the variants ({}{more})", shortened(name), known.join(", "));
    let is_switch = |name: &str| ["on", "off", "yes", "no"].iter().any(|word| name.eq_ignore_ascii_case(word));
    let is_truth = |name: &str| name == "true" || name == "false";
    let unquoted = is_truth(name) || is_switch(name) && variants.keys().any(|name| is_truth(name));
    if unquoted { format!("{message}; {UNQUOTED}") } else { message }
}

/// A name of any length, as a message holds it.
fn shortened(name: &str) -> String {
    if name.chars().nth(NAME_LENGTH).is_none() {
        name.to_owned()
    } else {
        name.chars().take(NAME_LENGTH).chain(['…']).collect()
    }
}

const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Whether it is nested at most `levels` deep.
fn is_flat(value: &Value, levels: usize) -> bool {
    let inside = |value: &Value| is_flat(value, levels - 1);
    levels > 0
        && match value {
            Value::Array(items) => items.iter().all(inside),
            Value::Object(members) => members.values().all(inside),
            _ => true,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::FeatureFlag;

    fn flags(spec: &FeatureFlagSpec) -> Result<Arc<FlagsSettings>, Mistakes> {
        review(spec).map(|reviewed| reviewed.settings)
    }

    fn flag_spec(body: &str) -> FeatureFlagSpec {
        serde_saphyr::from_str(body).unwrap()
    }

    #[rstest::rstest]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1, y: 'no'}}}}",
        "spec.flagSpec.flags.a.variants: must all be of one type"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {}}}}",
        "spec.flagSpec.flags.a.variants: must not be empty"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, defaultVariant: z}}}",
        "spec.flagSpec.flags.a.defaultVariant: z is not among the variants (x)"
    )]
    #[case(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, overrides: [{key: a, variant: z}]}",
        "spec.overrides[0].variant: z is not among the variants (x)"
    )]
    #[case(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, overrides: [{key: b, variant: x}]}",
        "spec.overrides[0].key: b is not a flag of this set"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{iff: [true]}, x]}}}}",
        "spec.flagSpec.flags.a.targeting.if[0].iff: iff is not an operator; use one of var, "
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: [x]}}}",
        "spec.flagSpec.flags.a.targeting: is of type array, and must be an object"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {$ref: vip}}}}",
        "spec.flagSpec.flags.a.targeting.$ref: vip is not among $evaluators"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {fractional: [[x, 1], [z, 9]]}}}}",
        "spec.flagSpec.flags.a.targeting: z is an answer, and is not among the variants (x)"
    )]
    #[case::a_word_that_yaml_reads_as_a_boolean(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{var: b}, off, x]}}}}",
        "spec.flagSpec.flags.a.targeting: false is an answer, and is not among the variants (x); YAML reads an unquoted on, off"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}, $evaluators: {vip: {in: [x]}}}",
        "spec.flagSpec.$evaluators.vip.in: takes two values, found 1"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}, $evaluators: {vip: {'!': {$ref: vip}}}}",
        "spec.flagSpec.$evaluators.vip.!.$ref: refers to itself: vip -> vip"
    )]
    #[case::no_moment(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, overrides: [{key: a, variant: x, until: '2026-02-30T00:00:00Z'}]}",
        "spec.overrides[0].until: \"2026-02-30T00:00:00Z\" is no moment"
    )]
    #[case::no_end(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, expiresAt: never}",
        "spec.expiresAt: \"never\" is no moment"
    )]
    #[case::a_variant_that_yaml_reads_as_a_boolean(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {'true': 1, 'false': 2}, defaultVariant: 'on'}}}",
        "spec.flagSpec.flags.a.defaultVariant: on is not among the variants (false, true); YAML reads an unquoted on, off"
    )]
    #[case::a_value_that_yaml_reads_as_a_boolean(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: true, y: 'off'}}}}",
        "spec.flagSpec.flags.a.variants: must all be of one type, boolean, string, number or object; found boolean and string; YAML"
    )]
    #[case::an_override_that_yaml_reads_as_a_boolean(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {'on': 1}}}}, overrides: [{key: a, variant: 'false'}]}",
        "spec.overrides[0].variant: false is not among the variants (on); YAML reads an unquoted on, off"
    )]
    #[case::no_key(
        "flagSpec: {flags: {'': {state: ENABLED, variants: {x: 1}}}}",
        "spec.flagSpec.flags[\"\"]: the key must not be empty"
    )]
    #[case::a_key_of_two_lines(
        "flagSpec: {flags: {\"a\\nb\": {state: ENABLED, variants: {x: 1}}}}",
        "spec.flagSpec.flags[\"a\\nb\"]: the key must not have control characters"
    )]
    #[case::a_variant_without_a_name(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {'': 1}}}}",
        "spec.flagSpec.flags.a.variants[\"\"]: the name must not be empty"
    )]
    #[case::a_shared_rule_without_a_name(
        "flagSpec: {flags: {}, $evaluators: {'': true}}",
        "spec.flagSpec.$evaluators[\"\"]: the name must not be empty"
    )]
    #[case::a_version_that_is_none(
        "flagSpec: {flags: {a.b: {state: ENABLED, variants: {x: 1}, targeting: {if: [{sem_ver: [{var: v}, '>=', one]}, x]}}}}",
        "spec.flagSpec.flags[\"a.b\"].targeting.if[0].sem_ver[2]: must be a version such as 1.2.3"
    )]
    #[case::a_comparison_that_is_none(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{sem_ver: [{var: v}, '==', '1']}, x]}}}}",
        "spec.flagSpec.flags.a.targeting.if[0].sem_ver[1]: must be one of ="
    )]
    #[case::half_a_weight(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {fractional: [[x, 0.5]]}}}}",
        "spec.flagSpec.flags.a.targeting.fractional[0][1]: must be a whole number"
    )]
    #[case::too_much_weight(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {fractional: [[x, 2147483647], [x]]}}}}",
        "spec.flagSpec.flags.a.targeting.fractional: the weights must not add up to more than 2147483647"
    )]
    #[case::an_end_that_is_no_text(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{ends_with: [{var: e}, 7]}, x]}}}}",
        "spec.flagSpec.flags.a.targeting.if[0].ends_with[1]: must be a text"
    )]
    fn bad_flags_are_refused_with_their_path(#[case] body: &str, #[case] expected: &str) {
        let error = flags(&flag_spec(body)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn every_mistake_is_listed_with_its_path() {
        let body = "flagSpec:
          flags:
            a: {state: ENABLED, variants: {x: 1, y: 'no'}, defaultVariant: z}
            b: {state: ENABLED, variants: {}, targeting: {or: [{vra: x}, {in: [1]}]}}
            c: {state: ENABLED, valueType: integer, variants: {x: 1, y: 1.5, z: true}, targeting: {if: [{$ref: bad}, w, v]}}
            d: {state: ENABLED, variants: {x: 1}, targeting: {if: [true, w, v]}}
          $evaluators: {bad: {'!': []}, worse: {$ref: bad}}
overrides: [{key: a, variant: w, until: never}, {key: e, variant: x}]
expiresAt: never";
        let error = flags(&flag_spec(body)).unwrap_err().to_string();
        let paths: Vec<_> = error.split("; ").filter_map(|one| Some(one.split_once(": ")?.0)).collect();
        let expected = [
            "spec.expiresAt",
            // Once, however many refer to it.
            "spec.flagSpec.$evaluators.bad.!",
            "spec.flagSpec.flags.a.variants",
            "spec.flagSpec.flags.a.defaultVariant",
            "spec.flagSpec.flags.b.variants",
            "spec.flagSpec.flags.b.targeting.or[0].vra",
            "spec.flagSpec.flags.b.targeting.or[1].in",
            "spec.flagSpec.flags.c.variants.y",
            "spec.flagSpec.flags.c.variants.z",
            "spec.flagSpec.flags.d.targeting",
            "spec.flagSpec.flags.d.targeting",
            "spec.overrides[0].until",
            "spec.overrides[0].variant",
            "spec.overrides[1].key",
        ];
        let named = |path: &&str| path.starts_with("spec.");
        assert_eq!(paths.into_iter().filter(named).collect::<Vec<_>>(), expected, "{error}");
        assert_eq!(flags(&flag_spec(body)).unwrap_err().to_string(), error);
    }

    /// What a condition holds, whatever is written.
    #[test]
    fn a_message_does_not_grow_with_the_set() {
        let mut spec = flag_spec("flagSpec: {flags: {}}");
        let long = "é\n".repeat(20);
        for nth in 0..500 {
            let variants = (0..20).map(|one| format!("{one}{long}: 1")).collect::<Vec<_>>();
            let variants = variants.iter().map(|name| (name.clone(), Value::from(1))).collect();
            let definition = FlagDefinition {
                state: feature_flag::FlagState::Enabled,
                value_type: Some(ValueType::String),
                variants,
                default_variant: Some("none".to_owned()),
                targeting: None,
                metadata: None,
            };
            spec.flag_spec.flags.insert(format!("{nth}{long}"), definition);
            if json_bytes(&spec.flag_spec) > MAX_FLAG_SPEC_BYTES - 4_096 {
                break;
            }
        }
        let error = flags(&spec).unwrap_err().to_string();
        assert!(error.len() < 4_000 && error.ends_with(" more"), "{} bytes: {error}", error.len());
    }

    #[rstest::rstest]
    #[case::constant_bucketing_value(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {fractional: [email, [x, 1]]}}}}",
        "; warning: spec.flagSpec.flags.a.targeting.fractional[0]: is the same for everybody"
    )]
    #[case::constant_bucketing_value_in_a_shared_rule(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {$ref: s}}}, $evaluators: {s: {fractional: [7, [x, 1]]}}}",
        "; warning: spec.flagSpec.$evaluators.s.fractional[0]: is the same for everybody"
    )]
    #[case::whole_numbers_and_others(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1, y: 2.5}}}}",
        "; warning: spec.flagSpec.flags.a.variants: some are whole numbers"
    )]
    #[case::metadata(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, metadata: {owner: {team: shop}}}}, metadata: {tags: [a], version: '1'}}",
        "; warning: spec.flagSpec.metadata.tags: is of type array; readers of flagd documents know strings, numbers and booleans; \
         spec.flagSpec.flags.a.metadata.owner: is of type object"
    )]
    #[case::nothing(
        "flagSpec: {flags: {a: {state: ENABLED, valueType: float, variants: {x: 1, y: 2.5}, targeting: {fractional: [[x, 1]]}}}}",
        ""
    )]
    fn what_works_and_is_hardly_meant_is_a_warning(#[case] body: &str, #[case] expected: &str) {
        let warnings = review(&flag_spec(body)).unwrap().warnings.to_string();
        assert!(warnings.starts_with(expected) && warnings.is_empty() == expected.is_empty(), "{warnings}");
    }

    #[test]
    fn a_set_that_only_server_side_apply_takes_is_said_to_be_one() {
        let mut spec = flag_spec("flagSpec: {flags: {a: {state: ENABLED, variants: {x: hello}}}}");
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), Value::from("x".repeat(MAX_ANNOTATION_BYTES - AROUND_SPEC_BYTES - 500)));
        assert_eq!(review(&spec).unwrap().warnings.to_string(), "");
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), Value::from("x".repeat(MAX_FLAG_SPEC_BYTES - 500)));
        let warnings = review(&spec).unwrap().warnings.to_string();
        assert!(
            warnings.starts_with("; warning: spec: has 26") && warnings.contains("kubectl apply --server-side"),
            "{warnings}"
        );
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), Value::from("x".repeat(MAX_FLAG_SPEC_BYTES)));
        let error = flags(&spec).unwrap_err().to_string();
        assert!(error.contains("split the set") && error.contains("kubectl apply --server-side"), "{error}");
    }

    /// Kubernetes makes `1` of `1.0`, also of what its own clients send.
    #[rstest::rstest]
    #[case::float("float", "{a: 1, b: 2.5, c: -3}", Ok(r#"{"a":1.0,"b":2.5,"c":-3.0}"#))]
    #[case::the_largest_float("float", "{a: 9007199254740991}", Ok(r#"{"a":9007199254740991.0}"#))]
    #[case::the_smallest_float("float", "{a: -9007199254740991.0}", Ok(r#"{"a":-9007199254740991.0}"#))]
    #[case::float_beyond("float", "{a: 9007199254740992}", Err("a: is 9007199254740992: numbers go from -90071"))]
    #[case::float_far_beyond("float", "{a: -1e300}", Err("a: is -1e+300: numbers go from -9007199254740991 to 9007"))]
    #[case::integer("integer", "{a: 1, b: 2.0, c: -1e3}", Ok(r#"{"a":1,"b":2,"c":-1000}"#))]
    #[case::integer_with_a_fraction("integer", "{a: 1, b: 2.5}", Err("b: is 2.5, and valueType says integer"))]
    #[case::the_largest_integer("integer", "{a: 9007199254740991.0}", Ok(r#"{"a":9007199254740991}"#))]
    #[case::integer_beyond("integer", "{a: -9007199254740992}", Err("a: is -9007199254740992: numbers go"))]
    #[case::integer_beyond_64_bits(
        "integer",
        "{a: 18446744073709551615}",
        Err("a: is 18446744073709551615: numbers go from -9007199254740991 to 9007199254740991, so that")
    )]
    #[case::integer_far_beyond("integer", "{a: 1e300}", Err("a: is 1e+300: numbers go from"))]
    #[case::integer_as_text("integer", "{a: '1'}", Err("a: is of type string, and valueType says integer"))]
    #[case::boolean("boolean", "{'on': true}", Ok(r#"{"on":true}"#))]
    #[case::boolean_as_text("boolean", "{'on': 'true'}", Err("on: is of type string, and valueType says boolean"))]
    #[case::string("string", "{a: 'on'}", Ok(r#"{"a":"on"}"#))]
    #[case::string_without_quotes(
        "string",
        "{a: true}",
        Err("a: is of type boolean, and valueType says string; YAML reads an unquoted")
    )]
    #[case::object("object", "{a: {b: 1}}", Ok(r#"{"a":{"b":1}}"#))]
    #[case::object_as_list("object", "{a: [1]}", Err("a: is of type array, and valueType says object"))]
    fn the_value_type_is_checked_and_kept(
        #[case] value_type: &str,
        #[case] variants: &str,
        #[case] expected: Result<&str, &str>,
    ) {
        let body =
            format!("flagSpec: {{flags: {{f: {{state: ENABLED, valueType: {value_type}, variants: {variants}}}}}}}");
        match (flags(&flag_spec(&body)), expected) {
            (Ok(settings), Ok(expected)) => {
                let text = serde_json::to_string(&settings).unwrap();
                assert!(text.contains(&format!(r#""variants":{expected}"#)), "{text}");
                let read: FlagsSettings = serde_json::from_str(&text).unwrap();
                assert_eq!(read, *settings, "the published document says the same");
            }
            (Err(error), Err(expected)) => {
                let expected = format!("spec.flagSpec.flags.f.variants.{expected}");
                assert!(error.to_string().starts_with(&expected), "{error}");
            }
            (found, expected) => panic!("{:?} instead of {expected:?}", found.map(|settings| settings.flags.clone())),
        }
    }

    #[test]
    fn a_number_beyond_all_digits_is_refused_once_without_a_value_type_too() {
        let body = "flagSpec: {flags: {f: {state: ENABLED, variants: {a: 9007199254740992, b: 1}}}}";
        let error = flags(&flag_spec(body)).err().map(|error| error.to_string()).unwrap();
        assert!(error.starts_with("spec.flagSpec.flags.f.variants.a: is 9007199254740992: numbers go"), "{error}");
        let inside = "flagSpec: {flags: {f: {state: ENABLED, variants: {a: {big: 9007199254740992}}}}}";
        assert!(flags(&flag_spec(inside)).is_ok(), "an object is its reader's business");
    }

    #[test]
    fn without_a_value_type_numbers_stay_as_they_are() {
        let body = "flagSpec: {flags: {f: {state: ENABLED, variants: {a: 1, b: 2.5}}}}";
        let text = serde_json::to_string(&flags(&flag_spec(body)).unwrap()).unwrap();
        assert!(text.contains(r#""variants":{"a":1,"b":2.5}"#), "{text}");
    }

    #[rstest::rstest]
    #[case::empty("''")]
    #[case::null("null")]
    fn no_default_variant_may_be_written_in_two_ways(#[case] default: &str) {
        let body =
            format!("flagSpec: {{flags: {{a: {{state: ENABLED, variants: {{x: 1}}, defaultVariant: {default}}}}}}}");
        assert_eq!(flags(&flag_spec(&body)).unwrap().flags["a"].default_variant, None);
    }

    #[test]
    fn names_are_what_flagd_takes_and_can_be_overridden() {
        let body = "{flagSpec: {$schema: 'https://flagd.dev/schema/v0/flags.json', flags: {
            checkout/new-flow: &flag {state: ENABLED, variants: {'-1': 1, 'v 2': 2}, defaultVariant: '-1'}, new_flow_: *flag, 'größe.水': *flag}},
            overrides: [{key: checkout/new-flow, variant: 'v 2'}, {key: new_flow_, variant: '-1'}, {key: 'größe.水', variant: '-1'}]}";
        let settings = flags(&flag_spec(body)).unwrap();
        assert!(settings.flags.values().all(|flag| flag.kill_switch.is_some()));
    }

    /// The manifests of the OpenFeature operator have this shape: only group and version are other ones here.
    #[rstest::rstest]
    #[case::plain(
        r#"
apiVersion: core.openfeature.dev/v1beta1
kind: FeatureFlag
metadata: {name: welcome}
spec:
  flagSpec:
    flags:
      "banner":
        state: "ENABLED"
        variants:
          "on": true
          "off": false
        defaultVariant: "off"
"#
    )]
    #[case::with_everything(
        r#"
apiVersion: core.openfeature.dev/v1beta1
kind: FeatureFlag
metadata:
  name: storefront
  labels: {app: storefront}
spec:
  flagSpec:
    metadata: {flagSetId: storefront, version: v2}
    flags:
      accent-color:
        state: ENABLED
        variants: {ruby: AA0000, mint: 00AA66, sky: 0066AA}
        defaultVariant: ruby
        metadata: {team: web, reviewed: true, revision: 3}
      search-algorithm:
        state: DISABLED
        variants: {linear: linear, tree: tree}
        defaultVariant: ""
        targeting:
          if:
          - $ref: isStaff
          - tree
          - null
      page:
        state: ENABLED
        variants: {small: {rows: 10}, large: {rows: 50, dense: true}}
        defaultVariant: small
        targeting:
          fractional:
          - cat: [{var: $flagd.flagKey}, {var: email}]
          - [small, 90]
          - [large, 10]
    $evaluators:
      isStaff:
        ends_with: [{var: email}, "@storefront.example"]
"#
    )]
    fn manifests_of_the_openfeature_operator_copy_across(#[case] manifest: &str) {
        let set: FeatureFlag = serde_saphyr::from_str(manifest).unwrap();
        let reviewed = review(&set.spec).unwrap();
        assert_eq!(reviewed.warnings, Warnings::default());
        assert_eq!(reviewed.settings.flags.len(), set.spec.flag_spec.flags.len());
    }

    #[test]
    fn good_targeting_gets_through_with_its_evaluators() {
        let body = "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1, z: 2}, defaultVariant: x, \
                    targeting: {if: [{$ref: vip}, z, {fractional: [[x, 1], [z, 9]]}]}}, \
                    b: {state: ENABLED, variants: {x: 1}, targeting: {}}}, \
                    $evaluators: {vip: {ends_with: [{var: email}, '@vip.example']}}}";
        let settings = flags(&flag_spec(body)).unwrap();
        assert!(settings.flags["a"].targeting.is_some() && settings.flags["b"].targeting.is_none());
        assert_eq!(settings.evaluators.len(), 1);
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let mut spec = flag_spec("flagSpec: {flags: {a: {state: ENABLED, variants: {x: hello}}}}");
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), Value::from("x".repeat(MAX_FLAG_SPEC_BYTES)));
        assert!(flags(&spec).unwrap_err().to_string().starts_with("spec.flagSpec: has "));
        let mut deep = Value::from(1);
        for _ in 0..=MAX_DEPTH {
            deep = serde_json::json!({ "a": deep });
        }
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), deep);
        assert!(flags(&spec).unwrap_err().to_string().contains("nested deeper"));
    }

    /// The end of the last year is an override without an end.
    #[test]
    fn an_override_may_last_for_ever() {
        let body = "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, \
                    overrides: [{key: a, variant: x, until: '9999-12-31T23:59:59Z'}]}";
        let settings = flags(&flag_spec(body)).unwrap();
        let over = settings.flags["a"].kill_switch.as_ref().unwrap();
        assert_eq!(over.until_ms, Some(Timestamp::MAX.as_millisecond()));
    }

    #[test]
    fn the_sample_flags_are_valid() {
        let sample: FeatureFlag = serde_saphyr::from_str(include_str!("../../../crds/samples/flags.yaml")).unwrap();
        let settings = flags(&sample.spec).unwrap();
        assert_eq!(settings.flags["EnablePdfGeneration"].kill_switch.as_ref().unwrap().variant, "off");
        assert_eq!(settings.flags["MaxConcurrentBookings"].value(0), Some(&Value::from(100)));
    }
}
