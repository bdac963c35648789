//! A provider shaped as PayPal: orders that are created, and captured by their id. They cannot be cancelled: a capture in doubt
//! is asked for again with the same request id, until it is answered.

use super::decision::Answer;
use super::https::Https;
use super::key::KeyTrouble;
use super::ledger::Order;
use super::providers::{
    Client, Listed, Listing, Owed, ProviderClient, ProviderError, Refund, Reply, Seen, VerifyError, about, cents,
    header_value, invalid_response, json_of, no, owed, path_part, refunded, step_key, words,
};
use crate::http_client::{HttpAnswer, HttpCall};
use async_trait::async_trait;
use axum::http::{HeaderName, StatusCode};
use resilience::Dependency;
use serde_json::{Value, json};
use std::time::Duration;

const REQUEST_ID: HeaderName = HeaderName::from_static("paypal-request-id");
/// Transactions on a page of a list.
const PAGE: usize = 100;
/// Pages that are read at most.
const MAX_PAGES: u64 = 1_000;

pub struct Paypal(Client);

impl Paypal {
    /// The one behind `service`.
    pub fn new(service: Https, dependency: &'static Dependency) -> Self {
        Self(Client::new(service, dependency, false))
    }
}

fn post(path: String, request_id: &str, document: &Value) -> HttpCall {
    let mut call = HttpCall::post(path, document);
    call.headers.insert(REQUEST_ID, header_value(request_id));
    call
}

/// What a capture is refused for that is final, whatever is tried again.
const FINAL: [&str; 7] = [
    "COMPLIANCE_VIOLATION",
    "PAYEE_ACCOUNT_LOCKED_OR_CLOSED",
    "PAYEE_ACCOUNT_RESTRICTED",
    "PAYER_ACCOUNT_LOCKED_OR_CLOSED",
    "PAYER_ACCOUNT_RESTRICTED",
    "PAYER_CANNOT_PAY",
    "TRANSACTION_REFUSED",
];

/// What a capture is refused for until the buyer has done something: paid with 3-D Secure, or approved the order at all.
const FOR_THE_BUYER: [&str; 2] = ["PAYER_ACTION_REQUIRED", "ORDER_NOT_APPROVED"];

/// 4500 as `45.00`.
fn value(cents: i64) -> String {
    format!("{}.{:02}", cents / 100, cents % 100)
}

/// The body that makes an order. Codes of currencies are upper-case there.
fn wanted(order: &Order) -> Value {
    let value = value(order.amount_cents.into());
    json!({
        "intent": "CAPTURE",
        "purchase_units": [{
            "reference_id": order.key,
            "custom_id": order.key,
            "amount": {"currency_code": order.currency.to_ascii_uppercase(), "value": value},
        }],
    })
}

/// The first capture of an order.
fn capture_of(order: &Value) -> &Value {
    &order["purchase_units"][0]["payments"]["captures"][0]
}

/// The key that an order was made for; version 0.1 has no custom id.
fn key_of(order: &Value) -> Option<&str> {
    let unit = &order["purchase_units"][0];
    unit["custom_id"].as_str().or_else(|| unit["reference_id"].as_str())
}

/// How an order stands.
fn of_order(order: &Value) -> Option<Answer> {
    let object = order["id"].as_str()?.to_owned();
    Some(match (order["status"].as_str()?, capture_of(order)["status"].as_str()) {
        ("COMPLETED", Some("PENDING")) => Answer::Processing,
        ("COMPLETED", Some("DECLINED" | "FAILED")) => Answer::Declined,
        ("COMPLETED", _) => Answer::Charged { object },
        ("PAYER_ACTION_REQUIRED", _) => Answer::NeedsBuyer { object },
        ("CREATED" | "SAVED" | "APPROVED", _) => Answer::Unconfirmed,
        ("VOIDED", _) => Answer::Cancelled,
        _ => return None,
    })
}

fn issue(answer: &HttpAnswer) -> String {
    json_of(answer)["details"][0]["issue"].as_str().unwrap_or_default().to_owned()
}

