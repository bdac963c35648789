//! Payment before providers that misbehave: nobody is ever charged twice, and what is not known is not guessed.

use crate::support::app::App;
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use contract::{
    CheckReport, CheckStatus, CircuitBreakerSettings, CircuitState, DependencySettings, FallbackSettings,
    FlagsSettings, HealthCheckSettings, PolicySettings, RetryOn, TripRule,
};
use futures::future::join_all;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// The ADR's shape of a policy for the providers, with shorter times.
fn quick() -> PolicySettings {
    let mut stripe = DependencySettings::default();
    stripe.timeout.request_ms = 2_000;
    stripe.timeout.per_try_ms = 300;
    stripe.retry.num_retries = 2;
    stripe.retry.base_interval_ms = 10;
    stripe.retry.retry_on = [RetryOn::ServerError].into();
    stripe.circuit_breaker = CircuitBreakerSettings {
        trip: TripRule::ConsecutiveFailures { failures: 3 },
        break_ms: 300,
        ..Default::default()
    };
    stripe.fallback = vec![FallbackSettings::Provider { provider: "paypal".into() }];
    let mut paypal = DependencySettings::default();
    paypal.timeout.request_ms = 1_000;
    paypal.timeout.per_try_ms = 300;
    paypal.retry.num_retries = 0;
    paypal.circuit_breaker.break_ms = 300;
    let check = HealthCheckSettings { interval_ms: 200, timeout_ms: 1_000, ..Default::default() };
    PolicySettings {
        health_checks: [("payment-provider-stripe".to_owned(), check)].into(),
        dependencies: [("stripe".to_owned(), stripe), ("paypal".to_owned(), paypal)].into(),
        ..Default::default()
    }
}

struct Stage {
    // Ends last.
    postgres: Postgres,
    providers: Providers,
    payment: App,
}

async fn stage() -> Stage {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let payment = App::payment(&postgres, &providers).await;
    payment.push(quick(), FlagsSettings::default()).await;
    Stage { postgres, providers, payment }
}

impl Stage {
    /// Asks for 45.00; the answer is the status and the body.
    async fn pay(&self, key: &str) -> (u16, Value) {
        self.pay_amount(key, 4_500).await
    }

    async fn pay_amount(&self, key: &str, amount_cents: i32) -> (u16, Value) {
        self.post(key, "", amount_cents).await
    }

    /// What a pod of version 0.1 leaves behind that dies after it has asked.
    async fn begun_by_version_0_1(&self, key: &str) {
        let insert = "INSERT INTO payments (key, amount_cents, currency) VALUES ($1, 4500, 'eur')";
        let client = self.postgres.connect().await;
        client.execute(insert, &[&key]).await.unwrap();
        let begun = "INSERT INTO payment_attempts (key, provider, state) VALUES ($1, 'stripe', 'Begun')";
        client.execute(begun, &[&key]).await.unwrap();
    }

    async fn post(&self, key: &str, path: &str, amount_cents: i32) -> (u16, Value) {
        let url = format!("http://{}/api/payments{path}", self.payment.address);
        let body = json!({"amountCents": amount_cents, "currency": "eur"}).to_string();
        let answer = self.payment.client.post(url).header("Idempotency-Key", key).body(body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    /// Asks until it is settled.
    async fn pay_in_the_end(&self, key: &str) -> (u16, Value) {
        crate::support::eventually("the payment is settled", async || {
            let (status, body) = self.pay(key).await;
            (status == 200 || status == 402).then_some((status, body))
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payment_is_made_once_however_often_it_is_asked_for() {
    let stage = stage().await;
    let (status, first) = stage.pay("a").await;
    assert_eq!((status, &first["provider"], &first["usedFallback"]), (200, &json!("stripe"), &json!(false)));
    assert_eq!(stage.pay("a").await, (200, first));
    assert_eq!(stage.providers.charged("a").await, ["stripe"]);
    let (status, other_amount) = stage.pay_amount("a", 4_501).await;
    assert_eq!((status, &other_amount["errorCode"]), (409, &json!("IDEMPOTENCY_KEY_REUSED")));
    assert_eq!(stage.pay("a").await.0, 200, "the payment itself is as it was");
}

#[rstest::rstest]
#[case::nobody_listens(json!({"refuse": true}))]
#[case::it_declines(json!({"decline": true}))]
#[tokio::test(flavor = "multi_thread")]
async fn the_second_provider_is_asked_when_the_first_has_not_charged(#[case] behaviour: Value) {
    let stage = stage().await;
    stage.providers.behave("stripe", behaviour).await;
    let (status, paid) = stage.pay("a").await;
    assert_eq!((status, &paid["provider"], &paid["usedFallback"]), (200, &json!("paypal"), &json!(true)));
    assert_eq!(stage.providers.charged("a").await, ["paypal"]);
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.pay("a").await, (200, paid), "also when the first is back");
    assert_eq!(stage.providers.charged("a").await, ["paypal"]);
}

/// The ADR's own code charges twice here.
#[rstest::rstest]
#[case::and_hangs("chargeThenHang")]
#[case::and_fails("chargeThenFail")]
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_charges_without_saying_so_is_found_out(#[case] how: &str) {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({how: true})).await;
    let (status, paid) = stage.pay("a").await;
    assert_eq!((status, &paid["provider"]), (200, &json!("stripe")));
    assert_eq!(stage.providers.charged("a").await, ["stripe"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_known_stays_open_and_nobody_else_is_asked() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    for _ in 0..3 {
        let (status, pending) = stage.pay("a").await;
        assert_eq!((status, &pending["status"]), (202, &json!("PaymentPending")));
    }
    // Gone altogether, it could be thought not to have charged.
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    assert_eq!(stage.pay("a").await.0, 202);
    assert_eq!(stage.providers.requests("paypal").await, 0);
    stage.providers.behave("stripe", json!({})).await;
    let (_, paid) = stage.pay_in_the_end("a").await;
    assert_eq!(paid["provider"], "stripe");
    assert_eq!(stage.providers.charged("a").await, ["stripe"]);
}

/// Making an object moves no money: that it had no answer is no doubt.
#[rstest::rstest]
#[case::slow(json!({"latencyMs": 700}))]
#[case::made_without_an_answer(json!({"createThenHang": true}))]
#[case::fails(json!({"failPercent": 100}))]
#[tokio::test(flavor = "multi_thread")]
async fn the_second_provider_is_asked_at_once_when_no_object_was_made(#[case] behaviour: Value) {
    let stage = stage().await;
    stage.providers.behave("stripe", behaviour).await;
    assert_eq!(stage.pay("a").await.1["provider"], "paypal");
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.pay("a").await.1["provider"], "paypal");
    assert_eq!(stage.providers.charged("a").await, ["paypal"]);
}

/// What is repeated because it had no answer goes with the key of the first time, so that it is done once.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_without_an_answer_is_repeated_with_its_own_key() {
    let stage = stage().await;
    let mut policy = quick();
    policy.dependencies.get_mut("stripe").unwrap().retry.retry_on = [RetryOn::Timeout].into();
    stage.payment.push(policy, FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"createThenHang": true})).await;
    let before = stage.providers.requests("stripe").await;
    assert_eq!(stage.pay("a").await.1["provider"], "paypal");
    assert!(stage.providers.requests("stripe").await >= before + 2, "it is repeated");
    let url = format!("http://{}/v1/payment_intents?limit=100", stage.providers.stripe);
    let list: Value = stage.payment.client.get(url).send().await.unwrap().json().await.unwrap();
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "{list}");
}

/// Case 1: a search that lags says nothing. Also of what version 0.1 has asked for in one step.
#[rstest::rstest]
#[case::two_steps(false)]
#[case::one_step(true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_search_that_lags_does_not_charge_twice(#[case] one_step: bool) {
    let stage = stage().await;
    if one_step {
        stage.begun_by_version_0_1("a").await;
    }
    let lags = json!({"chargeThenHang": true, "hide": !one_step, "searchLagMs": 3_600_000});
    stage.providers.behave("stripe", lags).await;
    for _ in 0..4 {
        assert_eq!(stage.pay("a").await.0, 202);
    }
    let minutes = "UPDATE payments SET created_at = created_at - interval '10 minutes'";
    stage.postgres.connect().await.execute(minutes, &[]).await.unwrap();
    let minutes = "UPDATE payment_attempts SET began_at = began_at - interval '10 minutes'";
    stage.postgres.connect().await.execute(minutes, &[]).await.unwrap();
    assert_eq!(stage.pay("a").await.0, 202, "the age of it proves nothing");
    assert_eq!(stage.providers.requests("paypal").await, 0);
    stage.providers.behave("stripe", json!({"searchLagMs": 3_600_000})).await;
    assert_eq!(stage.pay_in_the_end("a").await.1["provider"], "stripe");
    assert_eq!(stage.providers.charged("a").await, ["stripe"]);
}

/// Case 2: a failure that is stored for a key. The payment is cancelled there, and made under another key.
#[tokio::test(flavor = "multi_thread")]
async fn a_stored_failure_is_followed_by_an_attempt_with_another_key() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"storedFailure": true})).await;
    stage.providers.behave("paypal", json!({"refuse": true})).await;
    assert_eq!(stage.pay("a").await.0, 503, "it is certain that nothing is charged");
    let query = "SELECT state, number FROM payment_attempts WHERE provider = 'stripe'";
    let row = stage.postgres.connect().await.query_one(query, &[]).await.unwrap();
    assert_eq!((row.get::<_, String>(0), row.get::<_, i32>(1)), ("Uncharged".to_owned(), 1));
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.pay_in_the_end("a").await.1["provider"], "stripe");
    stage.providers.behave("paypal", json!({})).await;
    stage.providers.behave("stripe", json!({"storedFailure": true})).await;
    assert_eq!(stage.pay_in_the_end("b").await.1["provider"], "paypal");
    assert_eq!((stage.providers.charged("a").await.len(), stage.providers.charged("b").await.len()), (1, 1));
}

