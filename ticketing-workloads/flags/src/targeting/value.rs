//! The values that a rule computes with, and how JsonLogic turns one kind into another.

use crate::context::Attribute;
use serde_json::Value;
use std::fmt::Write as _;
use std::rc::Rc;

/// Lists that a rule builds are nested at most this deep, and what is nested deeper has no spelling.
pub(super) const MAX_DEPTH: usize = 64;

/// Longest spelling of a number, a Boolean or nothing, in bytes.
pub(super) const LONGEST_NUMBER: usize = 32;
/// How an object is spelled.
pub(super) const OBJECT: &str = "[object Object]";

/// A value. Everything that comes from the rule or from the context is borrowed.
#[derive(Clone, Debug)]
pub(super) enum Val<'a> {
    Null,
    Bool(bool),
    Int(i64),
    /// A whole number from 2^63 on: bucketed by exactly, and a float in all other operations.
    Big(u64),
    Float(f64),
    Str(&'a str),
    /// A text that the rule made.
    Text(Rc<str>),
    /// A list or an object; never anything else, see [`Val::from_json`].
    Json(&'a Value),
    /// A list that the rule made.
    List(Rc<List<'a>>),
}

/// A list that a rule made.
#[derive(Debug)]
pub(super) struct List<'a> {
    items: Vec<Val<'a>>,
    depth: usize,
}

impl<'a> List<'a> {
    pub(super) fn items(&self) -> &[Val<'a>] {
        &self.items
    }
}

impl<'a> Val<'a> {
    pub(super) fn from_json(value: &'a Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(value), _) => Self::Int(value),
                (None, Some(value)) => Self::Big(value),
                (None, None) => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Self::Str(text),
            Value::Array(_) | Value::Object(_) => Self::Json(value),
        }
    }

    pub(super) fn from_attribute(attribute: Attribute<'a>) -> Self {
        match attribute {
            Attribute::Bool(value) => Self::Bool(value),
            Attribute::Integer(value) => Self::Int(value),
            Attribute::Float(value) => Self::Float(value),
            Attribute::Text(text) => Self::Str(text),
            Attribute::Json(value) => Self::from_json(value),
        }
    }

    /// A list of `items`; `None`: it would be nested too deep.
    pub(super) fn list(items: Vec<Self>) -> Option<Self> {
        let depth = 1 + items.iter().map(Self::depth).max().unwrap_or(0);
        (depth <= MAX_DEPTH).then(|| Self::List(Rc::new(List { items, depth })))
    }

    /// Bytes that are read to see which number it is.
    pub(super) fn digits(&self) -> usize {
        match self {
            Self::Json(_) | Self::List(_) if self.items() == Some(1) => self.item(0).as_str().map_or(0, str::len),
            _ => self.as_str().map_or(0, str::len),
        }
    }

    /// Whether it is a list or an object.
    pub(super) const fn is_nested(&self) -> bool {
        matches!(self, Self::Json(_) | Self::List(_))
    }

    fn depth(&self) -> usize {
        if let Self::List(list) = self { list.depth } else { 0 }
    }

    pub(super) const fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Number of items, if it is a list.
    pub(super) fn items(&self) -> Option<usize> {
        match self {
            Self::Json(Value::Array(items)) => Some(items.len()),
            Self::List(list) => Some(list.items.len()),
            _ => None,
        }
    }

    /// The item at `index`; null if there is none.
    pub(super) fn item(&self, index: usize) -> Self {
        match self {
            Self::Json(Value::Array(items)) => items.get(index).map_or(Self::Null, Self::from_json),
            Self::List(list) => list.items.get(index).cloned().unwrap_or(Self::Null),
            _ => Self::Null,
        }
    }

    /// The member of that name, or the item at that index; null if there is none.
    pub(super) fn member(&self, name: &str) -> Self {
        match self {
            Self::Json(Value::Object(members)) => members.get(name).map_or(Self::Null, Self::from_json),
            Self::Json(_) | Self::List(_) => index_of(name).map_or(Self::Null, |index| self.item(index)),
            _ => Self::Null,
        }
    }

    /// JsonLogic's truth: nothing, zero, and what is empty are false, any other text, list or object is true.
    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Null => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Big(_) => true,
            Self::Float(value) => *value != 0.0 && !value.is_nan(),
            Self::Str(text) => !text.is_empty(),
            Self::Text(text) => !text.is_empty(),
            Self::Json(_) | Self::List(_) => self.items() != Some(0),
        }
    }

    /// As a number; what is none is NaN.
    pub(super) fn number(&self) -> Num {
        match self {
            Self::Null => Num::Int(0),
            Self::Bool(value) => Num::Int((*value).into()),
            Self::Int(value) => Num::Int(*value),
            Self::Big(value) => Num::Float(rounded(*value)),
            Self::Float(value) => Num::Float(*value),
            Self::Str(text) => Num::parse(text),
            Self::Text(text) => Num::parse(text),
            Self::Json(_) | Self::List(_) => match self.items() {
                Some(0) => Num::Int(0),
                Some(1) if self.item(0).items().is_none() => self.item(0).number(),
                _ => Num::Float(f64::NAN),
            },
        }
    }

    /// `===`: the same kind, and the same value. `1` and `1.0` are the same; lists and objects are compared by content.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Null, Self::Null) => true,
            (Self::Bool(left), Self::Bool(right)) => left == right,
            (Self::Int(_) | Self::Big(_) | Self::Float(_), Self::Int(_) | Self::Big(_) | Self::Float(_)) => {
                self.number().order(other.number()).is_some_and(std::cmp::Ordering::is_eq)
            }
            (Self::Json(left @ Value::Object(_)), Self::Json(right)) => left == right,
            _ => match (self.as_str(), other.as_str(), self.items(), other.items()) {
                (Some(left), Some(right), ..) => left == right,
                (_, _, Some(left), Some(right)) => {
                    left == right && (0..left).all(|index| self.item(index).is_same(&other.item(index)))
                }
                _ => false,
            },
        }
    }

    /// `==`: as in JavaScript, where kinds differ. Null equals nothing but null.
    pub(super) fn is_equal(&self, other: &Self) -> bool {
        if self.is_null() || other.is_null() {
            return self.is_null() && other.is_null();
        }
        match (self.as_str(), other.as_str()) {
            (Some(left), Some(right)) => left == right,
            (Some(text), _) if other.is_nested() => other.spelling().as_deref() == Some(text),
            (_, Some(text)) if self.is_nested() => self.spelling().as_deref() == Some(text),
            _ if self.is_nested() && other.is_nested() => self.is_same(other),
            _ => self.number().order(other.number()).is_some_and(std::cmp::Ordering::is_eq),
        }
    }

    /// The order for `<` and its kind: two texts by their characters, everything else as numbers. `None`: none of them
    /// holds.
    pub(super) fn order(&self, other: &Self) -> Option<std::cmp::Ordering> {
        match (self.as_str(), other.as_str()) {
            (Some(left), Some(right)) => Some(left.cmp(right)),
            _ => self.number().order(other.number()),
        }
    }

    /// Its spelling as a text; `None`: it is nested too deep.
    pub(super) fn spelling(&self) -> Option<String> {
        let mut out = String::new();
        self.spell(&mut out, 0)?;
        Some(out)
    }

    /// Appends its spelling to `out`. Null has none; a list is spelled as its items with commas between them.
    pub(super) fn spell(&self, out: &mut String, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Null => Ok(()),
            Self::Bool(value) => write!(out, "{value}"),
            Self::Int(value) => write!(out, "{value}"),
            Self::Big(value) => spell_float(rounded(*value), out),
            Self::Float(value) => spell_float(*value, out),
            Self::Str(text) => out.write_str(text),
            Self::Text(text) => out.write_str(text),
            Self::Json(Value::Object(_)) => out.write_str(OBJECT),
            Self::Json(_) | Self::List(_) => {
                for index in 0..self.items().unwrap_or(0) {
                    if index > 0 {
                        out.push(',');
                    }
                    self.item(index).spell(out, depth + 1)?;
                }
                Ok(())
            }
        };
        Some(())
    }
}

