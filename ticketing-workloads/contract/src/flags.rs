//! The `flags` section of a document: flagd flag definitions, only those that target the workload, with what a person
//! put over them. The crate `flags` evaluates them.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};

/// Largest whole number that every reader of JSON has exactly: 2^53 - 1. Numbers beyond it, or below its negative, are no values of
/// flags.
pub const MAX_NUMBER: u64 = (1 << 53) - 1;

/// All flags of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FlagsSettings {
    /// Flags by key. Most stay as they are when another one is edited, and are shared.
    pub flags: BTreeMap<String, Arc<FlagSettings>>,
    /// Shared targeting rules by name (flagd's `$evaluators`).
    pub evaluators: BTreeMap<String, Value>,
}

/// One flag, as flagd defines it, with an override if a person set one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlagSettings {
    /// Whether it is evaluated at all.
    pub state: FlagState,
    /// Values by variant name.
    pub variants: BTreeMap<String, Value>,
    /// Variant without a targeting match; absent: the caller's own default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_variant: Option<String>,
    /// flagd targeting rule (JSON logic). In the operator it is the one that was read, and not a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targeting: Option<Arc<Value>>,
    /// A person's override; it stands above everything else while it lasts.
    #[serde(default, rename = "override", skip_serializing_if = "Option::is_none")]
    pub kill_switch: Option<FlagOverride>,
    /// What the degradation of a fleet says of it, between the definition and a person's override. A pod of version 0.1 ignores
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded: Option<FlagDegradation>,
}

impl FlagSettings {
    /// The override that is in force at `now_ms`, if any.
    ///
    /// The pod evaluates the end itself, because the operator may be down when it comes.
    pub fn active_override(&self, now_ms: i64) -> Option<&FlagOverride> {
        self.kill_switch.as_ref().filter(|over| over.is_active(now_ms))
    }

    /// What the degradation of a fleet says at `now_ms`, if it says something that the flag has.
    ///
    /// It ends by itself: while the operator is down nobody takes it back.
    pub fn active_degradation(&self, now_ms: i64) -> Option<&FlagDegradation> {
        let lasts =
            |degraded: &&FlagDegradation| degraded.is_active(now_ms) && self.variants.contains_key(&degraded.variant);
        self.degraded.as_ref().filter(lasts)
    }

    /// The variant that stands over the definition at `now_ms`: of an override, else of the fleet's degradation.
    pub fn set_variant(&self, now_ms: i64) -> Option<&str> {
        let over = self.active_override(now_ms).map(|over| over.variant.as_str());
        over.or_else(|| self.active_degradation(now_ms).map(|degraded| degraded.variant.as_str()))
    }

    /// When another variant stands over the definition than at `now_ms`, or none, if nobody does anything.
    pub fn set_variant_changes_at(&self, now_ms: i64) -> Option<i64> {
        let over = self.kill_switch.as_ref().and_then(|over| over.until_ms);
        let degraded = self.degraded.as_ref().map(|degraded| degraded.until_ms);
        over.into_iter().chain(degraded).filter(|end| *end > now_ms).min()
    }

    /// The value without targeting at `now_ms`: override, else the fleet's degradation, else default variant. `None`: the
    /// caller's own default.
    pub fn value(&self, now_ms: i64) -> Option<&Value> {
        if let Some(variant) = self.set_variant(now_ms) {
            return self.variants.get(variant);
        }
        match self.state {
            FlagState::Enabled => self.variants.get(self.default_variant.as_ref()?),
            FlagState::Disabled | FlagState::Unknown => None,
        }
    }
}

/// Whether a flag is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum FlagState {
    /// It is evaluated.
    Enabled,
    /// It is not evaluated: callers get their own default.
    Disabled,
    /// A state that this reader does not know; it behaves as disabled.
    #[serde(other)]
    Unknown,
}

/// A person's override of one flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlagOverride {
    /// The variant that applies while the override lasts.
    pub variant: String,
    /// End, in milliseconds since the Unix epoch; absent: until a person takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<i64>,
    /// Why, in the person's words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What the degradation of a fleet says of one flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlagDegradation {
    /// The variant that applies while it lasts; one that the flag does not have changes nothing.
    pub variant: String,
    /// End, in milliseconds since the Unix epoch. The operator puts it off for as long as the fleet is degraded.
    pub until_ms: i64,
    /// The policy whose fleet is degraded, in the workload's namespace.
    pub by: String,
    /// The load of the stage that the fleet is in, in percent. A pod that is itself in a stage of that load or a higher one goes
    /// by its own word, any other by this one.
    #[serde(default)]
    pub load_percent: u32,
}

impl FlagDegradation {
    /// Whether it is in force at `now_ms`.
    pub fn is_active(&self, now_ms: i64) -> bool {
        now_ms < self.until_ms
    }
}

impl FlagOverride {
    /// Whether it is in force at `now_ms`.
    pub fn is_active(&self, now_ms: i64) -> bool {
        self.until_ms.is_none_or(|until| now_ms < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Stands for an override without an end.
    const FOR_EVER: i64 = i64::MAX;

    fn flag(over: Option<FlagOverride>, state: FlagState) -> FlagSettings {
        FlagSettings {
            state,
            variants: BTreeMap::from([("on".into(), json!(true)), ("off".into(), json!(false))]),
            default_variant: Some("on".into()),
            targeting: None,
            kill_switch: over,
            degraded: None,
        }
    }

    #[rstest::rstest]
    #[case::spec(None, FlagState::Enabled, Some(json!(true)))]
    #[case::disabled(None, FlagState::Disabled, None)]
    #[case::override_in_force(Some(1_001), FlagState::Enabled, Some(json!(false)))]
    #[case::override_without_end(Some(FOR_EVER), FlagState::Enabled, Some(json!(false)))]
    #[case::override_is_over(Some(1_000), FlagState::Enabled, Some(json!(true)))]
    #[case::override_beats_disabled(Some(FOR_EVER), FlagState::Disabled, Some(json!(false)))]
    fn precedence(#[case] until: Option<i64>, #[case] state: FlagState, #[case] expected: Option<Value>) {
        let over = until.map(|until| (until != FOR_EVER).then_some(until)).map(|until_ms| FlagOverride {
            variant: "off".into(),
            until_ms,
            reason: String::new(),
        });
        assert_eq!(flag(over, state).value(1_000), expected.as_ref());
    }

    #[rstest::rstest]
    #[case::it_lasts("off", 1_001, None, Some(json!(false)))]
    #[case::it_is_over("off", 1_000, None, Some(json!(true)))]
    #[case::no_such_variant("dim", 1_001, None, Some(json!(true)))]
    #[case::a_person_beats_it("off", 1_001, Some("on"), Some(json!(true)))]
    fn the_fleet_stands_between_the_definition_and_a_person(
        #[case] variant: &str,
        #[case] until_ms: i64,
        #[case] over: Option<&str>,
        #[case] expected: Option<Value>,
    ) {
        let over = over.map(|over| FlagOverride { variant: over.into(), until_ms: None, reason: String::new() });
        let degraded = FlagDegradation { variant: variant.into(), until_ms, by: "booking".into(), load_percent: 80 };
        let flag = FlagSettings { degraded: Some(degraded), ..flag(over, FlagState::Enabled) };
        assert_eq!(flag.value(1_000), expected.as_ref());
    }
}
