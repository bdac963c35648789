//! Notification before a mail server that misbehaves: nothing is lost, and what may be sent twice is counted.

use crate::support::app::{App, OPENING_NIGHT, order};
use crate::support::mails::Mails;
use crate::support::postgres::Postgres;
use crate::support::{eventually, within};
use contract::{CheckStatus, DependencySettings, FlagsSettings, HealthCheckSettings, PolicySettings};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};
use ticketing_services::notification::requeue::{self, Choice};

/// Only the check of the mails runs more often.
pub fn watched() -> PolicySettings {
    let check = HealthCheckSettings { interval_ms: 100, timeout_ms: 500, ..Default::default() };
    PolicySettings { health_checks: [("mail".to_owned(), check)].into(), ..Default::default() }
}

/// Mails are given up after half a second.
fn quick() -> PolicySettings {
    let mut smtp = DependencySettings::default();
    smtp.timeout.request_ms = 1_000;
    smtp.timeout.per_try_ms = 500;
    smtp.retry.num_retries = 0;
    smtp.circuit_breaker.break_ms = 200;
    PolicySettings { dependencies: [("smtp".to_owned(), smtp)].into(), ..watched() }
}

pub fn flags(mails: bool, tickets: bool) -> FlagsSettings {
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

/// Puts `count` mails into the outbox, to buyers at as many domains as there are in `domains`, in turns.
pub async fn seed(postgres: &Postgres, count: i32, domains: &[&str]) {
    let sql = "WITH sold AS (
            INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, email)
            SELECT gen_random_uuid(), $1::text::uuid, 'ann', 1, 'Confirmed', gen_random_uuid()::text,
                   'buyer' || n || '@' || ($3::text[])[1 + n % cardinality($3::text[])]
            FROM generate_series(1, $2::integer) n RETURNING id)
        INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingConfirmed' FROM sold";
    postgres.connect().await.execute(sql, &[&OPENING_NIGHT, &count, &domains]).await.unwrap();
}

/// How many mails are in the dead letters.
pub async fn dead_letters(postgres: &Postgres) -> i64 {
    postgres.connect().await.query_one("SELECT count(*) FROM dead_letters", &[]).await.unwrap().get(0)
}

/// Case 6 of payments: who was told to wait is told that it came to nothing, without a ticket.
#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_is_cancelled_after_it_waited_is_mailed() {
    let stage = stage().await;
    let id = book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    let client = stage.postgres.connect().await;
    let cancelled = "UPDATE bookings SET status = 'Cancelled', cancel_reason = 'declined';
                     INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingCancelled' FROM bookings";
    client.batch_execute(cancelled).await.unwrap();
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!(mails.len(), 2);
    assert_eq!(mails[1]["messageId"], format!("<{id}.BookingCancelled@ticketwave>"));
    assert_eq!(mails[1]["subject"], "Your payment for Opening Night was declined");
    let text = mails[1]["text"].as_str().unwrap();
    assert!(text.contains("with another way to pay") && !text.contains("icket is attached"), "{text}");
}

/// Waits until nothing is left in the outbox.
pub async fn until_empty(postgres: &Postgres) {
    until_empty_within(Duration::from_secs(30), postgres).await;
}

