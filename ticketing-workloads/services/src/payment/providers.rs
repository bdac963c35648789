//! How the providers are spoken to: what every one of them has to offer, and what their answers mean.

use super::decision::Answer;
use super::https::{AskError, Https};
use super::key::{Key, KeyTrouble, Use};
use super::ledger::Order;
use super::repeated::{FailedOrders, Repetition};
use crate::http_client::{self, HttpAnswer, HttpCall, HttpError};
use async_trait::async_trait;
use axum::http::{HeaderValue, StatusCode};
use contract::CheckStatus;
use resilience::failure::Verdict;
use resilience::{CallError, Check, CheckOutcome, Dependency, Failure, FailureKind};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest text of a provider that is kept, in characters.
const MAX_WORDS: usize = 200;

/// What came of a request to a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub answer: Answer,
    /// Whether the circuit to it is open.
    pub unavailable: bool,
    /// Why, in words, if it is not the answer that was hoped for.
    pub reason: Option<String>,
}

impl Reply {
    fn of(answer: Answer) -> Self {
        Self { answer, unavailable: false, reason: None }
    }
}

/// How the money of a charge goes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refund {
    /// The money is back; with the provider's id of it.
    Made(String),
    /// It is under way, and may still fail.
    Pending,
}

impl Refund {
    /// By the id and the status that a provider says; `None`: it is none that gives money back.
    pub fn of(refund: &Value) -> Option<Self> {
        match refund["status"].as_str()? {
            "succeeded" | "COMPLETED" => Some(Self::Made(refund["id"].as_str()?.to_owned())),
            "pending" | "requires_action" | "PENDING" => Some(Self::Pending),
            _ => None,
        }
    }
}

/// What is left to do for a charge whose money is to go back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owed {
    /// Nothing: all of it is back, or under way.
    Nothing(Refund),
    /// To give so much back, besides what is under way.
    Rest { cents: i64, is_under_way: bool },
}

/// What is left of a charge of `charged` cents, by its refunds: each with how it stands, if it gives money back at all.
pub fn owed(charged: i64, refunds: impl IntoIterator<Item = (Option<Refund>, Option<i64>)>) -> Result<Owed, String> {
    let (mut rest, mut is_under_way, mut last) = (charged, false, None);
    for (refund, cents) in refunds {
        let Some(refund) = refund else { continue };
        rest -= cents.ok_or("a refund without an amount")?;
        is_under_way |= refund == Refund::Pending;
        last = Some(refund);
    }
    match last {
        Some(_) if rest <= 0 && is_under_way => Ok(Owed::Nothing(Refund::Pending)),
        Some(made) if rest <= 0 => Ok(Owed::Nothing(made)),
        _ => Ok(Owed::Rest { cents: rest, is_under_way }),
    }
}

/// How the money goes back after the rest of it was asked for.
pub fn refunded(made: &Value, is_under_way: bool) -> Result<Refund, String> {
    let refund = Refund::of(made);
    let refund =
        refund.ok_or_else(|| format!("the refund is {}", made["status"].as_str().unwrap_or("of no status")))?;
    Ok(if is_under_way { Refund::Pending } else { refund })
}

/// An object as a provider has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub answer: Answer,
    /// The key of the order that it was made for.
    pub key: Option<String>,
}

/// A charge as a provider lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The key of the order, as it was sent.
    pub key: String,
    /// The provider's id of the object that was confirmed.
    pub object: String,
    /// What its refunds call it.
    pub charge: String,
    pub amount_cents: i64,
    pub currency: String,
    /// How much of it went back; `None`: the list does not say.
    pub refunded_cents: Option<i64>,
}

/// What a provider lists of a slice of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    pub charges: Vec<Listed>,
    /// Money that went back in that time, whenever it was charged: by what the charge is called there, in cents.
    pub refunds: Vec<(String, i64)>,
}

/// Why it is unknown whether an event is genuine.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Events of this provider are not set up.
    #[error("{0} is not set")]
    NotSetUp(&'static str),
    /// What was sent is no event of it, whatever is tried again.
    #[error("no event of it: {0}")]
    Invalid(String),
    /// Too many are asked about at once.
    #[error("too many events at once")]
    Busy,
    /// It can be tried again.
    #[error("{0}")]
    Failed(String),
}

