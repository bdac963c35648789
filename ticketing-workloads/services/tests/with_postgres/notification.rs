//! Notification before a mail server that misbehaves: nothing is lost, and what may be sent twice is counted.

use crate::support::app::{App, OPENING_NIGHT, order};
use crate::support::eventually;
use crate::support::mails::Mails;
use crate::support::postgres::Postgres;
use contract::{DependencySettings, FlagsSettings, PolicySettings};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

/// Mails are given up after half a second.
fn quick() -> PolicySettings {
    let mut smtp = DependencySettings::default();
    smtp.timeout.request_ms = 1_000;
    smtp.timeout.per_try_ms = 500;
    smtp.retry.num_retries = 0;
    smtp.circuit_breaker.break_ms = 200;
    PolicySettings { dependencies: [("smtp".to_owned(), smtp)].into(), ..Default::default() }
}

fn flags(mails: bool, tickets: bool) -> FlagsSettings {
    let flag = |on: bool| {
        let variant = if on { "on" } else { "off" };
        json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": variant})
    };
    let flags = json!({"EnableEmailNotifications": flag(mails), "EnablePdfGeneration": flag(tickets)});
    serde_json::from_value(json!({ "flags": flags })).unwrap()
}

struct Stage {
    postgres: Postgres,
    mails: Mails,
    booking: App,
    notification: App,
}

async fn stage() -> Stage {
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    let booking = App::start(&postgres, "booking-1").await;
    let notification = App::notification(&postgres, &mails).await;
    notification.push(quick(), flags(true, true)).await;
    Stage { postgres, mails, booking, notification }
}

/// Books one seat; the answer is the id of the booking.
async fn book(booking: &App, email: Option<&str>) -> String {
    let mut wanted = order(OPENING_NIGHT, 1);
    wanted["email"] = json!(email);
    let answer = booking.post(&wanted).await;
    assert_eq!(answer.status(), 201);
    answer.json::<Value>().await.unwrap()["bookingId"].as_str().unwrap().to_owned()
}

/// Case 6 of payments: who was told to wait is told that it came to nothing, without a ticket.
#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_is_cancelled_after_it_waited_is_mailed() {
    let stage = stage().await;
    let id = book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    let client = stage.postgres.connect().await;
    let cancelled = "INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingCancelled' FROM bookings";
    client.execute(cancelled, &[]).await.unwrap();
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!(mails.len(), 2);
    assert_eq!(mails[1]["messageId"], format!("<{id}.BookingCancelled@ticketwave>"));
    assert_eq!(mails[1]["subject"], "Your booking for Opening Night is cancelled");
    let text = mails[1]["text"].as_str().unwrap();
    assert!(text.contains("You pay nothing") && !text.contains("icket is attached"), "{text}");
}

