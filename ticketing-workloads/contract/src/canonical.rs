//! One spelling for equal JSON, and the hash over it.
//!
//! The hash must change exactly when the meaning does, whatever order a map was written in and whether a whole number
//! was spelled `1` or `1.0`, and it must be computable by a reader that does not know every field. So it is taken over
//! the JSON value, never over the bytes or over a struct.

use serde_json::{Number, Value};
use sha2::{Digest, Sha256};

/// SHA-256 of the canonical spelling, as 64 lower-case hex digits.
pub fn content_hash(value: &Value) -> String {
    let mut text = String::new();
    write_canonical(value, &mut text);
    hex(&Sha256::digest(text.as_bytes()))
}

/// Lower-case hex digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)]).collect()
}

/// Appends `value` with sorted keys, without white space and without members that are null: an absent member and a
/// null one mean the same here.
fn write_canonical(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().filter(|(_, v)| !v.is_null()).collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            out.push('{');
            for (index, (key, member)) in entries.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_canonical(member, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                write_canonical(item, out);
            }
            out.push(']');
        }
        Value::Number(number) => out.push_str(&whole(number).to_string()),
        other => out.push_str(&other.to_string()),
    }
}

/// A float that is a whole number within `i64`'s exact range becomes that integer.
#[expect(clippy::cast_possible_truncation, reason = "guarded by the range check")]
fn whole(number: &Number) -> Number {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53: every whole float up to here is one integer
    match number.as_f64() {
        Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() <= EXACT => Number::from(float as i64),
        _ => number.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[rstest::rstest]
    #[case::key_order(json!({"a": 1, "b": 2}), json!({"b": 2, "a": 1}), true)]
    #[case::whole_float(json!({"a": 1.0}), json!({"a": 1}), true)]
    #[case::null_member(json!({"a": 1, "b": null}), json!({"a": 1}), true)]
    #[case::other_value(json!({"a": 1}), json!({"a": 2}), false)]
    #[case::number_is_not_text(json!({"a": 1}), json!({"a": "1"}), false)]
    #[case::array_order_means_something(json!([1, 2]), json!([2, 1]), false)]
    #[case::null_item_counts(json!([1, null]), json!([1]), false)]
    #[case::nesting(json!({"a": {"b": 1}}), json!({"a": 1, "b": 1}), false)]
    #[case::quotes_cannot_forge_structure(json!({"a": "1\",\"b\":\"2"}), json!({"a": "1", "b": "2"}), false)]
    fn equal_meaning_equal_hash(#[case] left: Value, #[case] right: Value, #[case] equal: bool) {
        assert_eq!(content_hash(&left) == content_hash(&right), equal);
    }

    proptest! {
        #[test]
        fn hash_survives_a_round_trip_through_text(keys in proptest::collection::btree_map("[a-z]{1,6}", any::<i32>(), 0..12)) {
            let value = json!(keys);
            let again: Value = serde_json::from_str(&value.to_string()).unwrap();
            prop_assert_eq!(content_hash(&value), content_hash(&again));
        }
    }
}