/// A provider, behind the layers of its dependency.
#[async_trait]
pub trait ProviderClient: Send + Sync {
    /// Its name, which is that of the dependency.
    fn name(&self) -> &str;

    /// Whether an object can be cancelled so that a late confirmation charges nothing.
    fn cancels(&self) -> bool;

    /// How long it keeps the keys of the one-step protocol for certain.
    fn keys_last(&self) -> Duration;

    /// Makes an object to confirm. Moves no money.
    async fn create(&self, order: &Order, number: i32) -> Reply;

    /// Confirms the object: from here on, money moves.
    async fn confirm(&self, order: &Order, object: &str, number: i32) -> Reply;

    /// How the object stands. Past the circuit: what has been charged can be known while no more charges are wanted.
    async fn read(&self, object: &str) -> Reply;

    /// The same, with the order that it was made for.
    async fn inspect(&self, object: &str) -> Result<Seen, String>;

    /// Cancels the object; of one that cannot be cancelled, how it stands.
    async fn cancel(&self, object: &str) -> Reply;

    /// One-step protocol of version 0.1: searches for a charge by the order's key.
    async fn search(&self, key: &str) -> Reply;

    /// One-step protocol of version 0.1: asks again with the order's own key.
    async fn charge_again(&self, order: &Order) -> Reply;

    /// Gives the money of a charge back, as far as that is not done or under way. Again with the same key is the same refund.
    async fn refund(&self, key: &str, object: &str) -> Result<Refund, String>;

    /// What it has charged of what was created from then on, and before that, in seconds since 1970; and what went back.
    async fn list(&self, from: i64, before: i64) -> Result<Listing, String>;

    /// Whether it says itself that an event is its own; for a provider whose events are signed by a shared secret, never.
    async fn verify_event(&self, _question: String) -> Result<bool, VerifyError> {
        Err(VerifyError::Failed("its events are verified here".to_owned()))
    }

    /// Looks whether our key can be sent; and asks for something that every valid key gets, if there is a reason to
    /// doubt ours.
    async fn try_key(&self);

    /// Why our key is good for nothing, if it is.
    fn key_trouble(&self) -> Option<KeyTrouble>;
}

/// Why a provider did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    #[error("declined")]
    Declined,
    /// This order's own answer: it says nothing of the provider.
    #[error("it refuses this order: {0}")]
    Refused(String),
    #[error("it does not take the API key: {0}; check the Secret that holds it")]
    Unauthorized(String),
    /// Nothing was sent: there is no key.
    #[error("the API key cannot be sent: {0}; see to the Secret that holds it")]
    NoKey(String),
    /// It takes the key, but not for this.
    #[error("it forbids this: {0}")]
    Forbidden(String),
    /// A "no" that leaves open how the object stands, such as one about a request with the same key.
    #[error("{0}")]
    Unclear(String),
    #[error("invalid provider response: {0}")]
    InvalidResponse(String),
    /// A failure that this order had before. It says nothing of other orders.
    #[error("it has failed for this order before: status {}", .answer.status)]
    Repeated {
        answer: Box<HttpAnswer>,
        /// Whether it answers so to this key for ever.
        for_ever: bool,
    },
    #[error(transparent)]
    Http(#[from] HttpError),
}