async fn until_empty_within(limit: Duration, postgres: &Postgres) {
    let client = postgres.connect().await;
    within(limit, "the outbox is worked off", async || {
        let row = client.query_one("SELECT count(*) FROM outbox WHERE done_at IS NULL", &[]).await.ok()?;
        (row.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

async fn metric(app: &App, name: &str) -> u64 {
    value_of(&app.get("/metrics").await.text().await.unwrap(), name)
}

fn value_of(metrics: &str, name: &str) -> u64 {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
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
    let domain = "SELECT domain FROM outbox WHERE booking_id::text = $1";
    let domain: String = stage.postgres.connect().await.query_one(domain, &[&id]).await.unwrap().get(0);
    assert_eq!(domain, "example.com", "it is written with the order");
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
    eventually("sending is paused", async || {
        (metric(&stage.notification, "notification_paused").await > 0).then_some(())
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
    // As sold by a version that did not look closely.
    seed(&stage.postgres, 1, &["b"]).await;
    book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!(stage.mails.all().await.len(), 1);
    let query = "SELECT o.booking_id::text, d.reason FROM dead_letters d JOIN outbox o ON o.id = d.outbox_id";
    let rows = stage.postgres.connect().await.query(query, &[]).await.unwrap();
    let mut letters: BTreeMap<String, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(
        letters.remove(&bad).unwrap().contains("at RCPT TO: 550 5.1.1 there is nobody of that name"),
        "{letters:?}"
    );
    assert_eq!(letters.len(), 1);
    assert!(letters.values().all(|reason| reason.contains("must have a domain with a dot")), "{letters:?}");
    assert_eq!(metric(&stage.notification, "notification_pauses_total").await, 0);
}

/// A command puts dead letters back, as far as it is told to, and says which.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_go_back_by_command() {
    let stage = stage().await;
    stage
        .mails
        .behave(json!({"replies": [
            {"at": "rcpt", "to": "ann@", "reply": "550 5.1.1 <ann@example.com>: no such user"},
            {"at": "rcpt", "to": "bob@", "reply": "550 5.2.1 disabled"},
        ]}))
        .await;
    let ann = book(&stage.booking, Some("ann@example.com")).await;
    book(&stage.booking, Some("bob@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!(dead_letters(&stage.postgres).await, 2);
    stage.mails.behave(json!({})).await;

    // As a version before this one wrote it.
    let old = "UPDATE dead_letters SET reason = replace(reason, 'a…@', 'ann@')";
    assert_eq!(stage.postgres.connect().await.execute(old, &[]).await.unwrap(), 2);

    let run = async |choice: Choice, dry_run: bool| {
        let settings = requeue::Settings { database: stage.postgres.settings(), choice, dry_run };
        let mut said = String::new();
        requeue::run(&settings, &mut |line| said.push_str(line)).await.unwrap();
        said
    };
    let of_ann =
        Choice { reason: Some("NO SUCH user".to_owned()), since: Some(Duration::from_secs(600)), ..Default::default() };
    let said = run(of_ann.clone(), true).await;
    assert!(said.contains("1 dead letter(s) would go back") && said.contains(&ann) && !said.contains("ann@"), "{said}");
    assert_eq!(dead_letters(&stage.postgres).await, 2);
    let said = run(
        Choice { booking: Some("33333333-3333-4333-8333-333333333333".parse().unwrap()), ..Default::default() },
        false,
    )
    .await;
    assert!(said.contains("0 dead letter(s) went back"), "{said}");
    stage.notification.push(quick(), flags(false, true)).await;
    let said = run(of_ann, false).await;
    assert!(said.contains("1 dead letter(s) went back"), "{said}");
    let open = "SELECT tries, last_error FROM outbox WHERE done_at IS NULL";
    let open = stage.postgres.connect().await.query_one(open, &[]).await.unwrap();
    assert_eq!(open.get::<_, i32>(0), 0);
    assert!(open.get::<_, &str>(1).contains("no such user"), "the reason stays");

    stage.notification.push(quick(), flags(true, true)).await;
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!((mails.len(), &mails[0]["to"]), (1, &json!(["ann@example.com"])));
    run(Choice { all: true, ..Default::default() }, false).await;
    until_empty(&stage.postgres).await;
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (2, 0));
}

/// What only another server could take waits for it, and says so; it is no dead letter and holds up nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_another_script_waits_for_a_server_that_takes_it() {
    let stage = stage().await;
    stage.mails.behave(json!({"noSmtpUtf8": true})).await;
    book(&stage.booking, Some("उपयोगकर्ता@münchen.example")).await;
    book(&stage.booking, Some("ann@münchen.example")).await;
    eventually("the other one gets it", async || (stage.mails.all().await.len() == 1).then_some(())).await;
    let client = stage.postgres.connect().await;
    let why = eventually("it says why", async || {
        // That the other one is sent may not be written down yet.
        let open = client.query_one("SELECT last_error FROM outbox WHERE done_at IS NULL", &[]).await.ok()?;
        open.get::<_, Option<String>>(0)
    })
    .await;
    assert!(why.contains("does not offer SMTPUTF8"), "{why}");
    assert_eq!(metric(&stage.notification, "notification_pauses_total").await, 0);
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
    let to: Vec<_> = stage.mails.all().await.iter().map(|mail| mail["to"][0].as_str().unwrap().to_owned()).collect();
    assert_eq!(to, ["ann@xn--mnchen-3ya.example", "उपयोगकर्ता@xn--mnchen-3ya.example"]);
    assert_eq!(dead_letters(&stage.postgres).await, 0);
}

/// A bare 550 may be about the client. It is believed of a server that takes other mails, and says it again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_without_a_code_is_believed_late() {
    let stage = stage().await;
    stage.mails.behave(json!({"replies": [{"at": "rcpt", "to": "nobody@", "reply": "550 Unknown user"}]})).await;
    book(&stage.booking, Some("nobody@example.com")).await;
    let client = stage.postgres.connect().await;
    let tries = async || client.query_one("SELECT max(tries) FROM outbox", &[]).await.unwrap().get::<_, i32>(0);
    eventually("it was tried often enough", async || (tries().await >= 4).then_some(())).await;
    assert_eq!(dead_letters(&stage.postgres).await, 0, "the server took none");
    book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (1, 1));
}

/// Mails to a slow domain take some of the sessions, and leave the others to everybody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_domain_holds_up_no_other() {
    let stage = stage().await;
    stage.notification.push(watched(), flags(false, true)).await;
    stage.mails.behave(json!({"slow": "@slow.example", "delayMs": 2_000})).await;
    seed(&stage.postgres, 30, &["slow.example"]).await;
    seed(&stage.postgres, 30, &["quick.example", "fast.example"]).await;
    stage.notification.push(watched(), flags(true, true)).await;
    let received = async |domain: &str| {
        let mails = stage.mails.all().await;
        mails.iter().filter(|mail| mail["to"][0].as_str().unwrap().ends_with(domain)).count()
    };
    let all_quick = async || received("@quick.example").await + received("@fast.example").await == 30;
    eventually("the others get theirs", async || all_quick().await.then_some(())).await;
    let slow = received("@slow.example").await;
    assert!(slow < 30, "{slow} of the slow ones were sent before");
    assert!(slow > 0, "the slow ones have their share");
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
}

async fn received(mails: &Mails, domain: &str) -> usize {
    mails.all().await.iter().filter(|mail| mail["to"][0].as_str().unwrap().ends_with(domain)).count()
}

/// Such as one whose greylisting or whose filter lets the server wait: the mails to it time out, some at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_gives_no_answer_holds_up_no_other() {
    let stage = stage().await;
    stage.mails.behave(json!({"hangRecipient": "@slow.example"})).await;
    seed(&stage.postgres, 50, &["slow.example"]).await;
    // Nothing was taken before: the server may be suspected, and is not.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for round in 1..=10 {
        let begin = Instant::now();
        seed(&stage.postgres, 5, &["quick.example", "fast.example"]).await;
        let others =
            async || received(&stage.mails, "@quick.example").await + received(&stage.mails, "@fast.example").await;
        eventually("the others get theirs", async || (others().await == 5 * round).then_some(())).await;
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(5), "round {round}: {took:?}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(metric(&stage.notification, "notification_pauses_total").await, 0);
    assert_eq!(metric(&stage.notification, r#"circuit_breaker_opened_total{service="smtp"}"#).await, 0);
    let tries = "SELECT sum(tries)::bigint FROM outbox WHERE done_at IS NULL";
    let tries: i64 = stage.postgres.connect().await.query_one(tries, &[]).await.unwrap().get(0);
    assert!(tries < 12, "{tries} tries in vain");
    stage
        .notification
        .check("mail", "it is set aside", |check| {
            check.status == CheckStatus::Degraded && check.message.contains("slow.example")
        })
        .await;
    stage.mails.behave(json!({})).await;
    until_empty_within(Duration::from_secs(90), &stage.postgres).await;
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (100, 0));
}

/// However many mails to a domain without a place, and tickets that may not be made yet, wait in front of the others.
#[tokio::test(flavor = "multi_thread")]
async fn the_others_are_found_behind_thousands() {
    let stage = stage().await;
    stage.notification.push(quick(), flags(false, true)).await;
    stage.mails.behave(json!({"hangRecipient": "@slow.example"})).await;
    seed(&stage.postgres, 20_000, &["slow.example"]).await;
    let client = stage.postgres.connect().await;
    let tickets = "INSERT INTO outbox (booking_id, kind, next_at)
                   SELECT booking_id, 'Ticket', now() - interval '1 hour' FROM outbox LIMIT 5000";
    client.execute(tickets, &[]).await.unwrap();
    let domains: Vec<_> = (0..400).map(|nth| format!("domain{nth}.example")).collect();
    seed(&stage.postgres, 400, &domains.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let begin = Instant::now();
    stage.notification.push(quick(), flags(true, false)).await;
    eventually("the others get theirs", async || (stage.mails.stats().await.received == 400).then_some(())).await;
    println!("400 mails behind 25,000 were sent within {:.1} s", begin.elapsed().as_secs_f64());
    let tries = "SELECT max(tries), count(*) FILTER (WHERE claimed_until > now()) FROM outbox";
    let row = client.query_one(tries, &[]).await.unwrap();
    let (tries, claimed): (i32, i64) = (row.get(0), row.get(1));
    assert!(tries <= 4 && claimed <= 5, "{tries} tries, {claimed} claimed");
    assert_eq!(metric(&stage.notification, "notification_pauses_total").await, 0);
}

/// A claim that is made after its caller has given up keeps nothing from being sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_without_an_answer_holds_up_no_mail() {
    let stage = stage().await;
    stage.notification.push(quick(), flags(false, true)).await;
    seed(&stage.postgres, 30, &["a.example", "b.example", "c.example"]).await;
    let client = stage.postgres.connect().await;
    let slow = "CREATE TABLE slow (yes boolean);
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN IF EXISTS (SELECT FROM slow) THEN PERFORM pg_sleep(1.5); END IF; RETURN NULL; END $$;
        CREATE TRIGGER slow BEFORE UPDATE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION slow();
        INSERT INTO slow VALUES (true);";
    client.batch_execute(slow).await.unwrap();
    stage.notification.push(quick(), flags(true, true)).await;
    eventually("a claim was made", async || {
        let claimed = client.query_one("SELECT count(*) FROM outbox WHERE claim IS NOT NULL", &[]).await.unwrap();
        (claimed.get::<_, i64>(0) > 0).then_some(())
    })
    .await;
    client.batch_execute("DELETE FROM slow").await.unwrap();
    until_empty(&stage.postgres).await;
    let tries: i32 = client.query_one("SELECT max(tries) FROM outbox", &[]).await.unwrap().get(0);
    assert_eq!((stage.mails.all().await.len(), tries), (30, 1));
}

/// In the end a person decides.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_put_off_for_days_is_given_up() {
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    App::start(&postgres, "booking-1").await.end().await;
    mails.behave(json!({"greylist": "@"})).await;
    seed(&postgres, 2, &["old.example", "new.example"]).await;
    let client = postgres.connect().await;
    // The old one was tried often enough for a refusal to say nothing new.
    let age =
        "UPDATE outbox SET waiting_since = now() - CASE domain WHEN 'old.example' THEN 6 ELSE 1 END * interval '1 day',
                                 tries = CASE domain WHEN 'old.example' THEN 8 ELSE 0 END";
    assert_eq!(client.execute(age, &[]).await.unwrap(), 2);
    let notification = App::notification(&postgres, &mails).await;
    let reason = eventually("it is given up", async || {
        client.query_opt("SELECT reason FROM dead_letters", &[]).await.unwrap().map(|row| row.get::<_, String>(0))
    })
    .await;
    assert!(reason.starts_with("given up after 144 h: the mail server refused at RCPT TO: 451"), "{reason}");
    eventually("the metric says how old the other one is", async || {
        let seconds = metric(&notification, "notification_oldest_mail_seconds").await;
        (seconds >= 86_400).then_some(())
    })
    .await;
    mails.behave(json!({})).await;
    until_empty(&postgres).await;
    let settings = requeue::Settings {
        database: postgres.settings(),
        choice: Choice { all: true, ..Default::default() },
        dry_run: false,
    };
    let mut said = String::new();
    requeue::run(&settings, &mut |line| said.push_str(line)).await.unwrap();
    until_empty(&postgres).await;
    assert_eq!((mails.all().await.len(), dead_letters(&postgres).await), (2, 0), "its time begins anew: {said}");
}

/// A database that refuses to take down what became of a mail had it sent again with each claim, without end.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_of_which_nobody_knows_what_became_leaves_no_more() {
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    App::start(&postgres, "booking-1").await.end().await;
    seed(&postgres, 1, &["a.example"]).await;
    let client = postgres.connect().await;
    // As after so many claims that ran out while it was on its way; the next one makes five.
    let lost = "UPDATE outbox SET sending = true, claim = gen_random_uuid(), possible_duplicates = 4,
                                  claimed_until = now() - interval '1 second'";
    client.execute(lost, &[]).await.unwrap();
    let _notification = App::notification(&postgres, &mails).await;
    until_empty(&postgres).await;
    let reason: String = client.query_one("SELECT reason FROM dead_letters", &[]).await.unwrap().get(0);
    assert!(reason.contains("it has left 5 times"), "{reason}");
    assert_eq!(mails.all().await.len(), 0);
}

