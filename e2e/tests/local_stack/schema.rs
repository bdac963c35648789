//! Booking logs in as a role of its own, with a password, to a database that it has to fill: what it may not do there, what its
//! migrations wait for, and what happens when the password is another one. And its database under a policy that says little.

use crate::database::{RETRIES, write_as_server};
use crate::fixture::{Fixture, OPENING_NIGHT, Seen, policy};
use contract::{CheckReport, CheckStatus, CircuitBreakerPolicy, DependencyPolicy, PolicySettings};
use e2e::local_stack::Port;
use futures::future::join_all;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio_postgres::{Client, NoTls};

/// The role, and its database.
const SHOP: &str = "shop";
/// What a password may have in it.
const FIRST: &str = "p@ss/w:rd%20 'ö\\";

#[tokio::test(flavor = "multi_thread")]
async fn booking_has_a_role_of_its_own() {
    let mut fixture = Fixture::start().await;
    let (admin, secret) = log_in_with_a_password(&mut fixture).await;
    no_rights(&mut fixture, &admin).await;
    a_migration_waits(&mut fixture, &admin).await;
    password_rotated(&mut fixture, &admin, &secret).await;
    secret_comes_later(&mut fixture, &admin, &secret).await;
    only_a_circuit_breaker(&mut fixture, &admin).await;
    fixture.finish().await;
}

async fn schema(fixture: &Fixture) -> CheckReport {
    fixture.check(Port::Booking, "schema").await
}

/// From PostgreSQL 15 on, the role may not create anything in the schema `public`. The answer is the administrator's connection to
/// its database, and the file with the password.
async fn log_in_with_a_password(fixture: &mut Fixture) -> (Client, PathBuf) {
    let server = fixture.stack.connect().await.unwrap();
    let password = FIRST.replace('\'', "''");
    server.batch_execute(&format!("CREATE ROLE {SHOP} LOGIN PASSWORD '{password}'")).await.unwrap();
    server.batch_execute(&format!("CREATE DATABASE {SHOP}")).await.unwrap();
    let rules: String = server.query_one("SELECT current_setting('hba_file')", &[]).await.unwrap().get(0);
    let with_a_password =
        format!("local all all trust\nhost all {SHOP} 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust");
    write_as_server(&server, &rules, &with_a_password).await;
    server.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let direct = fixture.stack.database_url();
    let address = format!("{}/{SHOP}", direct.rsplit_once('/').unwrap().0);
    let (admin, connection) = tokio_postgres::connect(&address, NoTls).await.unwrap();
    tokio::spawn(connection);
    admin.batch_execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC").await.unwrap();
    let file = fixture.stack.folder().join("password");
    std::fs::write(&file, FIRST).unwrap();
    let (url, path) = (address.replace("postgres@", &format!("{SHOP}@")), file.display().to_string());
    let own = [("DATABASE_URL", Some(url.as_str())), ("DATABASE_PASSWORD_FILE", Some(path.as_str()))];
    fixture.restart_with("booking", &own).await;
    fixture.configure("booking", policy("booking")).await;
    (admin, file)
}

async fn no_rights(fixture: &mut Fixture, admin: &Client) {
    let is_said = async || {
        let report = schema(fixture).await;
        report.status == CheckStatus::Unhealthy && report.message.contains("permission denied for schema public")
    };
    let noticed = fixture.until("the check has the server's words", is_said).await;
    assert!(schema(fixture).await.message.contains("GRANT CREATE ON SCHEMA public"), "it says what to do");
    let refused = fixture.book().await;
    assert_eq!(refused.in_words(), "503 BOOKING_FAILED");
    admin.batch_execute(&format!("GRANT CREATE ON SCHEMA public TO {SHOP}")).await.unwrap();
    let well = fixture.until_well().await;
    let metrics = format!("check schema unhealthy after {} ms: permission denied", noticed.as_millis());
    fixture.record("no right to create the schema", &refused.in_words(), refused.took, well, &metrics);
}

/// A step that a report holds up, for as long as it reads; buyers do not notice.
async fn a_migration_waits(fixture: &mut Fixture, admin: &Client) {
    fixture.stack.kill("booking").await;
    // As before the update that says whose a booking is.
    let before = "
        DELETE FROM schema_migrations WHERE version IN (12, 43);
        DROP FUNCTION buyer_limit;
        ALTER TABLE bookings DROP COLUMN owner, DROP COLUMN network;
        ALTER TABLE events DROP COLUMN seats_per_buyer";
    admin.batch_execute(before).await.unwrap();
    admin.batch_execute("BEGIN; SELECT count(*) FROM bookings").await.unwrap();
    fixture.restart_with("booking", &[]).await;
    fixture.configure("booking", policy("booking")).await;
    let (mut slowest, mut sold) = (Duration::ZERO, 0);
    // Until it has asked, a pod that has just started knows of no step.
    fixture.until("the check says it", async || schema(fixture).await.status == CheckStatus::Degraded).await;
    let mut said = schema(fixture).await;
    let begin = Instant::now();
    while !(said.message.contains("waits for a lock, held by") && said.message.contains("tried 4 times")) {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", said.message);
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed", "{}", said.message);
        (slowest, sold) = (slowest.max(booked.took), sold + 1);
        said = schema(fixture).await;
    }
    assert_eq!(said.status, CheckStatus::Degraded, "{}", said.message);
    assert!(said.message.starts_with("step 12 (buyers)"), "{}", said.message);
    admin.batch_execute("COMMIT").await.unwrap();
    let well = fixture.until_well().await;
    let metrics = format!("check schema degraded: step 12 waits for a lock, held by …; {sold} sold meanwhile");
    fixture.record("a migration waits for a report", "201 Confirmed", slowest, well, &metrics);
}

