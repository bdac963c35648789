//! Feature flags: which value a flag has for a request.
//!
//! The wire types ([`contract::FlagsSettings`]) say what a flag is; this crate compiles them once ([`FlagSet::compile`])
//! and evaluates them for each request ([`Flag::evaluate`]), without a clock, without I/O, and for targeting rules with
//! bounded work. The operator uses it to validate flags, workloads use it to answer for them.
//!
//! ```
//! use flags::{Attribute, Context, FlagSet, Inputs};
//! use serde_json::json;
//!
//! let settings = serde_json::from_value(json!({ "flags": { "new-checkout": {
//!     "state": "ENABLED",
//!     "variants": { "on": true, "off": false },
//!     "defaultVariant": "off",
//!     "targeting": { "if": [{ "==": [{ "var": "country" }, "AT"] }, "on"] },
//! } } }))?;
//! let flags = FlagSet::compile(settings);
//! let attributes = [("country", Attribute::Text("AT"))];
//! let inputs = Inputs { context: Context::new(&attributes), degraded_variant: None };
//! let flag = flags.find("new-checkout").ok_or("no such flag")?;
//! assert_eq!(flag.evaluate("new-checkout", &inputs, || 0)?, Some(&json!(true)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod by_key;
mod context;
mod flag_set;
mod fractional;
mod resolution;
mod semver;
pub mod targeting;
mod variants;

pub use by_key::ByKey;
pub use context::{Attribute, Context};
pub use flag_set::{EvaluationError, Flag, FlagSet, Inputs};
pub use resolution::{Reason, Resolution};
