//! Each turn of an order is mailed once, with a reason and what to do next; and tickets that are signed are let in, for as long
//! as their booking stands.

use crate::support::app::{App, OPENING_NIGHT, SECRET, order, quick_policy, token_of};
use crate::support::eventually;
use crate::support::mails::Mails;
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use base64::Engine;
use contract::{
    CheckStatus, DegradationSettings, FallbackSettings, FlagsSettings, HealthCheckSettings, PolicySettings,
};
use reqwest::Response;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Output;
use ticketing_services::booking::cleanup;

/// What is in the outbox of this booking, by kind.
async fn kinds(postgres: &Postgres, id: &str) -> Vec<String> {
    let query = "SELECT kind FROM outbox WHERE booking_id::text = $1 ORDER BY id";
    let rows = postgres.connect().await.query(query, &[&id]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn until_empty(postgres: &Postgres) {
    let client = postgres.connect().await;
    eventually("the outbox is worked off", async || {
        let row = client.query_one("SELECT count(*) FROM outbox WHERE done_at IS NULL", &[]).await.ok()?;
        (row.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

fn to_ann(event: &str, seats: u32) -> Value {
    let mut wanted = order(event, seats);
    wanted["email"] = json!("ann@example.com");
    wanted
}

/// The status of an answer, and the id of the booking.
async fn taken(answer: Response) -> (u16, String) {
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    (status, body["bookingId"].as_str().unwrap_or_default().to_owned())
}

async fn found(booking: &App, id: &str) -> Value {
    booking.get(&format!("/api/bookings/{id}")).await.json().await.unwrap()
}

async fn until_cancelled(booking: &App, id: &str) -> Value {
    eventually("it is cancelled", async || {
        Some(found(booking, id).await).filter(|found| found["status"] == "Cancelled")
    })
    .await
}

fn paid(fallback: &[FallbackSettings]) -> PolicySettings {
    let mut policy = quick_policy();
    let mut payment = contract::DependencySettings { fallback: fallback.to_vec(), ..Default::default() };
    payment.timeout.request_ms = 2_000;
    payment.timeout.per_try_ms = 2_000;
    payment.retry.num_retries = 0;
    payment.circuit_breaker.break_ms = 300;
    policy.dependencies.insert("payment".to_owned(), payment);
    policy
}

struct Stage {
    postgres: Postgres,
    providers: Providers,
    // Ends with the stage.
    payment: App,
    booking: App,
}

async fn stage() -> Stage {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let payment = App::payment_over(&postgres.url(), &[], &postgres, &providers).await;
    let booking = App::paid_booking(&postgres, payment.address).await;
    booking.push(paid(&[FallbackSettings::Queue]), FlagsSettings::default()).await;
    Stage { postgres, providers, payment, booking }
}

impl Stage {
    async fn providers_behave(&self, behaviour: &Value) {
        for provider in ["stripe", "paypal"] {
            self.providers.behave(provider, behaviour.clone()).await;
        }
    }

    /// From now on payment is asked later.
    async fn degrade(&self) {
        let mut policy = paid(&[FallbackSettings::Queue]);
        policy.degradation = Some(DegradationSettings {
            enter_load_percent: 0,
            enter_for_ms: 0,
            exit_load_percent: 0,
            exit_for_ms: 60_000,
            flag_overrides: BTreeMap::new(),
            stages: Vec::new(),
        });
        self.booking.push(policy, FlagsSettings::default()).await;
        eventually("it is degraded", async || self.booking.health().await.degraded.then_some(())).await;
    }

    /// Until the payment of this booking was asked for so many times more, by the worker.
    async fn settled_again(&self, id: &str, times: i32) {
        let client = self.postgres.connect().await;
        let tries = async || {
            let tries = "SELECT settle_tries FROM bookings WHERE id::text = $1";
            client.query_one(tries, &[&id]).await.unwrap().get::<_, i32>(0)
        };
        let first = tries().await;
        eventually("it is settled again and again", async || {
            client.execute("UPDATE bookings SET settle_at = now() WHERE id::text = $1", &[&id]).await.unwrap();
            (tries().await > first + times).then_some(())
        })
        .await;
    }
}

/// Case 6, to the end: a mail at 202, and one when it is declined, each once and each with its words.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_and_is_declined_gets_a_mail_at_each_turn() {
    let stage = stage().await;
    stage.providers_behave(&json!({"refuse": true})).await;
    let mut wanted = to_ann(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!("once");
    let (status, id) = taken(stage.booking.post(&wanted).await).await;
    assert_eq!(status, 202);
    assert_eq!(kinds(&stage.postgres, &id).await, ["PaymentPending"]);
    assert_eq!(taken(stage.booking.post(&wanted).await).await.0, 202, "asked again");
    let mails = Mails::start();
    let _notification = App::notification(&stage.postgres, &mails).await;
    until_empty(&stage.postgres).await;
    stage.providers_behave(&json!({"decline": true})).await;
    let answer = until_cancelled(&stage.booking, &id).await;
    assert_eq!(answer["cancelReason"], "declined");
    assert!(answer["message"].as_str().unwrap().contains("Book again with another way to pay"), "{answer}");
    assert_eq!(kinds(&stage.postgres, &id).await, ["PaymentPending", "BookingCancelled"]);
    until_empty(&stage.postgres).await;
    let mails = mails.all().await;
    let subjects: Vec<_> = mails.iter().map(|mail| mail["subject"].as_str().unwrap()).collect();
    assert_eq!(subjects, ["Your payment for Opening Night is open", "Your payment for Opening Night was declined"]);
    assert_eq!(mails[1]["messageId"], format!("<{id}.BookingCancelled@ticketwave>"));
    assert_eq!(taken(stage.booking.post(&wanted).await).await.0, 402);
    assert_eq!(kinds(&stage.postgres, &id).await.len(), 2);
}

/// Mail that a turn has overtaken is not sent: two mails would contradict each other.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_overtaken_is_not_sent() {
    let stage = stage().await;
    stage.providers_behave(&json!({"refuse": true})).await;
    let (status, id) = taken(stage.booking.post(&to_ann(OPENING_NIGHT, 2)).await).await;
    assert_eq!(status, 202);
    stage.providers_behave(&json!({})).await;
    eventually("it is confirmed", async || (found(&stage.booking, &id).await["status"] == "Confirmed").then_some(()))
        .await;
    let mails = Mails::start();
    let notification = App::notification(&stage.postgres, &mails).await;
    until_empty(&stage.postgres).await;
    let all = mails.all().await;
    assert_eq!((all.len(), &all[0]["subject"]), (1, &json!("Your booking for Opening Night")));
    let metrics = notification.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("notifications_total{outcome=\"outdated\"} 1"), "{metrics}");
    assert_eq!(kinds(&stage.postgres, &id).await, ["PaymentPending", "BookingConfirmed"]);
}

/// Under load payment is asked later, and that is written down with the seats.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_is_paid_for_later_is_mailed_at_once() {
    let stage = stage().await;
    stage.providers_behave(&json!({"refuse": true})).await;
    stage.degrade().await;
    let (status, id) = taken(stage.booking.post(&to_ann(OPENING_NIGHT, 1)).await).await;
    assert_eq!((status, kinds(&stage.postgres, &id).await), (202, vec!["PaymentPending".to_owned()]));
    let (status, reserved) = taken(stage.booking.post_to("/api/reservations", &to_ann(OPENING_NIGHT, 1)).await).await;
    assert_eq!((status, kinds(&stage.postgres, &reserved).await.len()), (201, 0), "nothing has turned yet");
    let bought = stage.booking.post_to(&format!("/api/reservations/{reserved}/confirm"), &json!({})).await;
    assert_eq!(
        (bought.status().as_u16(), kinds(&stage.postgres, &reserved).await),
        (202, vec!["PaymentPending".to_owned()])
    );
    let (_, silent) = taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
    assert_eq!(kinds(&stage.postgres, &silent).await.len(), 0, "there is nobody to mail to");
}

#[rstest::rstest]
#[case::declined(json!({"decline": true}), true, 402, &["BookingCancelled"])]
#[case::the_answer_says_that_nothing_was_booked(json!({"refuse": true}), false, 503, &[])]
#[case::the_buyer_has_to_act(json!({"requiresAction": true}), true, 202, &["ConfirmPayment"])]
#[tokio::test(flavor = "multi_thread")]
async fn what_the_answer_says_is_mailed(
    #[case] behaviour: Value,
    #[case] may_wait: bool,
    #[case] status: u16,
    #[case] expected: &[&str],
) {
    let stage = stage().await;
    let fallback = if may_wait { vec![FallbackSettings::Queue] } else { Vec::new() };
    stage.booking.push(paid(&fallback), FlagsSettings::default()).await;
    stage.providers_behave(&behaviour).await;
    let mails = Mails::start();
    let _notification = App::notification(&stage.postgres, &mails).await;
    let (answered, _) = taken(stage.booking.post(&to_ann(OPENING_NIGHT, 2)).await).await;
    assert_eq!(answered, status);
    let client = stage.postgres.connect().await;
    let told = client.query("SELECT kind, booking_id::text FROM outbox", &[]).await.unwrap();
    assert_eq!(told.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>(), expected);
    if status == 202 {
        let found = found(&stage.booking, told[0].get(1)).await;
        assert_eq!(found["action"], "ConfirmPayment");
        assert!(found["message"].as_str().unwrap().starts_with("Please confirm the payment"), "{found}");
        eventually("it asks the buyer to act", async || {
            mails.all().await.first()?["text"].as_str()?.contains("your payment waits for you").then_some(())
        })
        .await;
    }
}

/// Nobody sees an answer that says so: the seats would be given to others while the buyer waits.
#[rstest::rstest]
#[case::payment_is_asked_later(true)]
#[case::the_answer_was_lost(false)]
#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_who_has_to_act_after_the_answer_is_asked_by_mail_once(#[case] is_degraded: bool) {
    let stage = stage().await;
    stage.payment.push(crate::paid_booking::quick_providers(), FlagsSettings::default()).await;
    if is_degraded {
        stage.degrade().await;
        stage.providers_behave(&json!({"requiresAction": true})).await;
    } else {
        stage.providers_behave(&json!({"createThenHang": true})).await;
    }
    let (mails, answer) = (Mails::start(), stage.booking.post(&to_ann(OPENING_NIGHT, 2)).await);
    let (status, id) = taken(answer).await;
    assert_eq!((status, kinds(&stage.postgres, &id).await[0].as_str()), (202, "PaymentPending"));
    let mut expected = vec!["Please confirm your payment for Opening Night"];
    let mut notification = None;
    if !is_degraded {
        notification = Some(App::notification(&stage.postgres, &mails).await);
        until_empty(&stage.postgres).await;
        expected.insert(0, "Your payment for Opening Night is open");
        stage.providers_behave(&json!({"requiresAction": true})).await;
    }
    eventually("the worker learns of it", async || {
        (kinds(&stage.postgres, &id).await == ["PaymentPending", "ConfirmPayment"]).then_some(())
    })
    .await;
    // What is overtaken is not sent any more.
    let _notification = match notification {
        Some(notification) => notification,
        None => App::notification(&stage.postgres, &mails).await,
    };
    until_empty(&stage.postgres).await;
    stage.settled_again(&id, 3).await;
    until_empty(&stage.postgres).await;
    assert_eq!(kinds(&stage.postgres, &id).await.len(), 2);
    let mails = mails.all().await;
    let subjects: Vec<_> = mails.iter().map(|mail| mail["subject"].as_str().unwrap()).collect();
    assert_eq!(subjects, expected);
    let last = mails.last().unwrap();
    assert!(last["text"].as_str().unwrap().contains("your payment waits for you"), "{last}");
    assert_eq!(last["messageId"], format!("<{id}.ConfirmPayment@ticketwave>"));
    stage.providers.buyer_acts(&id).await;
    eventually("it is confirmed", async || {
        stage
            .postgres
            .connect()
            .await
            .execute("UPDATE bookings SET settle_at = now() WHERE settle_at IS NOT NULL", &[])
            .await
            .unwrap();
        (found(&stage.booking, &id).await["status"] == "Confirmed").then_some(())
    })
    .await;
}

/// Reservations that come to nothing are mailed once, whichever way they end.
#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_that_ends_is_mailed_once() {
    let postgres = Postgres::start().await;
    let app = App::booking_with(&postgres, &[("--hold-seconds", "86400"), ("--expire-every-seconds", "1")]).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(taken(app.post_to("/api/reservations", &to_ann(OPENING_NIGHT, 2)).await).await.1);
    }
    for _ in 0..2 {
        assert_eq!(app.delete(&format!("/api/reservations/{}", ids[0])).await.status(), 200);
    }
    assert_eq!(kinds(&postgres, &ids[0]).await, ["BookingCancelled"]);
    assert_eq!(
        found(&app, &ids[0]).await["message"].as_str().unwrap().split('.').next(),
        Some("The reservation was given back")
    );
    let client = postgres.connect().await;
    let run_out = "UPDATE bookings SET held_until = now() - interval '1 second' WHERE id::text = $1";
    client.execute(run_out, &[&ids[1]]).await.unwrap();
    assert_eq!(until_cancelled(&app, &ids[1]).await["cancelReason"], "expired");
    assert_eq!(kinds(&postgres, &ids[1]).await, ["BookingCancelled"]);
    app.end().await;
    client.execute(run_out, &[&ids[2]]).await.unwrap();
    for _ in 0..2 {
        cleanup::run(&postgres.settings()).await.unwrap();
    }
    assert_eq!(kinds(&postgres, &ids[2]).await, ["BookingCancelled"], "by the cleanup Job, too");

    let mails = Mails::start();
    let _notification = App::notification(&postgres, &mails).await;
    until_empty(&postgres).await;
    let mails = mails.all().await;
    let mut subjects: Vec<_> = mails.iter().map(|mail| mail["subject"].as_str().unwrap()).collect();
    subjects.sort_unstable();
    assert_eq!(subjects[0], "Your reservation for Opening Night is cancelled");
    assert_eq!(subjects[1..], ["Your reservation for Opening Night is over"; 2]);
}

