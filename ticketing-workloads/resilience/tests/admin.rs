//! The admin port over a real socket.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use contract::admin::{
    ACTIONS_PATH, APPLIED_PATH, CONFIG_PATH, EFFECTIVE_PATH, HEALTH_PATH, MEMORY_FAULT_PATH, TOKEN_HEADER,
};
use contract::signing::{Advertised, ContentHash, Signed};
use contract::{
    Action, ActionAnswer, ActionOutcome, Applied, CheckStatus, EffectiveReport, HealthReport, MAX_CONFIG_BYTES, Origin,
    PolicySettings, PushAnswer, PushOutcome, RuntimeConfig, Section, WorkloadId,
};
use reqwest::{Client, Method, Response, StatusCode};
use resilience::control::admin::Admin;
use resilience::control::authentication::Authentication;
use resilience::fault_injection::FilledMemory;
use resilience::server::{Limits, serve};
use resilience::{Actions, Check, CheckOutcome, Checks, ConfigStore, Resilience, Tokens, clock};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

const TOKEN: &str = "the token in force";
const UID: &str = "5f2c8a3e-0b57-4c61-9d55-0a4f3a1c7b10";

struct Pod {
    base: String,
    admin: Arc<Admin>,
    runs: Arc<AtomicU32>,
    client: Client,
    _stop: DropGuard,
}

impl Pod {
    async fn start() -> Self {
        Self::start_with(Limits { head_timeout: Duration::from_secs(30), ..resilience::control::admin::LIMITS }).await
    }

    async fn start_with(limits: Limits) -> Self {
        Self::start_as(limits, None).await
    }

    async fn start_as(limits: Limits, faults: Option<Arc<FilledMemory>>) -> Self {
        let resilience = Resilience::builder(id()).dependency("database").build();
        let runs = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&runs);
        let reset = move || {
            let counter = Arc::clone(&counter);
            async move {
                tokio::task::yield_now().await;
                counter.fetch_add(1, Ordering::SeqCst);
                Ok("done".to_owned())
            }
        };
        let check =
            Check::new("database", &["critical"], |_| async { CheckOutcome::new(CheckStatus::Healthy, "fine") });
        let admin = Arc::new(Admin {
            store: ConfigStore::new(Arc::clone(&resilience)),
            checks: Checks::new(Arc::clone(&resilience), [check]),
            actions: Arc::new(Actions::new(Arc::clone(resilience.metrics())).on(
                Action::ResetConnections,
                "database",
                reset,
            )),
            auth: Authentication::new(Arc::default(), UID, "booking-1", "an instance"),
            pod: "booking-1".into(),
            faults,
            resilience,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, admin.router(), limits, stop.clone(), Duration::from_secs(1)));
        Self { base, admin, runs, client: Client::new(), _stop: stop.drop_guard() }
    }

    async fn with_token() -> Self {
        let pod = Self::start().await;
        pod.tokens().set(TOKEN.as_bytes(), b"the token before");
        pod
    }

    fn tokens(&self) -> &Tokens {
        self.admin.auth.tokens()
    }

    async fn call(&self, method: Method, path: &str, token: Option<&str>, body: Vec<u8>) -> Response {
        let mut request = self.client.request(method, format!("{}{path}", self.base)).body(body);
        if let Some(token) = token {
            request = request.header(TOKEN_HEADER, token);
        }
        request.send().await.unwrap()
    }

    /// A request that is signed with `token` for `audience` at `time_ms`.
    fn signed(&self, method: &Method, path: &str, body: Vec<u8>, signer: Signer<'_>) -> reqwest::RequestBuilder {
        let Signer { token, audience, time_ms } = signer;
        let signed = Signed { method: method.as_str(), path, time_ms, audience, content: ContentHash::of(&body) };
        let request = self.client.request(method.clone(), format!("{}{path}", self.base)).body(body);
        signed.headers(token.as_bytes()).into_iter().fold(request, |request, (name, value)| request.header(name, value))
    }

    async fn push(&self, body: Vec<u8>) -> PushAnswer {
        let answer = self.call(Method::PUT, CONFIG_PATH, Some(TOKEN), body).await;
        assert_eq!(answer.status(), StatusCode::OK);
        answer.json().await.unwrap()
    }

    async fn act(&self, intent: &str, check: &str) -> ActionAnswer {
        let body = json!({"intentId": intent, "action": "ResetConnections", "check": check}).to_string();
        let answer = self.call(Method::POST, ACTIONS_PATH, Some(TOKEN), body.into_bytes()).await;
        assert_eq!(answer.status(), StatusCode::OK);
        answer.json().await.unwrap()
    }
}

