//! A provider shaped as Stripe: payment intents that are created, and confirmed by their id.

use super::decision::Answer;
use super::https::Https;
use super::key::KeyTrouble;
use super::ledger::Order;
use super::providers::{
    Client, Listed, Listing, Owed, ProviderClient, ProviderError, Refund, Reply, Seen, about, header_value,
    invalid_response, json_of, no, owed, path_part, refunded, step_key, words,
};
use crate::http_client::{HttpAnswer, HttpCall, IDEMPOTENCY_KEY};
use async_trait::async_trait;
use axum::http::{HeaderValue, StatusCode, header};
use resilience::Dependency;
use serde_json::Value;
use std::time::Duration;

/// Objects on a page of a list.
const PAGE: usize = 100;
/// Pages that are read at most.
const MAX_PAGES: usize = 1_000;

pub struct Stripe(Client);

impl Stripe {
    /// The one behind `service`.
    pub fn new(service: Https, dependency: &'static Dependency) -> Self {
        Self(Client::new(service, dependency, true))
    }
}

fn form(path: String, key: Option<&str>, fields: &[(&str, &str)]) -> HttpCall {
    let mut call = HttpCall::post(path, &Value::Null);
    call.body = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish().into();
    call.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
    call.headers.extend(key.map(|key| (IDEMPOTENCY_KEY, header_value(key))));
    call
}

/// How an intent stands.
fn of_intent(intent: &Value) -> Option<Answer> {
    let object = intent["id"].as_str()?.to_owned();
    Some(match intent["status"].as_str()? {
        "succeeded" => Answer::Charged { object },
        "processing" => Answer::Processing,
        "requires_action" => Answer::NeedsBuyer { object },
        "requires_confirmation" => Answer::Unconfirmed,
        // It is created with a means of payment: that it needs another one means that this one was declined.
        "requires_payment_method" => Answer::Declined,
        "canceled" => Answer::Cancelled,
        _ => return None,
    })
}

/// What kind of error Stripe itself says it is.
fn kind_of_error(answer: &HttpAnswer) -> Option<String> {
    json_of(answer)["error"]["type"].as_str().map(str::to_owned)
}

fn of_answer(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    match answer.status {
        StatusCode::OK => of_intent(&json_of(answer)).ok_or_else(|| invalid_response(answer)),
        StatusCode::PAYMENT_REQUIRED if kind_of_error(answer).is_some() => Err(ProviderError::Declined),
        // Also "unexpected state" and "key in use": how the intent stands is for a read to say.
        _ => Err(no(answer, kind_of_error(answer).is_some())),
    }
}

/// What Stripe says of an intent that is not one to confirm, such as one that is charged or cancelled already. It says
/// nothing of the order.
const WRONG_STATE: &str = "payment_intent_unexpected_state";

