//! From a [`Rule`](super::Rule) and a request to the name of a variant.

use super::node::{Affix, Arithmetic, Each, Fold, Fractional, Hashing, Node, Order, Path, Var, Weight};
use super::value::{LONGEST_NUMBER, Num, OBJECT, Val};
use super::{MAX_BYTES, MAX_STEPS, Request};
use crate::context::Attribute;
use crate::fractional::{self, MAX_WEIGHT_SUM};
use crate::semver::Version;
use serde_json::Value;
use std::borrow::Cow;
use std::cell::Cell;

/// Why a rule gives no answer for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvaluationError {
    /// Lists or texts that are too long to go through.
    #[error("the evaluation took more than {MAX_STEPS} steps: the lists of the rule or of the context are too long")]
    TooMuchWork,
    /// Texts or lists that it makes are too long.
    #[error("the evaluation made more than {MAX_BYTES} bytes of texts and lists")]
    TooMuchMade,
    /// The rule put lists into lists without end, or the caller did.
    #[error("there are lists or objects that are nested too deep")]
    TooDeep,
    /// A number, a list or an object: no name of a variant.
    #[error("the rule answers with a {0}, which names no variant; it must be a text, true, false or null")]
    NoName(&'static str),
}

/// Bytes of a text that cost one step to go through; and to read a number from.
const BYTES_PER_STEP: usize = 32;
const DIGITS_PER_STEP: usize = 8;
/// Attributes of a context that cost one step to look at.
const ATTRIBUTES_PER_STEP: usize = 8;
/// What an item of a list that is made takes.
const ITEM_BYTES: usize = size_of::<Val<'_>>();
/// Lists and objects of the caller are nested at most so deep; `serde_json` reads nothing deeper.
const MAX_JSON_DEPTH: usize = 128;

pub(super) fn evaluate<'a>(root: &'a Node, request: &Request<'a>) -> Result<Option<Cow<'a, str>>, EvaluationError> {
    Run::new(request).answer(root, &Scope::Request)
}

/// The same, and how many steps it took.
pub(super) fn evaluate_counted<'a>(
    root: &'a Node,
    request: &Request<'a>,
) -> (Result<Option<Cow<'a, str>>, EvaluationError>, usize) {
    let run = Run::new(request);
    let answer = run.answer(root, &Scope::Request);
    (answer, run.steps.get())
}

