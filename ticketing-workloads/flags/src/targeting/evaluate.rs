//! From a [`Rule`](super::Rule) and a request to the name of a variant.

use super::node::{Affix, Arithmetic, Each, Fold, Fractional, Node, Order, Path, Var, Weight};
use super::value::{Num, Val};
use super::{MAX_STEPS, Request};
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
    /// The rule put lists into lists without end.
    #[error("the rule builds lists that are nested too deep")]
    TooDeep,
    /// A number, a list or an object: no name of a variant.
    #[error("the rule answers with a {0}, which names no variant; it must be a text, true, false or null")]
    NoName(&'static str),
}

/// Text bytes that cost one step.
const BYTES_PER_STEP: usize = 64;

pub(super) fn evaluate<'a>(root: &'a Node, request: &Request<'a>) -> Result<Option<Cow<'a, str>>, EvaluationError> {
    Run { request: *request, steps: Cell::new(0) }.answer(root, &Scope::Request)
}

/// The name of a variant that `value` is; `None`: the default variant.
fn name(value: Val<'_>) -> Result<Option<Cow<'_, str>>, EvaluationError> {
    match value {
        Val::Null => Ok(None),
        Val::Str(name) => Ok(Some(Cow::Borrowed(name))),
        Val::Text(name) => Ok(Some(Cow::Owned(name.as_ref().to_owned()))),
        Val::Bool(value) => Ok(Some(Cow::Borrowed(if value { "true" } else { "false" }))),
        Val::Int(_) | Val::Float(_) => Err(EvaluationError::NoName("number")),
        Val::Json(_) | Val::List(_) => Err(EvaluationError::NoName("list or object")),
    }
}

/// What `var` looks into.
enum Scope<'a> {
    Request,
    Item(Val<'a>),
    Reduce { current: Val<'a>, accumulator: Val<'a> },
}

struct Run<'a> {
    request: Request<'a>,
    steps: Cell<usize>,
}

type Evaluated<'a> = Result<Val<'a>, EvaluationError>;

impl<'a> Run<'a> {
    #[inline]
    fn charge(&self, steps: usize) -> Result<(), EvaluationError> {
        let steps = self.steps.get().saturating_add(steps);
        self.steps.set(steps);
        if steps > MAX_STEPS { Err(EvaluationError::TooMuchWork) } else { Ok(()) }
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
            Node::Fractional(split) => match self.bucket(split, scope)? {
                Some(Node::Text(text)) => Ok(Some(Cow::Borrowed(text))),
                Some(variant) => name(self.variant(variant, scope)?),
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
            Node::Json(value) => Val::Json(value),
            Node::Var(var) => return self.var(var, scope),
            Node::If(branches) => match self.branch(branches, scope)? {
                Some(node) => return self.value(node, scope),
                None => Val::Null,
            },
            Node::Affix(affix, sides) => self.affix(*affix, sides, scope)?.map_or(Val::Null, Val::Bool),
            Node::Fractional(split) => match self.bucket(split, scope)? {
                Some(variant) => return self.variant(variant, scope),
                None => Val::Null,
            },
            Node::Equal { .. } | Node::Order(..) | Node::In(_) | Node::Not(_) | Node::IsTrue(_) => {
                Val::Bool(self.is_true(node, scope)?)
            }
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
            self.charge(3)?;
            return Ok(Some(holds(text, part)));
        }
        let [text, part] = self.both(sides, scope)?;
        Ok(text.as_str().zip(part.as_str()).map(|(text, part)| holds(text, part)))
    }

    fn is_equal(&self, strict: bool, sides: &'a [Node; 2], scope: &Scope<'a>) -> Result<bool, EvaluationError> {
        if let Some((left, right)) = self.texts(sides, scope) {
            self.charge(3)?;
            return Ok(left == right);
        }
        let [left, right] = self.both(sides, scope)?;
        self.charge(left.size().saturating_add(right.size()))?;
        Ok(if strict { left.is_same(&right) } else { left.is_equal(&right) })
    }

