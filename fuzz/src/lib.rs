//! What has to hold whatever is read: nothing panics, work and answers have bounds, the same question has the same answer, what is
//! refused is refused with its place, and what is written is read as the same.

use bytes::Bytes;
use contract::FlagsSettings;
use crds::{FeatureFlag, FeatureFlagSpec, feature_flag::FlagSpec};
use flags::targeting::{Evaluators, MAX_STEPS, Request, Rule};
use flags::{Attribute, Context, EvaluationError, FlagSet, Inputs, Resolution};
use http_body_util::Full;
use operator::flag_sync::{
    message::{Room, framed, read},
    selector::{Selector, of_call},
    wire::{SyncFlagsRequest, SyncFlagsResponse},
};
use operator::fleet::degradations::Degradations;
use operator::kubernetes::guard::Guard;
use operator::ofrep::answer::{bulk, single, spell};
use operator::ofrep::document::Document;
use operator::ofrep::request::{EvaluationContext, MAX_ATTRIBUTES, MAX_TARGETING_KEY_BYTES};
use operator::spec::flags::review;
use serde_json::{Map, Value, json};
use std::{
    pin::pin,
    sync::{Arc, LazyLock},
    task::{Context as Task, Poll, Waker},
};

const NOW_MS: i64 = 1_790_000_000_123;
/// Longest error, in bytes.
const MAX_ERROR: usize = 4_096;
/// Flags of a document that are evaluated.
const MOST_FLAGS: usize = 20;

/// A target.
pub type Target = fn(&[u8]);

/// The targets by their names, which are those of the folders of the corpus, too.
pub const TARGETS: [(&str, Target); 4] = [
    ("flag_documents", flag_documents),
    ("contexts", contexts),
    ("ofrep_bodies", ofrep_bodies),
    ("sync_messages", sync_messages),
];

/// A flagd document: what the operator makes of it, and what a pod makes of it.
pub fn flag_documents(data: &[u8]) {
    if let Ok(flag_spec) = serde_json::from_slice::<FlagSpec>(data) {
        reviewed(flag_spec);
    }
    let Ok(Value::Object(mut document)) = serde_json::from_slice(data) else { return };
    // As a pod has it, from an operator that let everything pass.
    let evaluators = document.remove("$evaluators").unwrap_or_else(|| json!({}));
    let settings = json!({"flags": document.remove("flags").unwrap_or_else(|| json!({})), "evaluators": evaluators});
    let Ok(settings) = serde_json::from_value::<FlagsSettings>(settings) else { return };
    round_trip(&settings);
    let set = FlagSet::compile(settings.clone());
    for (key, flag) in set.iter() {
        assert!(set.find(key).is_some_and(|found| std::ptr::eq(found, flag)), "{key} is not found");
        if let Some(error) = flag.rule_error() {
            assert!(error.path.starts_with("targeting") || error.path.starts_with("$evaluators"), "{error}");
            assert!(error.to_string().len() <= MAX_ERROR, "{} bytes", error.to_string().len());
        }
    }
    let again = FlagSet::compile(settings.clone());
    for (key, settings) in settings.flags.iter().take(MOST_FLAGS) {
        for context in CONTEXTS.iter() {
            let (one, other) = (evaluated(&set, key, context), evaluated(&again, key, context));
            assert_eq!(one, other, "{key}");
            let Ok((variant, value)) = one else { continue };
            assert_eq!(variant.as_ref().and_then(|variant| settings.variants.get(variant)), value.as_ref());
        }
    }
}

