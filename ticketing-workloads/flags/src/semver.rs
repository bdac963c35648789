//! Versions as `sem_ver` compares them: semantic versioning 2.0.0, with what flagd allows on top of it: a leading `v` or
//! `V`, and versions without minor or patch number (`1.2` is `1.2.0`). Build metadata does not count.

use std::cmp::Ordering;

/// How two versions are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// `^`: the same major version.
    SameMajor,
    /// `~`: the same major and minor version.
    SameMinor,
}

impl Comparison {
    /// The comparison that is spelled `sign`.
    pub(super) fn from_sign(sign: &str) -> Option<Self> {
        Some(match sign {
            "=" => Self::Equal,
            "!=" => Self::NotEqual,
            "<" => Self::Less,
            "<=" => Self::LessOrEqual,
            ">" => Self::Greater,
            ">=" => Self::GreaterOrEqual,
            "^" => Self::SameMajor,
            "~" => Self::SameMinor,
            _ => return None,
        })
    }

    /// Whether it holds between `left` and `right`.
    pub(super) fn holds(self, left: &Version<'_>, right: &Version<'_>) -> bool {
        let order = left.order(right);
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
            Self::SameMajor => left.numbers[0] == right.numbers[0],
            Self::SameMinor => left.numbers[..2] == right.numbers[..2],
        }
    }
}

/// A version.
#[derive(Debug)]
pub(super) struct Version<'a> {
    /// Major, minor, patch.
    numbers: [u64; 3],
    /// What follows the `-`; empty: a release.
    pre_release: &'a str,
}

impl<'a> Version<'a> {
    /// Reads `text`; `None`: it is no version.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let text = text.strip_prefix(['v', 'V']).unwrap_or(text);
        let (text, build) = text.split_once('+').map_or((text, None), |(text, build)| (text, Some(build)));
        let (core, pre_release) = text.split_once('-').map_or((text, None), |(core, pre)| (core, Some(pre)));
        let identifiers_are_right = build.is_none_or(|build| build.split('.').all(is_identifier))
            && pre_release.is_none_or(|pre| pre.split('.').all(|one| is_identifier(one) && !has_leading_zero(one)));
        if !identifiers_are_right {
            return None;
        }
        let mut numbers = [0; 3];
        let mut parts = core.split('.');
        numbers[0] = number(parts.next()?)?;
        for (slot, part) in numbers[1..].iter_mut().zip(&mut parts) {
            *slot = number(part)?;
        }
        parts.next().is_none().then_some(Self { numbers, pre_release: pre_release.unwrap_or_default() })
    }

    fn order(&self, other: &Self) -> Ordering {
        self.numbers.cmp(&other.numbers).then_with(|| match (self.pre_release, other.pre_release) {
            (mine, theirs) if mine == theirs => Ordering::Equal,
            ("", _) => Ordering::Greater,
            (_, "") => Ordering::Less,
            (mine, theirs) => pre_release_order(mine, theirs),
        })
    }
}

fn pre_release_order(mine: &str, theirs: &str) -> Ordering {
    let (mut mine, mut theirs) = (mine.split('.'), theirs.split('.'));
    loop {
        let order = match (mine.next(), theirs.next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => Ordering::Less,
            (Some(_), None) => Ordering::Greater,
            (Some(mine), Some(theirs)) => match (is_number(mine), is_number(theirs)) {
                // Without leading zeros, the longer number is the larger one, however long it is.
                (true, true) => mine.len().cmp(&theirs.len()).then_with(|| mine.cmp(theirs)),
                (true, false) => Ordering::Less,
                (false, true) => Ordering::Greater,
                (false, false) => mine.cmp(theirs),
            },
        };
        if order.is_ne() {
            return order;
        }
    }
}

fn number(text: &str) -> Option<u64> {
    // `parse` alone would also take a sign.
    (is_number(text) && !has_leading_zero(text)).then(|| text.parse().ok()).flatten()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn has_leading_zero(text: &str) -> bool {
    is_number(text) && text.len() > 1 && text.starts_with('0')
}

fn is_identifier(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[rstest::rstest]
    #[case("1.2.3", "=", "1.2.3", true)]
    #[case("v1.2.3", "=", "V1.2.3", true)]
    #[case("1", "=", "1.0.0", true)]
    #[case("1.2", "<", "1.2.1", true)]
    #[case("1.10.0", ">", "1.9.9", true)]
    #[case("1.2.3", "!=", "1.2.4", true)]
    #[case("1.2.3", "<=", "1.2.3", true)]
    #[case("1.2.3", ">=", "1.2.4", false)]
    #[case("1.9.0", "^", "1.2.3", true)]
    #[case("2.0.0", "^", "1.9.0", false)]
    #[case("1.2.9", "~", "1.2.0", true)]
    #[case("1.3.0", "~", "1.2.0", false)]
    #[case("1.0.0-alpha", "<", "1.0.0", true)]
    #[case("1.0.0-alpha", "<", "1.0.0-alpha.1", true)]
    #[case("1.0.0-alpha.1", "<", "1.0.0-alpha.beta", true)]
    #[case("1.0.0-beta.2", "<", "1.0.0-beta.11", true)]
    #[case("1.0.0-rc.1", "<", "1.0.0", true)]
    #[case("1.0.0+a", "=", "1.0.0+b", true)]
    #[case("1-beta", "<", "1", true)]
    fn comparisons(#[case] left: &str, #[case] sign: &str, #[case] right: &str, #[case] expected: bool) {
        let [left, right] = [left, right].map(|text| Version::parse(text).unwrap());
        assert_eq!(Comparison::from_sign(sign).unwrap().holds(&left, &right), expected);
    }

    #[rstest::rstest]
    #[case("")]
    #[case("v")]
    #[case("1.2.3.4")]
    #[case("01.2.3")]
    #[case("1.2.x")]
    #[case("1.2.+3")]
    #[case("1.2.3-")]
    #[case("1.2.3-01")]
    #[case("1.2.3+")]
    #[case("1..3")]
    #[case("vv1.2.3")]
    #[case("99999999999999999999999.0.0")]
    fn no_versions(#[case] text: &str) {
        assert!(Version::parse(text).is_none());
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic_and_order_is_antisymmetric(left in ".{0,20}", right in "[0-9.a-z+-]{0,12}") {
            if let (Some(left), Some(right)) = (Version::parse(&left), Version::parse(&right)) {
                prop_assert_eq!(left.order(&right), right.order(&left).reverse());
            }
        }
    }
}
