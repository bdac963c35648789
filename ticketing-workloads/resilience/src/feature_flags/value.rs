//! Values of flags as code asks for them.

use contract::flags::MAX_NUMBER;
use serde_json::{Map, Value};

/// The type that code asks a flag for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// On or off.
    Boolean,
    /// A whole number.
    Integer,
    /// Any number.
    Float,
    /// A text.
    Text,
    /// A JSON object.
    Object,
}

impl ValueType {
    /// What it is called in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Boolean => "a boolean",
            Self::Integer => "an integer",
            Self::Float => "a number",
            Self::Text => "a string",
            Self::Object => "an object",
        }
    }

    /// Whether `value` is of this type, or becomes it without a loss.
    pub fn fits(self, value: &Value) -> bool {
        match self {
            Self::Boolean => value.is_boolean(),
            Self::Integer => i64::read(value).is_some(),
            Self::Float => f64::read(value).is_some(),
            Self::Text => value.is_string(),
            Self::Object => value.is_object(),
        }
    }
}

/// What `value` is called in messages.
pub fn description(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) if f64::read(value).is_none() => "a number beyond 2^53 - 1",
        Value::Number(_) if i64::read(value).is_none() => "a number with a fraction",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value that code can ask a flag for.
///
/// Numbers become each other only if nothing is lost on it, as flagd's decision on numeric coercion has it: `10.0` is an integer,
/// `3.14` is none.
pub trait FlagValue: Sized {
    /// Its type.
    const TYPE: ValueType;

    /// `value` as this; `None`: it is of another type.
    fn read(value: &Value) -> Option<Self>;
}

impl FlagValue for bool {
    const TYPE: ValueType = ValueType::Boolean;

    #[inline]
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl FlagValue for i64 {
    const TYPE: ValueType = ValueType::Integer;

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "guarded by the checks of fraction and range")]
    fn read(value: &Value) -> Option<Self> {
        match value.as_i64() {
            Some(whole) => (whole.unsigned_abs() <= MAX_NUMBER).then_some(whole),
            None => f64::read(value).filter(|float| float.fract() == 0.0).map(|float| float as Self),
        }
    }
}

impl FlagValue for f64 {
    const TYPE: ValueType = ValueType::Float;

    #[inline]
    #[expect(clippy::cast_precision_loss, reason = "it has so many digits that a float has them all")]
    fn read(value: &Value) -> Option<Self> {
        value.as_f64().filter(|float| float.abs() <= MAX_NUMBER as Self)
    }
}

impl FlagValue for String {
    const TYPE: ValueType = ValueType::Text;

    #[inline]
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl FlagValue for Map<String, Value> {
    const TYPE: ValueType = ValueType::Object;

    #[inline]
    fn read(value: &Value) -> Option<Self> {
        value.as_object().cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// flagd's table, for accessors of 64 bits.
    #[rstest::rstest]
    #[case::whole("10", Some(10), Some(10.0))]
    #[case::whole_as_a_float("10.0", Some(10), Some(10.0))]
    #[case::fraction("2.75", None, Some(2.75))]
    #[case::more_than_32_bits("9000000000", Some(9_000_000_000), Some(9_000_000_000.0))]
    #[case::the_largest("9007199254740991", Some(9_007_199_254_740_991), Some(9_007_199_254_740_991.0))]
    #[case::the_smallest("-9007199254740991", Some(-9_007_199_254_740_991), Some(-9_007_199_254_740_991.0))]
    #[case::the_largest_as_a_float("9007199254740991.0", Some(9_007_199_254_740_991), Some(9_007_199_254_740_991.0))]
    #[case::one_more("9007199254740992", None, None)]
    #[case::one_more_as_a_float("9007199254740992.0", None, None)]
    #[case::one_less("-9007199254740992", None, None)]
    #[case::beyond_64_bits("18446744073709551615", None, None)]
    #[case::lowest("-9223372036854775808", None, None)]
    #[case::huge("1e300", None, None)]
    #[case::a_text("\"10\"", None, None)]
    #[case::a_boolean("true", None, None)]
    #[case::nothing("null", None, None)]
    fn numbers(#[case] value: &str, #[case] integer: Option<i64>, #[case] float: Option<f64>) {
        let value: Value = serde_json::from_str(value).unwrap();
        assert_eq!((i64::read(&value), f64::read(&value)), (integer, float));
        assert_eq!(ValueType::Integer.fits(&value), integer.is_some());
        assert_eq!(ValueType::Float.fits(&value), float.is_some());
    }

    #[rstest::rstest]
    #[case(json!(true), ValueType::Boolean, "a boolean")]
    #[case(json!(7), ValueType::Integer, "an integer")]
    #[case(json!(7.5), ValueType::Float, "a number with a fraction")]
    #[case(json!("true"), ValueType::Text, "a string")]
    #[case(json!({"a": 1}), ValueType::Object, "an object")]
    fn a_value_is_of_its_own_type(#[case] value: Value, #[case] fits: ValueType, #[case] described: &str) {
        let types = [ValueType::Boolean, ValueType::Integer, ValueType::Float, ValueType::Text, ValueType::Object];
        for one in types {
            let is_wider = fits == ValueType::Integer && one == ValueType::Float;
            assert_eq!(one.fits(&value), one == fits || is_wider, "{one:?}");
        }
        assert_eq!(description(&value), described);
    }

    #[rstest::rstest]
    #[case(json!(null), "null")]
    #[case(json!([1]), "a list")]
    #[case(json!(1e300), "a number beyond 2^53 - 1")]
    fn what_fits_nothing_has_a_name(#[case] value: Value, #[case] described: &str) {
        assert_eq!(description(&value), described);
    }
}