    /// What [`Run::value`] does not do itself. Apart from it, so that the ordinary operators need little of the stack.
    #[inline(never)]
    fn rare(&self, node: &'a Node, scope: &Scope<'a>) -> Evaluated<'a> {
        Ok(match node {
            Node::List(nodes) => list(self.values(nodes, scope)?)?,
            Node::And(nodes) => return self.until(nodes, false, scope),
            Node::Or(nodes) => return self.until(nodes, true, scope),
            Node::Fold(fold, nodes) => self.fold(*fold, nodes, scope)?,
            Node::Negate(node) => {
                let number = self.value(node, scope)?.number();
                Num::Int(0).combine(number, i64::checked_sub, |zero, value| zero - value).val()
            }
            Node::Arithmetic(operation, sides) => {
                let [left, right] = self.both(sides, scope)?;
                arithmetic(*operation, left.number(), right.number())
            }
            Node::Cat(nodes) => self.cat(nodes, scope)?,
            Node::Substr(parts) => self.substr(parts, scope)?,
            Node::Missing(nodes) => {
                let names = self.values(nodes, scope)?;
                match names.as_slice() {
                    [names] if names.items().is_some() => list(self.missing(names, scope)?)?,
                    _ => list(self.missing(&list(names)?, scope)?)?,
                }
            }
            Node::MissingSome(sides) => {
                let [wanted, names] = self.both(sides, scope)?;
                let missing = self.missing(&names, scope)?;
                let present = names.items().unwrap_or(0).saturating_sub(missing.len());
                let enough = wanted.number().float() <= num(present).float();
                list(if enough { Vec::new() } else { missing })?
            }
            Node::Merge(nodes) => self.merge(nodes, scope)?,
            Node::Each(each, parts) => self.each(*each, parts, scope)?,
            Node::Reduce(parts) => self.reduce(parts, scope)?,
            Node::SemVer(comparison, sides) => {
                let [left, right] = self.both(sides, scope)?;
                self.charge(left.size().saturating_add(right.size()))?;
                let (left, right) = (version_text(&left), version_text(&right));
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
        nodes.iter().map(|node| self.value(node, scope)).collect()
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
            let next = self.value(node, scope)?.number();
            result = Some(match (result, fold) {
                (None, _) => next,
                (Some(sum), Fold::Sum) => sum.combine(next, i64::checked_add, |left, right| left + right),
                (Some(product), Fold::Product) => product.combine(next, i64::checked_mul, |left, right| left * right),
                (Some(least), Fold::Smallest) => {
                    if least.float() <= next.float() {
                        least
                    } else {
                        next
                    }
                }
                (Some(most), Fold::Largest) => {
                    if most.float() >= next.float() {
                        most
                    } else {
                        next
                    }
                }
            });
        }
        Ok(result.map_or(Val::Null, Num::val))
    }

    fn is_in(&self, sides: &'a [Node; 2], scope: &Scope<'a>) -> Result<bool, EvaluationError> {
        if let (Some(wanted), Node::Json(Value::Array(items))) = (self.text(&sides[0], scope), &sides[1]) {
            self.charge(items.len())?;
            return Ok(items.iter().any(|item| item.as_str() == Some(wanted)));
        }
        let [wanted, place] = self.both(sides, scope)?;
        if let Some(items) = place.items() {
            self.charge(place.size())?;
            return Ok((0..items).any(|index| place.item(index).is_same(&wanted)));
        }
        let Some(place) = place.as_str() else { return Ok(false) };
        self.charge(place.len() / BYTES_PER_STEP)?;
        if let Some(wanted) = wanted.as_str() {
            return Ok(place.contains(wanted));
        }
        // What is not there is in nothing, though its spelling is empty.
        Ok(!wanted.is_null() && self.spelling(&wanted)?.is_some_and(|wanted| place.contains(wanted.as_str())))
    }

    /// The spelling of something that may be long.
    fn spelling(&self, value: &Val<'a>) -> Result<Option<String>, EvaluationError> {
        self.charge(value.size())?;
        let text = value.spelling();
        self.charge(text.as_ref().map_or(0, String::len) / BYTES_PER_STEP)?;
        Ok(text)
    }

    fn cat(&self, nodes: &'a [Node], scope: &Scope<'a>) -> Evaluated<'a> {
        let mut text = String::new();
        for node in nodes {
            let value = self.value(node, scope)?;
            // Charged before it is written, so that nothing grows beyond what is allowed.
            self.charge(value.size().saturating_add(value.as_str().map_or(0, str::len) / BYTES_PER_STEP))?;
            let before = text.len();
            if value.spell(&mut text, 0).is_none() {
                return Err(EvaluationError::TooDeep);
            }
            if value.as_str().is_none() {
                self.charge((text.len() - before) / BYTES_PER_STEP)?;
            }
        }
        Ok(Val::Text(text.into()))
    }