/// Others are refused each on its own account, such as a stranger's: they would make the pause longer each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_goes_where_a_mail_was_taken_before() {
    let stage = stage().await;
    book(&stage.booking, Some("ann@good.example")).await;
    until_empty(&stage.postgres).await;
    stage.mails.behave(json!({"down": true})).await;
    let domains: Vec<_> = (0..20).map(|nth| format!("domain{nth}.example")).collect();
    seed(&stage.postgres, 20, &domains.iter().map(String::as_str).collect::<Vec<_>>()).await;
    eventually("sending is paused", async || {
        (metric(&stage.notification, "notification_paused").await > 0).then_some(())
    })
    .await;
    seed(&stage.postgres, 1, &["good.example"]).await;
    let client = stage.postgres.connect().await;
    let tried = "SELECT FROM outbox WHERE domain = 'good.example' AND last_error IS NOT NULL";
    eventually("the probe goes there", async || client.query_opt(tried, &[]).await.unwrap()).await;
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
    let mails = stage.mails.all().await;
    assert_eq!((mails.len(), &mails[1]["to"]), (22, &json!(["buyer1@good.example"])));
}

/// Another process may have sent all that was left.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_ends_though_nothing_is_left_to_send() {
    let stage = stage().await;
    stage.mails.behave(json!({"down": true})).await;
    book(&stage.booking, Some("ann@example.com")).await;
    eventually("sending is paused", async || {
        (metric(&stage.notification, "notification_paused").await > 0).then_some(())
    })
    .await;
    stage.postgres.connect().await.execute("UPDATE outbox SET done_at = now()", &[]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(metric(&stage.notification, "notification_paused").await, 1, "the server is still away");
    stage.mails.behave(json!({})).await;
    stage.notification.check("mail", "all is well again", |check| check.status == CheckStatus::Healthy).await;
    assert_eq!(metric(&stage.notification, "notification_paused").await, 0);
}

