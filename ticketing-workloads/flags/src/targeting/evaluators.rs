//! The rules that the flags of a set share by `$ref`: each is compiled once, and every rule that refers to it holds the same.

use super::compile::{Remarks, compile_shared, shortened};
use super::node::Node;
use super::{RuleError, RuleWarning};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names that a message lists.
const NAMES: usize = 10;

/// Most remarks of one kind that are kept besides the first mistake of each rule.
const MOST_REMARKS: usize = 100;

/// After so many rules with mistakes a person is told of, nobody reads on.
const MOST_WRONG: usize = 200;

/// The shared rules of a set, compiled: those that can be, and why the others cannot.
#[derive(Debug, Default)]
pub struct Evaluators {
    standing: BTreeMap<String, Standing>,
    /// Whether an operation with a literal that it can do nothing with is null, as in flagd, and not a mistake.
    pub(super) lenient: bool,
    /// Those that are being compiled, each because the one before refers to it.
    open: Vec<String>,
    /// At most [`MOST_REMARKS`] of each kind.
    remarks: Remarks,
    /// How many have mistakes.
    wrong: usize,
}

/// How far a shared rule is.
#[derive(Debug)]
pub(super) enum Standing {
    /// It waits for what it refers to, as the one at this place among those that do.
    Open(usize),
    Compiled(Result<Shared, RuleError>),
}

/// A shared rule.
#[derive(Debug)]
pub(super) struct Shared {
    pub node: Arc<Node>,
    /// Levels below its root.
    pub height: usize,
    pub uses_time: bool,
    /// Why it cannot stand outside of operators over lists; `None`: it can.
    pub only_inside: Option<RuleError>,
}

/// A shared rule on the way down to what it refers to.
struct Visit<'r> {
    name: &'r str,
    rule: &'r Value,
    /// Names in it that are not looked at yet.
    references: Vec<&'r str>,
}

impl Evaluators {
    /// Compiles all of `rules`, in an order in which each comes after those that it refers to. Its cost follows from the
    /// size of the document, however often they refer to each other.
    /// Rules are refused for what a person must have mistaken; if that are very many, the rest is not looked at
    /// ([`Evaluators::is_complete`]).
    pub fn compile<'r>(rules: impl IntoIterator<Item = (&'r String, &'r Value)>) -> Self {
        Self { lenient: false, ..Self::default() }.and(rules)
    }

    /// The same for who has to make do with what there is, such as a pod: a version that is none, or weights that are none, make only
    /// their own operation null, as evaluators of flagd have it, and the rule around it goes on.
    pub fn compile_leniently<'r>(rules: impl IntoIterator<Item = (&'r String, &'r Value)>) -> Self {
        Self { lenient: true, ..Self::default() }.and(rules)
    }

    fn and<'r>(self, rules: impl IntoIterator<Item = (&'r String, &'r Value)>) -> Self {
        let rules: BTreeMap<&str, &Value> = rules.into_iter().map(|(name, rule)| (name.as_str(), rule)).collect();
        let mut all = self;
        for (&name, &rule) in &rules {
            let mut way = Vec::new();
            all.visit(name, rule, &mut way);
            // Without recursion: they may refer to each other in a chain of any length.
            while let Some(last) = way.last_mut() {
                if let Some(reference) = last.references.pop() {
                    if let Some(rule) = rules.get(reference) {
                        all.visit(reference, rule, &mut way);
                    }
                    continue;
                }
                let (compiled, Remarks { others, warnings }) = compile_shared(last.name, last.rule, &all);
                let Remarks { others: kept, warnings: kept_warnings } = &mut all.remarks;
                kept.extend(others.into_iter().take(MOST_REMARKS.saturating_sub(kept.len())));
                kept_warnings.extend(warnings.into_iter().take(MOST_REMARKS.saturating_sub(kept_warnings.len())));
                all.wrong += usize::from(compiled.is_err());
                all.standing.insert(last.name.to_owned(), Standing::Compiled(compiled));
                all.open.pop();
                way.pop();
                if !all.is_complete() {
                    return all;
                }
            }
        }
        all
    }

    /// Whether all rules were looked at. If not, what else refers to them cannot be judged.
    pub const fn is_complete(&self) -> bool {
        self.lenient || self.wrong < MOST_WRONG
    }

    fn visit<'r>(&mut self, name: &'r str, rule: &'r Value, way: &mut Vec<Visit<'r>>) {
        if self.standing.contains_key(name) {
            return;
        }
        self.standing.insert(name.to_owned(), Standing::Open(self.open.len()));
        self.open.push(name.to_owned());
        way.push(Visit { name, rule, references: references(rule) });
    }

    /// Those that cannot be compiled, with the reason of each.
    pub fn errors(&self) -> impl Iterator<Item = (&str, &RuleError)> {
        self.standing.iter().filter_map(|(name, standing)| match standing {
            Standing::Compiled(Err(error)) => Some((name.as_str(), error)),
            _ => None,
        })
    }

    /// All mistakes in the shared rules that one can be told of at once: the first of each rule, and of those in other parts
    /// of it some more. A rule that refers to one with a mistake has the same.
    pub fn mistakes(&self) -> impl Iterator<Item = &RuleError> {
        self.errors().map(|(_, error)| error).chain(&self.remarks.others)
    }

    /// What works in the shared rules, and is hardly meant.
    pub fn warnings(&self) -> impl Iterator<Item = &RuleWarning> {
        self.remarks.warnings.iter()
    }

    pub(super) fn find(&self, name: &str) -> Option<&Standing> {
        self.standing.get(name)
    }

    /// Whether a rule is looked at after its first mistake. Where so much is wrong that nobody is told of all of it, it is not.
    pub(super) fn wants_all_mistakes(&self) -> bool {
        !self.lenient && self.remarks.others.len() < MOST_REMARKS
    }

    /// The way from a rule that is being compiled, the one at `first`, back to itself.
    pub(super) fn round(&self, first: usize) -> String {
        let round = self.open.get(first..).unwrap_or_default();
        let name = |name: &String| shortened(name);
        let mut names: Vec<_> = if round.len() <= NAMES {
            round.iter().map(name).collect()
        } else {
            let (head, tail) = (&round[..NAMES / 2], &round[round.len() - NAMES / 2..]);
            head.iter().map(name).chain(["…".to_owned()]).chain(tail.iter().map(name)).collect()
        };
        names.extend(round.first().map(name));
        names.join(" -> ")
    }

    /// Names that there are, for who mistyped one.
    pub(super) fn some_names(&self) -> String {
        let names: Vec<_> = self.standing.keys().take(NAMES).map(|name| shortened(name)).collect();
        let more = if self.standing.len() > NAMES { ", …" } else { "" };
        names.join(", ") + more
    }
}

/// What a rule refers to.
fn references(rule: &Value) -> Vec<&str> {
    let (mut found, mut open) = (Vec::new(), vec![rule]);
    while let Some(value) = open.pop() {
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(members) => match members.get("$ref") {
                Some(Value::String(name)) => found.push(name.as_str()),
                _ => open.extend(members.values()),
            },
            _ => {}
        }
    }
    found
}