    fn substr(&self, [text, start, length]: &'a [Node; 3], scope: &Scope<'a>) -> Evaluated<'a> {
        let text = self.value(text, scope)?;
        let start = self.value(start, scope)?.number().float();
        let length = self.value(length, scope)?;
        let owned;
        let chars = if let Some(text) = text.as_str() {
            text
        } else {
            owned = self.spelling(&text)?.unwrap_or_default();
            &owned
        };
        self.charge(chars.len() / BYTES_PER_STEP)?;
        let count = chars.chars().count();
        // From the end if negative; beyond the text, its end.
        let from = offset(start, count);
        let to = match &length {
            Val::Null => count,
            length => match length.number().float() {
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
        self.charge(names.size())?;
        let is_missing = |name: &Val<'a>| {
            let found = name.spelling().map_or(Val::Null, |name| self.find(&name, scope));
            found.is_null() || found.as_str() == Some("")
        };
        Ok((0..items).map(|index| names.item(index)).filter(is_missing).collect())
    }

    fn merge(&self, nodes: &'a [Node], scope: &Scope<'a>) -> Evaluated<'a> {
        let mut all = Vec::new();
        for node in nodes {
            let value = self.value(node, scope)?;
            match value.items() {
                Some(items) => {
                    self.charge(items)?;
                    all.extend((0..items).map(|index| value.item(index)));
                }
                None => all.push(value),
            }
        }
        list(all)
    }

    fn each(&self, each: Each, [items, question]: &'a [Node; 2], scope: &Scope<'a>) -> Evaluated<'a> {
        let items = self.value(items, scope)?;
        let count = items.items().unwrap_or(0);
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
            Each::Map | Each::Filter => list(kept),
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
                [name] => self.named(name, scope),
                [name, rest @ ..] => self.nested(name, rest.iter().map(|name| &**name), scope),
            },
            Path::Computed(node) => self.computed(node, scope)?,
        };
        if found.is_null() { self.value(&var.default, scope) } else { Ok(found) }
    }

    #[inline(never)]
    fn computed(&self, path: &'a Node, scope: &Scope<'a>) -> Evaluated<'a> {
        let path = self.value(path, scope)?;
        Ok(match path.as_str() {
            Some(path) => self.find(path, scope),
            None => self.spelling(&path)?.map_or(Val::Null, |path| self.find(&path, scope)),
        })
    }

    /// What is at a dotted path.
    fn find(&self, path: &str, scope: &Scope<'a>) -> Val<'a> {
        if path.is_empty() {
            return whole(scope);
        }
        let mut names = path.split('.');
        let name = names.next().unwrap_or_default();
        self.nested(name, names, scope)
    }

    fn nested<'n>(&self, name: &str, rest: impl Iterator<Item = &'n str>, scope: &Scope<'a>) -> Val<'a> {
        let mut rest = rest;
        if name == "$flagd" && matches!(scope, Scope::Request) {
            let value = match rest.next() {
                Some("flagKey") => Val::Str(self.request.flag_key),
                Some("timestamp") => Val::Int(self.request.now_ms.div_euclid(1_000)),
                _ => Val::Null,
            };
            return if rest.next().is_none() { value } else { Val::Null };
        }
        rest.fold(self.named(name, scope), |value, name| value.member(name))
    }

    #[inline]
    fn named(&self, name: &str, scope: &Scope<'a>) -> Val<'a> {
        match scope {
            Scope::Request if name == "targetingKey" => {
                self.request.context.targeting_key().map_or(Val::Null, Val::Str)
            }
            Scope::Request => self.request.context.attribute(name).map_or(Val::Null, Val::from_attribute),
            Scope::Item(item) => item.member(name),
            Scope::Reduce { current, .. } if name == "current" => current.clone(),
            Scope::Reduce { accumulator, .. } if name == "accumulator" => accumulator.clone(),
            Scope::Reduce { .. } => Val::Null,
        }
    }

    /// The variant of the bucket that is hit, if any.
    fn bucket(&self, split: &'a Fractional, scope: &Scope<'a>) -> Result<Option<&'a Node>, EvaluationError> {
        let hash = match &split.bucket_by {
            None => match self.request.context.targeting_key() {
                None | Some("") => None,
                Some(key) => Some(fractional::hash_pair(self.request.flag_key, key)),
            },
            Some(node) => match self.text(node, scope) {
                Some(text) => Some(fractional::hash_text(text)),
                None => hash(&self.value(node, scope)?),
            },
        };
        let Some(hash) = hash else { return Ok(None) };
        let total = match split.total {
            Some(total) => total,
            None => match self.total(split, scope)? {
                Some(total) => total,
                None => return Ok(None),
            },
        };
        self.charge(split.buckets.len())?;
        let mut place = fractional::place(hash, total);
        for bucket in &split.buckets {
            let weight = match &bucket.weight {
                Weight::Known(weight) => *weight,
                Weight::Computed(node) => match weight(&self.value(node, scope)?) {
                    Some(weight) => weight,
                    None => return Ok(None),
                },
            };
            if place < weight {
                return Ok(Some(&bucket.variant));
            }
            place -= weight;
        }
        Ok(None)
    }

    /// The variant of a bucket; a list or an object is none.
    fn variant(&self, variant: &'a Node, scope: &Scope<'a>) -> Evaluated<'a> {
        let variant = self.value(variant, scope)?;
        Ok(if matches!(variant, Val::Json(_) | Val::List(_)) { Val::Null } else { variant })
    }

    /// The sum of weights of which some are computed; `None`: one is no weight, or they are nothing together, or too
    /// much.
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
        Ok((total > 0).then_some(total))
    }
}

