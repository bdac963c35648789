//! Evaluations as spans, with the attributes that OpenTelemetry has for feature flags. They are of the level `debug`. The targeting key
//! is not among them: it is often a person.

use super::{answer::Evaluated, document::Document};
use crate::kubernetes::meta::cut;
use tracing::{Span, debug, debug_span, field::Empty};

/// Who evaluates.
const PROVIDER: &str = "resilience-operator";
/// Longest key that is told, in bytes.
const MAX_KEY: usize = 256;

/// The evaluation of one flag. It costs nothing while nobody wants to know.
pub fn evaluation(key: &str) -> Span {
    debug_span!(
        "feature_flag.evaluation",
        "feature_flag.key" = cut(key, MAX_KEY),
        "feature_flag.provider.name" = PROVIDER,
        "feature_flag.set.id" = Empty,
        "feature_flag.version" = Empty,
        "feature_flag.result.variant" = Empty,
        "feature_flag.result.reason" = Empty,
        "error.type" = Empty,
    )
}

/// The evaluation of all flags of a scope.
pub fn evaluation_of_all(scope: &str) -> Span {
    debug_span!(
        "feature_flag.evaluation",
        "feature_flag.provider.name" = PROVIDER,
        "feature_flag.set.id" = scope,
        "feature_flag.count" = Empty,
        "error.type" = Empty,
    )
}

/// Notes the outcome for one flag; none: there is no such flag.
pub fn record(span: &Span, document: &Document, key: &str, evaluated: Option<&Evaluated<'_>>) {
    if span.is_disabled() {
        return;
    }
    if let Some(set) = document.set_of(key) {
        span.record("feature_flag.set.id", set.id.as_str());
        span.record("feature_flag.version", set.generation.to_string().as_str());
    }
    match evaluated {
        Some(Evaluated::Success(success)) => {
            let (variant, reason) = success.result();
            span.record("feature_flag.result.reason", reason.to_ascii_lowercase().as_str());
            if let Some(variant) = variant {
                span.record("feature_flag.result.variant", variant);
            }
        }
        Some(Evaluated::Failure(failure)) => record_error(span, failure.code()),
        None => record_error(span, "FLAG_NOT_FOUND"),
    }
    span.in_scope(|| debug!("flag evaluated"));
}

/// Notes how many flags were evaluated together; none: the evaluation failed.
pub fn record_all(span: &Span, count: Option<usize>) {
    if span.is_disabled() {
        return;
    }
    match count {
        Some(count) => {
            span.record("feature_flag.count", count);
        }
        None => {
            span.record("error.type", "general");
        }
    }
    span.in_scope(|| debug!("flags evaluated"));
}

fn record_error(span: &Span, code: &str) {
    span.record("feature_flag.result.reason", "error");
    span.record("error.type", code.to_ascii_lowercase().as_str());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::degradations::Degradations;
    use crate::ofrep::{answer::single, request::EvaluationContext};
    use serde_json::json;
    use std::{
        collections::BTreeMap,
        sync::{Arc, Mutex},
    };
    use tracing::{
        field::{Field, Visit},
        span::{Attributes, Id, Record},
    };
    use tracing_subscriber::{
        Layer,
        layer::{Context, SubscriberExt},
    };

    type Fields = BTreeMap<String, String>;

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Fields>>);

    impl Visit for Seen {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.0.lock().unwrap().insert(field.name().to_owned(), format!("{value:?}"));
        }

        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.lock().unwrap().insert(field.name().to_owned(), value.to_owned());
        }
    }

    impl<S: tracing::Subscriber> Layer<S> for Seen {
        fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
            attributes.record(&mut self.clone());
        }

        fn on_record(&self, _: &Id, values: &Record<'_>, _: Context<'_, S>) {
            values.record(&mut self.clone());
        }
    }

    fn document() -> Document {
        let flag = |targeting: serde_json::Value| json!({"state": "ENABLED", "variants": {"on": true}, "defaultVariant": "on", "targeting": targeting});
        let flags = json!({"plain": flag(json!({})), "broken": flag(json!({"cat": ["no", "body"]}))});
        let set = json!({
            "metadata": {"namespace": "n", "name": "s", "uid": "u", "generation": 3},
            "spec": {"flagSpec": {"flags": flags}},
        });
        Document::of_namespace(&[Arc::new(serde_json::from_str(&set.to_string()).unwrap())], &Degradations::new(), None)
    }

    fn told(key: &str) -> Fields {
        let seen = Seen::default();
        let subscriber = tracing_subscriber::registry().with(seen.clone());
        tracing::subscriber::with_default(subscriber, || {
            let (document, context) = (document(), EvaluationContext::default());
            let span = evaluation(key);
            record(&span, &document, key, single(&document, key, &context, 0).as_ref());
        });
        let fields = seen.0.lock().unwrap();
        fields.clone()
    }

    fn fields(pairs: &[(&str, &str)]) -> Fields {
        let usual = [("feature_flag.provider.name", "resilience-operator")];
        pairs.iter().chain(&usual).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn an_evaluation_is_told_in_the_words_of_opentelemetry() {
        let set = [("feature_flag.set.id", "n/s"), ("feature_flag.version", "3")];
        let plain = [
            ("feature_flag.key", "plain"),
            ("feature_flag.result.reason", "static"),
            ("feature_flag.result.variant", "on"),
        ];
        assert_eq!(told("plain"), fields(&[&set[..], &plain].concat()));
        let broken =
            [("feature_flag.key", "broken"), ("feature_flag.result.reason", "error"), ("error.type", "general")];
        assert_eq!(told("broken"), fields(&[&set[..], &broken].concat()));
        let long = "x".repeat(1_000);
        let absent = [
            ("feature_flag.key", &long[..MAX_KEY]),
            ("feature_flag.result.reason", "error"),
            ("error.type", "flag_not_found"),
        ];
        assert_eq!(told(&long), fields(&absent));
    }
}