/// The end of a mail may take as long as its claim holds: RFC 5321 allows minutes for it, and an answer that is not waited for
/// is a mail that is sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_its_time_gets_each_mail_once() {
    let stage = stage().await;
    stage.mails.behave(json!({"delayMs": 2_500})).await;
    for nth in 0..4 {
        book(&stage.booking, Some(&format!("ann{nth}@example.com"))).await;
    }
    until_empty(&stage.postgres).await;
    assert_eq!(stage.mails.all().await.len(), 4);
    assert_eq!(metric(&stage.notification, "notification_possible_duplicates_total").await, 0);
    assert_eq!(metric(&stage.notification, "notification_pauses_total").await, 0);
}

/// A process that is newer than the schema sends nothing before what it writes has its columns, and while it waits for that
/// nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn no_mail_is_sent_before_its_columns_are_there() {
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    let booking = App::start(&postgres, "booking-1").await;
    booking.schema_is_done().await;
    let mut client = postgres.connect().await;
    let as_before =
        "DROP TRIGGER outbox_domain ON outbox; DROP FUNCTION outbox_domain; DROP INDEX outbox_open_by_domain;
        ALTER TABLE outbox DROP COLUMN last_error, DROP COLUMN waiting_since, DROP COLUMN domain;
        DELETE FROM schema_migrations WHERE version IN (8, 9, 42);";
    client.batch_execute(as_before).await.unwrap();
    let first = book(&booking, Some("ann@example.com")).await;
    let busy = client.transaction().await.unwrap();
    busy.batch_execute("LOCK TABLE outbox IN ROW EXCLUSIVE MODE").await.unwrap();
    let notification = App::notification_before_its_schema(&postgres, &mails).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // It waits for the migration's lock, which is given up for a while after 300 ms.
    seed(&postgres, 1, &["b.example"]).await;
    assert_eq!(mails.all().await.len(), 0);
    notification.push(watched(), flags(false, true)).await;
    busy.commit().await.unwrap();
    // Also of those that were there before.
    let domain = "SELECT FROM outbox WHERE booking_id::text = $1 AND domain = 'example.com'";
    eventually("it has its domain", async || client.query_opt(domain, &[&first]).await.ok().flatten()).await;
    notification.push(watched(), flags(true, true)).await;
    until_empty(&postgres).await;
    assert_eq!(mails.all().await.len(), 2);
}

