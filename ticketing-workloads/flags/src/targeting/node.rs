//! A compiled rule: a tree in which everything is resolved that does not depend on the request.

use crate::semver::Comparison;
use serde_json::Value;
use std::sync::Arc;

/// A part of a rule that has a value.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Int(i64),
    /// A whole number from 2^63 on.
    Big(u64),
    Float(f64),
    Text(Box<str>),
    /// A list in which nothing is computed.
    Json(Value),
    /// A list in which something is.
    List(Box<[Node]>),
    Var(Box<Var>),
    If(Box<[Node]>),
    And(Box<[Node]>),
    Or(Box<[Node]>),
    Not(Box<Node>),
    IsTrue(Box<Node>),
    Equal {
        strict: bool,
        negated: bool,
        sides: Box<[Node; 2]>,
    },
    /// Two sides, or three: the one in the middle lies between the others.
    Order(Order, Box<[Node]>),
    Fold(Fold, Box<[Node]>),
    Negate(Box<Node>),
    Arithmetic(Arithmetic, Box<[Node; 2]>),
    In(Box<[Node; 2]>),
    Cat(Box<[Node]>),
    /// Text, start, and length (null: to the end).
    Substr(Box<[Node; 3]>),
    Missing(Box<[Node]>),
    MissingSome(Box<[Node; 2]>),
    Merge(Box<[Node]>),
    /// A list, and what is asked of each item.
    Each(Each, Box<[Node; 2]>),
    /// A list, what is done with each item, and the value to begin with.
    Reduce(Box<[Node; 3]>),
    Affix(Affix, Box<[Node; 2]>),
    SemVer(Comparison, Box<[Node; 2]>),
    Fractional(Box<Fractional>),
    /// A rule that others refer to as well.
    Shared(Arc<Node>),
}

/// A look into the context, or into the item at hand.
#[derive(Clone, Debug)]
pub(super) struct Var {
    pub path: Path,
    pub default: Node,
}

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) enum Path {
    /// Names from the outside in; none: the item itself.
    Known(Box<[Box<str>]>),
    /// A path that is computed.
    Computed(Node),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Fold {
    Sum,
    Product,
    Smallest,
    Largest,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Arithmetic {
    Minus,
    Divide,
    Modulo,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Each {
    Map,
    Filter,
    All,
    Some,
    None,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Affix {
    Start,
    End,
}

/// Which hash a split goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hashing {
    /// Of the canonical CBOR encoding: flagd's third version.
    Canonical,
    /// Of texts as they are: the second one. Nothing else has a hash.
    Plain,
}

/// A split by shares.
#[derive(Clone, Debug)]
pub(super) struct Fractional {
    pub hashing: Hashing,
    /// What is hashed; `None`: flag key and targeting key.
    pub bucket_by: Option<Node>,
    pub buckets: Box<[Bucket]>,
    /// Sum of the weights, if all of them are known.
    pub total: Option<u32>,
}

/// A share of a split.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    pub variant: Node,
    pub weight: Weight,
}

#[derive(Clone, Debug)]
pub(super) enum Weight {
    Known(u32),
    Computed(Node),
}