impl Failure for ProviderError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Declined | Self::Refused(_) | Self::Forbidden(_) | Self::Unclear(_) | Self::NoKey(_) => {
                FailureKind::Business
            }
            Self::Unauthorized(_) => FailureKind::Status(401),
            Self::InvalidResponse(_) | Self::Repeated { for_ever: true, .. } => FailureKind::Other,
            Self::Repeated { answer, .. } | Self::Http(HttpError::Status(answer)) => http_client::kind_of(answer),
            Self::Http(error) => error.kind(),
        }
    }

    fn verdict(&self) -> Verdict {
        match self {
            // Of a provider that was not asked, a key that is not there says nothing.
            Self::Repeated { .. } | Self::NoKey(_) => Verdict::Neutral,
            Self::Http(error) if error.is_isolated() => Verdict::Neutral,
            // Retried or not, it comes from something before the provider.
            Self::Http(HttpError::Status(answer)) if is_no_answer_of_its_own(answer.status) => Verdict::Failure,
            error => error.kind().verdict(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        if let Self::Http(error) = self { error.retry_after() } else { None }
    }
}

impl ProviderError {
    /// Whether it leaves open that this request did something, or still will. An answer of a server in trouble does: it may
    /// come from something before the provider, which works on.
    fn in_doubt(&self) -> bool {
        match self {
            Self::Declined
            | Self::Refused(_)
            | Self::Unauthorized(_)
            | Self::NoKey(_)
            | Self::Http(HttpError::NotSent(_)) => false,
            // Refused before anything else happens.
            Self::Http(HttpError::Status(answer)) => answer.status != StatusCode::TOO_MANY_REQUESTS,
            Self::Forbidden(_)
            | Self::Unclear(_)
            | Self::InvalidResponse(_)
            | Self::Repeated { .. }
            | Self::Http(_) => true,
        }
    }
}

/// Whether a status that is an error stands for an answer that the provider itself has not written.
fn is_no_answer_of_its_own(status: StatusCode) -> bool {
    status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS
}

/// Finds out what an answer means.
pub trait Reader: Fn(&HttpAnswer) -> Result<Answer, ProviderError> + Send + Sync {}

impl<F: Fn(&HttpAnswer) -> Result<Answer, ProviderError> + Send + Sync> Reader for F {}

/// The same of a request about one object. An answer about another one, such as a proxy that mixes them up gives, says nothing.
pub fn about(object: &str, read: impl Reader) -> impl Reader {
    move |answer: &HttpAnswer| {
        let id = json_of(answer)["id"].as_str().map(str::to_owned);
        match id.filter(|id| answer.status.is_success() && id != object) {
            Some(id) => Err(ProviderError::InvalidResponse(format!("it is about {id:.100}, not about {object}"))),
            None => read(answer),
        }
    }
}

/// One provider over HTTP.
pub struct Client {
    service: Https,
    pub dependency: &'static Dependency,
    /// Whether the answer to a key is the same for ever, also a "no".
    keeps_answers: bool,
    failed_orders: Mutex<FailedOrders>,
    key: Key,
}

impl Client {
    pub fn new(service: Https, dependency: &'static Dependency, keeps_answers: bool) -> Self {
        let (failed_orders, key) = Default::default();
        Self { service, dependency, keeps_answers, failed_orders, key }
    }

    async fn once(&self, call: HttpCall) -> Result<HttpAnswer, ProviderError> {
        self.known(self.service.ask(call).await)
    }

    /// An answer, with what it says of our key noted.
    fn known(&self, answer: Result<HttpAnswer, AskError>) -> Result<HttpAnswer, ProviderError> {
        let answer = match answer {
            Ok(answer) => answer,
            Err(AskError::NoKey(why)) => {
                self.key.is_unusable(&why);
                return Err(ProviderError::NoKey(why));
            }
            Err(AskError::Http(error)) => return Err(error.into()),
        };
        match answer.status {
            StatusCode::UNAUTHORIZED => {
                let words = words(&answer);
                self.key.is_refused(&words);
                return Err(ProviderError::Unauthorized(words));
            }
            StatusCode::FORBIDDEN => self.key.has_forbidden(),
            _ => self.key.is_taken(),
        }
        Ok(answer)
    }

    /// Looks whether our key can be sent; and asks for something that every valid key gets, if there is a reason to
    /// doubt ours, and keeps what it says.
    pub async fn try_key(&self, call: HttpCall) {
        if let Err(why) = self.service.has_key().await {
            self.key.is_unusable(&why.to_string());
            return;
        }
        self.key.is_usable();
        if !self.key.is_in_doubt() {
            return;
        }
        let time = Duration::from_millis(self.dependency.timeouts().per_try_ms);
        let Ok(Ok(answer)) = tokio::time::timeout(time, self.service.ask(call)).await else { return };
        let is_refused = matches!(answer.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        self.key.was_tried(is_refused.then(|| words(&answer)));
    }

    pub fn key_trouble(&self) -> Option<KeyTrouble> {
        self.key.trouble()
    }

    /// Notes what an answer says of the use that our key is for. That nothing could be asked says nothing.
    fn note_use(&self, usage: Use, order: &str, result: &Result<Answer, CallError<ProviderError>>) {
        match result {
            Ok(_) | Err(CallError::Failed { source: ProviderError::Declined | ProviderError::Refused(_), .. }) => {
                self.key.may(usage);
            }
            Err(CallError::Failed { source: ProviderError::Forbidden(words), .. }) => {
                self.key.may_not(usage, order, words);
            }
            Err(_) => {}
        }
    }

    /// Whether the policy retries it by its number.
    fn is_retried(&self, status: StatusCode) -> bool {
        status.is_client_error() && self.dependency.settings().retry.http_status_codes.contains(&status.as_u16())
    }

    /// Asks through all layers for an object for `order`.
    pub async fn create(&self, call: HttpCall, order: &str, read: impl Reader) -> Reply {
        let (result, in_doubt) = self.attempt(call, order, read).await;
        self.note_use(Use::Create, order, &result);
        reply(result, in_doubt, self.keeps_answers)
    }

    /// Asks through all layers for something that charges `order`.
    pub async fn ask(&self, call: HttpCall, order: &str, read: impl Reader) -> Reply {
        let (result, in_doubt) = self.attempt(call, order, read).await;
        self.note_use(Use::Charge, order, &result);
        // That an object is created says nothing of charges.
        if matches!(&result, Ok(_) | Err(CallError::Failed { source: ProviderError::Declined, .. })) {
            self.failed_orders().answered(order);
        }
        reply(result, in_doubt, self.keeps_answers)
    }

    /// The answer, and whether any attempt may still do something, or has.
    async fn attempt(
        &self,
        call: HttpCall,
        order: &str,
        read: impl Reader,
    ) -> (Result<Answer, CallError<ProviderError>>, bool) {
        // Whether any attempt leaves something open. One that is given up never gets to say that it does not.
        let in_doubt = AtomicBool::new(false);
        let attempt = || async {
            let before = in_doubt.swap(true, Ordering::Relaxed);
            let result = self.counted_once(order, self.once(call.clone()).await);
            let result = result.and_then(|answer| match read(&answer) {
                // The policy retries this status; not so if it is the provider's word for a "no".
                Err(ProviderError::InvalidResponse(_)) if self.is_retried(answer.status) => {
                    Err(HttpError::Status(Box::new(answer)).into())
                }
                known => known,
            });
            in_doubt.store(before || result.as_ref().is_err_and(ProviderError::in_doubt), Ordering::Relaxed);
            result
        };
        let result = self.dependency.call(attempt).await;
        (result, in_doubt.into_inner())
    }

    /// Marks a failure that this order had before.
    fn counted_once(
        &self,
        order: &str,
        result: Result<HttpAnswer, ProviderError>,
    ) -> Result<HttpAnswer, ProviderError> {
        match result {
            Err(ProviderError::Http(HttpError::Status(answer))) if answer.status.is_server_error() => {
                Err(match self.failed_orders().note(order, &answer) {
                    Repetition::None => HttpError::Status(answer).into(),
                    Repetition::SameOrder => ProviderError::Repeated { answer, for_ever: false },
                    Repetition::SameKey => ProviderError::Repeated { answer, for_ever: true },
                })
            }
            result => result,
        }
    }

    fn failed_orders(&self) -> MutexGuard<'_, FailedOrders> {
        self.failed_orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks once, past the circuit. It has the time of an attempt, even if nobody waits for it: it is what settles a payment
    /// of which the caller has given up.
    pub async fn look(&self, call: HttpCall, read: impl Reader) -> Reply {
        let answer = match self.raw(call).await {
            Ok(answer) => read(&answer).map_err(|error| error.to_string()),
            Err(reason) => Err(reason),
        };
        match answer {
            Ok(answer) => Reply::of(answer),
            Err(reason) => Reply { answer: Answer::Unanswered, unavailable: false, reason: Some(reason) },
        }
    }

    /// Asks once for an object and the order that it was made for.
    pub async fn inspect(
        &self,
        call: HttpCall,
        read: impl Reader,
        key: fn(&Value) -> Option<&str>,
    ) -> Result<Seen, String> {
        let answer = self.raw(call).await?;
        let seen = read(&answer).map_err(|error| error.to_string())?;
        Ok(Seen { answer: seen, key: key(&json_of(&answer)).map(str::to_owned) })
    }

    /// The answer to one request, past the circuit, within the time of an attempt.
    pub async fn raw(&self, call: HttpCall) -> Result<HttpAnswer, String> {
        self.in_time(self.service.ask(call)).await
    }

    async fn in_time(&self, asked: impl Future<Output = Result<HttpAnswer, AskError>>) -> Result<HttpAnswer, String> {
        let time = Duration::from_millis(self.dependency.timeouts().per_try_ms);
        match tokio::time::timeout(time, asked).await {
            Ok(answer) => self.known(answer).map_err(|error| error.to_string()),
            Err(_) => Err(format!("timed out after {} ms", time.as_millis())),
        }
    }

    /// The body of a successful answer.
    pub async fn json(&self, call: HttpCall) -> Result<Value, String> {
        Self::body_of(&self.raw(call).await?)
    }

    /// The same of a page of a list, which may be large.
    pub async fn page(&self, call: HttpCall) -> Result<Value, String> {
        Self::body_of(&self.in_time(self.service.ask_for_list(call)).await?)
    }

    fn body_of(answer: &HttpAnswer) -> Result<Value, String> {
        if !answer.status.is_success() {
            return Err(format!("status {}: {}", answer.status, words(answer)));
        }
        serde_json::from_slice(&answer.body).map_err(|error| error.to_string())
    }
}

/// What came of a request. `in_doubt`: an attempt at it may still do something, or has; `keeps_answers`: the answer to a key is
/// the same for ever, also a "no".
fn reply(result: Result<Answer, CallError<ProviderError>>, in_doubt: bool, keeps_answers: bool) -> Reply {
    // Where the same key is the same answer, it is that of an attempt before, too, should that have arrived.
    let counts = keeps_answers || !in_doubt;
    match result {
        Ok(Answer::NeedsBuyer { .. }) if !counts => {
            let reason = Some("it needs the buyer; an attempt before has no answer".to_owned());
            Reply { answer: Answer::Unanswered, unavailable: false, reason }
        }
        Ok(answer) => Reply::of(answer),
        Err(error) => {
            let unavailable = matches!(&error, CallError::Rejected { rejection, .. } if rejection.is_open_circuit());
            let answer = match &error {
                CallError::Failed { source: ProviderError::Declined, .. } if counts => Answer::Declined,
                // A refusal is kept for the key nowhere.
                CallError::Failed { source: ProviderError::Refused(_), .. } if !in_doubt => Answer::Refused,
                _ if in_doubt => Answer::Unanswered,
                _ => Answer::NotReached,
            };
            Reply { answer, unavailable, reason: Some(error.to_string()) }
        }
    }
}

/// `payment-provider-<name>`: whether our key is there, and taken. The provider is asked only after it refused the key
/// or forbade something, or the key was not there.
pub fn key_check(provider: &Arc<dyn ProviderClient>) -> Check {
    let (name, provider) = (provider.name().to_owned(), Arc::clone(provider));
    Check::new(&format!("payment-provider-{name}"), &["service", &name], move |_| {
        let provider = Arc::clone(&provider);
        async move {
            provider.try_key().await;
            match provider.key_trouble() {
                Some(trouble) => CheckOutcome::new(CheckStatus::Unhealthy, trouble.to_string()),
                None => CheckOutcome::new(CheckStatus::Healthy, "no request was refused for its API key"),
            }
        }
    })
    .when_unanswered(CheckStatus::Unknown)
    .dependency(&name)
}

pub fn json_of(answer: &HttpAnswer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_default()
}

/// What a provider says of an error, within bounds and on one line.
pub fn words(answer: &HttpAnswer) -> String {
    let body = json_of(answer);
    let known = ["/error/message", "/message", "/details/0/issue", "/error_description", "/name"];
    let text = known.iter().find_map(|path| body.pointer(path)?.as_str());
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let text: String = text.unwrap_or_default().chars().map(plain).take(MAX_WORDS).collect();
    if text.is_empty() { format!("status {}", answer.status) } else { text }
}

/// What a "no" means of which it is not certain that nothing else happens: it is about our key, or about the request.
/// Without an error body of the provider it comes from something before it, which is in trouble.
pub fn no(answer: &HttpAnswer, is_its_own: bool) -> ProviderError {
    match answer.status {
        StatusCode::FORBIDDEN if is_its_own => ProviderError::Forbidden(words(answer)),
        status if is_its_own && status.is_client_error() => ProviderError::Unclear(words(answer)),
        _ => invalid_response(answer),
    }
}

pub fn invalid_response(answer: &HttpAnswer) -> ProviderError {
    ProviderError::InvalidResponse(format!("status {}", answer.status))
}

/// A value for a header; keys are plain text, which was seen to when they came.
pub fn header_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("invalid"))
}

