//! All that is wrong with an object, or worth a warning, in few words however much it is.

use super::Invalid;
use std::fmt;

/// Most findings of one kind that are told.
const LISTED: usize = 20;
/// Most findings that are counted. What is worse than that need not be looked at to its end.
const COUNTED: usize = 200;
/// Longest list, in bytes: a condition keeps 4,096, with what stands around it.
const LIST_BYTES: usize = 3_500;

/// Things to say, each with its field, in the order in which they were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Listing {
    listed: Vec<Invalid>,
    /// How many more there are.
    more: usize,
}

impl Listing {
    fn add(&mut self, finding: Invalid) {
        if self.listed.contains(&finding) {
            return;
        }
        if self.listed.len() < LISTED { self.listed.push(finding) } else { self.more += 1 }
    }

    /// Whether there is no need for more.
    const fn is_full(&self) -> bool {
        self.listed.len() + self.more >= COUNTED
    }
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut bytes, mut left) = (0, self.listed.len() + self.more);
        for (index, finding) in self.listed.iter().enumerate() {
            let text = finding.to_string();
            bytes += text.len();
            if index > 0 && bytes > LIST_BYTES {
                break;
            }
            write!(f, "{}{text}", if index > 0 { "; " } else { "" })?;
            left -= 1;
        }
        match left {
            0 => Ok(()),
            _ if self.is_full() => write!(f, "; and at least {left} more"),
            _ => write!(f, "; and {left} more"),
        }
    }
}

/// Why an object cannot be used: every mistake with its field, the first 20 in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Mistakes(Listing);

impl Mistakes {
    /// Adds one, if it is not there already.
    pub(super) fn add(&mut self, mistake: Invalid) {
        self.0.add(mistake);
    }

    /// Whether there are so many that no more are counted.
    pub(super) const fn is_full(&self) -> bool {
        self.0.is_full()
    }

    /// Whether there is none.
    pub(super) const fn is_empty(&self) -> bool {
        self.0.listed.is_empty()
    }
}

impl From<Invalid> for Mistakes {
    fn from(mistake: Invalid) -> Self {
        Self(Listing { listed: vec![mistake], more: 0 })
    }
}

/// What works, and is hardly meant. Written after another sentence, such as `valid`; nothing, if there is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warnings(Listing);

impl Warnings {
    /// Adds one, if it is not there already.
    pub(super) fn add(&mut self, warning: Invalid) {
        self.0.add(warning);
    }

    /// Whether there are so many that no more are counted.
    pub(super) const fn is_full(&self) -> bool {
        self.0.is_full()
    }
}

impl fmt::Display for Warnings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.listed.is_empty() { Ok(()) } else { write!(f, "; warning: {}", self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::invalid, *};

    #[test]
    fn few_are_listed_and_the_rest_counted() {
        let mut mistakes = Mistakes::default();
        assert!(mistakes.is_empty());
        for nth in 0..25 {
            mistakes.add(invalid(format!("spec.f{nth}"), "is wrong"));
            mistakes.add(invalid("spec.f0", "is wrong"));
        }
        let text = mistakes.to_string();
        assert!(text.starts_with("spec.f0: is wrong; spec.f1: is wrong; "), "{text}");
        assert!(text.ends_with("; spec.f19: is wrong; and 5 more"), "{text}");
        assert!(!mistakes.is_full());
        (0..175).for_each(|nth| mistakes.add(invalid("spec", format!("{nth}"))));
        assert!(mistakes.is_full());
        assert!(mistakes.to_string().ends_with("; and at least 180 more"), "{mistakes}");
        assert_eq!(Mistakes::from(invalid("spec", "is wrong")).to_string(), "spec: is wrong");
    }

    #[test]
    fn long_ones_leave_room_for_what_stands_around_them() {
        let mut warnings = Warnings::default();
        assert_eq!(warnings.to_string(), "");
        (0..10).for_each(|nth| warnings.add(invalid(format!("spec.f{nth}"), "x".repeat(1_000))));
        let text = warnings.to_string();
        assert!(text.starts_with("; warning: spec.f0: x") && text.ends_with("x; and 7 more"), "{text}");
    }
}
