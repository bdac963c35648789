//! What a caller knows about the request that a flag is evaluated for.

use serde_json::Value;

/// Whom or what a flag is evaluated for. It borrows everything: making one costs nothing.
///
/// ```
/// use flags::{Attribute, Context};
///
/// let attributes = [("currency", Attribute::Text("EUR")), ("amount", Attribute::Integer(4_200))];
/// let context = Context::new(&attributes).with_key("order-4711");
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Context<'a> {
    targeting_key: Option<&'a str>,
    attributes: &'a [(&'a str, Attribute<'a>)],
}

impl<'a> Context<'a> {
    /// Nothing is known.
    pub const EMPTY: Self = Self { targeting_key: None, attributes: &[] };

    /// These attributes. They are searched one after the other: a handful, not hundreds. Of two with the same name, the
    /// first counts.
    pub const fn new(attributes: &'a [(&'a str, Attribute<'a>)]) -> Self {
        Self { targeting_key: None, attributes }
    }

    /// The same with a targeting key: who is asking, as `targetingKey` in rules and for the shorthand of `fractional`.
    #[must_use]
    pub const fn with_key(self, key: &'a str) -> Self {
        Self { targeting_key: Some(key), ..self }
    }

    /// How many attributes there are.
    pub(crate) const fn len(&self) -> usize {
        self.attributes.len()
    }

    /// The targeting key, if there is one.
    pub const fn targeting_key(&self) -> Option<&'a str> {
        self.targeting_key
    }

    /// The attribute of that name, if there is one.
    pub fn attribute(&self, name: &str) -> Option<Attribute<'a>> {
        self.attributes.iter().find(|(known, _)| *known == name).map(|(_, attribute)| *attribute)
    }
}

/// The value of an attribute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attribute<'a> {
    /// Yes or no.
    Bool(bool),
    /// A whole number.
    Integer(i64),
    /// Any number.
    Float(f64),
    /// A text.
    Text(&'a str),
    /// Anything that JSON can say, for lists and objects.
    Json(&'a Value),
}
