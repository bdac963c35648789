//! What it costs the operator to review flag sets that somebody made to cost much. How long it takes is printed (`cargo test --release
//! --package resilience-operator --test bounds -- --nocapture`): what is asserted is the work, by the bytes that it asks for.

#[path = "../../ticketing-workloads/flags/tests/support/mod.rs"]
mod support;

use crds::{FeatureFlag, FeatureFlagSpec};
use operator::kubernetes::guard::Guard;
use operator::spec::flags::review;
use serde_json::json;
use std::time::{Duration, Instant};
use support::{counting::bytes, hostile};

#[global_allocator]
static ALLOCATOR: support::counting::Counting = support::counting::Counting;

/// Longest message: a condition keeps 4,096 bytes.
const MOST_WORDS: usize = 4_000;

#[test]
fn the_review_of_a_hostile_document_costs_what_its_size_says_and_ends_in_a_clear_error() {
    let mut longest = (Duration::ZERO, "");
    // What a process does once, the first time, is not the document's.
    let small = json!({ "flagSpec": {"flags": {}, "$evaluators": {"a": {"$ref": "a"}}} });
    assert!(review(&serde_json::from_value(small).unwrap()).is_err());
    for (name, document) in hostile::documents().into_iter().chain(hostile::unpublished()) {
        let size = document.to_string().len();
        let spec: FeatureFlagSpec = serde_json::from_value(json!({ "flagSpec": document })).unwrap();
        let begin = Instant::now();
        let (reviewed, peak, all) = bytes(|| review(&spec));
        let took = begin.elapsed();
        let (is_valid, words) = match &reviewed {
            Ok(reviewed) => (true, reviewed.warnings.to_string()),
            Err(mistakes) => (false, mistakes.to_string()),
        };
        let shown: String = words.chars().take(60).collect();
        println!("{name:<50} {size:>7} bytes: {peak:>8} at once, {all:>9} in all, {took:>9.1?} {is_valid} {shown}");
        // What is published is a copy, and an object of one member, which has eight bytes, takes 0.6 KiB when it is parsed.
        let around = 128 * 1024;
        assert!(
            peak < 100 * size + around && all < 150 * size + around,
            "{name}: {peak} bytes at once, {all} in all, for {size}"
        );
        assert!(words.len() <= MOST_WORDS, "{name}: {} bytes", words.len());
        let in_order = hostile::IN_ORDER.contains(&name) || name == "metadata that are none";
        assert_eq!(is_valid, in_order, "{name}: {words}");
        assert!(is_valid || words.starts_with("spec."), "{name} has no path: {words}");
        longest = longest.max((took, name));
    }
    println!("the longest: {longest:?}");
}

/// What is nested deeper than parsers follow, and texts that no tree of values can hold.
#[test]
fn what_cannot_be_parsed_ends_in_a_clear_error_too() {
    let object = |rule: &str| {
        format!(
            r#"{{"metadata":{{"name":"f"}},"spec":{{"flagSpec":{{"flags":{{"f":{{"state":"ENABLED","variants":{{"a":1}},"targeting":{rule}}}}}}}}}}}"#
        )
    };
    let nested = |levels: usize| object(&format!("{}1{}", r#"{"!":"#.repeat(levels), "}".repeat(levels)));
    let cases = [
        ("10,000 levels", nested(10_000), "recursion limit"),
        ("40,000 levels", nested(40_000), "recursion limit"),
        ("a number without bounds", object(r#"{"<":[1e999,1]}"#), "number out of range"),
    ];
    for (name, text, expected) in cases {
        let begin = Instant::now();
        let (read, peak, all) = bytes(|| serde_json::from_str::<Guard<FeatureFlag>>(&text));
        println!("{name:<50} {:>7} bytes: {peak:>8} at once, {all:>9} in all, {:>9.1?}", text.len(), begin.elapsed());
        assert!(all < 20 * text.len() + 65_536, "{name}: {all} bytes for {}", text.len());
        let error = read.unwrap().0.unwrap_err().error;
        assert!(error.contains("targeting") && error.contains(expected), "{name}: {error}");
    }
    // There is no such thing in JSON, so it is no object of Kubernetes.
    assert!(serde_json::from_str::<Guard<FeatureFlag>>(&object(r#"{"<":[NaN,1]}"#)).is_err());
    // Of two members with one name the last one counts, as it does for the API server.
    let twice = object(r#"{"!":[1],"!":{"$ref":"none"}}"#);
    let read: Guard<FeatureFlag> = serde_json::from_str(&twice).unwrap();
    let error = review(&read.0.unwrap().spec).err().map(|mistakes| mistakes.to_string()).unwrap_or_default();
    assert!(error.contains("targeting.!.$ref: none is not among $evaluators"), "{error}");
}
