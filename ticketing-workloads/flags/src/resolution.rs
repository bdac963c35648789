//! The value of a flag together with how it came about: what a caller over the network is told.

use crate::flag_set::{EvaluationError, Flag, Inputs};
use crate::targeting::Request;
use contract::FlagState;
use serde_json::Value;

/// How a flag came to its value, in the words of OpenFeature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It depends on nothing that the caller said: there is no targeting rule, or a person's override or degradation stands
    /// above it.
    Static,
    /// The targeting rule chose the variant.
    TargetingMatch,
    /// The targeting rule chose nothing, or there is no default variant.
    Default,
    /// The flag is disabled.
    Disabled,
}

impl Reason {
    /// Its name in OpenFeature.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Static => "STATIC",
            Self::TargetingMatch => "TARGETING_MATCH",
            Self::Default => "DEFAULT",
            Self::Disabled => "DISABLED",
        }
    }
}

/// What a flag says to a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resolution<'a> {
    /// How it came about.
    pub reason: Reason,
    /// Name of the variant and its value; `None`: the caller's own default.
    pub chosen: Option<(&'a str, &'a Value)>,
}

impl Flag {
    /// As [`Flag::evaluate`], with the variant and the reason.
    pub fn resolve<'a>(
        &'a self,
        key: &str,
        inputs: &Inputs<'_>,
        now_ms: i64,
    ) -> Result<Resolution<'a>, EvaluationError> {
        let variant = |name: &str| {
            let (name, value) = self.settings.variants.get_key_value(name)?;
            Some((name.as_str(), value))
        };
        if let Some(over) = self.settings.active_override(now_ms) {
            return Ok(Resolution { reason: Reason::Static, chosen: variant(&over.variant) });
        }
        if let Some(chosen) = inputs.degraded_variant.and_then(variant) {
            return Ok(Resolution { reason: Reason::Static, chosen: Some(chosen) });
        }
        if self.settings.state != FlagState::Enabled {
            return Ok(Resolution { reason: Reason::Disabled, chosen: None });
        }
        let default = self.settings.default_variant.as_deref().and_then(variant);
        let Some(rule) = &self.rule else {
            let is_static = default.is_some() && self.rule_error().is_none();
            let reason = if is_static { Reason::Static } else { Reason::Default };
            return Ok(Resolution { reason, chosen: default });
        };
        match rule.evaluate(&Request { flag_key: key, now_ms, context: inputs.context })? {
            None => Ok(Resolution { reason: Reason::Default, chosen: default }),
            Some(name) => match variant(&name) {
                Some(chosen) => Ok(Resolution { reason: Reason::TargetingMatch, chosen: Some(chosen) }),
                None => Err(EvaluationError::UnknownVariant(name.into_owned())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attribute, Context, FlagSet};
    use serde_json::json;

    const AT: &str = r#"{"targeting": {"if": [{"==": [{"var": "country"}, "AT"]}, "some"]}}"#;
    const OVER: &str = r#"{"override": {"variant": "some", "untilMs": 1000}, "state": "DISABLED"}"#;

    #[rstest::rstest]
    #[case::no_rule("{}", 0, None, Reason::Static, Some("none"))]
    #[case::an_empty_rule(r#"{"targeting": {}}"#, 0, None, Reason::Static, Some("none"))]
    #[case::a_match(AT, 0, None, Reason::TargetingMatch, Some("some"))]
    #[case::no_match(r#"{"targeting": {"if": [false, "some"]}}"#, 0, None, Reason::Default, Some("none"))]
    #[case::no_default(r#"{"defaultVariant": null}"#, 0, None, Reason::Default, None)]
    #[case::a_bad_rule(r#"{"targeting": {"iff": [true, "some"]}}"#, 0, None, Reason::Default, Some("none"))]
    #[case::disabled(r#"{"state": "DISABLED"}"#, 0, None, Reason::Disabled, None)]
    #[case::an_override(OVER, 999, None, Reason::Static, Some("some"))]
    #[case::an_override_that_is_over(OVER, 1000, None, Reason::Disabled, None)]
    #[case::an_override_beats_degradation(OVER, 999, Some("none"), Reason::Static, Some("some"))]
    #[case::degradation_beats_the_rule(AT, 0, Some("none"), Reason::Static, Some("none"))]
    #[case::degradation_to_an_unknown_variant(AT, 0, Some("absent"), Reason::TargetingMatch, Some("some"))]
    fn reasons(
        #[case] members: &str,
        #[case] now_ms: i64,
        #[case] degraded_variant: Option<&str>,
        #[case] reason: Reason,
        #[case] variant: Option<&str>,
    ) {
        let mut flag = json!({"state": "ENABLED", "defaultVariant": "none", "variants": {"none": 0, "some": 10.0}});
        let members: serde_json::Map<_, _> = serde_json::from_str(members).unwrap();
        members.into_iter().for_each(|(name, value)| flag[name] = value);
        let set = FlagSet::compile(serde_json::from_value(json!({"flags": {"Limit": flag}})).unwrap());
        let attributes = [("country", Attribute::Text("AT"))];
        let inputs = Inputs { context: Context::new(&attributes), degraded_variant };
        let flag = set.find("Limit").unwrap();
        let resolution = flag.resolve("Limit", &inputs, now_ms).unwrap();
        assert_eq!((resolution.reason, resolution.chosen.map(|(name, _)| name)), (reason, variant));
        let value = flag.evaluate("Limit", &inputs, || now_ms).unwrap();
        assert_eq!(resolution.chosen.map(|(_, value)| value), value, "pods say the same");
    }

    #[test]
    fn a_variant_that_the_flag_does_not_have_is_an_error() {
        let flag = json!({"state": "ENABLED", "variants": {"a": 1}, "targeting": {"cat": ["no", "body"]}});
        let set = FlagSet::compile(serde_json::from_value(json!({"flags": {"f": flag}})).unwrap());
        let error = set.find("f").unwrap().resolve("f", &Inputs::default(), 0);
        assert_eq!(error, Err(EvaluationError::UnknownVariant("nobody".into())));
    }
}
