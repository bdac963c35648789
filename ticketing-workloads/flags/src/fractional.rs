//! The hash behind `fractional`, flagd's third version of it: MurmurHash3 (x86, 32 bits, seed 0) over the canonical CBOR
//! encoding of the bucketing value. `fractional_v2` is the second one, over texts as they are.
//!
//! A key of the wrong type has a place of its own that way (`1` and `"1"` are two keys, `1` and `1.0` are one), and flag
//! key and targeting key cannot run into each other. The encoding goes straight into the hash: nothing is allocated,
//! except to sort the members of an object.

use serde_json::{Number, Value};

/// Largest sum of all weights.
pub(super) const MAX_WEIGHT_SUM: u32 = i32::MAX as u32;

/// Lists and objects of a bucketing value nested deeper than this give no hash.
const MAX_DEPTH: usize = 64;

/// Place of a hash among `total` shares; below `total`.
pub(super) const fn place(hash: u32, total: u32) -> u32 {
    ((hash as u64 * total as u64) >> 32) as u32
}

/// Hash of a text.
pub(super) fn hash_text(text: &str) -> u32 {
    let mut hash = Murmur::default();
    put_text(text, &mut hash);
    hash.finish()
}

/// Hash of a list of two texts: flag key and targeting key in the shorthand.
pub(super) fn hash_pair(first: &str, second: &str) -> u32 {
    let mut hash = Murmur::default();
    put_head(LIST, 2, &mut hash);
    put_text(first, &mut hash);
    put_text(second, &mut hash);
    hash.finish()
}

/// Hash of a text in the second version.
pub(super) fn hash_plain_text(text: &str) -> u32 {
    let mut hash = Murmur::default();
    hash.put(text.as_bytes());
    hash.finish()
}

/// Hash of two texts that run into each other: flag key and targeting key in the shorthand of the second version.
pub(super) fn hash_plain_pair(first: &str, second: &str) -> u32 {
    let mut hash = Murmur::default();
    hash.put(first.as_bytes());
    hash.put(second.as_bytes());
    hash.finish()
}

/// Hash of a Boolean.
pub(super) fn hash_bool(value: bool) -> u32 {
    let mut hash = Murmur::default();
    put_bool(value, &mut hash);
    hash.finish()
}

/// Hash of a whole number.
pub(super) fn hash_integer(value: i64) -> u32 {
    let mut hash = Murmur::default();
    put_integer(value, &mut hash);
    hash.finish()
}

/// Hash of a whole number from 0 on.
pub(super) fn hash_unsigned(value: u64) -> u32 {
    let mut hash = Murmur::default();
    put_head(UNSIGNED, value, &mut hash);
    hash.finish()
}

/// Hash of a number. One without a fraction is the same as that whole number.
pub(super) fn hash_float(value: f64) -> u32 {
    let mut hash = Murmur::default();
    put_float(value, &mut hash);
    hash.finish()
}

/// Hash of anything that JSON can say; `None`: it is nested too deep.
pub(super) fn hash_json(value: &Value) -> Option<u32> {
    let mut hash = Murmur::default();
    put_json(value, &mut hash, 0)?;
    Some(hash.finish())
}

/// Where encoded bytes go.
trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

// Major types of RFC 8949, in the upper three bits of the first byte.
const UNSIGNED: u8 = 0;
const NEGATIVE: u8 = 1 << 5;
const TEXT: u8 = 3 << 5;
const LIST: u8 = 4 << 5;
const OBJECT: u8 = 5 << 5;
const SIMPLE: u8 = 7 << 5;