/// Who signs, for whom, and when.
#[derive(Clone, Copy)]
struct Signer<'a> {
    token: &'a str,
    audience: &'a str,
    time_ms: i64,
}

impl Default for Signer<'_> {
    fn default() -> Self {
        Self { token: TOKEN, audience: UID, time_ms: clock::now_ms() }
    }
}

fn id() -> WorkloadId {
    WorkloadId::deployment("ticketing", "booking")
}

fn document(revision: i64) -> Vec<u8> {
    RuntimeConfig::new(id(), revision, Section::default(), Section::default()).to_bytes().unwrap()
}

#[tokio::test]
async fn without_a_mounted_token_everything_is_refused_and_says_so() {
    let pod = Pod::start().await;
    for (method, path) in [
        (Method::PUT, CONFIG_PATH),
        (Method::GET, APPLIED_PATH),
        (Method::POST, ACTIONS_PATH),
        (Method::GET, HEALTH_PATH),
        (Method::GET, "/no/such/call"),
    ] {
        for token in [None, Some(""), Some(TOKEN)] {
            let answer = pod.call(method.clone(), path, token, Vec::new()).await;
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
            assert_eq!(answer.json::<Value>().await.unwrap()["reason"], "NoToken", "{path}");
        }
    }
}

#[tokio::test]
async fn only_the_current_and_the_previous_token_are_let_in() {
    let pod = Pod::with_token().await;
    for token in [None, Some(""), Some("the token"), Some("the token in force!")] {
        let answer = pod.call(Method::GET, HEALTH_PATH, token, Vec::new()).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["reason"], "WrongToken");
        assert!(!body.to_string().contains(TOKEN), "a refusal never tells a token");
    }
    for token in [TOKEN, "the token before"] {
        assert_eq!(pod.call(Method::GET, HEALTH_PATH, Some(token), Vec::new()).await.status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn signed_requests_are_accepted_and_end_the_plain_token() {
    let pod = Pod::with_token().await;
    assert_eq!(
        pod.push(document(1)).await.outcome,
        PushOutcome::Applied,
        "the plain token of an operator of version 0.1"
    );

    let push = |revision| pod.signed(&Method::PUT, CONFIG_PATH, document(revision), Signer::default()).send();
    let answer: PushAnswer = push(2).await.unwrap().json().await.unwrap();
    assert_eq!(answer.outcome, PushOutcome::Unchanged);
    let before = Signer { token: "the token before", ..Signer::default() };
    let answer = pod.signed(&Method::GET, HEALTH_PATH, Vec::new(), before).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let body = json!({"intentId": "i", "action": "ResetConnections", "check": "database"}).to_string();
    let act = || pod.signed(&Method::POST, ACTIONS_PATH, body.clone().into_bytes(), Signer::default()).send();
    let answers = [act().await.unwrap(), act().await.unwrap()].map(Response::json::<ActionAnswer>);
    let outcomes = futures::future::join_all(answers).await.into_iter().map(|answer| answer.unwrap().outcome);
    let expected = [ActionOutcome::Done, ActionOutcome::AlreadyDone];
    assert_eq!(outcomes.collect::<Vec<_>>(), expected, "a replayed action is not executed again");

    let plain = pod.call(Method::PUT, CONFIG_PATH, Some(TOKEN), document(3)).await;
    assert_eq!(plain.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(plain.json::<Value>().await.unwrap()["reason"], "PlainToken");
    let answer: PushAnswer = push(1).await.unwrap().json().await.unwrap();
    assert_eq!((answer.outcome, answer.applied.revision), (PushOutcome::RefusedOlder, 2), "nor is a replayed document");
}

#[rstest::rstest]
#[case::another_token(Signer { token: "another", ..Signer::default() }, "WrongSignature")]
#[case::no_token(Signer { token: "", ..Signer::default() }, "WrongSignature")]
#[case::for_another_pod(Signer { audience: "another uid", ..Signer::default() }, "WrongSignature")]
#[case::stale(Signer { time_ms: clock::now_ms() - 70_000, ..Signer::default() }, "ClockSkew")]
#[case::of_the_future(Signer { time_ms: clock::now_ms() + 70_000, ..Signer::default() }, "ClockSkew")]
#[tokio::test]
async fn a_bad_signature_is_refused_and_does_not_end_the_plain_token(#[case] signer: Signer<'_>, #[case] reason: &str) {
    let pod = Pod::with_token().await;
    let answer = pod.signed(&Method::PUT, CONFIG_PATH, document(9), signer).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["reason"], reason, "{body}");
    assert_eq!(pod.admin.report().applied.revision, 0);
    assert_eq!(pod.push(document(1)).await.outcome, PushOutcome::Applied);
}

#[tokio::test]
async fn a_body_that_was_changed_on_its_way_is_refused() {
    let pod = Pod::with_token().await;
    let action = |check: &str| json!({"intentId": "i", "action": "ResetConnections", "check": check}).to_string();
    for (method, path, signed, sent) in [
        (Method::PUT, CONFIG_PATH, document(1), document(2)),
        (Method::POST, ACTIONS_PATH, action("memory").into_bytes(), action("database").into_bytes()),
    ] {
        let request = pod.signed(&method, path, signed, Signer::default()).body(sent);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(answer.json::<Value>().await.unwrap()["reason"], "WrongSignature");
    }
    assert_eq!((pod.admin.report().applied.revision, pod.runs.load(Ordering::SeqCst)), (0, 0));
}

/// So that an operator finds out how to sign without sending a token.
#[tokio::test]
async fn every_answer_says_how_to_sign() {
    let pod = Pod::start().await;
    let advertised = |answer: &Response| {
        Advertised::read(|name| answer.headers().get(name).and_then(|value| value.to_str().ok())).unwrap()
    };
    let refusal = pod.call(Method::GET, HEALTH_PATH, None, Vec::new()).await;
    assert_eq!(refusal.status(), StatusCode::UNAUTHORIZED);
    let said = advertised(&refusal);
    assert!(said.is_of(UID, "booking-1"));
    assert!((said.time_ms.unwrap() - clock::now_ms()).abs() < 10_000);
    pod.tokens().set(TOKEN.as_bytes(), b"");
    assert_eq!(advertised(&pod.call(Method::GET, HEALTH_PATH, Some(TOKEN), Vec::new()).await).audience, UID);
}

#[tokio::test]
async fn tells_of_checks_circuits_and_configuration() {
    let pod = Pod::with_token().await;
    let report: HealthReport = pod.call(Method::GET, HEALTH_PATH, Some(TOKEN), Vec::new()).await.json().await.unwrap();
    assert_eq!((report.pod.as_str(), report.applied.revision), ("booking-1", 0));
    assert!(report.checks.contains_key("database") && report.circuits.contains_key("database"));
}

#[tokio::test]
async fn takes_configurations_and_lists_them() {
    let pod = Pod::with_token().await;
    let now = clock::now_ms();
    assert_eq!(pod.push(document(now)).await.outcome, PushOutcome::Applied);
    assert_eq!(pod.push(document(now)).await.outcome, PushOutcome::Unchanged);
    assert_eq!(pod.push(document(now - 1)).await.outcome, PushOutcome::RefusedOlder);
    assert_eq!(pod.push(document(i64::MAX)).await.outcome, PushOutcome::RefusedFuture);
    assert_eq!(pod.push(b"garbage".to_vec()).await.outcome, PushOutcome::RefusedInvalid);
    let applied: Vec<Applied> =
        pod.call(Method::GET, APPLIED_PATH, Some(TOKEN), Vec::new()).await.json().await.unwrap();
    assert_eq!(applied.iter().map(|one| one.revision).collect::<Vec<_>>(), [now]);
}

#[tokio::test]
async fn a_huge_body_is_refused_and_one_without_a_token_is_not_even_read() {
    let pod = Pod::with_token().await;
    let answer = pod.call(Method::PUT, CONFIG_PATH, Some(TOKEN), vec![b' '; MAX_CONFIG_BYTES + 1]).await;
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let answer = pod.call(Method::POST, ACTIONS_PATH, Some(TOKEN), vec![b' '; 5_000]).await;
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);

    let mut unauthorised = TcpStream::connect(pod.base.trim_start_matches("http://")).await.unwrap();
    let head = format!("PUT {CONFIG_PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n");
    unauthorised.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    unauthorised.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 401");
}

#[tokio::test]
async fn a_client_that_dawdles_over_its_head_is_cut_off() {
    let pod =
        Pod::start_with(Limits { head_timeout: Duration::from_millis(50), ..resilience::control::admin::LIMITS }).await;
    let mut slow = TcpStream::connect(pod.base.trim_start_matches("http://")).await.unwrap();
    slow.write_all(b"GET /health HTTP/1.1\r\nhost:").await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), slow.read_to_end(&mut rest)).await.unwrap().unwrap();
}