/// Case 2: what may charge is written down before it leaves. A pod may die at any moment after that: the next one must not take
/// the order for one that nobody was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_confirmation_is_written_down_before_it_leaves() {
    let mut stage = stage().await;
    let mut policy = quick();
    let stripe = policy.dependencies.get_mut("stripe").unwrap();
    (stripe.timeout.request_ms, stripe.timeout.per_try_ms) = (60_000, 60_000);
    stage.payment.push(policy, FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"chargeThenHang": true})).await;
    let is_charged = crate::support::eventually("it is charged", async || {
        (stage.providers.charged("a").await == ["stripe"]).then_some(())
    });
    tokio::select! {
        answer = stage.pay("a") => panic!("the provider has not answered: {answer:?}"),
        () = is_charged => {}
    }
    assert_eq!(stage.state("stripe").await, "Confirming");

    stage.execute("UPDATE payments SET claimed_until = now()").await;
    let next = App::payment(&stage.postgres, &stage.providers).await;
    next.push(quick(), FlagsSettings::default()).await;
    drop(std::mem::replace(&mut stage.payment, next));
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    assert_eq!(stage.pay("a").await.0, 202, "nobody else is asked");
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.pay_in_the_end("a").await.1["provider"], "stripe");
    assert_eq!(stage.providers.charged("a").await, ["stripe"]);
}

/// Case 2: its retries, with old keys and with new ones, shut the circuit for everybody.
#[tokio::test(flavor = "multi_thread")]
async fn one_order_whose_failure_is_stored_opens_no_circuit() {
    let stage = stage().await;
    stage.providers.behave("paypal", json!({"refuse": true})).await;
    for retried in [false, true] {
        stage.providers.behave("stripe", json!({"storedFailure": true})).await;
        let before = stage.providers.requests("stripe").await;
        for _ in 0..5 {
            assert_eq!(stage.pay(&format!("a-{retried}")).await.0, 503, "it is certain that nothing is charged");
        }
        assert!(stage.providers.requests("stripe").await >= before + 15, "each time it is asked anew");
        let opened = stage.payment.health().await.circuits["stripe"].opened_total;
        assert_eq!(opened, 0, "what happens to one order says nothing of the others");
        stage.providers.behave("stripe", json!({})).await;
        assert_eq!(stage.pay(&format!("b-{retried}")).await.1["provider"], "stripe");
    }
    stage.providers.behave("stripe", json!({"storedFailure": true})).await;
    for key in ["c", "d", "e"] {
        assert_eq!(stage.pay(key).await.0, 503);
    }
    assert_eq!(stage.payment.health().await.circuits["stripe"].opened_total, 1, "three orders are no accident");
}

/// PayPal's shape: the capture is in doubt, the order is there and not captured.
async fn in_doubt_at_paypal() -> Stage {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    stage.providers.behave("paypal", json!({"storedFailure": true})).await;
    assert_eq!(stage.pay("a").await.0, 202);
    stage.providers.behave("stripe", json!({})).await;
    stage
}

impl Stage {
    async fn execute(&self, sql: &str) {
        self.postgres.connect().await.execute(sql, &[]).await.unwrap();
    }

    /// What the provider calls what was asked of it.
    async fn object(&self) -> String {
        let query = "SELECT object_id FROM payment_attempts";
        self.postgres.connect().await.query_one(query, &[]).await.unwrap().get(0)
    }

    async fn state(&self, provider: &str) -> String {
        let query = "SELECT state FROM payment_attempts WHERE provider = $1";
        self.postgres.connect().await.query_one(query, &[&provider]).await.unwrap().get(0)
    }
}

#[rstest::rstest]
#[case::no_json(400)]
#[case::unprocessable(422)]
#[case::no_such_path(404)]
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_by_something_before_the_provider_does_not_end_a_doubt(#[case] status: u16) {
    let stage = in_doubt_at_paypal().await;
    stage.providers.behave("paypal", json!({"proxyStatus": status})).await;
    for _ in 0..3 {
        assert_eq!(stage.pay("a").await.0, 202);
    }
    assert_eq!(stage.state("paypal").await, "Confirming");
    assert!(stage.providers.charged("a").await.is_empty(), "nobody else is asked");
}

