//! The variants of a flag.

use serde_json::Value;
use std::collections::BTreeMap;

/// Values by name. There are few, and so they are gone through: a processor guesses which one it is, and need not wait for a hash.
#[derive(Debug)]
pub struct Variants(Box<[(Box<str>, Value)]>);

/// Up to so many are gone through; of more, the half is left out at a time.
const FEW: usize = 8;

impl From<BTreeMap<String, Value>> for Variants {
    fn from(variants: BTreeMap<String, Value>) -> Self {
        // In the order of their names.
        Self(variants.into_iter().map(|(name, value)| (name.into_boxed_str(), value)).collect())
    }
}

impl Variants {
    /// The variant of that name, with its name.
    #[inline]
    pub fn get_key_value(&self, name: &str) -> Option<(&str, &Value)> {
        let found = if self.0.len() <= FEW {
            self.0.iter().find(|(known, _)| **known == *name)
        } else {
            self.0.binary_search_by(|(known, _)| (**known).cmp(name)).ok().and_then(|at| self.0.get(at))
        };
        found.map(|(name, value)| (&**name, value))
    }

    /// The value of the variant of that name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.get_key_value(name).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_found_whether_there_are_few_or_many() {
        for count in 0..40 {
            let all: BTreeMap<_, _> = (0..count).map(|nth| (format!("v{nth}"), Value::from(nth))).collect();
            let variants = Variants::from(all.clone());
            assert!(all.iter().all(|(name, value)| variants.get_key_value(name) == Some((name.as_str(), value))));
            assert_eq!((variants.get("v"), variants.get("")), (None, None));
        }
    }
}