/// The answer to a confirmation: it is refused where Stripe says that what is asked for is not valid, as of a creation.
/// The intent stays as it was, and is cancelled.
fn of_confirmation(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    let is_invalid = || {
        matches!(answer.status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
            && kind_of_error(answer).as_deref() == Some("invalid_request_error")
            && json_of(answer)["error"]["code"] != WRONG_STATE
    };
    match of_answer(answer) {
        Err(ProviderError::Unclear(words)) if is_invalid() => Err(ProviderError::Refused(words)),
        known => known,
    }
}

fn of_creation(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    match answer.status {
        StatusCode::OK => match json_of(answer)["id"].as_str() {
            Some(id) => Ok(Answer::Created { object: id.to_owned() }),
            None => Err(invalid_response(answer)),
        },
        status => match (status, kind_of_error(answer).as_deref()) {
            (StatusCode::PAYMENT_REQUIRED, Some(_)) => Err(ProviderError::Declined),
            // Of a key that was used for something else.
            (_, Some("idempotency_error")) => Err(ProviderError::Unclear(words(answer))),
            (StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY, Some(_)) => {
                Err(ProviderError::Refused(words(answer)))
            }
            (_, kind) => Err(no(answer, kind.is_some())),
        },
    }
}

/// Which of the intents with one key is charged. That there is none says nothing: the search lags.
fn of_search(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    let list = json_of(answer);
    let found = list["data"].as_array().filter(|_| answer.status == StatusCode::OK);
    let found = found.ok_or_else(|| invalid_response(answer))?;
    let all: Vec<_> = found.iter().filter_map(of_intent).collect();
    let wanted = |answer: &&Answer| !matches!(answer, Answer::Cancelled | Answer::Unconfirmed | Answer::Declined);
    let charged = all.iter().find(|answer| matches!(answer, Answer::Charged { .. }));
    Ok(charged.or(all.iter().find(wanted)).cloned().unwrap_or(Answer::Unconfirmed))
}

#[async_trait]
impl ProviderClient for Stripe {
    fn name(&self) -> &str {
        self.0.dependency.name()
    }

    fn cancels(&self) -> bool {
        true
    }

    /// It removes them after 24 h.
    fn keys_last(&self) -> Duration {
        Duration::from_secs(23 * 3_600)
    }

    async fn create(&self, order: &Order, number: i32) -> Reply {
        let (key, amount) = (step_key(&order.key, number, "create"), order.amount_cents.to_string());
        let fields = [
            ("amount", amount.as_str()),
            ("currency", &order.currency),
            ("payment_method", "pm_card"),
            ("metadata[key]", &order.key),
        ];
        self.0.create(form("/v1/payment_intents".to_owned(), Some(&key), &fields), &order.key, of_creation).await
    }

    async fn confirm(&self, order: &Order, object: &str, number: i32) -> Reply {
        let path = format!("/v1/payment_intents/{}/confirm", path_part(object));
        let call = form(path, Some(&step_key(&order.key, number, "confirm")), &[]);
        self.0.ask(call, &order.key, about(object, of_confirmation)).await
    }

    async fn read(&self, object: &str) -> Reply {
        self.0.look(HttpCall::get(format!("/v1/payment_intents/{}", path_part(object))), about(object, of_answer)).await
    }

    async fn inspect(&self, object: &str) -> Result<Seen, String> {
        let call = HttpCall::get(format!("/v1/payment_intents/{}", path_part(object)));
        self.0.inspect(call, about(object, of_answer), |intent| intent["metadata"]["key"].as_str()).await
    }

    async fn cancel(&self, object: &str) -> Reply {
        // Without a key: a stored failure must not stand in the way of the next try, and twice is the same as once.
        let path = format!("/v1/payment_intents/{}/cancel", path_part(object));
        let reply = self.0.look(form(path, None, &[]), about(object, of_answer)).await;
        if reply.answer == Answer::Unanswered { self.read(object).await } else { reply }
    }

    async fn search(&self, key: &str) -> Reply {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("query", &format!("metadata['key']:'{key}'"))
            .finish();
        self.0.look(HttpCall::get(format!("/v1/payment_intents/search?{query}")), of_search).await
    }

    async fn charge_again(&self, order: &Order) -> Reply {
        let amount = order.amount_cents.to_string();
        // To the letter what version 0.1 sends: other parameters under the same key are refused.
        let fields = [
            ("amount", amount.as_str()),
            ("currency", &order.currency),
            ("confirm", "true"),
            ("metadata[key]", &order.key),
        ];
        let call = form("/v1/payment_intents".to_owned(), Some(&order.key), &fields);
        self.0.ask(call, &order.key, of_answer).await
    }

    async fn refund(&self, key: &str, object: &str) -> Result<Refund, String> {
        let intent = self.0.json(HttpCall::get(format!("/v1/payment_intents/{}", path_part(object)))).await?;
        let charged = intent["amount_received"].as_i64().ok_or("the intent does not say what was received")?;
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("payment_intent", object)
            .append_pair("limit", &PAGE.to_string())
            .finish();
        let before = self.0.json(HttpCall::get(format!("/v1/refunds?{query}"))).await?;
        let before = before["data"].as_array().ok_or("invalid list of refunds")?;
        let before = before.iter().map(|one| (Refund::of(one), one["amount"].as_i64()));
        let (cents, is_under_way) = match owed(charged, before)? {
            Owed::Nothing(refund) => return Ok(refund),
            Owed::Rest { cents, is_under_way } => (cents.to_string(), is_under_way),
        };
        let fields = [("payment_intent", object), ("amount", cents.as_str())];
        refunded(&self.0.json(form("/v1/refunds".to_owned(), Some(key), &fields)).await?, is_under_way)
    }

    async fn list(&self, from: i64, before: i64) -> Result<Listing, String> {
        let (mut all, mut after) = (Listing::default(), None::<String>);
        for _ in 0..MAX_PAGES {
            let query = {
                let mut query = form_urlencoded::Serializer::new(String::new());
                query.append_pair("limit", &PAGE.to_string()).append_pair("expand[]", "data.latest_charge");
                query.append_pair("created[gte]", &from.to_string()).append_pair("created[lt]", &before.to_string());
                query.extend_pairs(after.iter().map(|after| ("starting_after", after)));
                query.finish()
            };
            let page = self.0.page(HttpCall::get(format!("/v1/payment_intents?{query}"))).await?;
            let data = page["data"].as_array().ok_or("invalid list of payment intents")?;
            for intent in data.iter().filter(|intent| intent["status"] == "succeeded") {
                all.charges.push(Listed {
                    key: intent["metadata"]["key"].as_str().unwrap_or_default().to_owned(),
                    object: intent["id"].as_str().unwrap_or_default().to_owned(),
                    amount_cents: intent["amount"].as_i64().unwrap_or_default(),
                    currency: intent["currency"].as_str().unwrap_or_default().to_owned(),
                    charge: intent["latest_charge"]["id"].as_str().unwrap_or_default().to_owned(),
                    refunded_cents: intent["latest_charge"]["amount_refunded"].as_i64(),
                });
            }
            after = data.last().and_then(|last| last["id"].as_str()).map(str::to_owned);
            if page["has_more"] != true || after.is_none() {
                return Ok(all);
            }
        }
        Err(format!("more than {MAX_PAGES} pages in one slice of time"))
    }

    async fn try_key(&self) {
        self.0.try_key(HttpCall::get("/v1/payment_intents?limit=1")).await;
    }

    fn key_trouble(&self) -> Option<KeyTrouble> {
        self.0.key_trouble()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[rstest::rstest]
    #[case("succeeded", Some(Answer::Charged { object: "pi".into() }))]
    #[case("processing", Some(Answer::Processing))]
    #[case("requires_action", Some(Answer::NeedsBuyer { object: "pi".into() }))]
    #[case("requires_confirmation", Some(Answer::Unconfirmed))]
    #[case("requires_payment_method", Some(Answer::Declined))]
    #[case("canceled", Some(Answer::Cancelled))]
    #[case("requires_capture", None)]
    fn statuses(#[case] status: &str, #[case] expected: Option<Answer>) {
        assert_eq!(of_intent(&json!({"id": "pi", "status": status})), expected);
    }

    /// Nothing was sent: the other provider may be asked at once.
    #[tokio::test]
    async fn a_confirmation_without_a_connection_is_not_in_doubt() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut defaults = super::super::defaults(1);
        let timeout = &mut defaults.dependencies.get_mut("stripe").unwrap().timeout;
        (timeout.request_ms, timeout.per_try_ms) = (2_000, 500);
        let id = contract::WorkloadId::deployment("default", "payment");
        let resilience = resilience::Resilience::builder(id).dependency("stripe").defaults(defaults).build();
        let dependency = resilience.dependency("stripe").unwrap();
        let base = format!("https://{}", listener.local_addr().unwrap());
        let https = Https::new(&base, None, super::super::https::Credentials::None, Some(dependency)).unwrap();
        let order = Order { key: "a".to_owned(), amount_cents: 100, currency: "eur".to_owned() };
        let reply = Stripe::new(https, dependency).confirm(&order, "pi_1", 1).await;
        assert_eq!(reply.answer, Answer::NotReached, "{:?}", reply.reason);
    }

    fn answer(status: u16, body: &str) -> HttpAnswer {
        let (status, headers) = (StatusCode::from_u16(status).unwrap(), axum::http::HeaderMap::new());
        HttpAnswer { status, headers, body: body.to_owned().into(), from_ejected: false }
    }

    const INVALID: &str = r#"{"error":{"type":"invalid_request_error","message":"no"}}"#;

    const WRONG: &str =
        r#"{"error":{"type":"invalid_request_error","code":"payment_intent_unexpected_state","message":"no"}}"#;

    /// How an intent stands that is already confirmed, or cancelled, is for a read to say.
    #[rstest::rstest]
    #[case::invalid(400, INVALID, "it refuses this order: no")]
    #[case::wrong_state(400, WRONG, "no")]
    #[case::missing(404, INVALID, "no")]
    #[case::forbidden(403, INVALID, "it forbids this: no")]
    #[case::key_reused(400, r#"{"error":{"type":"idempotency_error","message":"no"}}"#, "no")]
    #[case::declined(402, r#"{"error":{"type":"card_error"}}"#, "declined")]
    #[case::proxy(400, "<html>", PROXY_400)]
    fn only_what_is_not_valid_refuses_a_confirmation(#[case] status: u16, #[case] body: &str, #[case] expected: &str) {
        assert_eq!(of_confirmation(&answer(status, body)).unwrap_err().to_string(), expected);
    }

    /// And none refuses a read or a cancellation.
    #[rstest::rstest]
    #[case::invalid(400, INVALID, "it refuses this order: no", "no")]
    #[case::declined(402, r#"{"error":{"type":"card_error"}}"#, "declined", "declined")]
    #[case::key_reused(400, r#"{"error":{"type":"idempotency_error","message":"no"}}"#, "no", "no")]
    #[case::missing(404, INVALID, "no", "no")]
    #[case::forbidden(403, INVALID, "it forbids this: no", "it forbids this: no")]
    #[case::proxy(400, "<html>", PROXY_400, PROXY_400)]
    #[case::proxy_forbids(403, "<html>", PROXY_403, PROXY_403)]
    #[case::proxy_has_no_such_path(404, "<html>", PROXY_404, PROXY_404)]
    #[case::proxy_wants_money(402, "", PROXY_402, PROXY_402)]
    fn only_an_error_of_the_provider_itself_refuses_an_order(
        #[case] status: u16,
        #[case] body: &str,
        #[case] created: &str,
        #[case] confirmed: &str,
    ) {
        assert_eq!(of_creation(&answer(status, body)).unwrap_err().to_string(), created);
        assert_eq!(of_answer(&answer(status, body)).unwrap_err().to_string(), confirmed);
    }

    const PROXY_400: &str = "invalid provider response: status 400 Bad Request";
    const PROXY_402: &str = "invalid provider response: status 402 Payment Required";
    const PROXY_403: &str = "invalid provider response: status 403 Forbidden";
    const PROXY_404: &str = "invalid provider response: status 404 Not Found";
}