/// A thousand that run out at once, half of them with an address.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_reservations_that_run_out_make_a_row_each() {
    let postgres = Postgres::start().await;
    let app = App::booking_with(&postgres, &[("--expire-every-seconds", "1")]).await;
    let client = postgres.connect().await;
    client
        .batch_execute(&format!(
            "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, held_until, email)
             SELECT gen_random_uuid(), '{OPENING_NIGHT}', 'ann', 1, 'Held', 'key ' || nth, now(),
                    CASE WHEN nth % 2 = 0 THEN 'buyer' || nth || '@example.com' END
             FROM generate_series(1, 1000) nth;
             UPDATE events SET available = available - 1000"
        ))
        .await
        .unwrap();
    eventually("all have run out", async || {
        let held = client.query_one("SELECT count(*) FROM bookings WHERE status = 'Held'", &[]).await.unwrap();
        (held.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let told = "SELECT count(*), count(DISTINCT booking_id), count(*) FILTER (WHERE domain = 'example.com') FROM outbox
                WHERE kind = 'BookingCancelled'";
    let told = client.query_one(told, &[]).await.unwrap();
    assert_eq!([0, 1, 2].map(|nth| told.get::<_, i64>(nth)), [500; 3]);
    let free = client.query_one("SELECT available FROM events", &[]).await.unwrap();
    assert_eq!(free.get::<_, i32>(0), 100_000);
    app.end().await;
}

/// Orders do not wait for the step of the schema: what it brings is left out until then.
#[tokio::test(flavor = "multi_thread")]
async fn before_its_step_orders_go_on_without_the_new_mails() {
    let postgres = Postgres::start().await;
    App::start(&postgres, "pod-1").await.end().await;
    let client = postgres.connect().await;
    // As if a report kept the table from being changed.
    client
        .batch_execute(
            "DELETE FROM schema_migrations WHERE version IN (13, 15);
             DROP TABLE ticket_keys;
             ALTER TABLE outbox DROP CONSTRAINT outbox_kind_check,
                 ADD CONSTRAINT outbox_kind_check CHECK (kind IN ('BookingConfirmed', 'Ticket', 'BookingCancelled'))",
        )
        .await
        .unwrap();
    let report = postgres.connect().await;
    report.batch_execute("BEGIN; SELECT FROM outbox").await.unwrap();
    let booking = App::paid_booking_before_its_schema(&postgres, crate::support::nobody().await).await;
    booking.push(paid(&[FallbackSettings::Queue]), FlagsSettings::default()).await;
    let mails = Mails::start();
    let notification = App::notification_before_its_schema(&postgres, &mails).await;
    let (status, id) = taken(booking.post(&to_ann(OPENING_NIGHT, 2)).await).await;
    assert_eq!((status, kinds(&postgres, &id).await.len()), (202, 0));
    let (status, held) = taken(booking.post_to("/api/reservations", &to_ann(OPENING_NIGHT, 2)).await).await;
    assert_eq!(status, 201);
    assert_eq!(booking.delete(&format!("/api/reservations/{held}")).await.status(), 200);
    let code = "TW1.AQEBAQEBAQEAAAAAAAAAAAAAAAAAAAAzAAAAAAAAAAAAAAAAAAAAEQIE";
    let code = format!("/api/tickets/{code}.{}", "A".repeat(86));
    assert_eq!(booking.get(&code).await.status(), 503);
    client.execute("UPDATE events SET price_cents = 0", &[]).await.unwrap();
    let (status, free) = taken(booking.post(&to_ann(OPENING_NIGHT, 1)).await).await;
    assert_eq!((status, kinds(&postgres, &free).await), (201, vec!["BookingConfirmed".to_owned()]));
    let mail = eventually("it is confirmed by mail", async || mails.all().await.first().cloned()).await;
    assert!(mail["text"].as_str().unwrap().contains("follows in another mail"), "{mail}");
    report.batch_execute("COMMIT").await.unwrap();
    postgres.has_its_schema().await;
    eventually("its ticket follows", async || (mails.all().await.len() >= 2).then_some(())).await;
    eventually("the payment that is open is told", async || {
        (kinds(&postgres, &id).await == ["PaymentPending"]).then_some(())
    })
    .await;
    drop(notification);
}

/// What a camera reads from each page of a PDF in a mail.
fn scan(mail: &Value) -> Vec<String> {
    let text = mail["text"].as_str().unwrap();
    let begin = text.find("JVBERi0").unwrap();
    let encoded: String =
        text[begin..].lines().take_while(|line| !line.is_empty() && !line.starts_with("--")).collect();
    let pdf = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap();
    let pdf = String::from_utf8_lossy(&pdf);
    pdf.split("stream\n").filter(|part| part.contains(" re\n")).map(scan_page).collect()
}

fn scan_page(page: &str) -> String {
    let mut dark = std::collections::BTreeSet::new();
    for drawn in page.lines().filter_map(|line| line.strip_suffix(" re")) {
        let numbers: Vec<usize> = drawn.split(' ').map(|number| number.parse().unwrap()).collect();
        dark.extend((numbers[0]..numbers[0] + numbers[2]).map(|x| (x, numbers[1])));
    }
    let modules = dark.iter().map(|(x, _)| x + 1).max().unwrap() + 4;
    let is_dark = |x: usize, y: usize| dark.contains(&(x / 8, modules - 1 - y / 8));
    let side = modules * 8;
    let mut image = rqrr::PreparedImage::prepare_from_greyscale(side, side, |x, y| if is_dark(x, y) { 0 } else { 255 });
    image.detect_grids()[0].decode().unwrap().1
}

/// The command of an entrance without a network.
async fn verify(public_keys: &std::path::Path, codes: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ticketing"));
    command.arg("verify").args(codes).arg("--public-keys").arg(public_keys).output().await.unwrap()
}

/// The whole way of a ticket: signed, mailed, scanned, verified without a network and by the gateway, and worth nothing any more
/// once its booking is cancelled or its key is revoked.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_let_in_for_as_long_as_its_booking_stands() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let mails = Mails::start();
    let notification = App::notification(&postgres, &mails).await;
    let gateway = App::gateway(crate::support::nobody().await, booking.address).await;
    let (status, id) = taken(booking.post(&to_ann(OPENING_NIGHT, 3)).await).await;
    assert_eq!(status, 201);
    until_empty(&postgres).await;
    let codes = scan(&mails.all().await[0]);
    assert_eq!(codes.len(), 3, "one for each seat");

    let key_file = notification.mounts.path().join("ticket-key");
    let public = |file: &std::path::Path| {
        let command = std::process::Command::new(env!("CARGO_BIN_EXE_ticketing"))
            .args(["ticket-key", "public"])
            .arg(file)
            .output();
        command.unwrap().stdout
    };
    let public_keys = notification.mounts.path().join("public.pem");
    std::fs::write(&public_keys, public(&key_file)).unwrap();
    let output = verify(&public_keys, &[&codes[0], &codes[1], &codes[2]]).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.lines().count() == 3, "{said}");
    assert!(said.contains(&format!("valid: event {OPENING_NIGHT}, seat 2 of 3, booking {id}")), "{said}");

    let ask = async |code: &str| {
        let answer = gateway.get(&format!("/api/tickets/{code}")).await;
        let status = answer.status().as_u16();
        (status, answer.json::<Value>().await.unwrap())
    };
    for (nth, code) in (1..).zip(&codes) {
        let valid = json!({"valid": true, "eventId": OPENING_NIGHT, "event": "Opening Night", "seat": nth, "of": 3});
        assert_eq!(ask(code).await, (200, valid));
    }

    // A forger changes the seat, or signs himself.
    let mut forged = codes[0].clone();
    forged.replace_range(140..141, if &codes[0][140..141] == "A" { "B" } else { "A" });
    let output = verify(&public_keys, &[&codes[0], &forged]).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.lines().nth(1).unwrap().starts_with("not valid: the signature is not genuine"), "{said}");
    let reason = async |code: &str| {
        let (status, answer) = ask(code).await;
        assert_eq!((status, &answer["valid"]), (200, &json!(false)), "{answer}");
        assert!(!answer.to_string().contains("ann"), "{answer}");
        answer["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason(&forged).await, "Forged");
    assert_eq!(reason(&format!("TICKETWAVE:1:{id}:3")).await, "Unsigned");
    for nonsense in ["nonsense", "TW1.x.y", &"A".repeat(4_000)] {
        let (status, answer) = ask(nonsense).await;
        assert_eq!((status, &answer["errorCode"]), (404, &json!("NOT_A_TICKET")), "{answer}");
    }

    // A key is replaced: tickets of the one before stay good.
    std::fs::remove_file(&key_file).unwrap();
    let first = notification.check("ticket-key", "it has no key", |check| check.status != CheckStatus::Healthy);
    let check = HealthCheckSettings { interval_ms: 100, timeout_ms: 500, ..Default::default() };
    let policy = PolicySettings { health_checks: [("ticket-key".to_owned(), check)].into(), ..Default::default() };
    notification.push(policy, FlagsSettings::default()).await;
    assert_eq!(first.await.status, CheckStatus::Unhealthy);
    std::fs::write(&key_file, ticketing_services::tickets::generate().unwrap()).unwrap();
    booking.post(&to_ann(OPENING_NIGHT, 1)).await;
    until_empty(&postgres).await;
    let all = mails.all().await;
    let second = scan(all.last().unwrap()).remove(0);
    assert_eq!(ask(&second).await.0, 200);
    assert_eq!(ask(&second).await.1["valid"], true);
    assert_eq!(ask(&codes[0]).await.1["valid"], true);
    let output = verify(&public_keys, &[&second]).await;
    assert!(String::from_utf8(output.stdout).unwrap().contains("not among the public keys"));
    let both = [public(&key_file), std::fs::read(&public_keys).unwrap()].concat();
    std::fs::write(&public_keys, both).unwrap();
    assert!(verify(&public_keys, &[&second, &codes[0]]).await.status.success());

    let client = postgres.connect().await;
    client
        .execute(
            "UPDATE ticket_keys SET revoked_at = now() WHERE created_at = (SELECT max(created_at) FROM ticket_keys)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(reason(&second).await, "KeyRevoked");
    let cancel = "UPDATE bookings SET status = 'Cancelled', cancel_reason = 'the hall burned down' WHERE id::text = $1";
    client.execute(cancel, &[&id]).await.unwrap();
    assert_eq!(reason(&codes[2]).await, "Cancelled");
}

/// Without a key nothing is lost: the mail goes, and the tickets follow once there is one.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_tickets_wait() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let mails = Mails::start();
    let notification = App::notification(&postgres, &mails).await;
    let key_file = notification.mounts.path().join("ticket-key");
    let key = std::fs::read(&key_file).unwrap();
    std::fs::write(&key_file, "nothing").unwrap();
    booking.post(&to_ann(OPENING_NIGHT, 1)).await;
    let mail = eventually("the mail goes", async || mails.all().await.first().cloned()).await;
    assert!(mail["text"].as_str().unwrap().contains("Your ticket follows in another mail"), "{mail}");
    std::fs::write(&key_file, key).unwrap();
    until_empty(&postgres).await;
    let all = mails.all().await;
    assert_eq!((all.len(), &all[1]["subject"], scan(&all[1]).len()), (2, &json!("Your ticket for Opening Night"), 1));
}

/// Of two charges one goes back, and the ticket is good; once all goes back it is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_whose_money_went_back_lets_nobody_in() {
    let stage = stage().await;
    let mails = Mails::start();
    let _notification = App::notification(&stage.postgres, &mails).await;
    let (status, id) = taken(stage.booking.post(&to_ann(OPENING_NIGHT, 1)).await).await;
    assert_eq!(status, 201);
    until_empty(&stage.postgres).await;
    let code = scan(&mails.all().await[0]).remove(0);
    let ask = async || stage.booking.get(&format!("/api/tickets/{code}")).await.json::<Value>().await.unwrap();
    let client = stage.postgres.connect().await;
    let besides = "INSERT INTO refunds (key, provider, charge_id, reason, next_at)
                   VALUES ($1, 'paypal', 'another', 'charged besides', 'infinity')";
    client.execute(besides, &[&id]).await.unwrap();
    assert_eq!(ask().await["valid"], true);
    let all = "INSERT INTO refunds (key, provider, charge_id, reason, next_at)
               SELECT key, provider, charge_id, 'by hand', 'infinity' FROM payment_attempts WHERE state = 'Charged'";
    assert_eq!(client.execute(all, &[]).await.unwrap(), 1);
    assert_eq!(ask().await["reason"], "Refunded");
}

