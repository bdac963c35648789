//! From what people write to the flags that pods evaluate. Nothing else turns a `FeatureFlag` into settings.

use super::{Invalid, invalid};
use contract::{FlagOverride, FlagSettings, FlagState, FlagsSettings};
use crds::{
    FeatureFlagSpec, Moment,
    feature_flag::{self, FlagDefinition, MAX_DEPTH, MAX_FLAG_SPEC_BYTES},
};
use flags::targeting::{Evaluators, Rule, RuleError};
use jiff::Timestamp;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The flags of a flag set, with its overrides in place.
pub fn flags(spec: &FeatureFlagSpec) -> Result<FlagsSettings, Invalid> {
    let size = serde_json::to_vec(&spec.flag_spec).map_or(usize::MAX, |bytes| bytes.len());
    if size > MAX_FLAG_SPEC_BYTES {
        let message = format!("has {size} bytes, more than the {MAX_FLAG_SPEC_BYTES} that are allowed: split the set");
        return Err(invalid("spec.flagSpec", message));
    }
    if let Some(Err(error)) = spec.expires_at.as_ref().map(Moment::at) {
        return Err(invalid("spec.expiresAt", error.to_string()));
    }
    let evaluators = spec.flag_spec.evaluators.clone().unwrap_or_default().into_iter().collect::<BTreeMap<_, _>>();
    for (name, rule) in &evaluators {
        validate_depth(rule, &format!("spec.flagSpec.$evaluators.{name}"))?;
    }
    let compiled = Evaluators::compile(&evaluators);
    if let Some((_, error)) = compiled.errors().next() {
        return Err(bad_rule(error, "spec.flagSpec"));
    }
    let mut flags = BTreeMap::new();
    for (key, definition) in &spec.flag_spec.flags {
        let path = format!("spec.flagSpec.flags.{key}");
        validate_flag(definition, &path)?;
        let flag = flag(definition);
        validate_targeting(&flag, &compiled, &path)?;
        flags.insert(key.clone(), flag);
    }
    for (index, over) in spec.overrides.iter().enumerate() {
        let path = format!("spec.overrides[{index}]");
        let Some(flag) = flags.get_mut(&over.key) else {
            return Err(invalid(format!("{path}.key"), format!("{} is not a flag of this set", over.key)));
        };
        if !flag.variants.contains_key(&over.variant) {
            let known: Vec<_> = flag.variants.keys().map(String::as_str).collect();
            return Err(invalid(
                format!("{path}.variant"),
                format!("{} has no variant {} (it has {})", over.key, over.variant, known.join(", ")),
            ));
        }
        let until = over.until.as_ref().map(Moment::at).transpose();
        let until = until.map_err(|error| invalid(format!("{path}.until"), error.to_string()))?;
        flag.kill_switch = Some(FlagOverride {
            variant: over.variant.clone(),
            until_ms: until.map(Timestamp::as_millisecond),
            reason: over.reason.clone().unwrap_or_default(),
        });
    }
    Ok(FlagsSettings { flags, evaluators })
}

fn flag(definition: &FlagDefinition) -> FlagSettings {
    FlagSettings {
        state: match definition.state {
            feature_flag::FlagState::Enabled => FlagState::Enabled,
            feature_flag::FlagState::Disabled => FlagState::Disabled,
        },
        variants: definition.variants.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        default_variant: definition.default_variant.clone(),
        targeting: definition.targeting.clone().filter(|rule| !rule.is_empty()).map(Value::Object),
        kill_switch: None,
    }
}

fn validate_flag(definition: &FlagDefinition, path: &str) -> Result<(), Invalid> {
    let kinds: BTreeSet<_> = definition.variants.values().map(kind).collect();
    if definition.variants.is_empty() {
        return Err(invalid(format!("{path}.variants"), "must not be empty"));
    }
    if kinds.len() > 1 || kinds.contains("null") || kinds.contains("array") {
        let kinds: Vec<_> = kinds.into_iter().collect();
        let message =
            format!("must all be of one type, boolean, string, number or object; found {}", kinds.join(" and "));
        return Err(invalid(format!("{path}.variants"), message));
    }
    if let Some(name) = definition.default_variant.as_ref().filter(|name| !definition.variants.contains_key(*name)) {
        return Err(invalid(format!("{path}.defaultVariant"), format!("{name} is not among the variants")));
    }
    for (name, value) in &definition.variants {
        validate_depth(value, &format!("{path}.variants.{name}"))?;
    }
    for (name, value) in definition.targeting.iter().flatten() {
        validate_depth(value, &format!("{path}.targeting.{name}"))?;
    }
    Ok(())
}

/// Compiles the targeting rule, as the pods will, and looks for variants that it names and that are not there.
fn validate_targeting(flag: &FlagSettings, evaluators: &Evaluators, path: &str) -> Result<(), Invalid> {
    let Some(rule) = &flag.targeting else { return Ok(()) };
    let Some(rule) = Rule::compile(rule, evaluators).map_err(|error| bad_rule(&error, path))? else { return Ok(()) };
    if let Some(name) = rule.named_variants().into_iter().find(|name| !flag.variants.contains_key(*name)) {
        let known: Vec<_> = flag.variants.keys().map(String::as_str).collect();
        let message = format!("can answer {name}, which is not among the variants ({})", known.join(", "));
        return Err(invalid(format!("{path}.targeting"), message));
    }
    Ok(())
}

/// A mistake in a rule of the flag at `path`, or in a shared one.
fn bad_rule(error: &RuleError, path: &str) -> Invalid {
    let path = if error.path.starts_with("$evaluators") { "spec.flagSpec" } else { path };
    invalid(format!("{path}.{}", error.path), error.mistake.to_string())
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

fn validate_depth(value: &Value, path: &str) -> Result<(), Invalid> {
    // Breadth first and without recursion: the depth is what is in question.
    let mut level: Vec<&Value> = vec![value];
    for _ in 0..MAX_DEPTH {
        level = level
            .into_iter()
            .flat_map(|value| -> Vec<&Value> {
                match value {
                    Value::Array(items) => items.iter().collect(),
                    Value::Object(members) => members.values().collect(),
                    _ => Vec::new(),
                }
            })
            .collect();
        if level.is_empty() {
            return Ok(());
        }
    }
    Err(invalid(path, format!("is nested deeper than {MAX_DEPTH} levels")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::FeatureFlag;

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
        "spec.flagSpec.flags.a.defaultVariant: z is not among the variants"
    )]
    #[case(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, overrides: [{key: a, variant: z}]}",
        "spec.overrides[0].variant: a has no variant z (it has x)"
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
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {$ref: vip}}}}",
        "spec.flagSpec.flags.a.targeting.$ref: vip is not among $evaluators"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {fractional: [[x, 1], [z, 9]]}}}}",
        "spec.flagSpec.flags.a.targeting: can answer z, which is not among the variants (x)"
    )]
    #[case::a_word_that_yaml_reads_as_a_boolean(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{var: b}, off, x]}}}}",
        "spec.flagSpec.flags.a.targeting: can answer false, which is not among the variants (x)"
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
    fn bad_flags_are_refused_with_their_path(#[case] body: &str, #[case] expected: &str) {
        let error = flags(&flag_spec(body)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
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