/// The key of a step of an attempt.
pub fn step_key(order: &str, number: i32, step: &str) -> String {
    format!("{order}:{number}:{step}")
}

/// A text as a part of a path.
pub fn path_part(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// `45.00` as 4500.
pub fn cents(value: &str) -> Option<i64> {
    let (sign, digits) = value.strip_prefix('-').map_or((1, value), |digits| (-1, digits));
    let (whole, part) = digits.split_once('.')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = is_number(whole) && is_number(part) && part.len() == 2;
    let part = plain.then(|| part.parse::<i64>().ok())??;
    Some(sign * whole.parse::<i64>().ok()?.checked_mul(100)?.checked_add(part)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderMap, header};

    #[rstest::rstest]
    #[case("45.00", Some(4_500))]
    #[case("-0.50", Some(-50))]
    #[case("-45.07", Some(-4_507))]
    #[case("--1.00", None)]
    #[case("1.+5", None)]
    #[case("45", None)]
    fn amounts(#[case] value: &str, #[case] expected: Option<i64>) {
        assert_eq!(cents(value), expected);
    }

    /// Who goes on with an attempt, such as a pod of another version, has to ask with the keys that it was begun with.
    #[test]
    fn a_step_of_an_attempt_always_has_the_same_key() {
        assert_eq!(step_key("order", 2, "confirm"), "order:2:confirm");
    }

    /// A charge of another buyer is none of this one, and nor is what was cancelled.
    #[rstest::rstest]
    #[case::itself(200, r#"{"id": "pi_1"}"#, true)]
    #[case::of_another(200, r#"{"id": "pi_2"}"#, false)]
    #[case::of_none(200, "{}", true)]
    #[case::an_error_names_what_it_likes(400, r#"{"id": "req_1"}"#, true)]
    fn an_answer_about_another_object_says_nothing(#[case] status: u16, #[case] body: &str, #[case] counts: bool) {
        let answer = HttpAnswer {
            status: StatusCode::from_u16(status).unwrap(),
            headers: HeaderMap::new(),
            body: body.to_owned().into(),
            from_ejected: false,
        };
        let read = about("pi_1", |_: &HttpAnswer| Ok(Answer::Cancelled));
        match read(&answer) {
            Ok(Answer::Cancelled) => assert!(counts),
            other => assert!(!counts && other.unwrap_err().in_doubt()),
        }
    }

    /// PayPal keeps no "no" for a request id: the attempt before may have captured the order, or still will.
    #[rstest::rstest]
    #[case::declined(declined(), false, false, Answer::Declined)]
    #[case::declined_after_a_doubt(declined(), true, false, Answer::Unanswered)]
    #[case::declined_by_one_who_keeps_it(declined(), true, true, Answer::Declined)]
    #[case::for_the_buyer(Ok(for_the_buyer()), false, false, for_the_buyer())]
    #[case::for_the_buyer_after_a_doubt(Ok(for_the_buyer()), true, false, Answer::Unanswered)]
    #[case::for_the_buyer_by_one_who_keeps_it(Ok(for_the_buyer()), true, true, for_the_buyer())]
    #[case::refused(refused(), false, true, Answer::Refused)]
    #[case::refused_after_a_doubt(refused(), true, true, Answer::Unanswered)]
    #[case::charged_after_a_doubt(Ok(charged()), true, false, charged())]
    fn a_no_counts_only_for_what_it_is_the_answer_to(
        #[case] result: Result<Answer, ProviderError>,
        #[case] in_doubt: bool,
        #[case] keeps_answers: bool,
        #[case] expected: Answer,
    ) {
        let failed = |source| CallError::Failed { dependency: "paypal".to_owned(), attempts: 2, source };
        assert_eq!(reply(result.map_err(failed), in_doubt, keeps_answers).answer, expected);
    }

    fn declined() -> Result<Answer, ProviderError> {
        Err(ProviderError::Declined)
    }

    fn refused() -> Result<Answer, ProviderError> {
        Err(ProviderError::Refused("no".to_owned()))
    }

    fn for_the_buyer() -> Answer {
        Answer::NeedsBuyer { object: "o".to_owned() }
    }

    fn charged() -> Answer {
        Answer::Charged { object: "o".to_owned() }
    }

    /// A part that went back counted as all of it.
    #[rstest::rstest]
    #[case::none(&[], Owed::Rest { cents: 100, is_under_way: false })]
    #[case::all(&[(Some(made()), 100)], Owed::Nothing(made()))]
    #[case::part(&[(Some(made()), 30)], Owed::Rest { cents: 70, is_under_way: false })]
    #[case::parts(&[(Some(made()), 30), (Some(made()), 70)], Owed::Nothing(made()))]
    #[case::under_way(&[(Some(made()), 30), (Some(Refund::Pending), 70)], Owed::Nothing(Refund::Pending))]
    #[case::part_under_way(&[(Some(Refund::Pending), 30)], Owed::Rest { cents: 70, is_under_way: true })]
    #[case::failed(&[(None, 100)], Owed::Rest { cents: 100, is_under_way: false })]
    fn the_rest_of_a_charge_goes_back(#[case] refunds: &[(Option<Refund>, i64)], #[case] expected: Owed) {
        let refunds = refunds.iter().map(|(refund, cents)| (refund.clone(), Some(*cents)));
        assert_eq!(owed(100, refunds), Ok(expected));
    }

    fn made() -> Refund {
        Refund::Made("re".into())
    }

    #[test]
    fn a_refund_of_which_nobody_knows_how_much_it_is_counts_for_nothing() {
        assert!(owed(100, [(Some(made()), None)]).is_err());
    }

    /// One of several addresses of a provider that fails alone opened the circuit to all of them.
    #[rstest::rstest]
    #[case::alone(true, Verdict::Neutral)]
    #[case::like_all(false, Verdict::Failure)]
    fn a_failure_of_one_endpoint_alone_says_nothing_of_the_provider(#[case] alone: bool, #[case] expected: Verdict) {
        let answer = HttpAnswer {
            status: StatusCode::SERVICE_UNAVAILABLE,
            headers: [(header::RETRY_AFTER, HeaderValue::from_static("1"))].into_iter().collect(),
            body: axum::body::Bytes::new(),
            from_ejected: alone,
        };
        for error in
            [HttpError::Status(Box::new(answer)), HttpError::Broken { why: "reset".to_owned(), from_ejected: alone }]
        {
            let error = ProviderError::from(error);
            assert_eq!(error.verdict(), expected, "{error}");
            assert!(error.in_doubt());
        }
    }

    /// Also where the policy retries that status: a proxy that refuses everything opens the circuit.
    #[rstest::rstest]
    #[case(404, Verdict::Failure)]
    #[case(502, Verdict::Failure)]
    #[case(429, Verdict::Neutral)]
    fn an_error_of_a_proxy_is_a_failure(#[case] status: u16, #[case] expected: Verdict) {
        let (status, headers) = (StatusCode::from_u16(status).unwrap(), HeaderMap::new());
        let answer = HttpAnswer { status, headers, body: axum::body::Bytes::new(), from_ejected: false };
        let error = ProviderError::from(HttpError::Status(Box::new(answer)));
        assert_eq!(error.verdict(), expected, "{error}");
    }
}