fn of_answer(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    match answer.status {
        StatusCode::OK | StatusCode::CREATED => of_order(&json_of(answer)).ok_or_else(|| invalid_response(answer)),
        StatusCode::UNPROCESSABLE_ENTITY | StatusCode::BAD_REQUEST => match issue(answer).as_str() {
            "INSTRUMENT_DECLINED" => Err(ProviderError::Declined),
            issue if FOR_THE_BUYER.contains(&issue) => {
                let object = json_of(answer)["order_id"].as_str().unwrap_or_default().to_owned();
                Ok(Answer::NeedsBuyer { object })
            }
            issue if FINAL.contains(&issue) => Err(ProviderError::Refused(words(answer))),
            // Also of an order that was captured already: how it stands is for a read to say.
            _ => Err(no(answer, is_its_own(answer))),
        },
        _ => Err(no(answer, is_its_own(answer))),
    }
}

/// How an order that is read stands: one that was made waits for the buyer to approve it, and one that nobody has paid for is
/// removed in time.
fn of_read(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    let order = json_of(answer);
    if answer.status == StatusCode::NOT_FOUND && order["name"] == "RESOURCE_NOT_FOUND" {
        return Ok(Answer::Gone);
    }
    match (of_answer(answer)?, order["status"].as_str(), order["id"].as_str()) {
        (Answer::Unconfirmed, Some("CREATED" | "SAVED"), Some(id)) => Ok(Answer::NeedsBuyer { object: id.to_owned() }),
        (known, ..) => Ok(known),
    }
}

/// Whether PayPal itself says that something is wrong, and not something before it.
fn is_its_own(answer: &HttpAnswer) -> bool {
    json_of(answer)["name"].is_string()
}

fn of_creation(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    match answer.status {
        StatusCode::OK | StatusCode::CREATED => match json_of(answer)["id"].as_str() {
            Some(id) => Ok(Answer::Created { object: id.to_owned() }),
            None => Err(invalid_response(answer)),
        },
        StatusCode::UNPROCESSABLE_ENTITY if issue(answer) == "INSTRUMENT_DECLINED" => Err(ProviderError::Declined),
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY if is_its_own(answer) => {
            match issue(answer).as_str() {
                "DUPLICATE_REQUEST_ID" => Err(ProviderError::Unclear(words(answer))),
                _ => Err(ProviderError::Refused(words(answer))),
            }
        }
        _ => Err(no(answer, is_its_own(answer))),
    }
}

/// Which of the orders with one key is charged. That there is none says nothing.
fn of_search(answer: &HttpAnswer) -> Result<Answer, ProviderError> {
    let list = json_of(answer);
    let found = list["orders"].as_array().filter(|_| answer.status == StatusCode::OK);
    let found = found.ok_or_else(|| invalid_response(answer))?;
    let all: Vec<_> = found.iter().filter_map(of_order).collect();
    let charged = all.iter().find(|answer| matches!(answer, Answer::Charged { .. }));
    let waits = || all.iter().find(|answer| matches!(answer, Answer::Processing));
    Ok(charged.or_else(waits).cloned().unwrap_or(Answer::Unconfirmed))
}

#[async_trait]
impl ProviderClient for Paypal {
    fn name(&self) -> &str {
        self.0.dependency.name()
    }

    fn cancels(&self) -> bool {
        false
    }

    /// It keeps them for 6 h.
    fn keys_last(&self) -> Duration {
        Duration::from_secs(5 * 3_600)
    }

    async fn create(&self, order: &Order, number: i32) -> Reply {
        let call = post("/v2/checkout/orders".to_owned(), &step_key(&order.key, number, "create"), &wanted(order));
        self.0.create(call, &order.key, of_creation).await
    }

    async fn confirm(&self, order: &Order, object: &str, number: i32) -> Reply {
        let path = format!("/v2/checkout/orders/{}/capture", path_part(object));
        let call = post(path, &step_key(&order.key, number, "capture"), &json!({}));
        let mut reply = self.0.ask(call, &order.key, about(object, of_answer)).await;
        // An error does not name the order.
        if let Answer::NeedsBuyer { object: id } = &mut reply.answer {
            object.clone_into(id);
        }
        reply
    }

    async fn read(&self, object: &str) -> Reply {
        self.0.look(HttpCall::get(format!("/v2/checkout/orders/{}", path_part(object))), about(object, of_read)).await
    }

    async fn inspect(&self, object: &str) -> Result<Seen, String> {
        let call = HttpCall::get(format!("/v2/checkout/orders/{}", path_part(object)));
        self.0.inspect(call, about(object, of_read), key_of).await
    }

