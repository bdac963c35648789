//! What mail servers do.

use crate::fixture::{Fixture, order, policy};
use contract::CheckStatus;
use e2e::local_stack::Port;
use serde_json::json;
use std::time::{Duration, Instant};
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn mail_servers_have_their_ways() {
    let mut fixture = Fixture::start().await;
    wants_a_name(&mut fixture).await;
    refuses_everything(&mut fixture).await;
    a_domain_hangs(&mut fixture).await;
    put_off(&mut fixture).await;
    requeued(&mut fixture).await;
    fixture.finish().await;
}

async fn dead_letters(fixture: &Fixture) -> i64 {
    let client = fixture.stack.connect().await.unwrap();
    client.query_one("SELECT count(*) FROM dead_letters", &[]).await.unwrap().get(0)
}

async fn book_for(fixture: &Fixture, email: &str) -> Duration {
    let mut wanted = order();
    wanted["email"] = json!(email);
    let booked = fixture.post("/api/bookings", &wanted).await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    booked.took
}

/// A name without a dot was refused, and with it every mail.
async fn wants_a_name(fixture: &mut Fixture) {
    fixture.mail_server(json!({"needsDottedHelo": true})).await;
    // Sessions from now on.
    fixture.restart_with("notification", &[]).await;
    fixture.configure("notification", policy("notification")).await;
    let took = book_for(fixture, "ann@example.com").await;
    let arrived = fixture.until("the mail is there", async || fixture.mails().await == 1).await;
    let (paused, dead) =
        (fixture.metric(Port::Notification, "notification_pauses_total").await, dead_letters(fixture).await);
    assert_eq!((paused, dead), (0, 0));
    fixture.mail_server(json!({})).await;
    fixture.record("mail server checks the HELO name", "201 Confirmed, and a mail", took, arrived, "nothing paused");
}

/// Relaying denied: no fault of any recipient. Nothing is lost, and it goes on by itself.
async fn refuses_everything(fixture: &mut Fixture) {
    const MAILS: usize = 6;
    fixture.until("nothing is left to send", async || fixture.open_mails().await == 0).await;
    let before = fixture.mails().await;
    fixture.mail_server(json!({"replies": [{"at": "rcpt", "reply": "554 5.7.1 Relay access denied"}]})).await;
    let mut slowest = Duration::ZERO;
    for nth in 0..MAILS {
        slowest = slowest.max(book_for(fixture, &format!("ann@domain{nth}.example")).await);
    }
    let is_paused = async || fixture.metric(Port::Notification, "notification_paused").await == 1;
    let noticed = fixture.until("sending is paused", is_paused).await;
    let is_said = async || {
        let report = fixture.check(Port::Notification, "mail").await;
        report.status == CheckStatus::Unhealthy && report.message.contains("Relay access denied")
    };
    fixture.until("the check has its words", is_said).await;
    // Long enough for probes to be refused, too.
    fixture.until("it was paused for 3 s", async || paused_seconds(fixture).await >= 3).await;
    assert_eq!((fixture.mails().await, dead_letters(fixture).await), (before, 0));
    fixture.mail_server(json!({})).await;
    let begin = Instant::now();
    fixture.until("the mails are there", async || fixture.mails().await == before + MAILS).await;
    fixture.until_well().await;
    assert_eq!(dead_letters(fixture).await, 0);
    let metrics = format!("notification_paused 1 after {} ms, 0 dead letters", noticed.as_millis());
    let sees = "201 Confirmed, the mails come later";
    fixture.record("mail relay refuses everything", sees, slowest, begin.elapsed(), &metrics);
}

async fn paused_seconds(fixture: &Fixture) -> u64 {
    let report = fixture.check(Port::Notification, "mail").await;
    report.data.get("pausedSeconds").and_then(serde_json::Value::as_u64).unwrap_or_default()
}

