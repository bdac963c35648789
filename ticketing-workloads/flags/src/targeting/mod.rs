//! flagd targeting rules: JsonLogic with flagd's own operators.
//!
//! A rule is compiled once, when a configuration arrives ([`Rule::compile`]), and evaluated for each request
//! ([`Rule::evaluate`]): at once, without a clock, on borrowed values. Ordinary rules allocate nothing. Work has bounds: a rule
//! has at most [`MAX_NODES`] parts nested at most [`MAX_DEPTH`] deep, and an evaluation takes at most [`MAX_STEPS`]
//! steps, whatever lists the caller brings along.
//!
//! Where implementations of flagd differ, docs/featureflag.md says what is done here.

mod compile;
mod evaluate;
mod evaluators;
mod node;
#[cfg(test)]
mod tests;
mod value;

pub use compile::{Mistake, RuleError, RuleWarning};
pub use evaluate::EvaluationError;
pub use evaluators::Evaluators;

use crate::context::Context;
use node::Node;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

/// The operator `fractional` as flagd's second version has it, for evaluators elsewhere that still have that one. They call it
/// `fractional`: a document for them has it under that name.
pub const FRACTIONAL_V2: &str = "fractional_v2";

/// Deepest nesting of a rule, shared rules included.
pub const MAX_DEPTH: usize = 64;

/// Most parts of a rule, without those of the shared rules that it refers to.
pub const MAX_NODES: usize = 10_000;

/// Most steps of one evaluation: a step is a part of the rule, an item of a list, or 32 bytes of a text, and is charged before it
/// is made.
pub const MAX_STEPS: usize = 100_000;

/// Most bytes of texts and lists that one evaluation makes, also if it needs none of them any more. What holds them may be
/// twice as large, and a text is copied once.
pub const MAX_BYTES: usize = 256 * 1024;

/// A rule, ready to be evaluated.
#[derive(Clone, Debug)]
pub struct Rule {
    root: Node,
    uses_time: bool,
}

/// A rule that a person has written, with all that there is to say about it.
#[derive(Debug, Default)]
pub struct Review {
    /// The rule; `None`: there is none, or it has mistakes.
    pub rule: Option<Rule>,
    /// All mistakes that one can be told of at once, at most 21: the first, and those in other parts of the rule.
    pub mistakes: Vec<RuleError>,
    /// What works, and is hardly meant; at most 20.
    pub warnings: Vec<RuleWarning>,
}

/// What a rule is evaluated for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Key of the flag.
    pub flag_key: &'a str,
    /// The time, in milliseconds since the Unix epoch; rules see whole seconds.
    pub now_ms: i64,
    /// What the caller knows about the request.
    pub context: Context<'a>,
}

impl Rule {
    /// Compiles `rule`, which may refer to `evaluators`. `None`: `{}` and null are no rule.
    pub fn compile(rule: &Value, evaluators: &Evaluators) -> Result<Option<Self>, RuleError> {
        if is_none(rule) { Ok(None) } else { compile::compile(rule, evaluators).0.map(Some) }
    }

    /// Compiles `rule`, and goes on after the first mistake, to tell its writer of all of them.
    pub fn review(rule: &Value, evaluators: &Evaluators) -> Review {
        if is_none(rule) {
            return Review::default();
        }
        let (rule, compile::Remarks { mut others, warnings }) = compile::compile(rule, evaluators);
        match rule {
            Ok(rule) => Review { rule: Some(rule), mistakes: Vec::new(), warnings },
            Err(first) => {
                others.retain(|other| *other != first);
                let mut mistakes = vec![first];
                mistakes.extend(others);
                Review { rule: None, mistakes, warnings }
            }
        }
    }

    /// Whether the time makes a difference. If not, any [`Request::now_ms`] will do.
    pub const fn uses_time(&self) -> bool {
        self.uses_time
    }

    /// The name of the variant for `request`; `None`: the default variant. The name may be one that the flag does not
    /// have.
    pub fn evaluate<'a>(&'a self, request: &Request<'a>) -> Result<Option<Cow<'a, str>>, EvaluationError> {
        evaluate::evaluate(&self.root, request)
    }

    /// The same, and how many steps it took: at most [`MAX_STEPS`], unless that is why there is no answer.
    pub fn evaluate_counted<'a>(
        &'a self,
        request: &Request<'a>,
    ) -> (Result<Option<Cow<'a, str>>, EvaluationError>, usize) {
        evaluate::evaluate_counted(&self.root, request)
    }

    /// The names that stand in the rule where its answer comes from, one for each part that is looked at; `None` for one that is no
    /// name. A name may come more than once, and others may be computed.
    pub fn named_variants(&self) -> impl Iterator<Item = Option<&str>> {
        let (mut open, mut seen) = (vec![&self.root], HashSet::new());
        std::iter::from_fn(move || {
            let node = open.pop()?;
            match node {
                Node::Text(name) => return Some(Some(&**name)),
                Node::Bool(value) => return Some(Some(if *value { "true" } else { "false" })),
                // Conditions stand before each answer, and the last answer stands alone.
                Node::If(branches) => open.extend(
                    branches
                        .iter()
                        .enumerate()
                        .filter(|(at, _)| at % 2 == 1 || at + 1 == branches.len())
                        .map(|(_, node)| node),
                ),
                Node::Fractional(split) => open.extend(split.buckets.iter().map(|bucket| &bucket.variant)),
                Node::Shared(node) if seen.insert(Arc::as_ptr(node)) => open.push(node),
                _ => {}
            }
            Some(None)
        })
    }
}

/// Whether this is how a flag says that it has no rule.
fn is_none(rule: &Value) -> bool {
    rule.is_null() || rule.as_object().is_some_and(serde_json::Map::is_empty)
}
