//! What documents and contexts cost that somebody made to cost much: memory by the bytes that are allocated at most at once. How long
//! it takes is printed (`cargo test --release --package flags --test bounds -- --nocapture`): what is asserted is the work.

use flags::targeting::{Evaluators, Request, Rule};
use flags::{Attribute, Context, FlagSet};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

mod support;

use support::counting::bytes;
use support::hostile;

#[global_allocator]
static ALLOCATOR: support::counting::Counting = support::counting::Counting;

/// Most bytes of one evaluation.
const MOST: usize = 1024 * 1024;

fn ones(count: usize) -> Value {
    Value::from(vec![1; count])
}

/// `first`, to which `step` is applied so many times; it has its last value as `accumulator`.
fn times(count: usize, step: &Value, first: &Value) -> Value {
    json!({"reduce": [ones(count), step, first]})
}

fn doubled(operator: &str) -> Value {
    json!({ operator: [{"var": "accumulator"}, {"var": "accumulator"}] })
}

/// `work` for each of so many items.
fn for_each(count: usize, work: &Value) -> Value {
    json!({"all": [ones(count), {"or": [work, true]}]})
}

/// Rules that somebody made to cost much.
fn rules() -> Vec<(&'static str, Value)> {
    let var = |name: &str| json!({ "var": name });
    let long = times(15, &doubled("cat"), &json!("x".repeat(64)));
    let long_path = vec!["a"; 8_192].join(".");
    let each = |work: Value| for_each(9_000, &work);
    // Inside of `all`, an item is looked into: what is long is made anew for each, or stands in the rule.
    let pairs = |count| Value::from(vec![json!(["x", "x".repeat(100)]); count]);
    vec![
        (
            "a text of 2 MiB in 8,192 places as a version",
            json!({"sem_ver": [times(13, &doubled("merge"), &json!([long])), "=", "1"]}),
        ),
        (
            "a list in lists as a version",
            json!({"sem_ver": [times(40, &json!([var("accumulator"), var("accumulator")]), &long), "=", "1"]}),
        ),
        ("a text that doubles", json!({"cat": times(40, &doubled("cat"), &json!("text"))})),
        ("a list that doubles", json!({"in": ["x", times(40, &doubled("merge"), &json!([1, 2]))]})),
        ("a long path for each of many", each(var(&vec!["a"; 900].join(".")))),
        ("a long path that is computed for each of many", each(json!({"var": {"cat": [long_path, "a"]}}))),
        ("a long path that is missing for each of many", each(json!({"missing": [long_path]}))),
        ("a long text as a number for each of many", each(json!({"+": ["1".repeat(20_000)]}))),
        ("a long text as a broken number for each of many", each(json!({"<": ["1".repeat(20_000), 1]}))),
        ("a long text compared with a number for each of many", each(json!({"==": ["1".repeat(20_000), 1]}))),
        ("a long text hashed for each of many", each(json!({"fractional": ["x".repeat(20_000), ["a", 1]]}))),
        ("long texts compared for each of many", each(json!({"==": ["x".repeat(20_000), "x".repeat(20_000)]}))),
        ("long texts ordered for each of many", each(json!({"<": ["x".repeat(20_000), "x".repeat(20_000)]}))),
        ("a long text searched for each of many", each(json!({"in": ["x".repeat(500) + "y", "x".repeat(20_000)]}))),
        ("a part of a long text for each of many", each(json!({"substr": ["ü".repeat(20_000), -9]}))),
        ("lists compared for each of many", each(json!({"===": [pairs(100), pairs(100)]}))),
        ("lists compared with a text for each of many", each(json!({"==": [pairs(100), "x"]}))),
        ("a list in a list for each of many", each(json!({"in": [["x", "y"], pairs(100)]}))),
        (
            "a text among texts of its length for each of many",
            each(json!({"in": ["x".repeat(2_000), vec!["x".repeat(1_999) + "y"; 20]]})),
        ),
        (
            "a version for each of many",
            each(json!({"sem_ver": [format!("1.0.0-{}", "1.".repeat(5_000) + "1"), "=", "1"]})),
        ),
        ("lists merged for each of many", each(json!({"merge": [ones(400), ones(400)]}))),
        ("a map of maps", json!({"map": [ones(3_000), {"map": [ones(3_000), {"map": [ones(1_000), 1]}]}]})),
        ("a long text of the caller as a number", json!({"+": [var("text"), 1]})),
        ("a long text of the caller, spelled", json!({"cat": [var("text"), var("text")]})),
        ("a long text of the caller, cut", json!({"substr": [var("text"), 0, -1]})),
        ("a long text of the caller, hashed", json!({"fractional": [var("text"), ["a", 1]]})),
        ("an object of the caller, hashed", json!({"fractional": [var("object"), ["a", 1]]})),
        ("an object of the caller, compared", json!({"==": [var("object"), var("object")]})),
        ("a deep list of the caller, spelled", json!({"cat": [var("deep")]})),
        ("a deep list of the caller, compared", json!({"===": [var("deep"), var("deep")]})),
        ("a long list of the caller, mapped", json!({"map": [var("list"), {"cat": [var(""), "x"]}]})),
        ("a long list of the caller in itself", json!({"all": [var("list"), {"in": [var(""), vec![0; 9_000]]}]})),
        ("names of the caller that are missing", json!({"missing": [var("texts")]})),
    ]
}