    async fn cancel(&self, object: &str) -> Reply {
        self.read(object).await
    }

    async fn search(&self, key: &str) -> Reply {
        let query = form_urlencoded::Serializer::new(String::new()).append_pair("reference_id", key).finish();
        self.0.look(HttpCall::get(format!("/v2/checkout/orders?{query}")), of_search).await
    }

    async fn charge_again(&self, order: &Order) -> Reply {
        let mut document = wanted(order);
        // To the letter what version 0.1 sends: another body under the same id is refused.
        if let Some(unit) = document["purchase_units"][0].as_object_mut() {
            unit.remove("custom_id");
            unit["amount"]["currency_code"] = json!(order.currency);
        }
        self.0.ask(post("/v2/checkout/orders".to_owned(), &order.key, &document), &order.key, of_answer).await
    }

    async fn refund(&self, key: &str, object: &str) -> Result<Refund, String> {
        let order = self.0.json(HttpCall::get(format!("/v2/checkout/orders/{}", path_part(object)))).await?;
        let of = |amount: &Value| amount["value"].as_str().and_then(cents);
        let capture = capture_of(&order);
        let charged = of(&capture["amount"]).ok_or("the order does not say what was captured")?;
        let before = order["purchase_units"][0]["payments"]["refunds"].as_array();
        let before = before.into_iter().flatten().map(|one| (Refund::of(one), of(&one["amount"])));
        let (cents, is_under_way) = match owed(charged, before)? {
            Owed::Nothing(refund) => return Ok(refund),
            Owed::Rest { cents, is_under_way } => (cents, is_under_way),
        };
        let id = capture["id"].as_str().ok_or("the order has no capture")?;
        let path = format!("/v2/payments/captures/{}/refund", path_part(id));
        let amount = json!({"currency_code": capture["amount"]["currency_code"], "value": value(cents)});
        refunded(&self.0.json(post(path, key, &json!({"amount": amount}))).await?, is_under_way)
    }

    async fn list(&self, from: i64, before: i64) -> Result<Listing, String> {
        let date = |seconds| jiff::Timestamp::from_second(seconds).map(|at| at.to_string()).map_err(|e| e.to_string());
        // Both ends count.
        let (start, end) = (date(from)?, date(before - 1)?);
        let mut all = Listing::default();
        for number in 1..=MAX_PAGES {
            let query = form_urlencoded::Serializer::new(String::new())
                .append_pair("start_date", &start)
                .append_pair("end_date", &end)
                .append_pair("fields", "transaction_info")
                .append_pair("page", &number.to_string())
                .append_pair("page_size", &PAGE.to_string())
                .finish();
            let page = self.0.page(HttpCall::get(format!("/v1/reporting/transactions?{query}"))).await?;
            let details = page["transaction_details"].as_array().ok_or("invalid list of transactions")?;
            for info in details.iter().map(|detail| &detail["transaction_info"]) {
                let amount = &info["transaction_amount"];
                let cents = amount["value"].as_str().and_then(cents).unwrap_or_default();
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                if info["transaction_status"] != "S" || cents == 0 {
                    continue;
                }
                // A refund is listed with what it takes away, and names the capture.
                if cents < 0 {
                    all.refunds.push((text(&info["paypal_reference_id"]), -cents));
                    continue;
                }
                all.charges.push(Listed {
                    key: text(&info["custom_field"]),
                    object: text(&info["paypal_reference_id"]),
                    amount_cents: cents,
                    charge: text(&info["transaction_id"]),
                    currency: text(&amount["currency_code"]).to_ascii_lowercase(),
                    refunded_cents: None,
                });
            }
            if number >= page["total_pages"].as_u64().unwrap_or(1) {
                return Ok(all);
            }
        }
        Err(format!("more than {MAX_PAGES} pages in one slice of time"))
    }

    async fn verify_event(&self, question: String) -> Result<bool, VerifyError> {
        let mut call = HttpCall::post("/v1/notifications/verify-webhook-signature", &Value::Null);
        call.body = question.into();
        let answer = self.0.raw(call).await.map_err(VerifyError::Failed)?;
        let is_about_the_event =
            matches!(answer.status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY) && is_its_own(&answer);
        if is_about_the_event {
            return Err(VerifyError::Invalid(words(&answer)));
        }
        if !answer.status.is_success() {
            return Err(VerifyError::Failed(format!("status {}: {}", answer.status, words(&answer))));
        }
        Ok(json_of(&answer)["verification_status"] == "SUCCESS")
    }