/// A major type with its argument, in as few bytes as hold it.
#[expect(clippy::cast_possible_truncation, reason = "each arm is guarded by its range")]
fn put_head(major: u8, argument: u64, out: &mut impl Sink) {
    match argument {
        0..24 => out.put(&[major | argument as u8]),
        24..0x100 => out.put(&[major + 24, argument as u8]),
        0x100..0x1_0000 => {
            let [high, low] = (argument as u16).to_be_bytes();
            out.put(&[major + 25, high, low]);
        }
        0x1_0000..0x1_0000_0000 => {
            out.put(&[major + 26]);
            out.put(&(argument as u32).to_be_bytes());
        }
        _ => {
            out.put(&[major + 27]);
            out.put(&argument.to_be_bytes());
        }
    }
}

fn put_text(text: &str, out: &mut impl Sink) {
    put_head(TEXT, text.len() as u64, out);
    out.put(text.as_bytes());
}

fn put_bool(value: bool, out: &mut impl Sink) {
    out.put(&[SIMPLE + 20 + u8::from(value)]);
}

fn put_integer(value: i64, out: &mut impl Sink) {
    // A negative number n is written as -1 - n, which is the complement of its bits.
    let (major, argument) = if value < 0 { (NEGATIVE, !value) } else { (UNSIGNED, value) };
    put_head(major, argument.unsigned_abs(), out);
}

/// The shortest form that keeps the value: a whole number if it is one that fits into 64 bits, else 2, 4 or 8 bytes.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "guarded by the range checks; a float that is cut is compared with what it was"
)]
fn put_float(value: f64, out: &mut impl Sink) {
    const TWO_TO_63: f64 = 9_223_372_036_854_775_808.0;
    if value.fract() == 0.0 && (-TWO_TO_63..TWO_TO_63 * 2.0).contains(&value) {
        return if value < 0.0 { put_integer(value as i64, out) } else { put_head(UNSIGNED, value as u64, out) };
    }
    let short = value as f32;
    if value.is_nan() {
        out.put(&[SIMPLE + 25, 0x7e, 0]);
    } else if f64::from(short).to_bits() != value.to_bits() {
        out.put(&[SIMPLE + 27]);
        out.put(&value.to_bits().to_be_bytes());
    } else if let Some(half) = half(short) {
        out.put(&[SIMPLE + 25]);
        out.put(&half.to_be_bytes());
    } else {
        out.put(&[SIMPLE + 26]);
        out.put(&short.to_bits().to_be_bytes());
    }
}

/// The bits of `value` as a float of 16 bits, if it keeps its value.
#[expect(clippy::cast_possible_truncation, reason = "the exponent was checked, so the result has at most 15 bits")]
fn half(value: f32) -> Option<u16> {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let (exponent, fraction) = (bits >> 23 & 0xff, bits & 0x7f_ffff);
    let (shift, magnitude) = match exponent {
        0 if fraction == 0 => return Some(sign),
        255 => return (fraction == 0).then_some(sign | 0x7c00),
        // Normal: the biases are 127 and 15.
        113..=142 => (13, (exponent - 112) << 23 | fraction),
        // Subnormal: the leading one moves into the fraction.
        103..=112 => (13 + 113 - exponent, fraction | 0x80_0000),
        _ => return None,
    };
    (magnitude.trailing_zeros() >= shift).then_some(sign | (magnitude >> shift) as u16)
}

fn put_number(number: &Number, out: &mut impl Sink) {
    if let Some(value) = number.as_i64() {
        put_integer(value, out);
    } else if let Some(value) = number.as_u64() {
        put_head(UNSIGNED, value, out);
    } else {
        put_float(number.as_f64().unwrap_or(f64::NAN), out);
    }
}

fn put_json(value: &Value, out: &mut impl Sink, depth: usize) -> Option<()> {
    if depth > MAX_DEPTH {
        return None;
    }
    match value {
        Value::Null => out.put(&[SIMPLE + 22]),
        Value::Bool(value) => put_bool(*value, out),
        Value::Number(number) => put_number(number, out),
        Value::String(text) => put_text(text, out),
        Value::Array(items) => {
            put_head(LIST, items.len() as u64, out);
            for item in items {
                put_json(item, out, depth + 1)?;
            }
        }
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(key, _)| (key.len(), key.as_str()));
            put_head(OBJECT, members.len() as u64, out);
            for (key, member) in members {
                put_text(key, out);
                put_json(member, out, depth + 1)?;
            }
        }
    }
    Some(())
}

