//! What is generated is what the types say, and what the types say is documented and bounded.

#![allow(missing_docs, reason = "a test")]

use crds::manifests;
use serde_json::{Map, Value};
use std::path::Path;

/// Fields without a bound of their own, each with its reason. `[]` stands for the items of a list, `{}` for the values
/// of a map.
const UNBOUNDED: [(&str, &str); 0] = [];

/// Checkout that this test was built from.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn the_manifests_are_what_the_types_say() {
    let files = manifests::files().unwrap();
    assert_eq!(files.len(), 4, "two kinds, each for kubectl and for the chart");
    for (path, expected) in files {
        let found = std::fs::read_to_string(root().join(&path)).unwrap_or_default();
        assert!(found == expected, "{} is not what the types say: run `make generate`", path.display());
    }
}

#[test]
fn no_generated_file_is_left_over() {
    let expected: Vec<_> = manifests::files().unwrap().into_iter().map(|(path, _)| root().join(path)).collect();
    for folder in manifests::FOLDERS {
        for found in std::fs::read_dir(root().join(folder)).unwrap() {
            let found = found.unwrap().path();
            assert!(expected.contains(&found), "{} is generated from nothing", found.display());
        }
    }
}

/// Calls `visit` for every field below `schema`, with its path and its own schema.
fn walk(path: &str, schema: &Map<String, Value>, visit: &mut dyn FnMut(&str, &Map<String, Value>, bool)) {
    for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let path = format!("{path}.{name}");
        let field = field.as_object().unwrap();
        visit(&path, field, true);
        walk(&path, field, visit);
    }
    for (key, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
        if let Some(inner) = schema.get(key).and_then(Value::as_object) {
            let path = format!("{path}{mark}");
            visit(&path, inner, false);
            walk(&path, inner, visit);
        }
    }
}

/// The schemas of `spec` and `status` of every kind, by kind and part.
fn parts() -> Vec<(String, Map<String, Value>)> {
    let mut parts = Vec::new();
    for definition in manifests::definitions() {
        let kind = definition.spec.names.kind.clone();
        let definition = serde_json::to_value(definition).unwrap();
        for part in ["spec", "status"] {
            let pointer = format!("/spec/versions/0/schema/openAPIV3Schema/properties/{part}");
            let schema = definition.pointer(&pointer).and_then(Value::as_object).unwrap();
            parts.push((format!("{kind}.{part}"), schema.clone()));
        }
    }
    parts
}

#[test]
fn kubectl_explain_has_words_for_every_field() {
    let mut silent = Vec::new();
    for (part, schema) in parts() {
        walk(&part, &schema, &mut |path, field, named| {
            let words = field.get("description").and_then(Value::as_str).unwrap_or_default();
            if named && words.trim().len() < 4 {
                silent.push(path.to_owned());
            }
        });
    }
    assert!(silent.is_empty(), "without a description: {silent:#?}");
}

/// Why a field is not bounded, if it is not.
fn loose(field: &Map<String, Value>) -> Option<&'static str> {
    let has = |key: &str| field.contains_key(key);
    if has("enum") {
        return None;
    }
    if field.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        return (!(has("minimum") && has("maximum") && has("maxLength"))).then_some("a number or text without bounds");
    }
    match field.get("type").and_then(Value::as_str) {
        Some("string") => (!(has("maxLength") || field.get("format").is_some_and(|format| format == "date-time")))
            .then_some("a string without maxLength"),
        Some("array") => (!has("maxItems")).then_some("a list without maxItems"),
        Some("integer" | "number") => (!(has("minimum") && has("maximum"))).then_some("a number without bounds"),
        // Its keys and depth are bounded by the reconciler, which also measures the whole.
        Some("object") if has("x-kubernetes-preserve-unknown-fields") => None,
        Some("object") if has("additionalProperties") => {
            (!has("maxProperties")).then_some("a map without maxProperties")
        }
        Some("object" | "boolean") => None,
        _ => Some("a field without a type"),
    }
}

#[test]
fn every_field_of_a_spec_is_bounded() {
    let mut all = Vec::new();
    for (part, schema) in parts().into_iter().filter(|(part, _)| part.ends_with(".spec")) {
        walk(&part, &schema, &mut |path, field, _| {
            if let Some(why) = loose(field) {
                all.push((path.to_owned(), why));
            }
        });
    }
    let excused = |path: &str| UNBOUNDED.iter().any(|(known, _)| *known == path);
    let left: Vec<_> = all.iter().filter(|(path, _)| !excused(path)).collect();
    assert!(left.is_empty(), "{left:#?}");
    for (known, why) in UNBOUNDED {
        assert!(all.iter().any(|(path, _)| path == known), "{known} is bounded by now ({why}): take it off the list");
    }
}

#[test]
fn every_list_and_text_of_a_status_is_bounded() {
    let mut left = Vec::new();
    for (part, schema) in parts().into_iter().filter(|(part, _)| part.ends_with(".status")) {
        walk(&part, &schema, &mut |path, field, _| {
            // Counts and revisions are the operator's own.
            if let Some(why) = loose(field).filter(|why| !why.starts_with("a number")) {
                left.push((path.to_owned(), why));
            }
        });
    }
    assert!(left.is_empty(), "{left:#?}");
}