/// A failure that is stored for a request id is stored for that alone: the order is captured with the next one, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_capture_in_doubt_is_made_with_another_request_id_although_paypal_is_no_fallback_any_more() {
    let stage = in_doubt_at_paypal().await;
    stage.providers.behave("paypal", json!({})).await;
    let mut policy = quick();
    policy.dependencies.get_mut("stripe").unwrap().fallback = Vec::new();
    stage.payment.push(policy, FlagsSettings::default()).await;
    assert_eq!(stage.pay("a").await.0, 202, "the same request id is the same answer");
    stage.execute("UPDATE payment_attempts SET began_at = began_at - interval '2 minutes'").await;
    assert_eq!(stage.pay("a").await.1["provider"], "paypal");
    assert_eq!(stage.providers.charged("a").await, ["paypal"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_never_charges_and_ends_once_the_order_is_gone() {
    let stage = in_doubt_at_paypal().await;
    stage.providers.behave("paypal", json!({})).await;
    stage.execute("UPDATE payment_attempts SET began_at = began_at - interval '7 hours'").await;
    for _ in 0..2 {
        assert_eq!(stage.post("a", "/close", 4_500).await.0, 202);
        assert_eq!(stage.pay("a").await.0, 202, "it stays closed");
    }
    assert!(stage.providers.charged("a").await.is_empty());
    stage.execute("UPDATE payment_attempts SET object_id = 'removed' WHERE provider = 'paypal'").await;
    let (status, closed) = stage.post("a", "/close", 4_500).await;
    assert_eq!((status, &closed["errorCode"]), (402, &json!("PAYMENT_CLOSED")));
}

/// Version 0.1 writes `NotCharged` for what its search did not find.
#[tokio::test(flavor = "multi_thread")]
async fn not_charged_of_version_0_1_is_in_doubt() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"chargeThenHang": true, "searchLagMs": 3_600_000})).await;
    let one_step = [("amount", "4500"), ("currency", "eur"), ("confirm", "true"), ("metadata[key]", "a")];
    let url = format!("http://{}/v1/payment_intents", stage.providers.stripe);
    let request = stage.payment.client.post(url).header("Idempotency-Key", "a").timeout(Duration::from_millis(300));
    let body: Vec<_> = one_step.iter().map(|(name, value)| format!("{name}={value}")).collect();
    request.body(body.join("&")).send().await.unwrap_err();
    stage.begun_by_version_0_1("a").await;
    stage.execute("UPDATE payment_attempts SET state = 'NotCharged'").await;
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    assert_eq!(stage.pay("a").await.0, 202, "nobody else is asked");
    stage.providers.behave("stripe", json!({"searchLagMs": 3_600_000})).await;
    assert_eq!(stage.pay_in_the_end("a").await.1["provider"], "stripe");
    assert_eq!(stage.providers.charged("a").await, ["stripe"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_declined_intent_is_cancelled_so_that_nobody_confirms_it_later() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"decline": true})).await;
    assert_eq!(stage.pay("a").await.1["provider"], "paypal");
    assert_eq!(stage.state("stripe").await, "Declined");
    let query = "SELECT object_id FROM payment_attempts WHERE provider = 'stripe'";
    let object: String = stage.postgres.connect().await.query_one(query, &[]).await.unwrap().get(0);
    let url = format!("http://{}/v1/payment_intents/{object}", stage.providers.stripe);
    let intent: Value = stage.payment.client.get(url).send().await.unwrap().json().await.unwrap();
    assert_eq!(intent["status"], "canceled");
}

/// A proxy's 404 is no answer to an order: the other provider charges, and the circuit says that something is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_answers_404_declines_nobody_and_opens_the_circuit() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"proxyStatus": 404})).await;
    for key in ["a", "b", "c"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    }
    let circuits = stage.payment.health().await.circuits;
    assert_eq!(circuits["stripe"].state, CircuitState::Open);
    stage.providers.behave("paypal", json!({"proxyStatus": 404})).await;
    assert_eq!(stage.pay("d").await.0, 503, "not declined");
}

/// One order that the key may not be used for says nothing of the key, however often it is tried. That nothing at all can be
/// created does, although the key is taken and the other provider charges everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_which_nothing_can_be_created_is_said_by_a_check() {
    let stage = stage().await;
    let name = "payment-provider-stripe";
    stage.providers.behave("stripe", json!({"forbiddenKeys": ["a"]})).await;
    stage.providers.behave("paypal", json!({"refuse": true})).await;
    for _ in 0..6 {
        let before = stage.providers.requests("stripe").await;
        assert_eq!(stage.pay("a").await.0, 503);
        crate::support::eventually("the check tries the key, too", async || {
            (stage.providers.requests("stripe").await >= before + 2).then_some(())
        })
        .await;
    }
    // When the last run of it began, all before had said what they found.
    let report = stage.payment.health().await.checks.remove(name).unwrap();
    assert_eq!(report.status, CheckStatus::Healthy, "{}", report.message);

    stage.providers.behave("stripe", json!({"forbiddenKeys": ["*"]})).await;
    stage.providers.behave("paypal", json!({})).await;
    for key in ["b", "c", "d", "e"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    }
    let report = stage.payment.check(name, "it is restricted", |report| report.status == CheckStatus::Unhealthy).await;
    assert!(report.message.contains("The key may not do this"), "{}", report.message);
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.pay("good").await.1["provider"], "stripe");
    stage.payment.check(name, "it creates", |report| report.status == CheckStatus::Healthy).await;
}

/// A key may be good for everything but charging: each order makes an object before, which hid it.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_which_nothing_can_be_confirmed_is_said_by_a_check() {
    let stage = stage().await;
    let name = "payment-provider-stripe";
    stage.providers.behave("stripe", json!({"forbidCharges": true})).await;
    for key in ["a", "b", "c", "d"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    }
    assert_eq!(stage.payment.health().await.checks[name].status, CheckStatus::Healthy, "it may be about the orders");
    assert_eq!(stage.pay("e").await.1["provider"], "paypal");
    let unhealthy = |report: &CheckReport| report.status == CheckStatus::Unhealthy;
    let report = stage.payment.check(name, "nothing can be charged", unhealthy).await;
    assert!(report.message.contains("The key may not do this"), "{}", report.message);
    assert_eq!(stage.payment.health().await.circuits["stripe"].opened_total, 0, "that is no fault of the provider");
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.pay("good").await.1["provider"], "stripe");
    stage.payment.check(name, "it charges", |report| report.status == CheckStatus::Healthy).await;
}