/// MurmurHash3, x86, 32 bits, seed 0, of bytes that come in pieces.
#[derive(Default)]
struct Murmur {
    hash: u32,
    length: u32,
    /// Bytes that do not fill a block yet, the first in the lowest bits.
    rest: u32,
}

impl Murmur {
    #[inline]
    const fn scramble(block: u32) -> u32 {
        block.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593)
    }

    #[inline]
    const fn mix(hash: u32, block: u32) -> u32 {
        (hash ^ Self::scramble(block)).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
    }

    const fn finish(self) -> u32 {
        // A rest of nothing is 0, and scrambles to 0.
        let mut hash = self.hash ^ Self::scramble(self.rest) ^ self.length;
        hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
        hash ^ hash >> 16
    }
}

impl Sink for Murmur {
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the algorithm counts modulo 2^32")]
    fn put(&mut self, bytes: &[u8]) {
        // The rest of the piece before comes first in each block.
        let filled = self.length % 4 * 8;
        let (mut hash, mut rest) = (self.hash, u64::from(self.rest));
        let (blocks, tail) = bytes.as_chunks::<4>();
        for block in blocks {
            rest |= u64::from(u32::from_le_bytes(*block)) << filled;
            hash = Self::mix(hash, rest as u32);
            rest >>= 32;
        }
        let mut bits = filled;
        for byte in tail {
            rest |= u64::from(*byte) << bits;
            bits += 8;
        }
        if bits >= 32 {
            hash = Self::mix(hash, rest as u32);
            rest >>= 32;
        }
        (self.hash, self.rest) = (hash, rest as u32);
        self.length = self.length.wrapping_add(bytes.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    impl Sink for Vec<u8> {
        fn put(&mut self, bytes: &[u8]) {
            self.extend_from_slice(bytes);
        }
    }

    fn murmur(pieces: &[&[u8]]) -> u32 {
        let mut hash = Murmur::default();
        for piece in pieces {
            hash.put(piece);
        }
        hash.finish()
    }

    /// Made with the Python package mmh3 5.3.1.
    #[rstest::rstest]
    #[case(b"", 0)]
    #[case(b"a", 0x3c25_69b2)]
    #[case(b"ab", 0x9bbf_d75f)]
    #[case(b"abc", 0xb3dd_93fa)]
    #[case(b"abcd", 0x43ed_676a)]
    #[case(b"Hello, world!", 0xc036_3e43)]
    fn the_hash_is_murmur3(#[case] bytes: &[u8], #[case] expected: u32) {
        assert_eq!(murmur(&[bytes]), expected);
    }

    /// Made with the Python package cbor2 5.9.0 (canonical) after flagd's normalisation of numbers.
    #[rstest::rstest]
    #[case("null", "f6")]
    #[case("true", "f5")]
    #[case("false", "f4")]
    #[case("0", "00")]
    #[case("-0.0", "00")]
    #[case("23", "17")]
    #[case("24", "1818")]
    #[case("255", "18ff")]
    #[case("256", "190100")]
    #[case("65536", "1a00010000")]
    #[case("4294967296", "1b0000000100000000")]
    #[case("9223372036854775807", "1b7fffffffffffffff")]
    #[case("18446744073709551615", "1bffffffffffffffff")]
    #[case("-1", "20")]
    #[case("-24", "37")]
    #[case("-25", "3818")]
    #[case("-257", "390100")]
    #[case("-9223372036854775808", "3b7fffffffffffffff")]
    #[case("1.0", "01")]
    #[case("-3.0", "22")]
    #[case("1e+18", "1b0de0b6b3a7640000")]
    #[case("1.8446744073709552e+19", "fa5f800000")]
    #[case("1e+300", "fb7e37e43c8800759c")]
    #[case("0.5", "f93800")]
    #[case("-0.5", "f9b800")]
    #[case("1.5", "f93e00")]
    #[case("0.1", "fb3fb999999999999a")]
    #[case("65503.5", "fa477fdf80")]
    #[case("6.103515625e-05", "f90400")]
    #[case("3.0517578125e-05", "f90200")]
    #[case("3.05473804473877e-05", "fb3f00040000000001")]
    #[case("1.1754943508222875e-38", "fa00800000")]
    #[case("5e-324", "fb0000000000000001")]
    #[case("100000.5", "fa47c35040")]
    #[case("16777217.5", "fb4170000018000000")]
    #[case(r#""""#, "60")]
    #[case(r#""a""#, "6161")]
    #[case(r#""0123456789012345678901234567""#, "781c30313233343536373839303132333435363738393031323334353637")]
    #[case(r#""ü水𐅑""#, "69c3bce6b0b4f0908591")]
    #[case("[]", "80")]
    #[case("[1, [2.0, 3]]", "8201820203")]
    #[case("{}", "a0")]
    #[case(r#"{"bb": 1, "a": [2], "c": {"z": null}}"#, "a3616181026163a1617af662626201")]
    fn the_encoding_is_canonical(#[case] value: &str, #[case] expected: &str) {
        let value: Value = serde_json::from_str(value).unwrap();
        let mut bytes = Vec::new();
        put_json(&value, &mut bytes, 0).unwrap();
        assert_eq!(contract::canonical::hex(&bytes), expected);
    }

    /// As above; serde_json would read these a last digit off.
    #[rstest::rstest]
    #[case(f64::from(f32::MAX), "fa7f7fffff")]
    #[case(f64::from(f32::MIN_POSITIVE), "fa00800000")]
    #[case(1.0 / 16_777_216.0, "f90001")]
    #[case(f64::INFINITY, "f97c00")]
    #[case(f64::NEG_INFINITY, "f9fc00")]
    #[case(f64::NAN, "f97e00")]
    fn floats_are_as_short_as_can_be(#[case] value: f64, #[case] expected: &str) {
        let mut bytes = Vec::new();
        put_float(value, &mut bytes);
        assert_eq!(contract::canonical::hex(&bytes), expected);
    }

    #[test]
    fn what_is_nested_too_deep_has_no_hash() {
        let deep = (0..=MAX_DEPTH).fold(json!(1), |inner, _| json!([inner]));
        assert_eq!(hash_json(&deep), None);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(bytes: Vec<u8>, cuts in proptest::collection::vec(0_usize..64, 0..6)) {
            let (mut rest, mut pieces) = (&bytes[..], Vec::new());
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            prop_assert_eq!(murmur(&pieces), murmur(&[&bytes]));
        }

        #[test]
        fn a_place_is_among_the_shares(hash: u32, total in 1..=MAX_WEIGHT_SUM) {
            prop_assert!(place(hash, total) < total);
        }

        #[test]
        fn the_ways_in_agree(text: String, number: i64, float: f64, bool: bool) {
            prop_assert_eq!(Some(hash_text(&text)), hash_json(&json!(text)));
            prop_assert_eq!(Some(hash_integer(number)), hash_json(&json!(number)));
            prop_assert_eq!(Some(hash_unsigned(number.unsigned_abs())), hash_json(&json!(number.unsigned_abs())));
            prop_assert_eq!(Some(hash_bool(bool)), hash_json(&json!(bool)));
            prop_assert_eq!(Some(hash_pair(&text, "key")), hash_json(&json!([text, "key"])));
            if float.is_finite() {
                prop_assert_eq!(Some(hash_float(float)), hash_json(&json!(float)));
            }
        }
    }
}