/// Mails to it wait; all others go out as ever.
async fn a_domain_hangs(fixture: &mut Fixture) {
    fixture.until("nothing is left to send", async || fixture.open_mails().await == 0).await;
    let before = fixture.mails().await;
    let pauses = fixture.metric(Port::Notification, "notification_pauses_total").await;
    fixture.mail_server(json!({"hangRecipient": "@slow.example"})).await;
    for _ in 0..6 {
        book_for(fixture, "bob@slow.example").await;
    }
    let is_named = async || {
        let report = fixture.check(Port::Notification, "mail").await;
        report.status == CheckStatus::Degraded && report.message.contains("slow.example")
    };
    let (mut slowest, mut sent) = (Duration::ZERO, 0);
    fixture
        .until("the domain is set aside", async || {
            // Somebody else is sent theirs meanwhile: else it could be the server.
            book_for(fixture, "ann@example.com").await;
            is_named().await
        })
        .await;
    fixture.until("the others have theirs", async || fixture.open_mails().await == 6).await;
    for _ in 0..5 {
        slowest = slowest.max(book_for(fixture, "ann@quick.example").await);
        sent += 1;
    }
    let others = fixture.until("the others get theirs", async || fixture.open_mails().await == 6).await;
    assert!(others < Duration::from_secs(10), "{others:?}");
    assert_eq!(
        fixture.metric(Port::Notification, "notification_pauses_total").await,
        pauses,
        "it is no fault of the server"
    );
    assert!(fixture.mails().await >= before + sent);
    fixture.mail_server(json!({})).await;
    let begin = Instant::now();
    fixture.until("its mails are there, too", async || fixture.open_mails().await == 0).await;
    fixture.until_well().await;
    assert_eq!(dead_letters(fixture).await, 0);
    let metrics = format!("the others' mails within {} ms, nothing paused", others.as_millis());
    let sees = "201 Confirmed, its mails come later";
    fixture.record("a mail domain hangs", sees, slowest, begin.elapsed(), &metrics);
}

/// Greylisting, and a mailbox that is full: it is about these mails alone.
async fn put_off(fixture: &mut Fixture) {
    fixture.until("nothing is left to send", async || fixture.open_mails().await == 0).await;
    let pauses = fixture.metric(Port::Notification, "notification_pauses_total").await;
    let full = json!({"at": "rcpt", "reply": "452 4.2.2 The mailbox is over its quota", "to": "@full.example"});
    fixture.mail_server(json!({"greylist": "@grey.example", "replies": [full]})).await;
    let before = fixture.mails().await;
    let mut slowest = book_for(fixture, "bob@grey.example").await;
    slowest = slowest.max(book_for(fixture, "bob@full.example").await);
    let client = fixture.stack.connect().await.unwrap();
    let tried = "SELECT count(*) FROM outbox WHERE done_at IS NULL AND tries >= 2";
    fixture
        .until("both were tried twice", async || client.query_one(tried, &[]).await.unwrap().get::<_, i64>(0) == 2)
        .await;
    slowest = slowest.max(book_for(fixture, "ann@example.com").await);
    fixture.until("others get theirs", async || fixture.mails().await == before + 1).await;
    fixture.mail_server(json!({})).await;
    let begin = Instant::now();
    fixture.until("both are there", async || fixture.mails().await == before + 3).await;
    let well = begin.elapsed();
    fixture.until_well().await;
    let paused = fixture.metric(Port::Notification, "notification_pauses_total").await - pauses;
    assert_eq!((paused, dead_letters(fixture).await), (0, 0));
    let sees = "201 Confirmed, these mails come later";
    fixture.record("greylisting, and a full mailbox", sees, slowest, well, "nothing paused, 0 dead letters");
}

/// A list has an address on it by mistake, and is put right: `ticketing requeue-mail` sends what was given up.
async fn requeued(fixture: &mut Fixture) {
    const LISTED: &str = "550 5.1.1 Not on our list";
    fixture.until("nothing is left to send", async || fixture.open_mails().await == 0).await;
    let before = fixture.mails().await;
    fixture.mail_server(json!({"replies": [{"at": "rcpt", "reply": LISTED, "to": "bob@listed.example"}]})).await;
    let took = book_for(fixture, "bob@listed.example").await;
    fixture.until("it is given up", async || dead_letters(fixture).await == 1).await;
    assert_eq!(fixture.mails().await, before);
    fixture.mail_server(json!({})).await;
    let mut command = Command::new(fixture.stack.program());
    command.args(["requeue-mail", "--reason", "not on our list", "--since", "1h"]);
    let output = command.env("DATABASE_URL", fixture.stack.database_url()).output().await.unwrap();
    let begin = Instant::now();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("Not on our list"), "{output:?}");
    assert!(!text.contains("bob@"), "no address in full: {text}");
    fixture.until("the mail is there", async || fixture.mails().await == before + 1).await;
    let well = begin.elapsed();
    assert_eq!((fixture.open_mails().await, dead_letters(fixture).await), (0, 0));
    fixture.until_well().await;
    let sees = "201 Confirmed, the mail after requeue-mail";
    fixture.record("recipient refused by mistake", sees, took, well, "1 dead letter, then 0");
}
