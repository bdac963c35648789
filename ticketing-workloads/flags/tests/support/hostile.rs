//! Documents of flagd that somebody made to cost much, each near the 256 KiB that one may have.

use serde_json::{Map, Value, json};

/// Those in which nothing is wrong by itself: there is only much of it.
pub const IN_ORDER: [&str; 6] = [
    "answers that all flags share",
    "references that all flags share",
    "thousands of rules",
    "long lists",
    "lists in lists",
    "objects in objects",
];

/// With something around it.
const SIZE: usize = 240 * 1024;

fn object(members: impl IntoIterator<Item = (String, Value)>) -> Value {
    Value::Object(members.into_iter().collect::<Map<_, _>>())
}

fn flag(rule: &Value) -> Value {
    json!({"state": "ENABLED", "variants": {"a": 1}, "targeting": rule})
}

/// So many flags with one rule.
fn flags(count: usize, rule: &Value) -> Value {
    object((0..count).map(|nth| (format!("f{nth}"), flag(rule))))
}

fn reference(name: impl std::fmt::Display) -> Value {
    json!({ "$ref": name.to_string() })
}

fn repeated(part: &Value, bytes: usize) -> Value {
    vec![part.clone(); bytes / (part.to_string().len() + 1)].into()
}

/// `inner` in so many lists.
fn in_lists(levels: usize, inner: Value) -> Value {
    (0..levels).fold(inner, |inner, _| json!([inner]))
}

/// Flags that share as much as fits beside them.
fn shared_by_all(rule: &Value) -> Value {
    json!({"flags": flags(500, &reference("s")), "$evaluators": {"s": rule}})
}

