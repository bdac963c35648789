//! Small value types that cannot hold what the API does not allow.

pub use contract::duration::spell;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{borrow::Cow, fmt, str::FromStr};

/// Why a value was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not of the grammar of GEP-2257.
    #[error(
        "{0:?} is not a duration: write one to four numbers of at most five digits, each with h, m, s or ms, as in 1m30s or 500ms"
    )]
    DurationGrammar(String),
    /// Outside the field's bounds.
    #[error("{value} is out of bounds: it must be between {min} and {max}")]
    DurationBounds {
        /// What was given.
        value: String,
        /// Smallest allowed.
        min: String,
        /// Largest allowed.
        max: String,
    },
    /// Not a size.
    #[error(
        "{0:?} is not a size: write a whole number of bytes, or one with Ki, Mi, Gi, Ti, k, M, G or T, as in 512Mi"
    )]
    Size(String),
    /// Neither a count nor a percentage.
    #[error("{0:?} is neither a whole number from 0 to 1000 nor a percentage from 0% to 100%")]
    IntOrPercent(String),
}

/// A duration between `MIN` and `MAX` milliseconds, written as GEP-2257 does: `500ms`, `10s`, `1m30s`.
///
/// Parsing is total: whatever the text, the answer is a duration within bounds or an error, never a panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Duration<MIN, MAX> {
    /// A duration of `millis`, brought into the bounds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(if millis < MIN {
            MIN
        } else if millis > MAX {
            MAX
        } else {
            millis
        })
    }

    /// Whole milliseconds.
    pub const fn millis(self) -> u64 {
        self.0
    }
}

impl<const MIN: u64, const MAX: u64> From<Duration<MIN, MAX>> for std::time::Duration {
    fn from(value: Duration<MIN, MAX>) -> Self {
        Self::from_millis(value.0)
    }
}

impl<const MIN: u64, const MAX: u64> FromStr for Duration<MIN, MAX> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let millis = parse_millis(text).ok_or_else(|| ValueError::DurationGrammar(text.chars().take(40).collect()))?;
        if (MIN..=MAX).contains(&millis) {
            Ok(Self(millis))
        } else {
            Err(ValueError::DurationBounds { value: text.to_owned(), min: spell(MIN), max: spell(MAX) })
        }
    }
}

/// Grammar of GEP-2257: `([0-9]{1,5}(h|m|s|ms)){1,4}`. Four parts of five digits stay far below `u64::MAX`.
fn parse_millis(text: &str) -> Option<u64> {
    let mut rest = text;
    let mut total = 0;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        parts += 1;
        if !(1..=5).contains(&digits) || parts > 4 {
            return None;
        }
        let (number, tail) = rest.split_at(digits);
        let (unit, tail) = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)]
            .into_iter()
            .find_map(|(unit, millis)| tail.strip_prefix(unit).map(|tail| (millis, tail)))?;
        total += number.parse::<u64>().ok()? * unit;
        rest = tail;
    }
    (parts > 0).then_some(total)
}

impl<const MIN: u64, const MAX: u64> fmt::Display for Duration<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&spell(self.0))
    }
}

impl<const MIN: u64, const MAX: u64> Serialize for Duration<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Duration<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl<const MIN: u64, const MAX: u64> JsonSchema for Duration<MIN, MAX> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let (min, max) = (spell(MIN), spell(MAX));
        json_schema!({
            "type": "string",
            "maxLength": 28,
            "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$",
            "x-kubernetes-validations": [{
                // A text that is no duration is left to the pattern, which says so better than a failed conversion.
                "rule": format!(
                    "!self.matches('^([0-9]{{1,5}}(h|m|s|ms)){{1,4}}$') || (duration(self) >= duration('{min}') && duration(self) <= duration('{max}'))"
                ),
                "message": format!("must be between {min} and {max}"),
                "reason": "FieldValueInvalid",
            }],
        })
    }
}

/// A number of bytes, written as Kubernetes quantities are: `1Gi`, `512Mi`, `1000000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

const SIZE_UNITS: [(&str, u64); 8] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

impl FromStr for ByteSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (number, unit) = SIZE_UNITS
            .iter()
            .find_map(|(unit, size)| text.strip_suffix(unit).map(|number| (number, *size)))
            .unwrap_or((text, 1));
        let well_formed = (1..=12).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
        number
            .parse::<u64>()
            .ok()
            .filter(|number| well_formed && *number > 0)
            .and_then(|number| number.checked_mul(unit))
            .map(Self)
            .ok_or_else(|| ValueError::Size(text.chars().take(40).collect()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SIZE_UNITS[..4].iter().rev().find(|(_, size)| self.0 >= *size && self.0.is_multiple_of(*size));
        match binary {
            Some((unit, size)) => write!(f, "{}{unit}", self.0 / size),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for ByteSize {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "maxLength": 14, "pattern": "^0*[1-9][0-9]{0,11}(Ki|Mi|Gi|Ti|k|M|G|T)?$" })
    }
}