#[tokio::test]
async fn one_intent_acts_once_also_when_it_arrives_many_times_at_once() {
    let pod = Pod::with_token().await;
    let answers = futures::future::join_all((0..16).map(|_| pod.act("intent-1", "database"))).await;
    assert_eq!(pod.runs.load(Ordering::SeqCst), 1);
    assert_eq!(answers.iter().filter(|answer| answer.outcome == ActionOutcome::Done).count(), 1);
    assert_eq!(answers.iter().filter(|answer| answer.outcome == ActionOutcome::AlreadyDone).count(), 15);
    assert_eq!(pod.act("intent-2", "memory").await.outcome, ActionOutcome::Unsupported);
}

#[tokio::test]
async fn a_malformed_action_is_refused_and_one_of_tomorrow_is_unsupported() {
    let pod = Pod::with_token().await;
    for body in ["", "[]", r#"{"intentId": "", "action": "ResetConnections", "check": "database"}"#] {
        let answer = pod.call(Method::POST, ACTIONS_PATH, Some(TOKEN), body.into()).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{body}");
    }
    let body = json!({"intentId": "i", "action": "Levitate", "check": "database"}).to_string();
    let answer = pod.call(Method::POST, ACTIONS_PATH, Some(TOKEN), body.into_bytes()).await;
    assert_eq!(answer.json::<ActionAnswer>().await.unwrap().outcome, ActionOutcome::Unsupported);
    assert_eq!(pod.runs.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn says_what_it_runs_by_to_who_has_the_token() {
    let pod = Pod::with_token().await;
    assert_eq!(pod.call(Method::GET, EFFECTIVE_PATH, None, vec![]).await.status(), StatusCode::UNAUTHORIZED);
    let mut policy = PolicySettings::default();
    let said = serde_json::from_value(json!({"timeout": {"requestMs": 5_000}})).unwrap();
    policy.insert_dependency("database".into(), said);
    let policy = Section { sources: Vec::new(), settings: policy };
    pod.push(RuntimeConfig::new(id(), clock::now_ms(), policy, Section::default()).to_bytes().unwrap()).await;
    let answer = pod.call(Method::GET, EFFECTIVE_PATH, Some(TOKEN), vec![]).await;
    let report = EffectiveReport::parse(&answer.bytes().await.unwrap()).unwrap();
    let database = &report.dependencies["database"];
    assert_eq!((database.effective.timeout.request_ms, database.effective.timeout.per_try_ms), (5_000, 3_333));
    assert_eq!(database.origins["timeout.request"], Origin::Policy);
}

#[tokio::test]
async fn a_drill_fills_the_memory_of_a_process_that_allows_it_and_of_no_other() {
    let fill = |mebibytes: u32| json!({"mebibytes": mebibytes, "leaseSeconds": 60}).to_string().into_bytes();
    let pod = Pod::with_token().await;
    let refused = pod.call(Method::PUT, MEMORY_FAULT_PATH, Some(TOKEN), fill(1)).await;
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    assert_eq!(refused.json::<Value>().await.unwrap()["reason"], "FaultsNotAllowed");

    let memory = Arc::new(FilledMemory::default());
    let pod = Pod::start_as(resilience::control::admin::LIMITS, Some(Arc::clone(&memory))).await;
    pod.tokens().set(TOKEN.as_bytes(), b"");
    assert_eq!(pod.call(Method::PUT, MEMORY_FAULT_PATH, None, fill(1)).await.status(), StatusCode::UNAUTHORIZED);
    for wrong in [fill(1_000_000), b"{}".to_vec()] {
        let answer = pod.call(Method::PUT, MEMORY_FAULT_PATH, Some(TOKEN), wrong).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    }
    assert_eq!(memory.bytes(), 0);
    assert_eq!(pod.call(Method::PUT, MEMORY_FAULT_PATH, Some(TOKEN), fill(3)).await.status(), StatusCode::OK);
    assert_eq!(memory.bytes(), 3 << 20);
}
