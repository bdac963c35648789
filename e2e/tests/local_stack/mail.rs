//! What mail servers do.

use crate::fixture::{Fixture, order, policy};
use contract::CheckStatus;
use e2e::local_stack::Port;
use serde_json::json;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn mail_servers_have_their_ways() {
    let mut fixture = Fixture::start().await;
    wants_a_name(&mut fixture).await;
    refuses_everything(&mut fixture).await;
    a_domain_hangs(&mut fixture).await;
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