/// A count, or a share of a whole such as `50%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IntOrPercent {
    /// That many.
    Count(u32),
    /// That share.
    Percent(u32),
}

impl TryFrom<IntOrString> for IntOrPercent {
    type Error = ValueError;

    fn try_from(value: IntOrString) -> Result<Self, ValueError> {
        match value {
            IntOrString::Int(count) => u32::try_from(count)
                .ok()
                .filter(|count| *count <= 1000)
                .map(Self::Count)
                .ok_or_else(|| ValueError::IntOrPercent(count.to_string())),
            IntOrString::String(text) => text
                .strip_suffix('%')
                .filter(|digits| (1..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .filter(|percent| *percent <= 100)
                .map(Self::Percent)
                .ok_or_else(|| ValueError::IntOrPercent(text.chars().take(40).collect())),
        }
    }
}

impl Serialize for IntOrPercent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => serializer.serialize_u32(*count),
            Self::Percent(percent) => serializer.collect_str(&format_args!("{percent}%")),
        }
    }
}

impl<'de> Deserialize<'de> for IntOrPercent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IntOrString::deserialize(deserializer)?.try_into().map_err(de::Error::custom)
    }
}

impl JsonSchema for IntOrPercent {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "IntOrPercent".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "minimum": 0,
            "maximum": 1000,
            "maxLength": 4,
            "pattern": "^(100|[0-9]{1,2})%$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    type Wide = Duration<0, { u64::MAX }>;

    #[rstest]
    #[case("500ms", 500)]
    #[case("1m30s", 90_000)]
    #[case("1h", 3_600_000)]
    #[case("0s", 0)]
    #[case("1s1s1s1s", 4_000)]
    #[case("99999h99999h99999h99999h", 4 * 99_999 * 3_600_000)]
    fn durations(#[case] text: &str, #[case] millis: u64) {
        assert_eq!(text.parse::<Wide>().unwrap().millis(), millis);
    }

    #[rstest]
    #[case("")]
    #[case("10")]
    #[case("s")]
    #[case("-1s")]
    #[case("1.5s")]
    #[case("1 s")]
    #[case("1S")]
    #[case("1us")]
    #[case("1d")]
    #[case("100000s")]
    #[case("1s1s1s1s1s")]
    #[case("99999999999999999999h")]
    #[case("1m٣s")]
    fn not_durations(#[case] text: &str) {
        assert_eq!(text.parse::<Wide>(), Err(ValueError::DurationGrammar(text.to_owned())));
    }

    #[test]
    fn bounds_are_named_in_the_error() {
        let error = "2h".parse::<Duration<1_000, 3_600_000>>().unwrap_err();
        assert_eq!(error.to_string(), "2h is out of bounds: it must be between 1s and 1h");
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,40}") {
            let _ = text.parse::<Wide>();
            let _ = text.parse::<ByteSize>();
            let _ = IntOrPercent::try_from(IntOrString::String(text));
        }

        #[test]
        fn what_is_spelled_is_read_back(millis in 0..99_999u64 * 3_600_000) {
            prop_assert_eq!(spell(millis).parse::<Wide>().unwrap().millis(), millis);
        }
    }

    #[rstest]
    #[case("1Gi", Some(1 << 30))]
    #[case("512Mi", Some(512 << 20))]
    #[case("1000000", Some(1_000_000))]
    #[case("1k", Some(1_000))]
    #[case("0", None)]
    #[case("1.5Gi", None)]
    #[case("+1", None)]
    #[case("999999999999Ti", None)]
    #[case("", None)]
    fn sizes(#[case] text: &str, #[case] bytes: Option<u64>) {
        assert_eq!(text.parse::<ByteSize>().ok().map(ByteSize::bytes), bytes);
    }

    #[rstest]
    #[case(IntOrString::String("50%".into()), Some(IntOrPercent::Percent(50)))]
    #[case(IntOrString::String("101%".into()), None)]
    #[case(IntOrString::String("%".into()), None)]
    #[case(IntOrString::String("+5%".into()), None)]
    #[case(IntOrString::Int(3), Some(IntOrPercent::Count(3)))]
    #[case(IntOrString::Int(-1), None)]
    fn counts_and_shares(#[case] given: IntOrString, #[case] expected: Option<IntOrPercent>) {
        assert_eq!(IntOrPercent::try_from(given).ok(), expected);
    }
}