/// A whole number as the nearest float.
#[expect(clippy::cast_precision_loss, reason = "as any JSON reader that knows only floats would have it")]
const fn rounded(value: u64) -> f64 {
    value as f64
}

/// The index that a name is: digits as one writes them, without a sign or zeros before them.
fn index_of(name: &str) -> Option<usize> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_digit()) && (name == "0" || !name.starts_with('0'));
    is_plain.then(|| name.parse().ok()).flatten()
}

/// Spells a number as JavaScript does: no more digits than tell it from its neighbours, and an exponent where it is very large or very
/// small.
fn spell_float(value: f64, out: &mut String) -> std::fmt::Result {
    if !value.is_finite() {
        return out.write_str(if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        });
    }
    if value == 0.0 || (1e-6..1e21).contains(&value.abs()) {
        // Without the sign of -0.
        return write!(out, "{}", value + 0.0);
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) if !exponent.starts_with('-') => write!(out, "{digits}e+{exponent}"),
        _ => out.write_str(&text),
    }
}

/// A number: whole as long as it can be, so that large keys and weights stay exact.
#[derive(Clone, Copy, Debug)]
pub(super) enum Num {
    Int(i64),
    Float(f64),
}

impl Num {
    /// The number that `text` spells; the empty text is 0, what spells none is NaN.
    fn parse(text: &str) -> Self {
        let text = text.trim();
        if text.is_empty() {
            return Self::Int(0);
        }
        if let Ok(value) = text.parse() {
            return Self::Int(value);
        }
        // Rust would also read `inf` and `nan`, which are words here.
        let spells = text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E'));
        Self::Float(if spells { text.parse().unwrap_or(f64::NAN) } else { f64::NAN })
    }