/// The way out when a key has leaked, as the README has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leaked_key_is_replaced_and_tickets_are_sent_anew() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let mails = Mails::start();
    let notification = App::notification(&postgres, &mails).await;
    booking.post(&to_ann(OPENING_NIGHT, 2)).await;
    until_empty(&postgres).await;
    let leaked = scan(&mails.all().await[0]);
    let client = postgres.connect().await;
    client.execute("UPDATE events SET starts_at = now() + interval '1 day'", &[]).await.unwrap();
    let id: String = client.query_one("SELECT id FROM ticket_keys", &[]).await.unwrap().get(0);
    let key = ticketing_services::tickets::generate().unwrap();
    std::fs::write(notification.mounts.path().join("ticket-key"), key).unwrap();

    let readme = include_str!("../../../README.md");
    let statements = readme.split("```sql\n").nth(1).unwrap().split("```").next().unwrap();
    client.batch_execute(&statements.replace('…', &id)).await.unwrap();
    until_empty(&postgres).await;
    let all = mails.all().await;
    assert_eq!((all.len(), &all[1]["subject"]), (2, &json!("Your tickets for Opening Night")));
    let ask = async |code: &str| booking.get(&format!("/api/tickets/{code}")).await.json::<Value>().await.unwrap();
    assert_eq!(ask(&leaked[1]).await["reason"], "KeyRevoked");
    let valid = ask(&scan(&all[1])[1]).await;
    assert_eq!((&valid["valid"], &valid["seat"]), (&json!(true), &json!(2)), "{valid}");
}