/// A context that somebody made to cost much.
fn context() -> Map<String, Value> {
    let object: Map<_, _> = (0..20_000).map(|nth| (format!("{nth}{}", "n".repeat(40)), json!([nth]))).collect();
    let deep = (0..120).fold(json!(["x".repeat(1_000)]), |inner, _| json!([inner, 1]));
    let mut all = Map::new();
    all.insert("text".into(), json!("1".repeat(1_000_000)));
    all.insert("texts".into(), json!(vec!["a.a.a.a.a.a.a.a.a.a".repeat(500); 200]));
    all.insert("object".into(), object.into());
    all.insert("list".into(), ones(100_000));
    all.insert("deep".into(), deep);
    all.extend((0..2_000).map(|nth| (format!("attribute-{nth}"), json!(nth))));
    all
}

#[test]
fn an_evaluation_has_bounds_whatever_it_is_about() {
    let context = context();
    let attributes: Vec<_> = context.iter().map(|(name, value)| (name.as_str(), Attribute::Json(value))).collect();
    let mut longest = (Duration::ZERO, "");
    for (name, rule) in rules() {
        let rule = Rule::compile(&rule, &Evaluators::default()).unwrap().unwrap();
        let request = Request { flag_key: "f", now_ms: 0, context: Context::new(&attributes).with_key("k") };
        let begin = Instant::now();
        let (answer, peak, _) = bytes(|| rule.evaluate(&request).map(|_| ()));
        let took = begin.elapsed();
        println!("{name:<55} {peak:>9} bytes {took:>12.1?} {answer:?}");
        assert!(peak <= MOST, "{name}: {peak} bytes");
        longest = longest.max((took, name));
    }
    println!("the longest: {longest:?}");
}

fn flags_of(evaluators: &Value, count: usize, rule: &Value) -> Value {
    let flag = json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "targeting": rule});
    let flags: Map<_, _> = (0..count).map(|nth| (format!("flag-{nth}"), flag.clone())).collect();
    json!({"flags": flags, "evaluators": evaluators})
}

/// Each flag refers to shared rules; the more of them, the less it costs to copy none.
#[test]
fn what_is_shared_is_there_once() {
    let list: Vec<_> = (0..2_000).map(|nth| format!("somebody-{nth}@example.com")).collect();
    let listed = flags_of(&json!({"staff": {"in": [{"var": "email"}, list]}}), 500, &json!({"$ref": "staff"}));
    let doubling = |nth: usize| {
        let before = json!({ "$ref": format!("r{}", nth - 1) });
        json!({"and": [before, before]})
    };
    let mut doubled: BTreeMap<_, _> = (1..12).map(|nth| (format!("r{nth}"), doubling(nth))).collect();
    doubled.insert("r0".into(), json!("x".repeat(65_000)));
    let doubled = flags_of(&json!(doubled), 100, &json!({"$ref": "r11"}));
    for (name, settings) in [("a list", listed), ("a text that is doubled", doubled)] {
        let size = settings.to_string().len();
        let settings = serde_json::from_value(settings).unwrap();
        let begin = Instant::now();
        let (set, peak, _) = bytes(|| FlagSet::compile(settings));
        println!("{name}: {size} bytes, and {peak} more while it is compiled, in {:.1?}", begin.elapsed());
        assert!(peak < 4 * size, "{name}: {peak} bytes for {size}");
        assert!(set.find("flag-7").unwrap().rule_error().is_none());
    }
}

/// What a pod does with a document that somebody made to cost much: it is refused rule by rule, for work that follows from its size.
#[test]
fn a_hostile_document_costs_a_pod_what_its_size_says() {
    let mut longest = (Duration::ZERO, "");
    for (name, document) in hostile::documents() {
        let size = document.to_string().len();
        let none = json!({});
        let evaluators = document.get("$evaluators").unwrap_or(&none);
        let settings = serde_json::from_value(json!({"flags": document["flags"], "evaluators": evaluators})).unwrap();
        let begin = Instant::now();
        let (set, peak, all) = bytes(|| FlagSet::compile(settings));
        let took = begin.elapsed();
        let wrong = set.iter().filter(|(_, flag)| flag.rule_error().is_some()).count();
        println!("{name:<50} {size:>7} bytes: {peak:>8} at once, {all:>9} in all, {took:>9.1?}, {wrong} wrong");
        assert!(
            peak < 32 * size + 131_072 && all < 64 * size + 131_072,
            "{name}: {peak} bytes at once, {all} in all, for {size}"
        );
        // What is of no use is let pass in a pod, so not all others are wrong there.
        assert!(wrong == 0 || !hostile::IN_ORDER.contains(&name), "{name}");
        longest = longest.max((took, name));
    }
    println!("the longest: {longest:?}");
}