/// A document that can be parsed, in the operator.
fn reviewed(flag_spec: FlagSpec) {
    let spec =
        FeatureFlagSpec { flag_spec, target_refs: Vec::new(), priority: 0, overrides: Vec::new(), expires_at: None };
    match (review(&spec), review(&spec)) {
        (Err(mistakes), Err(again)) => {
            let text = mistakes.to_string();
            assert!(text.starts_with("spec.") && text.len() <= MAX_ERROR, "{text}");
            assert_eq!(mistakes, again);
        }
        (Ok(reviewed), Ok(again)) => {
            let warnings = reviewed.warnings.to_string();
            assert!(warnings.len() <= MAX_ERROR && (warnings.is_empty() || warnings.contains("spec.")), "{warnings}");
            assert_eq!((&reviewed.settings, &reviewed.warnings), (&again.settings, &again.warnings));
            round_trip(&reviewed.settings);
            bounded_steps(&reviewed.settings);
            for (key, flag) in FlagSet::compile(Arc::unwrap_or_clone(reviewed.settings)).iter() {
                assert_eq!(flag.rule_error(), None, "{key}: the operator takes what a pod does not");
            }
        }
        _ => panic!("taken once and refused once"),
    }
}

fn round_trip(settings: &FlagsSettings) {
    let text = serde_json::to_vec(settings).expect("it has a spelling");
    let read: FlagsSettings = serde_json::from_slice(&text).expect("what is written can be read");
    assert_eq!(read, *settings);
}

fn bounded_steps(settings: &FlagsSettings) {
    let evaluators = Evaluators::compile(&settings.evaluators);
    for (key, flag) in settings.flags.iter().take(MOST_FLAGS) {
        let Some(rule) = &flag.targeting else { continue };
        let Ok(Some(rule)) = Rule::compile(rule, &evaluators) else { continue };
        for context in CONTEXTS.iter() {
            let attributes = context.attributes();
            let request = Request { flag_key: key, now_ms: NOW_MS, context: context.with(&attributes) };
            let (answer, steps) = rule.evaluate_counted(&request);
            assert!(answer.is_err() || (1..=MAX_STEPS).contains(&steps), "{steps} steps");
        }
    }
}

/// Some that rules are likely to look into.
static CONTEXTS: LazyLock<Vec<EvaluationContext>> = LazyLock::new(|| {
    let bodies = [
        json!({}),
        json!({"context": {"targetingKey": "k"}}),
        json!({"context": {
            "targetingKey": "user-7", "email": "a@staff.example", "country": "AT", "version": "1.2.3", "vip": true, "n": 7, "x": 0.5,
            "list": [1, 2, 3, [4]], "user": {"name": "Ada", "roles": ["x", "y"]}, "big": 18_446_744_073_709_551_615_u64,
            "texts": vec!["a.b.c"; 2_000], "deep": (0..90).fold(json!(1), |inner, _| json!([inner])), "none": null,
        }}),
    ];
    let parse = |body: &Value| EvaluationContext::parse(body.to_string().as_bytes()).expect("a context");
    bodies.iter().map(parse).collect()
});

type Evaluated = Result<(Option<String>, Option<Value>), EvaluationError>;

fn evaluated(set: &FlagSet, key: &str, context: &EvaluationContext) -> Evaluated {
    let attributes = context.attributes();
    let inputs = Inputs { context: context.with(&attributes), degraded_variant: None };
    let flag = set.find(key).expect("it is in the set");
    let found = flag.resolve(key, &inputs, || NOW_MS);
    if let Some(settled) = flag.for_every_request(None, NOW_MS) {
        assert_eq!(found.as_ref(), Ok(&settled));
    }
    found.map(|Resolution { variant, value, .. }| (variant.map(str::to_owned), value.cloned()))
}

/// The attributes of a context, as a JSON object.
pub fn contexts(data: &[u8]) {
    let Ok(Value::Object(context)) = serde_json::from_slice(data) else { return };
    let json: Vec<_> = context.iter().map(|(name, value)| (name.as_str(), Attribute::Json(value))).collect();
    // As a service has them, which knows of which type each is.
    let typed: Vec<_> = context.iter().map(|(name, value)| (name.as_str(), typed(value))).collect();
    let key = context.get("targetingKey").and_then(Value::as_str);
    let with = |attributes: &[(&str, Attribute<'_>)], flag: &str| {
        let about = Context::new(attributes);
        let inputs = Inputs { context: key.map_or(about, |key| about.with_key(key)), degraded_variant: None };
        let found = OPERATORS.find(flag).expect("it is in the set").resolve(flag, &inputs, || NOW_MS);
        found.map(|found| (found.variant.map(str::to_owned), found.value.cloned(), found.reason))
    };
    for (flag, _) in OPERATORS.iter() {
        let found = with(&json, flag);
        assert_eq!(found, with(&json, flag), "{flag}");
        assert_eq!(found, with(&typed, flag), "{flag}, with types");
    }
}

fn typed(value: &Value) -> Attribute<'_> {
    match value {
        Value::Bool(value) => Attribute::Bool(*value),
        Value::String(text) => Attribute::Text(text),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => Attribute::Integer(whole),
            (None, Some(float)) if number.is_f64() => Attribute::Float(float),
            _ => Attribute::Json(value),
        },
        _ => Attribute::Json(value),
    }
}