/// An index waits for everybody who is in the middle of something, for as long as that takes: a report, or for ever.
#[tokio::test(flavor = "multi_thread")]
async fn mails_are_sent_while_an_index_is_built() {
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    let booking = App::start(&postgres, "booking-1").await;
    booking.schema_is_done().await;
    booking.end().await;
    let (client, mut buyer) = (postgres.connect().await, postgres.connect().await);
    let without = "DROP INDEX events_by_age; DELETE FROM schema_migrations WHERE version = 42";
    client.batch_execute(without).await.unwrap();
    let busy = buyer.transaction().await.unwrap();
    busy.batch_execute("LOCK TABLE events IN ROW EXCLUSIVE MODE").await.unwrap();
    let notification = App::notification_before_its_schema(&postgres, &mails).await;
    let waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                 AND query LIKE 'CREATE INDEX CONCURRENTLY%' LIMIT 1";
    eventually("the index waits", async || client.query_opt(waits, &[]).await.unwrap()).await;
    seed(&postgres, 3, &["a.example"]).await;
    until_empty(&postgres).await;
    assert_eq!(mails.all().await.len(), 3);
    assert!(client.query_opt(waits, &[]).await.unwrap().is_some(), "it waits still");
    busy.commit().await.unwrap();
    notification.schema_is_done().await;
}

/// What a server says may have signs that a database does not take.
#[tokio::test(flavor = "multi_thread")]
async fn odd_signs_in_an_answer_jam_nothing() {
    let stage = stage().await;
    stage
        .mails
        .behave(json!({"replies": [
            {"at": "rcpt", "to": "nobody@", "reply": "550 5.1.1 no\u{0}body\u{1b}[31m"},
            {"at": "rcpt", "to": "later@", "reply": "450 4.2.0 la\u{0}ter"},
        ]}))
        .await;
    for _ in 0..4 {
        book(&stage.booking, Some("nobody@example.com")).await;
        book(&stage.booking, Some("later@example.com")).await;
    }
    eventually("the answers are written down", async || (dead_letters(&stage.postgres).await == 4).then_some(())).await;
    stage.mails.behave(json!({})).await;
    book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!(stage.mails.all().await.len(), 5);
}

/// Also where a session has to be reset after each mail.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_open_no_more_sessions_than_there_may_be() {
    let stage = stage().await;
    // While one is being reset, another one could be opened.
    stage.mails.behave(json!({"refuse": "@", "resetDelayMs": 100})).await;
    seed(&stage.postgres, 60, &["a.example", "b.example"]).await;
    until_empty(&stage.postgres).await;
    assert_eq!(dead_letters(&stage.postgres).await, 60);
    let stats = stage.mails.stats().await;
    assert!(stats.most_at_once <= 5 && stats.conversations <= 8, "{stats:?}");
}

/// `NAME` of the environment, where a longer run is wanted than the usual one.
fn size(name: &str, usual: u32) -> u32 {
    std::env::var(name).map_or(usual, |size| size.parse().unwrap())
}

/// For as long as the server refuses everything, nothing is lost and no mail is tried in vain again and again; then sending
/// goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_everything_for_a_while_loses_no_mail() {
    const MAILS: i32 = 200;
    let seconds = 4_u64;
    let stage = stage().await;
    stage.notification.push(watched(), flags(true, true)).await;
    stage.mails.behave(blocked()).await;
    seed(&stage.postgres, MAILS, &["a.example", "b.example"]).await;
    let long = |check: &contract::CheckReport| check.data.get("pausedSeconds").and_then(Value::as_u64) >= Some(seconds);
    within(Duration::from_secs(seconds + 30), "it was refused for long enough", async || {
        stage.notification.health().await.checks.remove("mail").filter(long)
    })
    .await;
    let tries = "SELECT max(tries) FROM outbox";
    let tries: i32 = stage.postgres.connect().await.query_one(tries, &[]).await.unwrap().get(0);
    assert!(tries <= 1, "a mail has lost {tries} tries to the pause");
    stage.mails.behave(json!({})).await;
    let begin = Instant::now();
    // The longest pause is a minute, and the circuit stays open for half of one.
    until_empty_within(Duration::from_secs(100), &stage.postgres).await;
    println!("refused for {seconds} s: {MAILS} mails were sent {:.1} s after that", begin.elapsed().as_secs_f64());
    assert_eq!(stage.mails.stats().await.received, u64::try_from(MAILS).unwrap());
    assert_eq!(dead_letters(&stage.postgres).await, 0);
}

