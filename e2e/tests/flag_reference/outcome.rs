//! What a flag resolves to, in one form for all evaluators.

use crate::generator::Ask;
use contract::{AppliedFrom, FlagsSettings, RuntimeConfig, Section, WorkloadId};
use crds::FeatureFlag;
use flags::{Attribute, Context, EvaluationError, FlagSet, Inputs};
use operator::fleet::{degradations::Degradations, flag_set};
use operator::kubernetes::guard::Guard;
use operator::ofrep::{answer, document::Document, request::EvaluationContext};
use resilience::feature_flags::{AnswerReason, Details, ErrorCode};
use resilience::{ConfigStore, Resilience};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// What a flag resolves to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Variant { variant: String, value: Value, reason: String },
    CallersDefault { reason: String },
    Error,
}

impl Outcome {
    fn of(variant: Option<&str>, value: Option<&Value>, reason: &str) -> Self {
        match (variant, value) {
            (Some(variant), Some(value)) => {
                Self::Variant { variant: variant.to_owned(), value: plain(value), reason: reason.to_owned() }
            }
            _ => Self::CallersDefault { reason: reason.to_owned() },
        }
    }

    /// From an answer of one of the reference evaluators.
    pub fn of_reference(answer: &Value) -> Self {
        match &answer["error"] {
            Value::Null => {
                let value = Some(&answer["value"]).filter(|value| !value.is_null());
                Self::of(answer["variant"].as_str(), value, answer["reason"].as_str().unwrap_or_default())
            }
            _ => Self::Error,
        }
    }

    fn of_ofrep(answer: &Value) -> Self {
        if answer.get("errorCode").is_some() {
            return Self::Error;
        }
        Self::of(answer["variant"].as_str(), answer.get("value"), answer["reason"].as_str().unwrap_or_default())
    }
}

/// Numbers as some evaluators give them: all of them floats.
fn plain(value: &Value) -> Value {
    match value {
        Value::Number(number) => number.as_f64().map_or(Value::Null, Value::from),
        Value::Array(items) => items.iter().map(plain).collect(),
        Value::Object(members) => {
            members.iter().map(|(name, value)| (name.clone(), plain(value))).collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

/// One document, everywhere we evaluate flags.
pub struct Ours {
    set: FlagSet,
    /// If the operator takes the document: what it answers over OFREP, and what a workload answers.
    taken: Option<(Document, Arc<Resilience>)>,
}

impl Ours {
    pub fn new(document: &Value) -> Self {
        let object = json!({
            "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
            "metadata": {"namespace": "n", "name": "f", "uid": "u", "generation": 1}, "spec": {"flagSpec": document},
        });
        let object: Guard<FeatureFlag> = serde_json::from_str(&object.to_string()).unwrap();
        let object = flag_set::FlagSet::from(object);
        if let Some(Ok(reviewed)) = object.reviewed() {
            let settings = FlagsSettings::clone(&reviewed.settings);
            let ofrep = Document::of_namespace(&[Arc::new(object)], &Degradations::new(), None);
            return Self { set: FlagSet::compile(settings.clone()), taken: Some((ofrep, workload(settings))) };
        }
        // As a pod has it that gets it all the same.
        let none = json!({});
        let evaluators = document.get("$evaluators").unwrap_or(&none);
        let settings = json!({"flags": document["flags"], "evaluators": evaluators});
        Self { set: FlagSet::compile(serde_json::from_value(settings).unwrap()), taken: None }
    }

    pub const fn is_taken(&self) -> bool {
        self.taken.is_some()
    }

    /// What a flag resolves to; over OFREP and in a workload it has to be the same.
    pub fn outcome(&self, ask: &Ask) -> Outcome {
        let Value::Object(context) = &ask.context else { panic!("a context is an object") };
        let key = context.get("targetingKey").and_then(Value::as_str);
        let attributes: Vec<_> = context
            .iter()
            .filter(|(name, _)| *name != "targetingKey")
            .map(|(name, value)| (name.as_str(), Attribute::Json(value)))
            .collect();
        let about = Context::new(&attributes);
        let about = key.map_or(about, |key| about.with_key(key));
        let flag = self.set.find(&ask.key).unwrap();
        let inputs = Inputs { context: about, degraded_variant: None };
        let outcome = match flag.resolve(&ask.key, &inputs, || super::NOW * 1_000) {
            // A rule that cannot be compiled is an error for evaluators that give no answer then.
            Ok(_) if flag.rule_error().is_some() => Outcome::Error,
            Ok(found) => Outcome::of(found.variant, found.value, found.reason.as_str()),
            Err(EvaluationError::Rule(_) | EvaluationError::UnknownVariant(_)) => Outcome::Error,
        };
        if let Some((document, workload)) = &self.taken {
            let body = json!({ "context": context }).to_string();
            let about_it = EvaluationContext::parse(body.as_bytes()).unwrap();
            let answer = json!(answer::single(document, &ask.key, &about_it, super::NOW * 1_000).unwrap());
            assert_eq!(Outcome::of_ofrep(&answer), outcome, "over OFREP: {answer}");
            // A workload asks its own clock.
            if !flag_uses_time(document, &ask.key) {
                assert_eq!(in_workload(workload, ask, &about), outcome, "in a workload: {ask:?}");
            }
        }
        outcome
    }
}

fn flag_uses_time(document: &Document, key: &str) -> bool {
    let settings = &document.section.settings;
    let mentions = |value: &Value| value.to_string().contains("timestamp");
    settings.flags[key].targeting.as_deref().is_some_and(mentions) || settings.evaluators.values().any(mentions)
}

fn workload(settings: FlagsSettings) -> Arc<Resilience> {
    let id = WorkloadId::deployment("n", "w");
    let resilience = Resilience::builder(id.clone()).build();
    let document = RuntimeConfig::new(id, 1, Section::default(), Section { sources: Vec::new(), settings });
    ConfigStore::new(Arc::clone(&resilience)).apply(&document.to_bytes().unwrap(), AppliedFrom::Push, 0);
    resilience
}

fn in_workload(workload: &Resilience, ask: &Ask, context: &Context<'_>) -> Outcome {
    fn of<T: Into<Value>>(details: Details<T>) -> Outcome {
        match details.reason {
            AnswerReason::Error(ErrorCode::FlagNotFound) => panic!("it is not there"),
            AnswerReason::Error(_) => Outcome::Error,
            AnswerReason::Resolved(reason) => {
                Outcome::of(details.variant.as_deref(), Some(&details.value.into()), reason.as_str())
            }
        }
    }
    let (flags, key) = (workload.flags(), ask.key.as_str());
    match ask.type_ {
        "boolean" => of(flags.details(key, false, context)),
        "number" => of(flags.details(key, 0.0, context)),
        "string" => of(flags.details(key, String::new(), context)),
        _ => of(flags.details(key, Map::new(), context)),
    }
}