/// Flags that look at `a`, `b` and `email` with every operator.
static OPERATORS: LazyLock<FlagSet> = LazyLock::new(|| {
    let set: FeatureFlag = serde_json::from_value(set_of_operators()).expect("a set");
    FlagSet::compile(Arc::unwrap_or_clone(review(&set.spec).expect("it is valid").settings))
});

fn set_of_operators() -> Value {
    let (a, b) = (json!({"var": "a"}), json!({"var": "b.c"}));
    let two = [
        "==", "===", "!=", "!==", "<", "<=", ">", ">=", "+", "-", "*", "/", "%", "min", "max", "in", "cat", "merge",
        "and", "or",
    ];
    let mut rules: Map<String, Value> =
        two.iter().map(|name| ((*name).to_owned(), json!({"!!": [{ *name: [a, b] }]}))).collect();
    let mut more = |name: &str, rule: Value| rules.insert(name.to_owned(), rule);
    more("starts_with", json!({"starts_with": [a, b]}));
    more("ends_with", json!({"ends_with": [{"var": "email"}, "@staff.example"]}));
    more("sem_ver", json!({"sem_ver": [a, "^", b]}));
    more("substr", json!({"!!": [{"substr": [a, b, 3]}]}));
    more("missing", json!({"!!": [{"missing": ["a", "b.c", "email"]}]}));
    more("missing_some", json!({"!!": [{"missing_some": [1, ["a", "b.c"]]}]}));
    more("all", json!({"all": [a, {"var": "b"}]}));
    more("some", json!({"some": [a, {">": [{"var": ""}, 1]}]}));
    more("map", json!({"in": ["1", {"map": [a, {"cat": [{"var": "b"}, ""]}]}]}));
    more("filter", json!({"!!": [{"filter": [a, {"var": "c"}]}]}));
    more("reduce", json!({"!!": [{"reduce": [a, {"cat": [{"var": "current"}, {"var": "accumulator"}]}, ""]}]}));
    more("computed", json!({"!!": [{"var": a}]}));
    more("fractional", json!({"fractional": [a, ["true", 50], ["false", {"var": "b.c"}], ["true", 1]]}));
    more("fractional_v2", json!({"fractional_v2": [a, ["true", 50], ["false", {"var": "b.c"}], ["true", 1]]}));
    more("fractional by key", json!({"fractional": [["true", 50], ["false", 50]]}));
    let flag = |rule: Value| json!({"state": "ENABLED", "variants": {"true": 1, "false": 0}, "defaultVariant": "false", "targeting": rule});
    let flags: Map<_, _> = rules.into_iter().map(|(name, rule)| (name, flag(rule))).collect();
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
        "metadata": {"namespace": "n", "name": "f", "uid": "u", "generation": 1},
        "spec": {"flagSpec": {"flags": flags, "metadata": {"owner": "sales"}}},
    })
}

static DOCUMENT: LazyLock<Document> = LazyLock::new(|| {
    let set: Guard<FeatureFlag> = serde_json::from_str(&set_of_operators().to_string()).expect("a set");
    Document::of_namespace(&[Arc::new(set.into())], &Degradations::new(), None)
});