/// A Secret that is not mounted, or is empty, took Stripe out for everybody, and all was green.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_not_there_is_said_by_a_check_before_anybody_pays() {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    let stripe = format!("https://{}", crate::support::nobody().await);
    let more = [("--stripe-url", stripe.as_str()), ("--stripe-api-key-file", file.to_str().unwrap())];
    let payment = App::payment_over(&postgres.url(), &more, &postgres, &providers).await;
    payment.push(quick(), FlagsSettings::default()).await;
    let stage = Stage { postgres, providers, payment };
    let name = "payment-provider-stripe";
    let unhealthy = |report: &CheckReport| report.status == CheckStatus::Unhealthy;
    let report = stage.payment.check(name, "the key is missing", unhealthy).await;
    assert!(report.message.contains("No such file"), "{}", report.message);
    std::fs::write(&file, "\n").unwrap();
    stage.payment.check(name, "it is empty", |report| unhealthy(report) && report.message.contains("empty")).await;
    for key in ["a", "b", "c", "d"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    }
    let circuits = stage.payment.health().await.circuits;
    assert_eq!(circuits["stripe"].opened_total, 0, "the provider was not asked");
    std::fs::write(&file, "sk_live").unwrap();
    stage.payment.check(name, "it is there", |report| report.status == CheckStatus::Healthy).await;
}

/// Case 3: the buyer has to act. That is no failure, and it ends.
#[rstest::rstest]
#[case::acts("stripe", "requiresAction", true)]
#[case::does_not("stripe", "requiresAction", false)]
#[case::acts_at_paypal("paypal", "requiresAction", true)]
#[case::does_not_at_paypal("paypal", "requiresAction", false)]
#[case::approves_at_paypal("paypal", "requiresApproval", true)]
#[case::never_approves_at_paypal("paypal", "requiresApproval", false)]
#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_who_has_to_act_learns_so_and_has_some_time(
    #[case] provider: &str,
    #[case] how: &str,
    #[case] acts: bool,
) {
    let stage = stage().await;
    // A single failure would open it, and a busy machine makes none.
    let mut policy = quick();
    for dependency in policy.dependencies.values_mut() {
        (dependency.timeout.request_ms, dependency.timeout.per_try_ms) = (10_000, 5_000);
        dependency.circuit_breaker.trip = TripRule::ConsecutiveFailures { failures: 1 };
    }
    stage.payment.push(policy, FlagsSettings::default()).await;
    if provider == "paypal" {
        stage.providers.behave("stripe", json!({"decline": true})).await;
    }
    stage.providers.behave(provider, json!({how: true})).await;
    for key in ["a", "b", "c", "d"] {
        let (status, waits) = stage.pay(key).await;
        let expected = (202, &json!("RequiresAction"), &json!(provider));
        assert_eq!((status, &waits["status"], &waits["provider"]), expected);
    }
    let circuits = stage.payment.health().await.circuits;
    assert!(circuits.values().all(|circuit| circuit.opened_total == 0), "{circuits:?}");
    stage.providers.behave(provider, json!({})).await;
    if acts {
        stage.providers.buyer_acts("a").await;
        assert_eq!(stage.pay("a").await.1["provider"], provider);
    } else {
        let (status, over) = stage.pay_in_the_end("a").await;
        assert_eq!((status, &over["errorCode"]), (402, &json!("PAYMENT_DECLINED")));
        stage.providers.buyer_acts("a").await;
        assert_eq!(stage.pay("a").await.0, 402, "too late");
    }
    assert_eq!(stage.providers.charged("a").await.len(), usize::from(acts));
}

/// The time of a buyer is over at some point, also if each try to confirm the payment ends with them again.
#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_gets_no_more_time_by_acting_in_vain() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"decline": true})).await;
    stage.providers.behave("paypal", json!({"requiresAction": true})).await;
    crate::support::eventually("it is over", async || {
        stage.providers.buyer_acts("a").await;
        (stage.pay("a").await.0 == 402).then_some(())
    })
    .await;
    assert_eq!(stage.state("paypal").await, "Expired");
}

/// Rows of version 0.1 of which nobody ever finds a charge kept their bookings for ever.
#[rstest::rstest]
#[case::two_days_later("2 days", (402, "PAYMENT_DECLINED"))]
#[case::too_early("23 hours", (202, ""))]
#[tokio::test(flavor = "multi_thread")]
async fn what_version_0_1_has_asked_for_ends_when_it_is_closed(#[case] age: &str, #[case] expected: (u16, &str)) {
    let stage = stage().await;
    stage.begun_by_version_0_1("a").await;
    stage.execute(&format!("UPDATE payments SET created_at = now() - interval '{age}'")).await;
    stage.execute(&format!("UPDATE payment_attempts SET began_at = now() - interval '{age}'")).await;
    let (status, answer) = stage.post("a", "/close", 4_500).await;
    assert_eq!((status, answer["errorCode"].as_str().unwrap_or_default()), expected);
    assert_eq!(stage.providers.charges().await.len(), 0);
}

/// Case 4: what is wrong with one order is that order's answer alone.
#[tokio::test(flavor = "multi_thread")]
async fn orders_that_are_not_valid_open_no_circuit() {
    let stage = stage().await;
    let bad = ["bad-1", "bad-2", "bad-3", "bad-4"];
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"invalidKeys": bad})).await;
    }
    for key in bad {
        let (status, refused) = stage.pay(key).await;
        assert_eq!((status, &refused["errorCode"]), (402, &json!("PAYMENT_DECLINED")));
    }
    assert_eq!(stage.pay("good").await.1["provider"], "stripe");
}

/// Case 4: the same when it is confirmed. A new object was made and refused each minute, for a day.
#[rstest::rstest]
#[case::the_other_one_charges(true, 200)]
#[case::there_is_no_other_one(false, 402)]
#[tokio::test(flavor = "multi_thread")]
async fn a_confirmation_that_is_not_valid_is_the_last_word(#[case] falls_back: bool, #[case] expected: u16) {
    let stage = stage().await;
    let mut policy = quick();
    if !falls_back {
        policy.dependencies.get_mut("stripe").unwrap().fallback = Vec::new();
    }
    stage.payment.push(policy, FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"invalidCharges": true})).await;
    for key in ["b", "c", "d", "a"] {
        assert_eq!(stage.pay(key).await.0, expected);
    }
    let query = "SELECT state, reason, object_id FROM payment_attempts WHERE provider = 'stripe' AND key = 'a'";
    let row = stage.postgres.connect().await.query_one(query, &[]).await.unwrap();
    let (state, reason, object): (String, String, String) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(state, "Refused");
    assert!(reason.contains("Amount must be at least 50 cents"), "{reason}");
    let url = format!("http://{}/v1/payment_intents/{object}", stage.providers.stripe);
    let intent: Value = stage.payment.client.get(url).send().await.unwrap().json().await.unwrap();
    assert_eq!(intent["status"], "canceled", "nobody confirms it later");
    let before = stage.providers.requests("stripe").await;
    assert_eq!(stage.pay("a").await.0, expected);
    assert_eq!(stage.providers.requests("stripe").await, before, "it is not asked again");
    assert_eq!(stage.payment.health().await.circuits["stripe"].opened_total, 0, "it says nothing of the others");
}