/// Hash of a bucketing value; `None`: it is none.
fn hash(value: &Val<'_>) -> Option<u32> {
    match value {
        // A list in the first place would be a bucket.
        Val::Null | Val::List(_) => None,
        Val::Bool(value) => Some(fractional::hash_bool(*value)),
        Val::Int(value) => Some(fractional::hash_integer(*value)),
        Val::Float(value) => Some(fractional::hash_float(*value)),
        Val::Str(text) => Some(fractional::hash_text(text)),
        Val::Text(text) => Some(fractional::hash_text(text)),
        Val::Json(value) => value.is_object().then(|| fractional::hash_json(value)).flatten(),
    }
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

fn list(items: Vec<Val<'_>>) -> Evaluated<'_> {
    Val::list(items).ok_or(EvaluationError::TooDeep)
}

/// What `var` without a name gives: the item at hand.
fn whole<'a>(scope: &Scope<'a>) -> Val<'a> {
    if let Scope::Item(item) = scope { item.clone() } else { Val::Null }
}

fn version_text<'v>(value: &'v Val<'_>) -> Cow<'v, str> {
    value.as_str().map_or_else(|| Cow::Owned(value.spelling().unwrap_or_default()), Cow::Borrowed)
}

fn num(count: usize) -> Num {
    i64::try_from(count).map_or(Num::Float(f64::INFINITY), Num::Int)
}

/// Where `at` is among `count` characters: negative from the end, never outside.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "floats saturate; NaN is 0")]
fn offset(at: f64, count: usize) -> usize {
    if at < 0.0 { count.saturating_sub(-at as usize) } else { (at as usize).min(count) }
}