/// A body of OFREP, and the answers to it.
pub fn ofrep_bodies(data: &[u8]) {
    let context = match EvaluationContext::parse(data) {
        Ok(context) => context,
        Err(error) => {
            assert!(["PARSE_ERROR", "INVALID_CONTEXT"].contains(&error.code()), "{}", error.code());
            assert!((1..=MAX_ERROR).contains(&error.to_string().len()), "{error}");
            assert_eq!(EvaluationContext::parse(data), Err(error));
            return;
        }
    };
    let attributes = context.attributes();
    assert!(attributes.len() <= MAX_ATTRIBUTES);
    let about = context.with(&attributes);
    assert!(about.targeting_key().is_none_or(|key| key.len() <= MAX_TARGETING_KEY_BYTES));
    let mut again: Map<String, Value> =
        attributes.iter().map(|(name, value)| ((*name).to_owned(), whole(value))).collect();
    again.extend(about.targeting_key().map(|key| ("targetingKey".to_owned(), key.into())));
    let again = EvaluationContext::parse(json!({ "context": again }).to_string().as_bytes());
    assert_eq!(again.as_ref(), Ok(&context), "what is written is read as the same");

    let all = bulk(&DOCUMENT, &context, NOW_MS, || false).expect("there is time");
    let all: Value = serde_json::from_slice(&spell(&all).expect("it is small")).expect("JSON");
    let all = all["flags"].as_array().expect("a list");
    assert_eq!(all.len(), OPERATORS.iter().count());
    for answer in all {
        let key = answer["key"].as_str().expect("a key");
        let alone = single(&DOCUMENT, key, &context, NOW_MS).expect("it is in the document");
        let alone: Value = serde_json::from_slice(&spell(&alone).expect("it is small")).expect("JSON");
        assert_eq!(alone, *answer, "alone and among all");
        if answer.get("errorCode").is_some() {
            assert!(answer["errorDetails"].as_str().is_some_and(|details| !details.is_empty()), "{answer}");
        } else {
            assert!(answer["reason"].is_string() && answer["metadata"]["flagSetId"] == "n/f", "{answer}");
        }
    }
}

fn whole(attribute: &Attribute<'_>) -> Value {
    match attribute {
        Attribute::Json(value) => (*value).clone(),
        _ => unreachable!("attributes of a body are JSON"),
    }
}

/// What the body of a call of `flagd.sync.v1` has, all of which is there.
fn message<M: prost::Message + Default + 'static>(data: &[u8]) -> Result<M, String> {
    let reading = pin!(read(Full::new(Bytes::copy_from_slice(data))));
    match reading.poll(&mut Task::from_waker(Waker::noop())) {
        Poll::Ready(read) => read.map_err(|failure| failure.to_string()),
        Poll::Pending => panic!("it waits for what never comes"),
    }
}

/// The body of a call of `flagd.sync.v1`, what it selects, and a document that is sent back.
pub fn sync_messages(data: &[u8]) {
    if let Ok(document) = str::from_utf8(data) {
        let sent = Room::default().message(document.to_owned()).expect("there is room");
        let received = message::<SyncFlagsResponse>(&sent).expect("what is sent can be read");
        assert_eq!(received.flag_configuration, document);
    }
    let request: SyncFlagsRequest = match message(data) {
        Ok(request) => request,
        Err(error) => return assert!((1..=MAX_ERROR).contains(&error.len()), "{error}"),
    };
    assert_eq!(message(&framed(&request)).as_ref(), Ok(&request), "what is written is read as the same");
    match Selector::parse(of_call(None, &request.selector, &request.provider_id)) {
        Ok(selector) => {
            let Selector { selected, token } = &selector;
            for name in [&selected.namespace].into_iter().chain(&selected.workload) {
                assert!((1..=253).contains(&name.len()) && name.is_ascii(), "{name}");
            }
            assert!(token.as_ref().is_none_or(|token| !token.is_empty()));
            let workload = selected.workload.iter().map(|name| format!(",workload={name}"));
            let token = token.iter().map(|token| format!(",token={token}"));
            let again = format!("namespace={}{}", selected.namespace, workload.chain(token).collect::<String>());
            assert_eq!(Selector::parse(&again), Ok(selector));
        }
        Err(error) => assert!((1..=MAX_ERROR).contains(&error.to_string().len()), "{error}"),
    }
}