/// A service as a process of its own, which logs all that it has to say into this file.
fn process(name: &str, more: &[String], log: &std::fs::File) -> tokio::process::Child {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ticketing"));
    command.args([name, "--bind-address", "127.0.0.1", "--admin-port", "0"]).args(more);
    // All of everything, and the driver of the database by name.
    command.env("RUST_LOG", "trace,tokio_postgres=trace,tokio_postgres::query=trace").stdout(log.try_clone().unwrap());
    command.stderr(log.try_clone().unwrap()).kill_on_drop(true).spawn().unwrap()
}

/// Neither where an order is taken, nor where its mail is sent, nor in what a mail server says of it, whatever `RUST_LOG` asks for: no
/// address of a buyer, and nothing that somebody else could be a buyer with, or this service.
#[tokio::test(flavor = "multi_thread")]
async fn no_log_has_an_address_in_full() {
    let postgres = Postgres::start().await;
    App::start(&postgres, "pod-1").await.end().await;
    let mails = Mails::start();
    let refusal =
        json!({"at": "rcpt", "to": "secret.one@", "reply": "550 5.1.1 <secret.one@example.com>: no such user"});
    let later = json!({"at": "rcpt", "to": "secret.two@", "reply": "451 4.3.0 secret.two@example.com has to wait"});
    let login = json!({"user": "tickets", "password": "secret.password"});
    mails.behave(json!({"replies": [refusal, later], "login": login})).await;
    let secrets = tempfile::tempdir().unwrap();
    let in_file = |name: &str, content: &str| {
        let path = secrets.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let path = tempfile::NamedTempFile::new().unwrap();
    let log = path.reopen().unwrap();
    let (url, address) = (postgres.url(), crate::support::nobody().await);
    let port = address.port().to_string();
    let of = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
    let charge_nothing = of(&["--database-url", &url, "--port", &port, "--charge-nothing", "yes"]);
    let booking = process("booking", &charge_nothing, &log);
    let smtp_port = mails.smtp.port().to_string();
    let mut to_sink =
        of(&["--database-url", &url, "--port", "0", "--smtp-host", "127.0.0.1", "--smtp-port", &smtp_port]);
    to_sink.extend(of(&["--smtp-user", "tickets", "--smtp-password-file", &in_file("smtp", "secret.password")]));
    let notification = process("notification", &to_sink, &log);
    let edge = crate::support::nobody().await;
    let (edge_port, base) = (edge.port().to_string(), format!("http://{address}"));
    let mut at_edge = of(&["--catalog-url", &base, "--booking-url", &base, "--port", &edge_port]);
    at_edge.extend(of(&["--token-hmac-file", &in_file("tokens", SECRET)]));
    let gateway = process("gateway", &at_edge, &log);
    let client = reqwest::Client::new();
    eventually("booking is there", async || client.get(format!("http://{address}/readyz")).send().await.ok()).await;
    let order_to = async |path: &str, email: &str| {
        let mut wanted = order(OPENING_NIGHT, 1);
        wanted["email"] = json!(email);
        client.post(format!("http://{address}{path}")).body(wanted.to_string()).send().await.unwrap().status().as_u16()
    };
    eventually("orders are taken", async || {
        (order_to("/api/bookings", "secret.one@example.com").await == 201).then_some(())
    })
    .await;
    assert_eq!(order_to("/api/bookings", "secret.two@example.com").await, 201);
    assert_eq!(order_to("/api/reservations", "secret.three@example.com").await, 201);
    assert_eq!(order_to("/api/bookings", "secret.four@example").await, 422);
    // Through the gateway, once with a login and once with a session.
    let token = token_of("ann");
    let mut wanted = order(OPENING_NIGHT, 1);
    wanted["email"] = json!("secret.five@example.com");
    let order = || client.post(format!("http://{edge}/api/bookings")).body(wanted.to_string());
    let answer = eventually("the gateway is there", async || {
        order().bearer_auth(&token).send().await.ok().filter(|answer| answer.status() == 201)
    })
    .await;
    assert!(answer.headers().get("set-cookie").is_none());
    let answer = order().send().await.unwrap();
    assert_eq!(answer.status(), 201);
    let cookie = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
    let (_, session) = cookie.split(';').next().unwrap().split_once('=').unwrap();
    assert_eq!(order().header("cookie", cookie.split(';').next().unwrap()).send().await.unwrap().status(), 201);
    let said = async |words: &str| {
        eventually(words, async || Some(std::fs::read_to_string(path.path()).ok()?).filter(|log| log.contains(words)))
            .await
    };
    said("s…@example.com has to wait").await;
    said("undeliverable; moved to dead_letters").await;
    drop((booking, notification, gateway));
    let log = std::fs::read_to_string(path.path()).unwrap();
    // A span of an attempt, which is not there at `info`.
    assert!(log.contains("attempt{"), "all is asked for");
    let login = base64::prelude::BASE64_STANDARD.encode("\0tickets\0secret.password");
    let must_not = ["secret.", &token, session, SECRET, &login];
    let leaks: Vec<_> = log.lines().filter(|line| must_not.iter().any(|secret| line.contains(secret))).collect();
    assert_eq!(leaks, Vec::<&str>::new());
}