/// The name of a variant that `value` is; `None`: the default variant.
fn name(value: Val<'_>) -> Result<Option<Cow<'_, str>>, EvaluationError> {
    match value {
        Val::Null => Ok(None),
        Val::Str(name) => Ok(Some(Cow::Borrowed(name))),
        Val::Text(name) => Ok(Some(Cow::Owned(name.as_ref().to_owned()))),
        Val::Bool(value) => Ok(Some(Cow::Borrowed(if value { "true" } else { "false" }))),
        Val::Int(_) | Val::Big(_) | Val::Float(_) => Err(EvaluationError::NoName("number")),
        Val::Json(_) | Val::List(_) => Err(EvaluationError::NoName("list or object")),
    }
}

/// What `var` looks into.
enum Scope<'a> {
    Request,
    Item(Val<'a>),
    Reduce { current: Val<'a>, accumulator: Val<'a> },
}

/// The variant of a bucket that is hit.
enum Hit<'a> {
    /// Of one that stands in the rule.
    Bucket(&'a Node),
    /// Of one that was computed.
    Listed(Val<'a>),
}

struct Run<'a> {
    request: Request<'a>,
    /// What it costs to look for an attribute.
    look: usize,
    steps: Cell<usize>,
    made: Cell<usize>,
}

type Evaluated<'a> = Result<Val<'a>, EvaluationError>;

impl<'a> Run<'a> {
    #[inline]
    fn new(request: &Request<'a>) -> Self {
        let look = 1 + request.context.len() / ATTRIBUTES_PER_STEP;
        Self { request: *request, look, steps: Cell::new(0), made: Cell::new(0) }
    }

    #[inline]
    fn charge(&self, steps: usize) -> Result<(), EvaluationError> {
        let steps = self.steps.get().saturating_add(steps);
        self.steps.set(steps);
        if steps > MAX_STEPS { Err(EvaluationError::TooMuchWork) } else { Ok(()) }
    }

    /// Charges for reading so many bytes of a text.
    #[inline]
    fn read(&self, bytes: usize) -> Result<(), EvaluationError> {
        self.charge(bytes / BYTES_PER_STEP)
    }

    /// Charges for making so many bytes, before they are made.
    fn make(&self, bytes: usize) -> Result<(), EvaluationError> {
        let made = self.made.get().saturating_add(bytes);
        self.made.set(made);
        if made > MAX_BYTES { Err(EvaluationError::TooMuchMade) } else { self.read(bytes) }
    }

    /// Charges for going through all of `value`; the answer is how many bytes its spelling has at most.
    fn weigh(&self, value: &Val<'a>) -> Result<usize, EvaluationError> {
        self.charge(1)?;
        match value {
            Val::Null | Val::Bool(_) | Val::Int(_) | Val::Big(_) | Val::Float(_) => Ok(LONGEST_NUMBER),
            Val::Str(text) => self.read(text.len()).map(|()| text.len()),
            Val::Text(text) => self.read(text.len()).map(|()| text.len()),
            Val::Json(json) => self.weigh_json(json, 0),
            // Not deeper than a list may be.
            Val::List(list) => list
                .items()
                .iter()
                .try_fold(0_usize, |bytes, item| Ok(bytes.saturating_add(self.weigh(item)?).saturating_add(1))),
        }
    }

    fn weigh_json(&self, json: &Value, depth: usize) -> Result<usize, EvaluationError> {
        if depth > MAX_JSON_DEPTH {
            return Err(EvaluationError::TooDeep);
        }
        self.charge(1)?;
        match json {
            Value::Null | Value::Bool(_) | Value::Number(_) => Ok(LONGEST_NUMBER),
            Value::String(text) => self.read(text.len()).map(|()| text.len()),
            Value::Array(items) => items.iter().try_fold(0_usize, |bytes, item| {
                Ok(bytes.saturating_add(self.weigh_json(item, depth + 1)?).saturating_add(1))
            }),
            Value::Object(members) => {
                for (name, member) in members {
                    // They may have to be sorted.
                    self.charge(2 + name.len() / DIGITS_PER_STEP)?;
                    self.weigh_json(member, depth + 1)?;
                }
                Ok(OBJECT.len())
            }
        }
    }

    /// The number that `value` is.
    fn number(&self, value: &Val<'a>) -> Result<Num, EvaluationError> {
        self.charge(value.digits() / DIGITS_PER_STEP)?;
        Ok(value.number())
    }

    /// The answer of a rule, without making a value of it on the ways that most rules take.
    fn answer(&self, node: &'a Node, scope: &Scope<'a>) -> Result<Option<Cow<'a, str>>, EvaluationError> {
        self.charge(1)?;
        match node {
            Node::Text(text) => Ok(Some(Cow::Borrowed(text))),
            Node::If(branches) => match self.branch(branches, scope)? {
                Some(node) => self.answer(node, scope),
                None => Ok(None),
            },
            Node::Shared(node) => self.answer(node, scope),
            Node::Fractional(split) => match self.bucket(split, scope)? {
                Some(Hit::Bucket(Node::Text(text))) => Ok(Some(Cow::Borrowed(text))),
                Some(hit) => name(self.variant(hit, scope)?),
                None => Ok(None),
            },
            _ => name(self.value(node, scope)?),
        }
    }

    fn value(&self, node: &'a Node, scope: &Scope<'a>) -> Evaluated<'a> {
        self.charge(1)?;
        Ok(match node {
            Node::Null => Val::Null,
            Node::Bool(value) => Val::Bool(*value),
            Node::Int(value) => Val::Int(*value),
            Node::Float(value) => Val::Float(*value),
            Node::Text(text) => Val::Str(text),
            Node::Big(value) => Val::Big(*value),
            Node::Json(value) => Val::Json(value),
            Node::Var(var) => return self.var(var, scope),
            Node::If(branches) => match self.branch(branches, scope)? {
                Some(node) => return self.value(node, scope),
                None => Val::Null,
            },
            Node::Affix(affix, sides) => self.affix(*affix, sides, scope)?.map_or(Val::Null, Val::Bool),
            Node::Fractional(split) => match self.bucket(split, scope)? {
                Some(hit) => return self.variant(hit, scope),
                None => Val::Null,
            },
            Node::Equal { .. } | Node::Order(..) | Node::In(_) | Node::Not(_) | Node::IsTrue(_) => {
                Val::Bool(self.is_true(node, scope)?)
            }
            Node::Shared(node) => return self.value(node, scope),
            _ => return self.rare(node, scope),
        })
    }

    /// Whether the value of `node` is true, without making that value where it can be avoided.
    fn is_true(&self, node: &'a Node, scope: &Scope<'a>) -> Result<bool, EvaluationError> {
        match node {
            Node::Affix(affix, sides) => Ok(self.affix(*affix, sides, scope)? == Some(true)),
            Node::Equal { strict, negated, sides } => Ok(self.is_equal(*strict, sides, scope)? != *negated),
            Node::In(sides) => self.is_in(sides, scope),
            Node::Order(order, nodes) => self.in_order(*order, nodes, scope),
            Node::Not(node) => {
                self.charge(1)?;
                Ok(!self.is_true(node, scope)?)
            }
            Node::IsTrue(node) => {
                self.charge(1)?;
                self.is_true(node, scope)
            }
            Node::Shared(node) => {
                self.charge(1)?;
                self.is_true(node, scope)
            }
            _ => Ok(self.value(node, scope)?.is_true()),
        }
    }

    /// A text that is there already: one of the rule, or an attribute. `None`: it takes more to know.
    #[inline]
    fn text(&self, node: &'a Node, scope: &Scope<'a>) -> Option<&'a str> {
        match node {
            Node::Text(text) => Some(text),
            Node::Var(var) if matches!(scope, Scope::Request) => match &var.path {
                Path::Known(names) => match &**names {
                    [name] if &**name == "targetingKey" => self.request.context.targeting_key(),
                    [name] => match self.request.context.attribute(name) {
                        Some(Attribute::Text(text)) => Some(text),
                        _ => None,
                    },
                    _ => None,
                },
                Path::Computed(_) => None,
            },
            _ => None,
        }
    }

    #[inline]
    fn texts(&self, sides: &'a [Node; 2], scope: &Scope<'a>) -> Option<(&'a str, &'a str)> {
        Some((self.text(&sides[0], scope)?, self.text(&sides[1], scope)?))
    }

    /// `None`: one of the sides is no text.
    #[inline]
    fn affix(&self, affix: Affix, sides: &'a [Node; 2], scope: &Scope<'a>) -> Result<Option<bool>, EvaluationError> {
        let holds = |text: &str, part: &str| match affix {
            Affix::Start => text.starts_with(part),
            Affix::End => text.ends_with(part),
        };
        if let Some((text, part)) = self.texts(sides, scope) {
            self.charge(2 * self.look + part.len() / BYTES_PER_STEP)?;
            return Ok(Some(holds(text, part)));
        }
        let [text, part] = self.both(sides, scope)?;
        let Some((text, part)) = text.as_str().zip(part.as_str()) else { return Ok(None) };
        self.read(part.len())?;
        Ok(Some(holds(text, part)))
    }

    fn is_equal(&self, strict: bool, sides: &'a [Node; 2], scope: &Scope<'a>) -> Result<bool, EvaluationError> {
        if let Some((left, right)) = self.texts(sides, scope) {
            self.charge(2 * self.look + left.len().min(right.len()) / BYTES_PER_STEP)?;
            return Ok(left == right);
        }
        let [left, right] = self.both(sides, scope)?;
        let bytes = self.weigh(&left)?.saturating_add(self.weigh(&right)?);
        if strict {
            return Ok(left.is_same(&right));
        }
        // A list may be spelled, and a text be read as a number.
        if left.is_nested() != right.is_nested() {
            self.make(bytes)?;
        }
        self.charge((left.digits() + right.digits()) / DIGITS_PER_STEP)?;
        Ok(left.is_equal(&right))
    }

    /// What [`Run::value`] does not do itself. Apart from it, so that the ordinary operators need little of the stack.
    #[inline(never)]
    fn rare(&self, node: &'a Node, scope: &Scope<'a>) -> Evaluated<'a> {
        Ok(match node {
            Node::List(nodes) => self.list(self.values(nodes, scope)?)?,
            Node::And(nodes) => return self.until(nodes, false, scope),
            Node::Or(nodes) => return self.until(nodes, true, scope),
            Node::Fold(fold, nodes) => self.fold(*fold, nodes, scope)?,
            Node::Negate(node) => {
                let number = self.number(&self.value(node, scope)?)?;
                Num::Int(0).combine(number, i64::checked_sub, |zero, value| zero - value).val()
            }
            Node::Arithmetic(operation, sides) => {
                let [left, right] = self.both(sides, scope)?;
                arithmetic(*operation, self.number(&left)?, self.number(&right)?)
            }
            Node::Cat(nodes) => self.cat(nodes, scope)?,
            Node::Substr(parts) => self.substr(parts, scope)?,
            Node::Missing(nodes) => {
                let names = self.values(nodes, scope)?;
                let missing = match names.as_slice() {
                    [names] if names.items().is_some() => self.missing(names, scope)?,
                    _ => self.missing(&self.list(names)?, scope)?,
                };
                self.list(missing)?
            }
            Node::MissingSome(sides) => {
                let [wanted, names] = self.both(sides, scope)?;
                let missing = self.missing(&names, scope)?;
                let present = names.items().unwrap_or(0).saturating_sub(missing.len());
                let enough = self.number(&wanted)?.float() <= num(present).float();
                self.list(if enough { Vec::new() } else { missing })?
            }
            Node::Merge(nodes) => self.merge(nodes, scope)?,
            Node::Each(each, parts) => self.each(*each, parts, scope)?,
            Node::Reduce(parts) => self.reduce(parts, scope)?,
            Node::SemVer(comparison, sides) => {
                let [left, right] = self.both(sides, scope)?;
                let (left, right) = (self.text_of(&left)?, self.text_of(&right)?);
                self.charge((left.len() + right.len()) / DIGITS_PER_STEP)?;
                match (Version::parse(&left), Version::parse(&right)) {
                    (Some(left), Some(right)) => Val::Bool(comparison.holds(&left, &right)),
                    _ => Val::Null,
                }
            }
            // All others are done by `value`, which sends nothing here that it does itself.
            _ => Val::Null,
        })
    }

    #[inline]
    fn both(&self, sides: &'a [Node; 2], scope: &Scope<'a>) -> Result<[Val<'a>; 2], EvaluationError> {
        Ok([self.value(&sides[0], scope)?, self.value(&sides[1], scope)?])
    }

    fn values(&self, nodes: &'a [Node], scope: &Scope<'a>) -> Result<Vec<Val<'a>>, EvaluationError> {
        self.make(nodes.len() * ITEM_BYTES)?;
        nodes.iter().map(|node| self.value(node, scope)).collect()
    }

    /// A list of items that are charged for.
    fn list(&self, items: Vec<Val<'a>>) -> Evaluated<'a> {
        self.charge(items.len())?;
        Val::list(items).ok_or(EvaluationError::TooDeep)
    }

    /// What it is as a text.
    fn text_of<'v>(&self, value: &'v Val<'a>) -> Result<Cow<'v, str>, EvaluationError> {
        match value.as_str() {
            Some(text) => {
                self.read(text.len())?;
                Ok(Cow::Borrowed(text))
            }
            None => Ok(Cow::Owned(self.spelling(value)?)),
        }
    }

    /// The branch that is taken, if any.
    fn branch(&self, mut branches: &'a [Node], scope: &Scope<'a>) -> Result<Option<&'a Node>, EvaluationError> {
        loop {
            match branches {
                [] => return Ok(None),
                [otherwise] => return Ok(Some(otherwise)),
                [condition, then, rest @ ..] => {
                    if self.is_true(condition, scope)? {
                        return Ok(Some(then));
                    }
                    branches = rest;
                }
            }
        }
    }

    /// The first value that is `wanted`, else the last.
    fn until(&self, nodes: &'a [Node], wanted: bool, scope: &Scope<'a>) -> Evaluated<'a> {
        let mut last = Val::Null;
        for node in nodes {
            last = self.value(node, scope)?;
            if last.is_true() == wanted {
                break;
            }
        }
        Ok(last)
    }

    fn in_order(&self, order: Order, nodes: &'a [Node], scope: &Scope<'a>) -> Result<bool, EvaluationError> {
        let Some((first, rest)) = nodes.split_first() else { return Ok(false) };
        let mut left = self.value(first, scope)?;
        for node in rest {
            let right = self.value(node, scope)?;
            // As texts or as numbers.
            self.charge(1 + left.digits().min(right.digits()) / BYTES_PER_STEP)?;
            if left.as_str().is_none() || right.as_str().is_none() {
                self.charge((left.digits() + right.digits()) / DIGITS_PER_STEP)?;
            }
            let holds = left.order(&right).is_some_and(|found| match order {
                Order::Less => found.is_lt(),
                Order::LessOrEqual => found.is_le(),
                Order::Greater => found.is_gt(),
                Order::GreaterOrEqual => found.is_ge(),
            });
            if !holds {
                return Ok(false);
            }
            left = right;
        }
        Ok(true)
    }

    fn fold(&self, fold: Fold, nodes: &'a [Node], scope: &Scope<'a>) -> Evaluated<'a> {
        let mut result: Option<Num> = None;
        for node in nodes {
            let next = self.number(&self.value(node, scope)?)?;
            result = Some(match (result, fold) {
                (None, _) => next,
                (Some(sum), Fold::Sum) => sum.combine(next, i64::checked_add, |left, right| left + right),
                (Some(product), Fold::Product) => product.combine(next, i64::checked_mul, |left, right| left * right),
                (Some(least), Fold::Smallest) => least.or_no_number(next, |next| next.float() < least.float()),
                (Some(most), Fold::Largest) => most.or_no_number(next, |next| next.float() > most.float()),
            });
        }
        Ok(result.map_or(Val::Null, Num::val))
    }

    fn is_in(&self, sides: &'a [Node; 2], scope: &Scope<'a>) -> Result<bool, EvaluationError> {
        if let (Some(wanted), Node::Json(Value::Array(items))) = (self.text(&sides[0], scope), &sides[1]) {
            self.charge(self.look + items.len())?;
            for item in items.iter().filter_map(Value::as_str).filter(|item| item.len() == wanted.len()) {
                self.read(item.len())?;
                if item == wanted {
                    return Ok(true);
                }
            }
            return Ok(false);
        }
        let [wanted, place] = self.both(sides, scope)?;
        if let Some(items) = place.items() {
            self.weigh(&place)?;
            self.weigh(&wanted)?;
            return Ok((0..items).any(|index| place.item(index).is_same(&wanted)));
        }
        let Some(place) = place.as_str() else { return Ok(false) };
        // What is not there is in nothing, though its spelling is empty.
        if wanted.is_null() {
            return Ok(false);
        }
        self.read(place.len())?;
        Ok(place.contains(&*self.text_of(&wanted)?))
    }

    /// The spelling of something that may be long.
    fn spelling(&self, value: &Val<'a>) -> Result<String, EvaluationError> {
        let bytes = self.weigh(value)?;
        self.make(bytes)?;
        value.spelling().ok_or(EvaluationError::TooDeep)
    }

    fn cat(&self, nodes: &'a [Node], scope: &Scope<'a>) -> Evaluated<'a> {
        let mut text = String::new();
        for node in nodes {
            let value = self.value(node, scope)?;
            let bytes = self.weigh(&value)?;
            self.make(bytes)?;
            if value.spell(&mut text, 0).is_none() {
                return Err(EvaluationError::TooDeep);
            }
        }
        Ok(Val::Text(text.into()))
    }

    fn substr(&self, [text, start, length]: &'a [Node; 3], scope: &Scope<'a>) -> Evaluated<'a> {
        let text = self.value(text, scope)?;
        let start = self.number(&self.value(start, scope)?)?.float();
        let length = self.value(length, scope)?;
        let chars = self.text_of(&text)?;
        // What is taken of it is not known yet.
        self.make(chars.len())?;
        let count = chars.chars().count();
        // From the end if negative; beyond the text, its end.
        let from = offset(start, count);
        let to = match &length {
            Val::Null => count,
            length => match self.number(length)?.float() {
                length if length < 0.0 => offset(length, count).max(from),
                length => from.saturating_add(offset(length, count)).min(count),
            },
        };
        let part: String = chars.chars().skip(from).take(to - from.min(to)).collect();
        Ok(Val::Text(part.into()))
    }

    /// Those of `names` under which there is nothing.
    fn missing(&self, names: &Val<'a>, scope: &Scope<'a>) -> Result<Vec<Val<'a>>, EvaluationError> {
        let items = names.items().unwrap_or(0);
        self.make(items.saturating_mul(ITEM_BYTES))?;
        let mut missing = Vec::new();
        for name in (0..items).map(|index| names.item(index)) {
            let found = self.find(&self.text_of(&name)?, scope)?;
            if found.is_null() || found.as_str() == Some("") {
                missing.push(name);
            }
        }
        Ok(missing)
    }

    fn merge(&self, nodes: &'a [Node], scope: &Scope<'a>) -> Evaluated<'a> {
        let mut all = Vec::new();
        for node in nodes {
            let value = self.value(node, scope)?;
            if let Some(items) = value.items() {
                self.make(items.saturating_mul(ITEM_BYTES))?;
                all.extend((0..items).map(|index| value.item(index)));
            } else {
                self.make(ITEM_BYTES)?;
                all.push(value);
            }
        }
        self.list(all)
    }

    fn each(&self, each: Each, [items, question]: &'a [Node; 2], scope: &Scope<'a>) -> Evaluated<'a> {
        let items = self.value(items, scope)?;
        let count = items.items().unwrap_or(0);
        if matches!(each, Each::Map | Each::Filter) {
            self.make(count.saturating_mul(ITEM_BYTES))?;
        }
        let mut kept = Vec::new();
        for index in 0..count {
            let item = items.item(index);
            let inner = Scope::Item(item);
            let answer = self.value(question, &inner)?;
            let Scope::Item(item) = inner else { continue };
            match each {
                Each::Map => kept.push(answer),
                Each::Filter if answer.is_true() => kept.push(item),
                Each::All if !answer.is_true() => return Ok(Val::Bool(false)),
                Each::Some if answer.is_true() => return Ok(Val::Bool(true)),
                Each::None if answer.is_true() => return Ok(Val::Bool(false)),
                _ => {}
            }
        }
        match each {
            Each::Map | Each::Filter => self.list(kept),
            // JsonLogic's: nothing is not all of it.
            Each::All => Ok(Val::Bool(count > 0)),
            Each::Some => Ok(Val::Bool(false)),
            Each::None => Ok(Val::Bool(true)),
        }
    }

    fn reduce(&self, [items, step, first]: &'a [Node; 3], scope: &Scope<'a>) -> Evaluated<'a> {
        let items = self.value(items, scope)?;
        let mut accumulator = self.value(first, scope)?;
        for index in 0..items.items().unwrap_or(0) {
            accumulator = self.value(step, &Scope::Reduce { current: items.item(index), accumulator })?;
        }
        Ok(accumulator)
    }

    fn var(&self, var: &'a Var, scope: &Scope<'a>) -> Evaluated<'a> {
        let found = match &var.path {
            Path::Known(names) => match &**names {
                [] => whole(scope),
                [name] => self.named(name, scope)?,
                [name, rest @ ..] => self.nested(name, rest.iter().map(|name| &**name), scope)?,
            },
            Path::Computed(node) => self.computed(node, scope)?,
        };
        if found.is_null() { self.value(&var.default, scope) } else { Ok(found) }
    }

    #[inline(never)]
    fn computed(&self, path: &'a Node, scope: &Scope<'a>) -> Evaluated<'a> {
        let path = self.value(path, scope)?;
        self.find(&self.text_of(&path)?, scope)
    }

    /// What is at a dotted path.
    fn find(&self, path: &str, scope: &Scope<'a>) -> Evaluated<'a> {
        if path.is_empty() {
            return Ok(whole(scope));
        }
        let mut names = path.split('.');
        let name = names.next().unwrap_or_default();
        self.nested(name, names, scope)
    }

    fn nested<'n>(&self, name: &str, rest: impl Iterator<Item = &'n str>, scope: &Scope<'a>) -> Evaluated<'a> {
        let mut rest = rest;
        if name == "$flagd" && matches!(scope, Scope::Request) {
            let value = match rest.next() {
                Some("flagKey") => Val::Str(self.request.flag_key),
                Some("timestamp") => Val::Int(self.request.now_ms.div_euclid(1_000)),
                _ => Val::Null,
            };
            return Ok(if rest.next().is_none() { value } else { Val::Null });
        }
        let mut found = self.named(name, scope)?;
        for name in rest {
            found = self.member(&found, name)?;
        }
        Ok(found)
    }

    fn member(&self, value: &Val<'a>, name: &str) -> Evaluated<'a> {
        // It is compared with some names, or read as an index.
        self.charge(2 + name.len() / DIGITS_PER_STEP)?;
        Ok(value.member(name))
    }

    #[inline]
    fn named(&self, name: &str, scope: &Scope<'a>) -> Evaluated<'a> {
        self.charge(self.look + name.len() / DIGITS_PER_STEP)?;
        Ok(match scope {
            Scope::Request if name == "targetingKey" => {
                self.request.context.targeting_key().map_or(Val::Null, Val::Str)
            }
            Scope::Request => self.request.context.attribute(name).map_or(Val::Null, Val::from_attribute),
            Scope::Item(item) => item.member(name),
            Scope::Reduce { current, .. } if name == "current" => current.clone(),
            Scope::Reduce { accumulator, .. } if name == "accumulator" => accumulator.clone(),
            Scope::Reduce { .. } => Val::Null,
        })
    }

    /// The variant of the bucket that is hit, if any.
    fn bucket(&self, split: &'a Fractional, scope: &Scope<'a>) -> Result<Option<Hit<'a>>, EvaluationError> {
        let mut first = None;
        let hash = match &split.bucket_by {
            None => self.hash_of_key(split.hashing)?,
            Some(node) => {
                if let Some(text) = self.text(node, scope) {
                    self.charge(self.look + text.len() / BYTES_PER_STEP)?;
                    Some(match split.hashing {
                        Hashing::Canonical => fractional::hash_text(text),
                        Hashing::Plain => fractional::hash_plain_text(text),
                    })
                } else {
                    let value = self.value(node, scope)?;
                    self.weigh(&value)?;
                    if value.items().is_some() {
                        // A list in the first place is a bucket, also if it is computed.
                        let Some(bucket) = listed(&value) else { return Ok(None) };
                        first = Some(bucket);
                        self.hash_of_key(split.hashing)?
                    } else {
                        hash(&value, split.hashing)
                    }
                }
            }
        };
        let Some(hash) = hash else { return Ok(None) };
        let others = match split.total {
            Some(total) => total,
            None => match self.total(split, scope)? {
                Some(total) => total,
                None => return Ok(None),
            },
        };
        let total = others.checked_add(first.as_ref().map_or(0, |(_, weight)| *weight));
        let Some(total) = total.filter(|total| (1..=MAX_WEIGHT_SUM).contains(total)) else { return Ok(None) };
        self.charge(split.buckets.len())?;
        let mut place = fractional::place(hash, total);
        if let Some((variant, weight)) = first {
            if place < weight {
                return Ok(Some(Hit::Listed(variant)));
            }
            place -= weight;
        }
        for bucket in &split.buckets {
            let weight = match &bucket.weight {
                Weight::Known(weight) => *weight,
                Weight::Computed(node) => match weight(&self.value(node, scope)?) {
                    Some(weight) => weight,
                    None => return Ok(None),
                },
            };
            if place < weight {
                return Ok(Some(Hit::Bucket(&bucket.variant)));
            }
            place -= weight;
        }
        Ok(None)
    }

    /// Hash of flag key and targeting key; `None`: there is no targeting key.
    fn hash_of_key(&self, hashing: Hashing) -> Result<Option<u32>, EvaluationError> {
        match self.request.context.targeting_key() {
            None | Some("") => Ok(None),
            Some(key) => {
                self.read(key.len())?;
                let flag_key = self.request.flag_key;
                Ok(Some(match hashing {
                    Hashing::Canonical => fractional::hash_pair(flag_key, key),
                    Hashing::Plain => fractional::hash_plain_pair(flag_key, key),
                }))
            }
        }
    }

    /// The variant of a bucket; a list or an object is none.
    fn variant(&self, hit: Hit<'a>, scope: &Scope<'a>) -> Evaluated<'a> {
        let variant = match hit {
            Hit::Bucket(node) => self.value(node, scope)?,
            Hit::Listed(value) => value,
        };
        Ok(if variant.is_nested() { Val::Null } else { variant })
    }

    /// The sum of weights of which some are computed; `None`: one is no weight, or they are too much together.
    fn total(&self, split: &'a Fractional, scope: &Scope<'a>) -> Result<Option<u32>, EvaluationError> {
        let mut total = 0_u32;
        for bucket in &split.buckets {
            let weight = match &bucket.weight {
                Weight::Known(weight) => Some(*weight),
                Weight::Computed(node) => weight(&self.value(node, scope)?),
            };
            match weight.and_then(|weight| total.checked_add(weight)) {
                Some(sum) if sum <= MAX_WEIGHT_SUM => total = sum,
                _ => return Ok(None),
            }
        }
        Ok(Some(total))
    }
}