/// Case 4: a key that is not taken, or is good for nothing, is said by a check, with the provider's words.
#[rstest::rstest]
#[case::revoked("unauthorized", "Expired API Key provided")]
#[case::without_any_right("forbidden", "The key may not do this")]
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_said_by_a_check_and_the_other_provider_charges(#[case] how: &str, #[case] words: &str) {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({how: true})).await;
    for key in ["a", "b", "c", "d"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    }
    let name = "payment-provider-stripe";
    let unhealthy = |report: &CheckReport| report.status == CheckStatus::Unhealthy;
    let report = stage.payment.check(name, "the key is refused", unhealthy).await;
    assert!(report.message.contains(words), "{}", report.message);
    assert_eq!(stage.payment.health().await.circuits["stripe"].opened_total, 0, "that is no fault of the provider");
    stage.providers.behave("stripe", json!({})).await;
    stage.payment.check(name, "the key is taken", |report| report.status == CheckStatus::Healthy).await;
}

/// Case 4: the key is revoked between two steps of an order. What comes with such a key does nothing, so the order is not
/// left pending: the other provider charges it.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_revoked_before_the_confirmation_leaves_nothing_in_doubt() {
    let stage = stage().await;
    stage.execute("INSERT INTO payments (key, amount_cents, currency) VALUES ('a', 4500, 'eur')").await;
    let created = "INSERT INTO payment_attempts (key, provider, state, number, object_id)
                   VALUES ('a', 'stripe', 'Created', 1, 'pi_1')";
    stage.execute(created).await;
    stage.providers.behave("stripe", json!({"unauthorized": true})).await;
    let (status, paid) = stage.pay("a").await;
    assert_eq!((status, &paid["provider"]), (200, &json!("paypal")), "{paid}");
    assert_eq!(stage.providers.charged("a").await, ["paypal"]);
}

/// Events settle payments; repeated, forged and out of order they change nothing. They come through the gateway.
#[rstest::rstest]
#[case("stripe")]
#[case("paypal")]
#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_provider_settle_a_payment(#[case] provider: &str) {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec_old\nwhsec_new\n");
    let gateway = App::gateway_to_payment(crate::support::nobody().await, stage.payment.address).await;
    if provider == "paypal" {
        stage.providers.behave("stripe", json!({"refuse": true})).await;
    }
    stage.providers.behave(provider, json!({"chargeThenHang": true, "hide": true})).await;
    assert_eq!(stage.pay("a").await.0, 202);
    stage.providers.behave(provider, json!({})).await;
    let client = stage.postgres.connect().await;
    let query = "SELECT object_id FROM payment_attempts WHERE provider = $1";
    let object: String = client.query_one(query, &[&provider]).await.unwrap().get(0);
    let send = async |id: &str, genuine: bool| {
        let body = if provider == "stripe" {
            json!({"id": id, "type": "payment_intent.canceled", "data": {"object": {"id": object}}})
        } else {
            json!({"id": id, "event_type": "PAYMENT.CAPTURE.DENIED", "resource": {"id": object}})
        };
        // Its keys are in no order, as those of a real one.
        let body = format!(" {{\"zone\" : 1.50, {}", &body.to_string()[1..]);
        let url = format!("http://{}/api/webhooks/{provider}", gateway.address);
        let request = as_paypal(gateway.client.post(url));
        let signature = if genuine { sha256(&format!("t.{}", body.trim())) } else { "forged".to_owned() };
        let request = request.header("paypal-transmission-sig", signature);
        let request = request.header("stripe-signature", signed(&body, if genuine { "whsec_new" } else { "forged" }));
        request.body(body).send().await.unwrap().status().as_u16()
    };
    let state = async || {
        let query = "SELECT state FROM payment_attempts WHERE provider = $1";
        client.query_one(query, &[&provider]).await.unwrap().get::<_, String>(0)
    };
    assert_eq!(send("forged", false).await, 400);
    for id in ["evt-1", "evt-1", "evt-2"] {
        assert_eq!(send(id, true).await, 200);
    }
    crate::support::eventually("the event settles it", async || (state().await == "Charged").then_some(())).await;
    crate::support::eventually("both events are worked off", async || {
        let done = "SELECT count(*) FROM webhook_events WHERE done_at IS NOT NULL";
        (client.query_one(done, &[]).await.unwrap().get::<_, i64>(0) == 2).then_some(())
    })
    .await;
    assert_eq!((state().await.as_str(), stage.providers.charged("a").await.len()), ("Charged", 1));
    let metrics = stage.payment.get("/metrics").await.text().await.unwrap();
    for (outcome, count) in [("received", 2), ("repeated", 1), ("not_genuine", 1)] {
        let is_it = |line: &&str| {
            line.starts_with("payment_webhooks_total{")
                && line.contains(&format!("outcome=\"{outcome}\""))
                && line.contains(&format!("provider=\"{provider}\""))
        };
        let counted = metrics.lines().find(is_it).and_then(|line| line.rsplit(' ').next());
        assert_eq!(counted, Some(count.to_string().as_str()), "{outcome}");
    }
}

/// With what PayPal sends besides the signature.
fn as_paypal(request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
    let now = jiff::Timestamp::now().to_string();
    request
        .header("paypal-auth-algo", "SHA256withRSA")
        .header("paypal-cert-url", "https://api.paypal.com/v1/notifications/certs/CERT")
        .header("paypal-transmission-id", "t")
        .header("paypal-transmission-time", now)
}

impl Stage {
    /// Sends an event of Stripe about an object.
    async fn event_of_stripe(&self, id: &str, object: &str) {
        let body = json!({"id": id, "data": {"object": {"id": object}}}).to_string();
        let url = format!("http://{}/api/webhooks/stripe", self.payment.address);
        let request = self.payment.client.post(url).header("stripe-signature", signed(&body, "whsec"));
        assert_eq!(request.body(body).send().await.unwrap().status(), 200);
    }

    /// A booking that waits for the payment with this key, and asks for it in an hour.
    async fn booking(&self, key: &str) {
        let insert = "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, amount_cents, settle_at)
                      SELECT $1::text::uuid, id, 'ann', 1, 'PaymentPending', 'k', 4500, now() + interval '1 hour'
                      FROM events LIMIT 1";
        self.postgres.connect().await.execute(insert, &[&key]).await.unwrap();
    }

    /// Whether the booking asks for its payment now.
    async fn is_due(&self) -> bool {
        let query = "SELECT settle_at <= now() FROM bookings";
        self.postgres.connect().await.query_one(query, &[]).await.unwrap().get(0)
    }
}

const BOOKING: &str = "11111111-2222-4333-8444-555555555555";

/// A provider that has charged what it said it had not: its event is about an object of which nothing was expected any more.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_about_a_charge_that_was_out_of_the_question_settles_the_payment() {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec\n");
    assert_eq!(stage.pay(BOOKING).await.0, 200);
    let object = stage.object().await;
    stage.execute("UPDATE payment_attempts SET state = 'Uncharged', charge_id = NULL").await;
    stage.booking(BOOKING).await;
    stage.event_of_stripe("evt", &object).await;
    crate::support::eventually("it is charged", async || (stage.state("stripe").await == "Charged").then_some(()))
        .await;
    crate::support::eventually("booking asks now", async || stage.is_due().await.then_some(())).await;
    assert_eq!(stage.pay(BOOKING).await.1["paymentId"], json!(object));
}