    #[expect(clippy::cast_precision_loss, reason = "as any JSON reader that knows only floats would have it")]
    pub(super) const fn float(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    /// `next` if it is to be taken, and no number if one of both is none, in whichever order they come.
    pub(super) fn or_no_number(self, next: Self, is_taken: impl Fn(Self) -> bool) -> Self {
        match (self.float().is_nan(), next.float().is_nan()) {
            (true, _) => self,
            (_, true) => next,
            _ if is_taken(next) => next,
            _ => self,
        }
    }

    pub(super) fn order(self, other: Self) -> Option<std::cmp::Ordering> {
        match (self, other) {
            (Self::Int(left), Self::Int(right)) => Some(left.cmp(&right)),
            _ => self.float().partial_cmp(&other.float()),
        }
    }

    /// `whole` of two whole numbers if it gives one, else `float` of both.
    pub(super) fn combine(
        self,
        other: Self,
        whole: impl Fn(i64, i64) -> Option<i64>,
        float: impl Fn(f64, f64) -> f64,
    ) -> Self {
        if let (Self::Int(left), Self::Int(right)) = (self, other)
            && let Some(value) = whole(left, right)
        {
            return Self::Int(value);
        }
        Self::Float(float(self.float(), other.float()))
    }

    /// As a whole number; `None`: it is none, or one that no float holds exactly.
    #[expect(clippy::cast_possible_truncation, reason = "guarded by the range check")]
    pub(super) fn whole(self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(value),
            Self::Float(value) if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 => Some(value as i64),
            Self::Float(_) => None,
        }
    }

    pub(super) const fn val<'a>(self) -> Val<'a> {
        match self {
            Self::Int(value) => Val::Int(value),
            Self::Float(value) => Val::Float(value),
        }
    }
}