/// Hash of a bucketing value; `None`: it is none.
fn hash(value: &Val<'_>, hashing: Hashing) -> Option<u32> {
    match value {
        Val::Str(text) if hashing == Hashing::Plain => Some(fractional::hash_plain_text(text)),
        Val::Text(text) if hashing == Hashing::Plain => Some(fractional::hash_plain_text(text)),
        _ if hashing == Hashing::Plain => None,
        Val::Null | Val::List(_) => None,
        Val::Bool(value) => Some(fractional::hash_bool(*value)),
        Val::Int(value) => Some(fractional::hash_integer(*value)),
        Val::Big(value) => Some(fractional::hash_unsigned(*value)),
        Val::Float(value) => Some(fractional::hash_float(*value)),
        Val::Str(text) => Some(fractional::hash_text(text)),
        Val::Text(text) => Some(fractional::hash_text(text)),
        Val::Json(value) => value.is_object().then(|| fractional::hash_json(value)).flatten(),
    }
}

/// The variant and the weight of a bucket that was computed; `None`: the list is none.
fn listed<'a>(bucket: &Val<'a>) -> Option<(Val<'a>, u32)> {
    let share = match bucket.items()? {
        1 => 1,
        2 => weight(&bucket.item(1))?,
        _ => return None,
    };
    Some((bucket.item(0), share))
}