    async fn try_key(&self) {
        // Every valid key gets the answer that there is no such order.
        self.0.try_key(HttpCall::get("/v2/checkout/orders/NONE")).await;
    }

    fn key_trouble(&self) -> Option<KeyTrouble> {
        self.0.key_trouble()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("COMPLETED", Some("COMPLETED"), Some(Answer::Charged { object: "o".into() }))]
    #[case("COMPLETED", Some("PENDING"), Some(Answer::Processing))]
    #[case("COMPLETED", Some("DECLINED"), Some(Answer::Declined))]
    #[case("PAYER_ACTION_REQUIRED", None, Some(Answer::NeedsBuyer { object: "o".into() }))]
    #[case("APPROVED", None, Some(Answer::Unconfirmed))]
    #[case("VOIDED", None, Some(Answer::Cancelled))]
    #[case("OF_TOMORROW", None, None)]
    fn statuses(#[case] status: &str, #[case] capture: Option<&str>, #[case] expected: Option<Answer>) {
        let captures = capture.map(|status| json!([{"id": "c", "status": status}]));
        let order = json!({"id": "o", "status": status, "purchase_units": [{"payments": {"captures": captures}}]});
        assert_eq!(of_order(&order), expected);
    }

    #[rstest::rstest]
    #[case::final_one(422, r#"{"name":"UNPROCESSABLE_ENTITY","details":[{"issue":"TRANSACTION_REFUSED"}]}"#, true)]
    #[case::other(422, r#"{"name":"UNPROCESSABLE_ENTITY","details":[{"issue":"ORDER_ALREADY_CAPTURED"}]}"#, false)]
    #[case::of_tomorrow(400, r#"{"name":"INVALID_REQUEST","details":[{"issue":"OF_TOMORROW"}]}"#, false)]
    #[case::proxy(400, "<html>", false)]
    #[case::proxy_with_json(422, "{}", false)]
    fn only_what_is_known_to_be_final_refuses_a_capture(
        #[case] status: u16,
        #[case] body: &str,
        #[case] is_refused: bool,
    ) {
        let error = of_answer(&answer(status, body)).unwrap_err();
        assert_eq!(matches!(error, ProviderError::Refused(_)), is_refused, "{error}");
    }

    #[rstest::rstest]
    #[case("PAYER_ACTION_REQUIRED")]
    #[case("ORDER_NOT_APPROVED")]
    fn a_capture_that_needs_the_buyer_first_is_no_failure(#[case] issue: &str) {
        let body = json!({"name": "UNPROCESSABLE_ENTITY", "details": [{"issue": issue}]}).to_string();
        let captured = of_answer(&answer(422, &body)).unwrap();
        assert!(matches!(captured, Answer::NeedsBuyer { .. }), "{captured:?}");
    }

    #[rstest::rstest]
    #[case::waits_for_the_buyer("CREATED", Answer::NeedsBuyer { object: "o".into() })]
    #[case::the_buyer_has_acted("APPROVED", Answer::Unconfirmed)]
    #[case::captured("COMPLETED", Answer::Charged { object: "o".into() })]
    fn an_order_that_is_read(#[case] status: &str, #[case] expected: Answer) {
        let body = json!({"id": "o", "status": status}).to_string();
        assert_eq!(of_read(&answer(200, &body)).unwrap(), expected);
    }

    #[rstest::rstest]
    #[case(r#"{"name":"RESOURCE_NOT_FOUND"}"#, true)]
    #[case("<html>", false)]
    fn an_order_is_gone_when_paypal_says_so(#[case] body: &str, #[case] is_gone: bool) {
        assert_eq!(of_read(&answer(404, body)).is_ok_and(|read| read == Answer::Gone), is_gone);
    }

    fn answer(status: u16, body: &str) -> HttpAnswer {
        let (status, headers) = (StatusCode::from_u16(status).unwrap(), axum::http::HeaderMap::new());
        HttpAnswer { status, headers, body: body.to_owned().into(), from_ejected: false }
    }
}