/// The same when the booking is cancelled already, or when the object is an earlier one and the payment has got another charge.
#[rstest::rstest]
#[case::cancelled("UPDATE payment_attempts SET state = 'Declined', charge_id = NULL", "the booking was cancelled")]
#[case::another_object("UPDATE payment_attempts SET charge_id = 'other', object_id = 'other'", "charged besides")]
#[case::another_provider(
    "WITH other AS (INSERT INTO payment_attempts (key, provider, state, charge_id) SELECT key, 'paypal', 'Charged', 'p' FROM payments)
     UPDATE payment_attempts SET state = 'Uncharged', charge_id = NULL",
    "charged besides"
)]
#[tokio::test(flavor = "multi_thread")]
async fn an_event_about_a_charge_that_nobody_wants_any_more_has_it_refunded(#[case] sql: &str, #[case] reason: &str) {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec\n");
    assert_eq!(stage.pay(BOOKING).await.0, 200);
    let object = stage.object().await;
    stage.execute(sql).await;
    if reason == "the booking was cancelled" {
        stage.booking(BOOKING).await;
        stage.execute("UPDATE bookings SET status = 'Cancelled', settle_at = NULL, cancel_reason = 'declined'").await;
        // Out of reach of the search for such charges.
        stage.execute("UPDATE bookings SET created_at = now() - interval '40 days'").await;
    }
    stage.event_of_stripe("evt-1", &object).await;
    stage.event_of_stripe("evt-2", &object).await;
    crate::support::eventually("it is refunded", async || {
        stage.providers.charges().await.iter().all(|charge| charge["refunded"] == json!(true)).then_some(())
    })
    .await;
    let client = stage.postgres.connect().await;
    let rows = client.query("SELECT charge_id, reason FROM refunds", &[]).await.unwrap();
    let rows: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, [(object, reason.to_owned())]);
}

/// A signature as Stripe makes it, of this moment.
fn signed(body: &str, secret: &str) -> String {
    use hmac::Mac;
    let now = crate::support::app::now_ms() / 1_000;
    let mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    let mac = mac.chain_update(format!("{now}.{body}")).finalize().into_bytes();
    format!("t={now},v1={}", hex(&mac))
}