/// A computed weight: a whole number; below 0 is 0.
fn weight(value: &Val<'_>) -> Option<u32> {
    let (Val::Int(_) | Val::Float(_)) = value else { return None };
    let weight = value.number().whole()?;
    u32::try_from(weight.max(0)).ok().filter(|weight| *weight <= MAX_WEIGHT_SUM)
}

fn arithmetic<'a>(operation: Arithmetic, left: Num, right: Num) -> Val<'a> {
    match operation {
        Arithmetic::Minus => left.combine(right, i64::checked_sub, |left, right| left - right),
        // Whole if it comes out even.
        Arithmetic::Divide => left.combine(
            right,
            |left, right| (left.checked_rem(right)? == 0).then(|| left.checked_div(right)).flatten(),
            |left, right| left / right,
        ),
        Arithmetic::Modulo => left.combine(right, i64::checked_rem, |left, right| left % right),
    }
    .val()
}

/// What `var` without a name gives: the item at hand.
fn whole<'a>(scope: &Scope<'a>) -> Val<'a> {
    if let Scope::Item(item) = scope { item.clone() } else { Val::Null }
}

fn num(count: usize) -> Num {
    i64::try_from(count).map_or(Num::Float(f64::INFINITY), Num::Int)
}

/// Where `at` is among `count` characters: negative from the end, never outside.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "floats saturate; NaN is 0")]
fn offset(at: f64, count: usize) -> usize {
    if at < 0.0 { count.saturating_sub(-at as usize) } else { (at as usize).min(count) }
}