/// Waits until nothing is left in the outbox.
async fn until_empty(postgres: &Postgres) {
    let client = postgres.connect().await;
    eventually("the outbox is worked off", async || {
        let row = client.query_one("SELECT count(*) FROM outbox WHERE done_at IS NULL", &[]).await.ok()?;
        (row.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

async fn metric(app: &App, name: &str) -> u64 {
    let text = app.get("/metrics").await.text().await.unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_confirmed_booking_is_mailed_with_its_ticket() {
    let stage = stage().await;
    let id = book(&stage.booking, Some("ann@example.com")).await;
    book(&stage.booking, None).await;
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!(mails.len(), 1, "who gave no address gets no mail");
    assert_eq!(mails[0]["to"], json!(["ann@example.com"]));
    assert_eq!(mails[0]["messageId"], format!("<{id}.BookingConfirmed@ticketwave>"));
    assert_eq!(mails[0]["subject"], "Your booking for Opening Night");
    let text = mails[0]["text"].as_str().unwrap();
    assert!(text.contains(&format!("ticket-{id}.pdf")) && text.contains("application/pdf"), "{text}");
    assert!(text.contains("JVBERi0"), "the beginning of a PDF in base64");
    assert_eq!(metric(&stage.notification, r#"notifications_total{outcome="no_recipient"}"#).await, 1);
}

#[rstest::rstest]
#[case::down(json!({"down": true}))]
#[case::hangs(json!({"hang": true}))]
#[case::busy(json!({"tryLater": true}))]
#[case::wrong_password(json!({"refuseSender": true}))]
#[tokio::test(flavor = "multi_thread")]
async fn while_the_mail_server_is_in_trouble_mails_wait(#[case] trouble: Value) {
    let stage = stage().await;
    stage.mails.behave(trouble).await;
    let id = book(&stage.booking, Some("ann@example.com")).await;
    eventually("it was tried", async || {
        (metric(&stage.notification, r#"notifications_total{outcome="later"}"#).await > 0).then_some(())
    })
    .await;
    assert_eq!(stage.mails.all().await.len(), 0);
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!((mails.len(), &mails[0]["messageId"]), (1, &json!(format!("<{id}.BookingConfirmed@ticketwave>"))));
    assert_eq!(metric(&stage.notification, "notification_possible_duplicates_total").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_can_never_be_sent_blocks_no_other() {
    let stage = stage().await;
    stage.mails.behave(json!({"refuse": "nobody@"})).await;
    let bad = book(&stage.booking, Some("nobody@example.com")).await;
    let odd = book(&stage.booking, Some("änn@example.com")).await;
    book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!(stage.mails.all().await.len(), 1);
    let query = "SELECT o.booking_id::text, d.reason FROM dead_letters d JOIN outbox o ON o.id = d.outbox_id";
    let rows = stage.postgres.connect().await.query(query, &[]).await.unwrap();
    let letters: BTreeMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(letters[&bad].contains("there is nobody of that name"), "{letters:?}");
    assert!(letters[&odd].contains("ASCII"), "{letters:?}");
    assert_eq!(letters.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_no_goodbye_has_taken_the_mail() {
    let stage = stage().await;
    stage.mails.behave(json!({"hangAtEnd": true})).await;
    book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!(stage.mails.all().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_end_sends_nothing_twice() {
    let stage = stage().await;
    stage.mails.behave(json!({"delayMs": 400})).await;
    book(&stage.booking, Some("ann@example.com")).await;
    eventually("it is being sent", async || (!stage.mails.all().await.is_empty()).then_some(())).await;
    stage.notification.end().await;
    let left = "SELECT count(*) FROM outbox WHERE done_at IS NULL";
    assert_eq!(stage.postgres.connect().await.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_sent_twice_has_the_same_id_and_is_counted() {
    let stage = stage().await;
    stage.mails.behave(json!({"takeThenClose": true})).await;
    let id = book(&stage.booking, Some("ann@example.com")).await;
    eventually("it was taken", async || (!stage.mails.all().await.is_empty()).then_some(())).await;
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert!(
        mails.len() >= 2 && mails.iter().all(|mail| mail["messageId"] == format!("<{id}.BookingConfirmed@ticketwave>"))
    );
    let counted = metric(&stage.notification, "notification_possible_duplicates_total").await;
    assert_eq!(counted, mails.len() as u64 - 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_turned_off_waits_and_is_not_lost() {
    let stage = stage().await;
    stage.notification.push(quick(), flags(false, true)).await;
    book(&stage.booking, Some("ann@example.com")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.mails.all().await.len(), 0, "mails are off");

    stage.notification.push(quick(), flags(true, false)).await;
    eventually("the mail goes without its ticket", async || (stage.mails.all().await.len() == 1).then_some(())).await;
    let text = stage.mails.all().await[0]["text"].as_str().unwrap().to_owned();
    assert!(text.contains("follows in another mail") && !text.contains("application/pdf"));

    stage.notification.push(quick(), flags(true, true)).await;
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!((mails.len(), &mails[1]["subject"]), (2, &json!("Your ticket for Opening Night")));
    assert!(mails[1]["text"].as_str().unwrap().contains("application/pdf"));
}

/// A real process, killed while it sends: nothing is lost, and each kill makes one mail twice at most.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_makes_one_duplicate_at_most() {
    const MAILS: usize = 12;
    const KILLS: usize = 4;
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    let booking = App::start(&postgres, "booking-1").await;
    for nth in 0..MAILS {
        book(&booking, Some(&format!("ann{nth}@example.com"))).await;
    }
    mails.behave(json!({"delayMs": 150})).await;
    let start = || {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ticketing"));
        command.args(["notification", "--bind-address", "127.0.0.1", "--port", "0", "--admin-port", "0"]);
        command.args(["--database-url", &postgres.url(), "--smtp-host", "127.0.0.1"]);
        command.args(["--smtp-port", &mails.smtp.port().to_string()]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap()
    };
    for kill in 0..KILLS {
        let mut process = start();
        let before = mails.all().await.len();
        eventually("it sends", async || (mails.all().await.len() > before).then_some(())).await;
        tokio::time::sleep(Duration::from_millis(60 * kill as u64)).await;
        process.kill().await.unwrap();
        // The next worker need not wait for the claim of the dead one to run out.
        let free = "UPDATE outbox SET claimed_until = now() - interval '1 second' WHERE done_at IS NULL";
        postgres.connect().await.execute(free, &[]).await.unwrap();
    }
    let _last = start();
    until_empty(&postgres).await;
    let mut sent = BTreeMap::new();
    for mail in mails.all().await {
        *sent.entry(mail["messageId"].as_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert_eq!(sent.len(), MAILS, "none is lost");
    let total: usize = sent.values().sum();
    assert!(total <= MAILS + KILLS, "{sent:?}");
    assert!(total > MAILS, "no kill met a mail on its way: this proves nothing: {sent:?}");
    let counted = "SELECT sum(possible_duplicates) FROM outbox";
    let counted: i64 = postgres.connect().await.query_one(counted, &[]).await.unwrap().get(0);
    let counted = usize::try_from(counted).unwrap();
    assert!((total - MAILS..=KILLS).contains(&counted), "{counted} were counted: {sent:?}");
}

/// One address that is to wait is no reason to let all others wait.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_has_to_wait_holds_up_no_other() {
    let stage = stage().await;
    stage.mails.behave(json!({"greylist": "new@"})).await;
    for _ in 0..6 {
        book(&stage.booking, Some("new@example.com")).await;
    }
    book(&stage.booking, Some("ann@example.com")).await;
    eventually("the other one gets it", async || (stage.mails.all().await.len() == 1).then_some(())).await;
    assert_eq!(metric(&stage.notification, r#"circuit_breaker_opened_total{service="smtp"}"#).await, 0);
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
    assert_eq!(stage.mails.all().await.len(), 7);
}
