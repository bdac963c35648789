//! What a flag resolves to, and why, in the words of OpenFeature.

use serde_json::Value;

/// What a flag resolves to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resolution<'a> {
    /// The variant that was chosen; `None`: none, and the caller's own default holds.
    pub variant: Option<&'a str>,
    /// Its value; `None`: the caller's own default.
    pub value: Option<&'a Value>,
    /// Why.
    pub reason: Reason,
}

/// Why a flag has the value that it has. Errors have no resolution: [`EvaluationError`](crate::EvaluationError).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Nothing about the request was looked at: the flag has no rule, or a person or the degraded mode says which variant holds.
    Static,
    /// The default variant, because the rule chose none or cannot be used; or the caller's own default, because there is no
    /// default variant.
    Default,
    /// The rule chose the variant.
    TargetingMatch,
    /// The flag is disabled: the caller's own default.
    Disabled,
}

impl Reason {
    /// The word that OpenFeature has for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Static => "STATIC",
            Self::Default => "DEFAULT",
            Self::TargetingMatch => "TARGETING_MATCH",
            Self::Disabled => "DISABLED",
        }
    }
}