/// The documents: what each is about, and itself.
pub fn documents() -> Vec<(&'static str, Value)> {
    let alone = |rule: Value| json!({"flags": {"f": flag(&rule)}});
    let split = |rule: fn(usize) -> Value, count: usize, bytes: usize| {
        object((0..count).map(|nth| (format!("f{nth}"), flag(&rule(bytes / count)))))
    };
    // Each refers to the next, and back to the first, the one before and itself.
    let circle = object((0..2_600).map(|nth: usize| {
        let back = [0, 0, nth / 2, nth].map(|nth| reference(format!("r{nth}")));
        let next = reference(format!("r{}", (nth + 1) % 2_600));
        (format!("r{nth}"), json!({"and": [next, back[0], back[1], back[2], back[3]]}))
    }));
    let hub = json!({"if": (0..4_000).flat_map(|nth| [json!(1), reference(format!("e{nth}"))]).collect::<Vec<_>>()});
    let mut leaves: Map<_, _> = (0..4_000).map(|nth| (format!("e{nth}"), json!("a"))).collect();
    leaves.insert("s".into(), hub);
    let answers: Vec<_> = (0..4_990).flat_map(|_| [json!(1), json!("a")]).collect();
    let answers = json!({ "if": answers });
    vec![
        ("references in circles", json!({"flags": flags(100, &reference("r7")), "$evaluators": circle})),
        (
            "references to nothing",
            json!({"flags": split(|bytes| json!({"or": repeated(&reference("none"), bytes)}), 30, SIZE)}),
        ),
        (
            "references to what is wrong",
            json!({
                "flags": split(|bytes| json!({"or": repeated(&reference("w"), bytes)}), 30, SIZE),
                "$evaluators": {"w": {"no such": [1]}},
            }),
        ),
        ("100 levels", alone((0..100).fold(json!("a"), |inner, _| json!({"!": inner})))),
        (
            "operators that are none",
            json!({"flags": split(|bytes| json!({"or": repeated(&json!({"w": 1}), bytes)}), 40, SIZE)}),
        ),
        ("operators that are none, in one rule", alone(json!({"or": repeated(&json!({"w": 1}), SIZE)}))),
        (
            "operators that are none, deep and long",
            json!({"flags": split(
                |bytes| (0..30).fold(json!({"or": repeated(&json!({"w": 1}), bytes / 2)}), |inner, _| json!({"n".repeat(60): inner})),
                40,
                SIZE,
            )}),
        ),
        (
            "operators that are none, in shared rules",
            json!({
                "flags": flags(1, &reference("r0")),
                "$evaluators": object((0..2_000).map(|nth| (format!("r{nth}"), json!({"or": vec![json!({"w": 1}); 12]})))),
            }),
        ),
        (
            "weights that are none",
            json!({"flags": split(
                |bytes| json!({"fractional": repeated(&json!(["a", 1e300]), bytes)}), 30, SIZE,
            )}),
        ),
        (
            "weights that are too much",
            json!({"flags": split(
                |bytes| json!({"fractional": repeated(&json!(["a", 2_147_483_647]), bytes)}), 30, SIZE,
            )}),
        ),
        (
            "versions that are none",
            json!({"flags": split(
                |bytes| json!({"or": repeated(&json!({"sem_ver": ["x", "=", "y"]}), bytes)}), 30, SIZE,
            )}),
        ),
        ("one long version", alone(json!({"sem_ver": ["1.".repeat(SIZE / 2), "=", "1"]}))),
        ("one long path", alone(json!({"var": "a.".repeat(SIZE / 2)}))),
        ("one long name", alone(json!({"n".repeat(SIZE - 1_000): 1}))),
        (
            "answers that are no variants",
            json!({"flags": split(
                |bytes| json!({"if": repeated(&json!("w"), bytes)}), 30, SIZE,
            )}),
        ),
        ("answers that all flags share", shared_by_all(&answers)),
        ("references that all flags share", json!({"flags": flags(500, &reference("s")), "$evaluators": leaves})),
        (
            "thousands of rules",
            json!({
                "flags": flags(300, &reference("r9")),
                "$evaluators": object((0..5_500).map(|nth| (format!("r{nth}"), json!({"!": {"var": "a"}})))),
            }),
        ),
        (
            "long lists",
            json!({"flags": split(|bytes| json!({"in": [{"var": "a"}, repeated(&json!(1), bytes)]}), 20, SIZE / 2)}),
        ),
        (
            "lists in lists",
            json!({"flags": split(
                |bytes| json!({"in": [{"var": "a"}, in_lists(55, repeated(&json!("x"), bytes))]}), 20, SIZE / 2,
            )}),
        ),
        (
            "objects in objects",
            json!({"flags": object((0..400).map(|nth| (format!("f{nth}"), json!({
                "state": "ENABLED", "variants": {"a": (0..60).fold(json!({}), |inner, _| json!({"o": inner}))},
            }))))}),
        ),
    ]
}

/// Documents in which what is not published is hostile.
#[allow(dead_code, reason = "not each test that has this file needs them")]
pub fn unpublished() -> Vec<(&'static str, Value)> {
    let many = |value: &Value, count: usize| object((0..count).map(|nth| (format!("{nth}"), value.clone())));
    vec![
        ("metadata that are none", json!({"flags": {}, "metadata": many(&json!([]), 20_000)})),
        (
            "variants of many kinds",
            json!({"flags": {"f": {"state": "ENABLED", "valueType": "boolean", "variants": many(&json!(1), 22_000)}}}),
        ),
        (
            "variants without names",
            json!({"flags": {"f": {"state": "ENABLED", "variants": object(
                (0..20_000).map(|nth| (format!("\n{nth}"), json!(1))),
            )}}}),
        ),
        (
            "numbers beyond all digits",
            json!({"flags": {"f": {"state": "ENABLED", "variants": many(&json!(1e300), 15_000)}}}),
        ),
        (
            "overrides of nothing",
            json!({"flags": many(&json!({"state": "ENABLED", "variants": {}, "defaultVariant": "w"}), 500)}),
        ),
    ]
}