fn sha256(text: &str) -> String {
    use sha2::Digest;
    hex(&sha2::Sha256::digest(text))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

/// Anybody can send something to the address of a provider's events: that shuts nobody out, and costs no request to PayPal
/// unless it may be genuine.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_anybody_sends_shut_no_provider_out() {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec\n");
    let mut policy = quick();
    policy.dependencies.get_mut("paypal").unwrap().timeout.per_try_ms = 60_000;
    policy.dependencies.get_mut("paypal").unwrap().timeout.request_ms = 60_000;
    stage.payment.push(policy, FlagsSettings::default()).await;
    let gateway = App::gateway_to_payment(crate::support::nobody().await, stage.payment.address).await;
    let url = |provider: &str| format!("http://{}/api/webhooks/{provider}", gateway.address);
    let before = stage.providers.requests("paypal").await;
    for _ in 0..30 {
        let answer = gateway.client.post(url("paypal")).body("{}").send().await.unwrap();
        assert_eq!(answer.status(), 400, "it has no headers");
        let mut request = gateway.client.post(url("paypal"));
        for name in ["auth-algo", "cert-url", "transmission-id", "transmission-sig", "transmission-time"] {
            request = request.header(format!("paypal-{name}"), "any");
        }
        assert_eq!(request.body("{}").send().await.unwrap().status(), 400, "its headers are nonsense");
    }
    assert_eq!(stage.providers.requests("paypal").await, before);
    let genuine_of_stripe = async || {
        let body = json!({"id": "evt", "data": {"object": {"id": "pi_1"}}}).to_string();
        let request = gateway.client.post(url("stripe")).header("stripe-signature", signed(&body, "whsec"));
        request.body(body).send().await.unwrap().status()
    };
    let maybe_of_paypal = |url: String| {
        let request = as_paypal(gateway.client.post(url)).header("paypal-transmission-sig", "forged");
        request.body(r#"{"id":"evt"}"#)
    };

    // Those of PayPal cannot be verified now.
    stage.providers.behave("paypal", json!({"failPercent": 100})).await;
    for _ in 0..30 {
        assert_eq!(maybe_of_paypal(url("paypal")).send().await.unwrap().status(), 503);
    }
    let circuits = gateway.health().await.circuits;
    assert_eq!(circuits["paypal-events"].state, CircuitState::Open);
    assert_eq!(genuine_of_stripe().await, 200);

    // PayPal takes its time with as many as it is asked about at once.
    stage.providers.behave("paypal", json!({"latencyMs": 3_600_000})).await;
    let before = stage.providers.requests("paypal").await;
    let url_at_payment = format!("http://{}/api/webhooks/paypal", stage.payment.address);
    for _ in 0..8 {
        tokio::spawn(maybe_of_paypal(url_at_payment.clone()).send());
    }
    crate::support::eventually("all places are taken", async || {
        (stage.providers.requests("paypal").await == before + 8).then_some(())
    })
    .await;
    let busy = maybe_of_paypal(url_at_payment).send().await.unwrap();
    assert_eq!(busy.status(), 429);
    assert_eq!(busy.headers()["x-refused"], "true");
    assert_eq!(genuine_of_stripe().await, 200, "it needs none");
}

/// Each look had booking ask, and so a buyer who was declined meanwhile got no answer.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_says_nothing_new_has_nobody_ask() {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec\n");
    stage.providers.behave("stripe", json!({"processing": true})).await;
    assert_eq!(stage.pay(BOOKING).await.0, 202);
    stage.booking(BOOKING).await;
    stage.event_of_stripe("evt", &stage.object().await).await;
    let client = stage.postgres.connect().await;
    // The third look begins when the second one is over.
    crate::support::eventually("it was looked at twice", async || {
        let tries = client.query_one("SELECT tries FROM webhook_events", &[]).await.unwrap();
        (tries.get::<_, i32>(0) >= 3).then_some(())
    })
    .await;
    assert!(!stage.is_due().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_looked_at_until_its_payment_has_a_definite_answer() {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec\n");
    stage.providers.behave("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    assert_eq!(stage.pay(BOOKING).await.0, 202);
    stage.booking(BOOKING).await;
    stage.event_of_stripe("evt", &stage.object().await).await;
    let client = stage.postgres.connect().await;
    crate::support::eventually("it was looked at twice", async || {
        let row = client.query_one("SELECT tries, done_at IS NULL FROM webhook_events", &[]).await.unwrap();
        assert!(row.get::<_, bool>(1), "nothing is known of the payment");
        (row.get::<_, i32>(0) >= 2).then_some(())
    })
    .await;
    stage.providers.behave("stripe", json!({})).await;
    crate::support::eventually("it is done", async || {
        let row = client.query_one("SELECT done_at IS NOT NULL FROM webhook_events", &[]).await.unwrap();
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    assert_eq!(stage.state("stripe").await, "Charged");
    assert!(stage.is_due().await);
}

/// Nothing is charged for what was closed, and what was charged stays so.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_payment_is_never_charged() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"requiresAction": true})).await;
    assert_eq!(stage.pay("a").await.0, 202);
    assert_eq!(stage.post("a", "/close", 4_500).await.0, 402);
    stage.providers.behave("stripe", json!({})).await;
    stage.providers.buyer_acts("a").await;
    assert_eq!(stage.pay("a").await.0, 402);
    assert_eq!(stage.post("never-asked", "/close", 4_500).await.1["errorCode"], "PAYMENT_CLOSED");
    assert_eq!(stage.pay("never-asked").await.0, 402);
    assert_eq!(stage.providers.charges().await.len(), 0);
    assert_eq!(stage.pay("paid").await.0, 200);
    assert_eq!(stage.post("paid", "/close", 4_500).await.0, 200, "it is charged");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_circuit_is_no_reason_to_wait() {
    let stage = stage().await;
    let mut policy = quick();
    policy.dependencies.get_mut("stripe").unwrap().circuit_breaker.break_ms = 60_000;
    stage.payment.push(policy, FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    for key in ["a", "b", "c"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    }
    stage.providers.behave("paypal", json!({"refuse": true})).await;
    let (status, failed) = stage.pay("d").await;
    assert_eq!((status, &failed["errorCode"]), (503, &json!("ALL_PROVIDERS_FAILED")));
    assert_eq!(failed["providers"], json!({"stripe": "PROVIDER_UNAVAILABLE", "paypal": "PROCESSING_ERROR"}));
    stage.providers.behave("paypal", json!({})).await;
    assert_eq!(stage.pay("d").await.1["provider"], "paypal", "it may be asked for again");
}

/// A provider that is down may say "in a second" for hours: no order went to the other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_always_says_when_to_come_back_is_left_for_the_other_one() {
    let stage = stage().await;
    let mut policy = quick();
    let stripe = policy.dependencies.get_mut("stripe").unwrap();
    stripe.retry.retry_on = [RetryOn::ServerError, RetryOn::RateLimited].into();
    stripe.retry.num_retries = 1;
    stripe.timeout.request_ms = 3_000;
    stripe.circuit_breaker.break_ms = 60_000;
    stage.payment.push(policy, FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"failPercent": 100, "failRetryAfter": 1})).await;
    for key in ["a", "b", "c"] {
        assert_eq!(stage.pay(key).await.1["provider"], "paypal", "no object was made there");
    }
    let asked = stage.providers.requests("stripe").await;
    let (status, paid) = stage.pay("d").await;
    assert_eq!((status, &paid["provider"]), (200, &json!("paypal")));
    assert_eq!(stage.providers.requests("stripe").await, asked, "its circuit is open: nobody waits for it any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decline_by_both_is_the_last_word() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"decline": true})).await;
    stage.providers.behave("paypal", json!({"decline": true})).await;
    for _ in 0..2 {
        let (status, declined) = stage.pay("a").await;
        assert_eq!((status, &declined["errorCode"]), (402, &json!("PAYMENT_DECLINED")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn charging_can_be_turned_off() {
    let stage = stage().await;
    let flag = json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "off"});
    let flags = serde_json::from_value(json!({"flags": {"EnableExternalPaymentProviders": flag}})).unwrap();
    stage.payment.push(quick(), flags).await;
    let (status, off) = stage.pay("a").await;
    assert_eq!((status, &off["errorCode"]), (503, &json!("PAYMENTS_TURNED_OFF")));
    assert_eq!(stage.providers.requests("stripe").await + stage.providers.requests("paypal").await, 0);
    stage.payment.push(quick(), FlagsSettings::default()).await;
    assert_eq!(stage.pay("a").await.0, 200);
}

/// Many payments, each asked for by several at once, while both providers change their ways all the time.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_charged_twice_whatever_the_providers_do() {
    let stage = &stage().await;
    let ways = [
        ("stripe", json!({"chargeThenHang": true})),
        ("paypal", json!({"chargeThenFail": true})),
        ("stripe", json!({"failPercent": 50})),
        ("stripe", json!({"refuse": true})),
        ("stripe", json!({})),
        ("paypal", json!({"chargeThenHang": true, "hide": true})),
        ("stripe", json!({"chargeThenFail": true, "hide": true})),
        ("paypal", json!({"latencyMs": 400})),
        ("stripe", json!({"latencyMs": 350})),
        ("stripe", json!({"storedFailure": true})),
        ("paypal", json!({"failPercent": 30})),
    ];
    let keys: Vec<String> = (0..60).map(|key| format!("payment-{key}")).collect();
    let changing = async {
        for (provider, way) in &ways {
            stage.providers.behave(provider, way.clone()).await;
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    let asking = join_all(keys.iter().enumerate().map(|(nth, key)| async move {
        tokio::time::sleep(Duration::from_millis(40) * u32::try_from(nth).unwrap()).await;
        for _ in 0..6 {
            join_all((0..3).map(|_| stage.pay(key))).await;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }));
    tokio::join!(changing, asking);
    stage.providers.behave("stripe", json!({})).await;
    stage.providers.behave("paypal", json!({})).await;
    let paid = join_all(keys.iter().map(|key| stage.pay_in_the_end(key))).await;
    assert!(paid.iter().all(|(status, _)| *status == 200), "every payment is made in the end");
    let mut charges = BTreeMap::new();
    for charge in stage.providers.charges().await {
        *charges.entry(charge["key"].as_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert_eq!(charges, keys.into_iter().map(|key| (key, 1)).collect());
}

/// The policy with so much time for a provider that nothing times out.
fn patient() -> PolicySettings {
    let mut policy = quick();
    for dependency in policy.dependencies.values_mut() {
        (dependency.timeout.request_ms, dependency.timeout.per_try_ms) = (60_000, 60_000);
    }
    policy
}

/// As many as a pod works off side by side of one provider, with ten connections to the database.
const AT_ONCE: u64 = 5;

/// A payment that PayPal has charged with this key; and then Stripe takes requests and answers none.
async fn charged_by_paypal_and_stripe_hangs(key: &str) -> Stage {
    let stage = stage().await;
    stage.payment.push(patient(), FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    assert_eq!(stage.pay(key).await.1["provider"], "paypal");
    stage.providers.behave("stripe", json!({"latencyMs": 3_600_000})).await;
    stage
}

impl Stage {
    /// Stripe has got so many requests more than before, and answered none.
    async fn stripe_is_asked(&self, before: u64) {
        crate::support::eventually("as many are asked for as may be at once", async || {
            (self.providers.requests("stripe").await == before + AT_ONCE).then_some(())
        })
        .await;
    }

    async fn count(&self, sql: &str) -> i64 {
        self.postgres.connect().await.query_one(sql, &[]).await.unwrap().get(0)
    }
}

/// A buyer who had confirmed a payment waited until all events before were looked up one after the other, also at the
/// other provider, for as long as that one hung.
#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_provider_that_hangs_hold_up_none_of_the_other() {
    let stage = charged_by_paypal_and_stripe_hangs("a").await;
    let before = stage.providers.requests("stripe").await;
    stage
        .execute(
            "INSERT INTO webhook_events (provider, event_id, object_id)
             SELECT 'stripe', 'evt-' || nth, 'pi_' || nth FROM generate_series(1, 30) nth",
        )
        .await;
    stage.stripe_is_asked(before).await;
    stage.execute("UPDATE payment_attempts SET state = 'Uncharged', charge_id = NULL WHERE provider = 'paypal'").await;
    stage
        .execute(
            "INSERT INTO webhook_events (provider, event_id, object_id)
             SELECT provider, 'evt', object_id FROM payment_attempts WHERE provider = 'paypal'",
        )
        .await;
    crate::support::eventually("the event of PayPal settles its payment", async || {
        (stage.state("paypal").await == "Charged").then_some(())
    })
    .await;
    assert_eq!(
        stage.count("SELECT count(*) FROM webhook_events WHERE done_at IS NULL AND provider = 'stripe'").await,
        30
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_events_take_seconds() {
    let stage = &stage().await;
    stage.payment.push(patient(), FlagsSettings::default()).await;
    let keys: Vec<String> = (0..200).map(|key| format!("payment-{key}")).collect();
    for keys in keys.chunks(20) {
        let paid = join_all(keys.iter().map(|key| stage.pay(key))).await;
        assert!(paid.iter().all(|(status, _)| *status == 200));
    }
    stage.execute("UPDATE payment_attempts SET state = 'Uncharged', charge_id = NULL").await;
    stage.providers.behave("stripe", json!({"latencyMs": 200})).await;
    stage
        .execute(
            "INSERT INTO webhook_events (provider, event_id, object_id)
             SELECT provider, 'evt ' || key, object_id FROM payment_attempts",
        )
        .await;
    // One after the other, they would take 40 s.
    crate::support::within(Duration::from_secs(25), "all events are worked off", async || {
        (stage.count("SELECT count(*) FROM webhook_events WHERE done_at IS NULL").await == 0).then_some(())
    })
    .await;
    assert_eq!(stage.count("SELECT count(*) FROM payment_attempts WHERE state = 'Charged'").await, 200);
}

/// Most events are about charges that their own requests have told of. They cost the provider nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_about_a_charge_that_is_written_down_asks_nobody() {
    let stage = stage().await;
    stage.payment.mount("stripe-webhooks", "whsec\n");
    assert_eq!(stage.pay(BOOKING).await.0, 200);
    stage.booking(BOOKING).await;
    let object = stage.object().await;
    let before = stage.providers.requests("stripe").await;
    stage.event_of_stripe("evt", &object).await;
    crate::support::eventually("it is done", async || {
        (stage.count("SELECT count(*) FROM webhook_events WHERE done_at IS NOT NULL").await == 1).then_some(())
    })
    .await;
    assert_eq!(stage.providers.requests("stripe").await, before);
    assert!(!stage.is_due().await, "it says nothing new");
}

/// A cancelled event has thousands of refunds: one after the other they took hours, and where one provider hung, so
/// long for those of the other one.
#[tokio::test(flavor = "multi_thread")]
async fn refunds_of_a_provider_that_hangs_hold_up_none_of_the_other() {
    let stage = charged_by_paypal_and_stripe_hangs("a").await;
    let before = stage.providers.requests("stripe").await;
    stage
        .execute(
            "INSERT INTO refunds (key, provider, charge_id, reason)
             SELECT 'k-' || nth, 'stripe', 'pi_' || nth, 'cancelled' FROM generate_series(1, 30) nth",
        )
        .await;
    stage.stripe_is_asked(before).await;
    stage
        .execute(
            "INSERT INTO refunds (key, provider, charge_id, reason)
             SELECT key, provider, charge_id, 'cancelled' FROM payment_attempts WHERE provider = 'paypal'",
        )
        .await;
    crate::support::eventually("PayPal gives the money back", async || {
        (stage.count("SELECT count(*) FROM refunds WHERE done_at IS NOT NULL").await == 1).then_some(())
    })
    .await;
    assert!(stage.providers.charges().await.iter().all(|charge| charge["refunded"] == json!(true)));
    assert_eq!(stage.count("SELECT count(*) FROM refunds WHERE done_at IS NULL AND provider = 'stripe'").await, 30);
}

/// The search for charges of cancelled bookings waited for payments that are closed, each as long as its provider
/// hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_hangs_hides_no_charge_of_a_cancelled_booking() {
    let stage = charged_by_paypal_and_stripe_hangs(BOOKING).await;
    let before = stage.providers.requests("stripe").await;
    stage
        .execute(
            "WITH cancelled AS (
                 INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, amount_cents, cancel_reason)
                 SELECT gen_random_uuid(), id, 'ann', 1, 'Cancelled', nth::text, 4500, 'declined'
                 FROM (SELECT id FROM events LIMIT 1) one, generate_series(1, 5) nth RETURNING id::text AS key
             ), open AS (
                 INSERT INTO payments (key, amount_cents, currency) SELECT key, 4500, 'eur' FROM cancelled RETURNING key
             )
             INSERT INTO payment_attempts (key, provider, state, number, object_id)
             SELECT key, 'stripe', 'Confirming', 1, 'pi_' || key FROM open",
        )
        .await;
    crate::support::within(Duration::from_secs(60), "the first of them is to be closed", async || {
        (stage.providers.requests("stripe").await > before).then_some(())
    })
    .await;
    stage.booking(BOOKING).await;
    let cancel = "UPDATE bookings SET status = 'Cancelled', settle_at = NULL, cancel_reason = 'declined' WHERE id = ";
    stage.execute(&format!("{cancel} '{BOOKING}'")).await;
    crate::support::within(Duration::from_secs(50), "its charge is found", async || {
        (stage.count("SELECT count(*) FROM refunds").await == 1).then_some(())
    })
    .await;
}

/// Nobody makes it, and somebody must see why.
#[tokio::test(flavor = "multi_thread")]
async fn a_refund_at_a_provider_that_is_gone_says_so() {
    let stage = stage().await;
    stage
        .execute("INSERT INTO refunds (key, provider, charge_id, reason) VALUES ('k', 'adyen', 'c', 'cancelled')")
        .await;
    // It looks for such when it starts.
    let _next = App::payment(&stage.postgres, &stage.providers).await;
    let gone = "SELECT count(*) FROM refunds WHERE last_error = 'there is no provider adyen any more'";
    crate::support::eventually("it is said", async || (stage.count(gone).await == 1).then_some(())).await;
}