/// Another password, and no connection that was opened with the one before.
async fn rotate(admin: &Client, password: &str) {
    admin.batch_execute(&format!("ALTER ROLE {SHOP} PASSWORD '{password}'")).await.unwrap();
}

async fn end_sessions(admin: &Client) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1";
    admin.execute(end, &[&SHOP]).await.unwrap();
}

/// As a Secret is that is kept up to date: the file has the new password as soon as the server does.
async fn password_rotated(fixture: &mut Fixture, admin: &Client, secret: &Path) {
    let (over, orders) = (AtomicBool::new(false), Mutex::new(Vec::<Seen>::new()));
    let buy = join_all((0..4).map(|_| async {
        while !over.load(Ordering::Relaxed) {
            let booked = fixture.book().await;
            orders.lock().unwrap().push(booked);
        }
    }));
    let before = fixture.metrics(Port::Booking, RETRIES).await;
    let rotating = async {
        let more = async |most: usize| {
            let until = orders.lock().unwrap().len() + most;
            fixture.until("orders are taken", async || orders.lock().unwrap().len() >= until).await;
        };
        more(20).await;
        rotate(admin, "second").await;
        std::fs::write(secret, "second").unwrap();
        end_sessions(admin).await;
        more(100).await;
        over.store(true, Ordering::Relaxed);
    };
    tokio::join!(buy, rotating);
    let orders = orders.into_inner().unwrap();
    for booked in &orders {
        assert!(matches!(booked.status, 201 | 202), "{}", booked.in_words());
    }
    let later = orders.iter().filter(|booked| booked.status == 202).count();
    let retried = fixture.metrics(Port::Booking, RETRIES).await - before;
    let well = fixture.until_well().await;
    let slowest = orders.iter().map(|booked| booked.took).max().unwrap();
    let sees = format!("{} x 201 Confirmed, {later} x 202, 0 x 503", orders.len() - later);
    let metrics = format!("booking: database retries +{retried}");
    fixture.record("database's password rotated", &sees, slowest, well, &metrics);
}

/// The server has another password for a while than the file.
async fn secret_comes_later(fixture: &mut Fixture, admin: &Client, secret: &Path) {
    rotate(admin, "third").await;
    end_sessions(admin).await;
    fixture.until("orders are refused", async || fixture.book().await.in_words() == "503 BOOKING_FAILED").await;
    let refused = fixture.book().await;
    assert_eq!(refused.in_words(), "503 BOOKING_FAILED");
    let is_said = async || {
        let report = fixture.check(Port::Booking, "database").await;
        report.status == CheckStatus::Unhealthy && report.message.contains("password")
    };
    fixture.until("the check says it", is_said).await;
    std::fs::write(secret, "third").unwrap();
    let well = fixture.until_well().await;
    let metrics = "check database unhealthy: password refused";
    fixture.record("... and the file comes later", &refused.in_words(), refused.took, well, metrics);
}

/// All else is as it is built in; without its retries every third order would be refused.
async fn only_a_circuit_breaker(fixture: &mut Fixture, admin: &Client) {
    const BUYERS: usize = 10;
    const EACH: usize = 20;
    let breaker = CircuitBreakerPolicy { consecutive_failures: Some(5), ..CircuitBreakerPolicy::default() };
    let said = DependencyPolicy { circuit_breaker: breaker, ..DependencyPolicy::default() };
    let mut little = PolicySettings::default();
    little.insert_dependency("database".to_owned(), said);
    fixture.configure("booking", little).await;
    // Every third attempt meets a deadlock.
    let deadlocks = "CREATE SEQUENCE attempts;
        CREATE FUNCTION deadlock() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN
            IF nextval(''attempts'') % 3 = 0 THEN RAISE EXCEPTION USING ERRCODE = ''40P01''; END IF; RETURN NEW; END';
        CREATE TRIGGER deadlock BEFORE INSERT ON bookings FOR EACH ROW EXECUTE FUNCTION deadlock()";
    admin.batch_execute(deadlocks).await.unwrap();
    let before = fixture.metrics(Port::Booking, RETRIES).await;
    let seen: Vec<_> = join_all((0..BUYERS).map(|_| async {
        let mut seen = Vec::new();
        for _ in 0..EACH {
            seen.push(fixture.book().await);
        }
        seen
    }))
    .await
    .into_iter()
    .flatten()
    .collect();
    let refused = seen.iter().filter(|booked| booked.status == 503).count();
    let retried = fixture.metrics(Port::Booking, RETRIES).await - before;
    assert!(retried >= 50, "{retried}");
    assert!(refused * 20 < seen.len(), "{refused} of {} orders were refused", seen.len());
    admin.batch_execute("DROP TRIGGER deadlock ON bookings").await.unwrap();
    fixture.configure("booking", policy("booking")).await;
    let well = fixture.until_well().await;
    let books = "SELECT capacity - available - (SELECT sum(ticket_count) FROM bookings
                 WHERE event_id = e.id AND status <> 'Cancelled') FROM events e WHERE id::text = $1";
    assert_eq!(admin.query_one(books, &[&OPENING_NIGHT]).await.unwrap().get::<_, i64>(0), 0);
    let slowest = seen.iter().map(|booked| booked.took).max().unwrap();
    let sees = format!("{} x 201 Confirmed, {refused} x 503", seen.len() - refused);
    let metrics = format!("booking: database retries +{retried}");
    fixture.record("policy says only circuitBreaker, deadlocks", &sees, slowest, well, &metrics);
}
