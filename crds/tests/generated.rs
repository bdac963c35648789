//! What is generated is what the types say, and what the types say is documented and bounded.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

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
    assert_eq!(files.len(), 6, "three kinds, each for kubectl and for the chart");
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

/// A field, or the items of a list or the values of a map.
struct Field {
    path: String,
    /// It has a name of its own, so `kubectl explain` shows it.
    named: bool,
    schema: Map<String, Value>,
}

/// Adds every field below `schema`.
fn collect(path: &str, schema: &Map<String, Value>, all: &mut Vec<Field>) {
    let named = schema.get("properties").and_then(Value::as_object).into_iter().flatten();
    let named = named.map(|(name, field)| (format!("{path}.{name}"), true, field.as_object()));
    let inner = [("items", "[]"), ("additionalProperties", "{}")]
        .map(|(key, mark)| (format!("{path}{mark}"), false, schema.get(key).and_then(Value::as_object)));
    for (path, named, schema) in named.chain(inner) {
        let Some(schema) = schema else { continue };
        collect(&path, schema, all);
        all.push(Field { path, named, schema: schema.clone() });
    }
}

/// Every field of a part (`spec` or `status`) of every kind.
fn fields(part: &str) -> Vec<Field> {
    let mut all = Vec::new();
    for definition in manifests::definitions() {
        let kind = definition.spec.names.kind.clone();
        let definition = serde_json::to_value(definition).unwrap();
        let pointer = format!("/spec/versions/0/schema/openAPIV3Schema/properties/{part}");
        let schema = definition.pointer(&pointer).and_then(Value::as_object).unwrap();
        collect(&format!("{kind}.{part}"), schema, &mut all);
    }
    assert!(all.len() > 20, "{part}: {}", all.len());
    all
}

#[test]
fn kubectl_explain_has_words_for_every_field() {
    let words = |field: &Field| field.schema.get("description").and_then(Value::as_str).unwrap_or_default().len();
    let all = fields("spec").into_iter().chain(fields("status"));
    let silent: Vec<_> = all.filter(|field| field.named && words(field) < 4).map(|field| field.path).collect();
    assert!(silent.is_empty(), "without a description: {silent:#?}");
}

/// The keys by which the items of a list are told apart.
fn keys_of(kind: &str, path: &str) -> Vec<String> {
    let (part, _) = path.split_once('.').unwrap();
    let field = fields(part).into_iter().find(|field| field.path == format!("{kind}.{path}")).unwrap();
    assert_eq!(field.schema.get("x-kubernetes-list-type"), Some(&Value::from("map")), "{kind}.{path}");
    let keys = field.schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array).unwrap();
    keys.iter().map(|key| key.as_str().unwrap().to_owned()).collect()
}

#[test]
fn named_things_in_a_status_are_told_apart_by_all_of_their_name() {
    assert_eq!(keys_of("ResiliencePolicy", "status.targets"), ["kind", "name"]);
    assert_eq!(keys_of("FeatureFlag", "status.targets"), ["kind", "name"]);
    // Two targets may have a check, or a dependency, of one name.
    assert_eq!(keys_of("ResiliencePolicy", "status.checks"), ["kind", "target", "name"]);
    assert_eq!(keys_of("ResiliencePolicy", "status.circuits"), ["kind", "target", "dependency"]);
}

#[test]
fn a_dependency_has_no_defaults_in_the_schema() {
    let all = fields("spec");
    let below = |field: &&Field| field.path.starts_with("ResiliencePolicy.spec.dependencies[]");
    let filled: Vec<_> = all.iter().filter(below).filter(|field| field.schema.contains_key("default")).collect();
    assert!(filled.is_empty(), "{:?}", filled.iter().map(|field| &field.path).collect::<Vec<_>>());
    assert!(all.iter().filter(below).count() > 40);
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

/// Fields of a part that are not bounded, each with what is missing.
fn loose_fields(part: &str) -> Vec<(String, &'static str)> {
    fields(part).into_iter().filter_map(|field| Some((field.path, loose(&field.schema)?))).collect()
}

#[test]
fn every_field_of_a_spec_is_bounded() {
    let all = loose_fields("spec");
    let excused = |path: &str| UNBOUNDED.iter().any(|(known, _)| *known == path);
    let left: Vec<_> = all.iter().filter(|(path, _)| !excused(path)).collect();
    assert!(left.is_empty(), "{left:#?}");
    for (known, why) in UNBOUNDED {
        assert!(all.iter().any(|(path, _)| path == known), "{known} is bounded by now ({why}): take it off the list");
    }
}

#[test]
fn every_list_and_text_of_a_status_is_bounded() {
    // Counts and revisions are the operator's own.
    let left: Vec<_> = loose_fields("status").into_iter().filter(|(_, why)| !why.starts_with("a number")).collect();
    assert!(left.is_empty(), "{left:#?}");
}