/// It is on a list of servers that nobody takes mail from.
fn blocked() -> Value {
    let reply = json!({"at": "rcpt", "reply": "554 5.7.1 Service unavailable; Client host blocked using list.example"});
    json!({"replies": [reply]})
}

/// Two processes share the outbox, each with several sessions that it keeps. `make bench-mail` sends 20,000, once after all of
/// them were refused for a minute.
#[tokio::test(flavor = "multi_thread")]
async fn many_mails_are_sent_by_two_processes_over_few_sessions() {
    let count = size("MAILS", 500);
    let limit = Duration::from_secs(if count > 500 { 300 } else { 60 });
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    App::start(&postgres, "booking-1").await.end().await;
    // Four of five buyers have their address at one large provider.
    let domains: Vec<_> = (0..20).map(|nth| format!("domain{}.example", if nth % 5 == 0 { nth } else { 1 })).collect();
    seed(&postgres, i32::try_from(count).unwrap(), &domains.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let refused = u64::from(size("REFUSE_SECONDS", 0));
    if refused > 0 {
        mails.behave(blocked()).await;
    }
    let mut begin = Instant::now();
    let ports = [(); 2].map(|()| free_port());
    let processes = ports.map(|port| quiet(command_at(port, &postgres, &mails)));
    for port in ports.iter().filter(|_| refused > 0) {
        within(Duration::from_secs(refused + 60), "it was refused for long enough", async || {
            let report: Value =
                reqwest::get(format!("http://127.0.0.1:{port}/health")).await.ok()?.json().await.ok()?;
            (report["checks"]["mail"]["data"]["pausedSeconds"].as_u64() >= Some(refused)).then_some(())
        })
        .await;
    }
    if refused > 0 {
        assert_eq!((mails.stats().await.received, dead_letters(&postgres).await), (0, 0));
        mails.behave(json!({})).await;
        begin = Instant::now();
    }
    until_empty_within(limit, &postgres).await;
    let took = begin.elapsed();
    let stats = mails.stats().await;
    let a_second = f64::from(count) / took.as_secs_f64();
    let after = if refused > 0 { format!(", after {refused} s of refusals") } else { String::new() };
    println!("{count} mails by two processes in {:.1} s{after}, {a_second:.0} a second: {stats:?}", took.as_secs_f64());
    assert_eq!(stats.received, u64::from(count), "none is lost, and none sent twice");
    for port in ports {
        let text = reqwest::get(format!("http://127.0.0.1:{port}/metrics")).await.unwrap().text().await.unwrap();
        let sent = value_of(&text, r#"notifications_total{outcome="sent"}"#);
        assert!(sent > u64::from(count) / 10, "both take part: {sent} by one");
    }
    // A session is over after a hundred mails.
    assert!(stats.conversations <= 20 + u64::from(count) / 50, "sessions are kept: {stats:?}");
    assert_eq!(dead_letters(&postgres).await, 0);
    drop(processes);
}

/// Whatever a server repeats of an address, the log shows where a mail went and not to whom.
#[tokio::test(flavor = "multi_thread")]
async fn logs_show_no_address_in_full() {
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    mails
        .behave(json!({"replies": [
            {"at": "rcpt", "to": "nobody@", "reply": "550 5.1.1 <nobody@example.com>: no such user nobody@example.com"},
            {"at": "rcpt", "to": "later@", "reply": "450 4.2.0 <later@example.com>: Greylisted"},
        ]}))
        .await;
    let booking = App::start(&postgres, "booking-1").await;
    book(&booking, Some("nobody@example.com")).await;
    book(&booking, Some("later@example.com")).await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = command(&postgres, &mails);
    command.env("RUST_LOG", "debug").stdout(log.reopen().unwrap()).stderr(log.reopen().unwrap());
    let mut process = command.spawn().unwrap();
    let text = async || std::fs::read_to_string(log.path()).unwrap();
    let text = eventually("both are in the log", async || {
        let text = text().await;
        (text.contains("moved to dead_letters") && text.contains("l…@example.com")).then_some(text)
    })
    .await;
    process.kill().await.unwrap();
    assert!(text.contains("<n…@example.com>: no such user"), "{text}");
    assert!(!text.contains("nobody@") && !text.contains("later@"), "{text}");
}

/// A process of its own that works off the outbox; it ends when this is dropped.
fn process(postgres: &Postgres, mails: &Mails) -> tokio::process::Child {
    quiet(command(postgres, mails))
}

fn quiet(mut command: tokio::process::Command) -> tokio::process::Child {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn command(postgres: &Postgres, mails: &Mails) -> tokio::process::Command {
    command_at(0, postgres, mails)
}

/// With the port for everybody at this one.
fn command_at(port: u16, postgres: &Postgres, mails: &Mails) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ticketing"));
    command.args(["notification", "--bind-address", "127.0.0.1", "--admin-port", "0", "--port", &port.to_string()]);
    command.args(["--database-url", &postgres.url(), "--smtp-host", "127.0.0.1"]);
    command.args(["--smtp-port", &mails.smtp.port().to_string()]).kill_on_drop(true);
    let key = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("ticket-key.pem");
    if !key.exists() {
        std::fs::write(&key, ticketing_services::tickets::generate().unwrap()).unwrap();
    }
    command.arg("--ticket-key-file").arg(key);
    command
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
    // Longer than other work gets at the end, and admin calls before it.
    stage.mails.behave(json!({"delayMs": 9_000})).await;
    book(&stage.booking, Some("ann@example.com")).await;
    eventually("it is being sent", async || (!stage.mails.all().await.is_empty()).then_some(())).await;
    stage.notification.end().await;
    let left = "SELECT count(*) FROM outbox WHERE done_at IS NULL";
    assert_eq!(stage.postgres.connect().await.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    assert_eq!(stage.mails.all().await.len(), 1);
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

/// A real process, killed while it sends: nothing is lost, and each kill makes no more mails twice than were on their way.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_makes_no_more_duplicates_than_mails_were_on_their_way() {
    const MAILS: usize = 24;
    const KILLS: usize = 4;
    /// Those that may be on their way to one domain.
    const AT_ONCE: usize = 3;
    let postgres = Postgres::start().await;
    let mails = Mails::start();
    let booking = App::start(&postgres, "booking-1").await;
    for nth in 0..MAILS {
        book(&booking, Some(&format!("ann{nth}@example.com"))).await;
    }
    mails.behave(json!({"delayMs": 150})).await;
    for kill in 0..KILLS {
        let mut process = process(&postgres, &mails);
        let before = mails.all().await.len();
        eventually("it sends", async || (mails.all().await.len() > before).then_some(())).await;
        tokio::time::sleep(Duration::from_millis(60 * kill as u64)).await;
        process.kill().await.unwrap();
        // The next worker need not wait for the claim of the dead one to run out.
        let free = "UPDATE outbox SET claimed_until = now() - interval '1 second' WHERE done_at IS NULL";
        postgres.connect().await.execute(free, &[]).await.unwrap();
    }
    let _last = process(&postgres, &mails);
    until_empty(&postgres).await;
    let mut sent = BTreeMap::new();
    for mail in mails.all().await {
        *sent.entry(mail["messageId"].as_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert_eq!(sent.len(), MAILS, "none is lost");
    let total: usize = sent.values().sum();
    assert!(total <= MAILS + KILLS * AT_ONCE, "{sent:?}");
    assert!(total > MAILS, "no kill met a mail on its way: this proves nothing: {sent:?}");
    let counted = "SELECT sum(possible_duplicates) FROM outbox";
    let counted: i64 = postgres.connect().await.query_one(counted, &[]).await.unwrap().get(0);
    let counted = usize::try_from(counted).unwrap();
    assert!((total - MAILS..=KILLS * AT_ONCE).contains(&counted), "{counted} were counted: {sent:?}");
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

/// A server that wants a name with a dot gets one, and no mail is lost over it (case 21).
#[tokio::test(flavor = "multi_thread")]
async fn the_name_that_it_greets_with_is_one_that_servers_take() {
    let stage = stage().await;
    stage.mails.behave(json!({"needsDottedHelo": true})).await;
    book(&stage.booking, Some("ann@example.com")).await;
    until_empty(&stage.postgres).await;
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (1, 0));
}

/// A refusal of this service is nobody's dead letter, wherever the server says it (case 21).
#[rstest::rstest]
#[case::name("rcpt", "504 5.5.2 <notification-1>: Helo command rejected: need fully-qualified hostname")]
#[case::block_list("rcpt", "554 5.7.1 Service unavailable; Client host [192.0.2.7] blocked using a block list")]
#[case::block_list_at_once("connect", "554 5.7.1 192.0.2.7 is on our block list")]
#[case::relay_denied("rcpt", "554 5.7.1 <ann0@example.com>: Relay access denied")]
#[case::policy("end", "550 5.7.1 Our policy forbids this mail")]
#[case::mailboxes_full("rcpt", "552 5.2.2 Mailbox full")]
#[case::quota_of_the_sender("end", "550 5.4.5 Daily sending quota exceeded")]
#[case::quota_as_a_mailbox(
    "end",
    "554 5.2.0 STOREDRV.Submission.Exception:OutboundSpamException; verdict is RefuseQuota"
)]
#[case::quota_as_an_address("rcpt", "550 5.1.90 You have reached your daily limit for message recipients")]
#[case::quota_for_now("rcpt", "450 4.2.1 Peak SMTP relay limit exceeded for customer")]
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_the_service_is_published_and_loses_nothing(#[case] at: &str, #[case] reply: &str) {
    const MAILS: usize = 20;
    let stage = stage().await;
    stage.mails.behave(json!({"replies": [{"at": at, "reply": reply}]})).await;
    for nth in 0..MAILS {
        book(&stage.booking, Some(&format!("ann{nth}@domain{}.example", nth % 5))).await;
    }
    let code = reply.split(' ').next().unwrap();
    let check = stage
        .notification
        .check("mail", "the check says it", |check| {
            check.status == CheckStatus::Unhealthy && check.message.contains(code)
        })
        .await;
    assert!(!check.message.contains("ann0@"), "{}", check.message);
    assert_eq!(metric(&stage.notification, "notification_paused").await, 1);
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (0, 0));
    stage.mails.behave(json!({})).await;
    until_empty(&stage.postgres).await;
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (MAILS, 0));
    stage.notification.check("mail", "all is well again", |check| check.status == CheckStatus::Healthy).await;
    assert_eq!(metric(&stage.notification, "notification_paused").await, 0);
}

/// Where all buyers have their address at one provider, no other domain shows that it is the relay: nothing is lost either, however
/// long it lasts.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_refuses_the_only_domain_for_days_loses_nothing() {
    let stage = stage().await;
    stage.notification.push(watched(), flags(false, true)).await;
    let reply = json!({"at": "rcpt", "reply": "554 5.7.1 Relay access denied"});
    stage.mails.behave(json!({"replies": [reply]})).await;
    seed(&stage.postgres, 3, &["one.example"]).await;
    // Each of these would be given up if one more try counted.
    let old = "UPDATE outbox SET waiting_since = now() - interval '6 days', tries = 8";
    let client = stage.postgres.connect().await;
    client.execute(old, &[]).await.unwrap();
    seed(&stage.postgres, 3, &["one.example"]).await;
    stage.notification.push(watched(), flags(true, true)).await;
    let check = stage.notification.check("mail", "the check says it", |check| check.status == CheckStatus::Unhealthy);
    let message = check.await.message;
    assert!(message.contains("no mail is lost") && message.contains("554 5.7.1 Relay access denied"), "{message}");
    eventually("it is set aside", async || {
        (metric(&stage.notification, "notification_domains_set_aside").await == 1).then_some(())
    })
    .await;
    eventually("it is tried again and again", async || {
        (metric(&stage.notification, r#"notifications_total{outcome="held"}"#).await >= 5).then_some(())
    })
    .await;
    let tries = "SELECT array_agg(DISTINCT tries ORDER BY tries) FROM outbox WHERE claim IS NULL";
    let tries: Vec<i32> = client.query_one(tries, &[]).await.unwrap().get(0);
    assert_eq!((tries, dead_letters(&stage.postgres).await), (vec![0, 8], 0));
    stage.mails.behave(json!({})).await;
    until_empty_within(Duration::from_secs(90), &stage.postgres).await;
    assert_eq!((stage.mails.all().await.len(), dead_letters(&stage.postgres).await), (6, 0));
    assert_eq!(metric(&stage.notification, "notification_domains_set_aside").await, 0);
}

/// That is about the recipient: nobody else waits for it, and in the end a person decides.
#[rstest::rstest]
#[case("552 5.2.2 Mailbox full")]
#[case("452 4.2.2 Over quota")]
#[tokio::test(flavor = "multi_thread")]
async fn a_full_mailbox_holds_up_no_other(#[case] reply: &str) {
    let stage = stage().await;
    stage.mails.behave(json!({"replies": [{"at": "rcpt", "to": "full@", "reply": reply}]})).await;
    for _ in 0..3 {
        book(&stage.booking, Some("full@one.example")).await;
    }
    seed(&stage.postgres, 10, &["one.example", "two.example"]).await;
    eventually("the others get theirs", async || (stage.mails.all().await.len() == 10).then_some(())).await;
    let old = "UPDATE outbox SET waiting_since = now() - interval '6 days', tries = 9, next_at = now()
               WHERE done_at IS NULL AND claim IS NULL";
    let client = stage.postgres.connect().await;
    within(Duration::from_secs(90), "it is given up", async || {
        client.execute(old, &[]).await.unwrap();
        (dead_letters(&stage.postgres).await == 3).then_some(())
    })
    .await;
}

/// Each odd address is refused where the order is taken, or gets its mail (case 22).
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_sold_to_gets_its_mail() {
    const ODD: [&str; 22] = [
        "a@b",
        "a@example.com.",
        "a b@example.com",
        " a@example.com",
        "a@example.com ",
        "\"a b\"@example.com",
        "\"a\"@example.com",
        "ann@münchen.example",
        "änn@example.com",
        "ann(her)@example.com",
        "ann@example.com(work)",
        "a@example.com,b@example.com",
        "a@example.com b@example.com",
        "Ann <ann@example.com>",
        "a..b@example.com",
        ".a@example.com",
        "a.@example.com",
        "a@-example.com",
        "a@exa_mple.com",
        "a@[192.0.2.1]",
        "a@@example.com",
        "ann+tag@sub.example.com",
    ];
    let stage = stage().await;
    let mut sold = Vec::new();
    for address in ODD {
        let mut wanted = order(OPENING_NIGHT, 1);
        wanted["email"] = json!(address);
        let answer = stage.booking.post(&wanted).await;
        match answer.status().as_u16() {
            201 => sold.push(address),
            422 => assert!(answer.text().await.unwrap().contains("email"), "{address}"),
            status => panic!("{address}: {status}"),
        }
    }
    until_empty(&stage.postgres).await;
    assert_eq!(dead_letters(&stage.postgres).await, 0, "sold: {sold:?}");
    assert_eq!(stage.mails.all().await.len(), sold.len());
    assert_eq!(sold, ["ann@münchen.example", "änn@example.com", "ann+tag@sub.example.com"]);
}
