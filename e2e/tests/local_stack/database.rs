//! What the database does, and what is done to it.

use crate::fixture::{Fixture, OPENING_NIGHT, SERVICES, order, policy};
use contract::PolicySettings;
use e2e::local_stack::Port;
use futures::future::join_all;
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio_postgres::Client;

const OPENED: &str = r#"circuit_breaker_opened_total{service="database"}"#;
pub const RETRIES: &str = r#"retry_attempts_total{service="database""#;

#[tokio::test(flavor = "multi_thread")]
async fn the_database_fails() {
    let mut fixture = Fixture::start().await;
    restarted(&mut fixture).await;
    connections_hang(&mut fixture).await;
    connections_killed(&mut fixture).await;
    deadlocks(&mut fixture).await;
    takes_no_writes(&mut fixture).await;
    takes_tls_only(&mut fixture).await;
    pooler_restarted(&mut fixture).await;
    fixture.finish().await;
}

/// A failover: the server that all connections lead to is a replica from now on, and says so only to writes.
async fn takes_no_writes(fixture: &mut Fixture) {
    assert_eq!(fixture.events("").await.status, 200);
    let client = connect(fixture).await;
    let set = async |value: &str| {
        client.batch_execute(&format!("ALTER SYSTEM SET default_transaction_read_only = {value}")).await.unwrap();
        client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    };
    set("on").await;
    let (mut slowest, mut sees) = (Duration::ZERO, String::new());
    fixture.until("an order is refused", async || fixture.book().await.status == 503).await;
    for _ in 0..4 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "503 BOOKING_FAILED");
        slowest = slowest.max(booked.took);
        sees = booked.in_words();
    }
    let said = async || {
        let report = fixture.check(Port::Booking, "database").await;
        report.status == contract::CheckStatus::Unhealthy && report.message.contains("read-only")
    };
    let noticed = fixture.until("the check says it", said).await;
    assert_eq!(fixture.events("").await.status, 200);
    set("off").await;
    let well = fixture.until_well().await;
    assert_eq!(missing_seats(&client).await, 0);
    let metrics = format!("check database unhealthy (read-only) after {} ms", noticed.as_millis());
    fixture.record("database takes no writes (failover)", &format!("{sees}; events go on"), slowest, well, &metrics);
}

/// A PgBouncer in transaction mode before the database, which ends when it is dropped.
struct PgBouncer(Child);

impl PgBouncer {
    /// In `folder`, which is the server's own.
    fn start(folder: &Path) -> Self {
        let mut command = Command::new("pgbouncer");
        let owner = std::fs::metadata(folder).unwrap();
        let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
        if is_root {
            // It does not run as root.
            command.uid(owner.uid()).gid(owner.gid());
        }
        command.current_dir(folder).arg("pgbouncer.ini").stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.stderr(Stdio::null()).spawn().expect("it is one of the packages of these tests"))
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sessions that the PgBouncer at this port has with the server, as it says itself.
async fn sessions_of(port: u16) -> usize {
    let console = format!("postgres://postgres@127.0.0.1:{port}/pgbouncer");
    let (client, connection) = tokio_postgres::connect(&console, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let said = client.simple_query("SHOW SERVERS").await.unwrap();
    said.iter().filter(|message| matches!(message, tokio_postgres::SimpleQueryMessage::Row(_))).count()
}

/// Booking and payment share the sessions of a PgBouncer in transaction mode, and that is replaced.
async fn pooler_restarted(fixture: &mut Fixture) {
    let client = connect(fixture).await;
    let folder: String = client.query_one("SELECT current_setting('data_directory')", &[]).await.unwrap().get(0);
    let (direct, port) = (fixture.stack.database_url(), e2e::local_stack::Ports::any_free().unwrap());
    let server = direct.rsplit_once(':').unwrap().1.split_once('/').unwrap().0;
    let settings = format!(
        "[databases]\n* = host=127.0.0.1 port={server} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         unix_socket_dir =\nauth_type = any\nadmin_users = postgres\npool_mode = transaction\ndefault_pool_size = 6\nmax_client_conn = 200\n"
    );
    write_as_server(&client, &format!("{folder}/pgbouncer.ini"), &settings).await;
    let pooler = PgBouncer::start(Path::new(&folder));
    let pooled = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    for service in ["booking", "payment"] {
        let through_it = [("DATABASE_URL", Some(pooled.as_str())), ("DATABASE_POOLER", Some("transaction"))];
        fixture.restart_with(service, &through_it).await;
        fixture.configure(service, policy(service)).await;
    }
    fixture.until_well().await;
    // Twice as many at once as there are sessions: each transaction may get another one.
    for booked in join_all((0..12).map(|_| fixture.book())).await {
        assert_eq!(booked.in_words(), "201 Confirmed");
    }
    let sessions = sessions_of(port).await;
    assert!((1..=6).contains(&sessions), "{sessions} sessions");
    drop(pooler);
    let refused = fixture.book().await;
    assert_eq!(refused.in_words(), "503 BOOKING_FAILED");
    let _pooler = PgBouncer::start(Path::new(&folder));
    let well = fixture.until_well().await;
    assert_eq!(missing_seats(&client).await, 0);
    let metrics = format!("12 orders at once on {sessions} sessions");
    fixture.record("PgBouncer (transaction mode) replaced", &refused.in_words(), refused.took, well, &metrics);
    for service in ["booking", "payment"] {
        fixture.restart_with(service, &[("DATABASE_URL", Some(&direct)), ("DATABASE_POOLER", None)]).await;
    }
}

/// Writes a file where the server may read it, and nobody else.
pub async fn write_as_server(client: &Client, path: &str, text: &str) {
    let lines =
        format!("COPY (SELECT unnest(string_to_array($${text}$$, E'\\n'))) TO PROGRAM 'umask 077; cat > {path}'");
    client.batch_execute(&lines).await.unwrap();
}

/// From one moment on the server takes connections with TLS only; the services ask for it first.
async fn takes_tls_only(fixture: &mut Fixture) {
    let client = connect(fixture).await;
    let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let row =
        client.query_one("SELECT current_setting('data_directory'), current_setting('hba_file')", &[]).await.unwrap();
    let (folder, rules): (String, String) = (row.get(0), row.get(1));
    let before: String = client.query_one("SELECT pg_read_file($1)", &[&rules]).await.unwrap().get(0);
    let (certificate, key) = (format!("{folder}/local-stack.crt"), format!("{folder}/local-stack.key"));
    write_as_server(&client, &certificate, &signed.cert.pem()).await;
    write_as_server(&client, &key, &signed.signing_key.serialize_pem()).await;
    write_as_server(&client, &rules, "local all all trust\nhostssl all all 127.0.0.1/32 trust").await;
    for change in [
        format!("ALTER SYSTEM SET ssl_cert_file = '{certificate}'"),
        format!("ALTER SYSTEM SET ssl_key_file = '{key}'"),
        "ALTER SYSTEM SET ssl = on".to_owned(),
        "SELECT pg_reload_conf()".to_owned(),
    ] {
        client.batch_execute(&change).await.unwrap();
    }
    fixture.until("nobody comes in without TLS", async || fixture.stack.connect().await.is_err()).await;
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> '' AND pid <> pg_backend_pid()";
    client.execute(kill, &[]).await.unwrap();
    let booked = fixture.book().await;
    let well = fixture.until_well().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    let query = "SELECT count(*) FILTER (WHERE ssl), count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                 WHERE application_name <> '' AND pid <> pg_backend_pid()";
    let row = client.query_one(query, &[]).await.unwrap();
    let (encrypted, all): (i64, i64) = (row.get(0), row.get(1));
    assert!(all > 0 && encrypted == all, "{encrypted} of {all}");
    write_as_server(&client, &rules, &before).await;
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    fixture.until("everybody comes in again", async || fixture.stack.connect().await.is_ok()).await;
    let metrics = format!("{encrypted} of {all} connections encrypted");
    fixture.record("database takes TLS only, from now on", "201 Confirmed", booked.took, well, &metrics);
}

async fn connect(fixture: &Fixture) -> Client {
    fixture.stack.connect().await.unwrap()
}

/// Seats that are not where the bookings say they are.
async fn missing_seats(client: &Client) -> i64 {
    let books = "SELECT capacity - available - (SELECT COALESCE(sum(ticket_count), 0) FROM bookings
                 WHERE event_id = e.id AND status <> 'Cancelled') FROM events e WHERE id::text = $1";
    client.query_one(books, &[&OPENING_NIGHT]).await.unwrap().get(0)
}

/// It crashes and comes back: nothing that was confirmed is lost, and nobody has to be restarted.
async fn restarted(fixture: &mut Fixture) {
    let confirmed = fixture.book().await;
    assert_eq!(confirmed.in_words(), "201 Confirmed");
    assert_eq!(fixture.events("").await.status, 200);
    fixture.stack.crash_database().await;
    let (mut slowest, mut sees) = (Duration::ZERO, String::new());
    for _ in 0..4 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "503 BOOKING_FAILED");
        assert!(booked.header("retry-after").is_some());
        slowest = slowest.max(booked.took);
        sees = booked.in_words();
    }
    let events = fixture.events("").await;
    assert_eq!((events.status, &events.body["isFromCache"]), (200, &json!(true)));
    // The pods are alive and ready: a database that is away is no reason to take them out of service.
    assert_eq!(fixture.get(Port::Booking, "/readyz").await.status, 200);
    let opened = fixture.metric(Port::Booking, OPENED).await;
    assert!(opened >= 1);
    fixture.stack.start_database().await.unwrap();
    let well = fixture.until_well().await;
    let found =
        fixture.get(Port::Gateway, &format!("/api/bookings/{}", confirmed.body["bookingId"].as_str().unwrap())).await;
    assert_eq!(found.body["status"], "Confirmed");
    assert_eq!(missing_seats(&connect(fixture).await).await, 0);
    let metrics = format!("booking: database opened +{opened}");
    fixture.record("database restarted", &format!("{sees}; events from memory"), slowest, well, &metrics);
}

/// Back ends of the database that are stopped; they go on when this is dropped.
struct Hung(Vec<i32>);

impl Hung {
    fn signal(&self, name: &str) {
        let pids: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        assert!(Command::new("kill").arg(format!("-{name}")).args(pids).status().unwrap().success());
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        self.signal("CONT");
    }
}

/// Stops all back ends of all services at once, and says since when. One that is stopped in the middle of a statement keeps
/// its locks, which is another failure; so it is tried again until none is.
async fn hang(fixture: &Fixture, client: &Client) -> (Instant, Hung) {
    let all = "SELECT pid FROM pg_stat_activity WHERE application_name <> '' AND pid <> pg_backend_pid()";
    let busy = client.prepare("SELECT FROM pg_stat_activity WHERE pid = ANY($1) AND state <> 'idle'").await.unwrap();
    let stopped = Mutex::new(None);
    fixture
        .until("all connections are stopped between statements", async || {
            let hung = Hung(client.query(all, &[]).await.unwrap().iter().map(|row| row.get(0)).collect());
            let since = Instant::now();
            hung.signal("STOP");
            // Without an answer, one of them has a lock that everybody needs.
            let busy = tokio::time::timeout(Duration::from_millis(200), client.query(&busy, &[&hung.0])).await;
            let is_over = busy.is_ok_and(|busy| busy.unwrap().is_empty());
            if is_over {
                *stopped.lock().unwrap() = Some((since, hung));
            }
            is_over
        })
        .await;
    stopped.into_inner().unwrap().unwrap()
}

/// All connections of all services hang at one moment, while orders come in; new ones work. Nobody helps, and no policy makes
/// it shorter: orders flow again within 5 s. Where booking's circuit to payment has opened meanwhile, they are paid after its
/// break (202).
async fn connections_hang(fixture: &mut Fixture) {
    for (service, ..) in SERVICES {
        fixture.configure(service, PolicySettings::default()).await;
    }
    let client = connect(fixture).await;
    let (over, orders) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let buy = join_all((0..4).map(|_| async {
        while !over.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let booked = fixture.book().await;
            orders.lock().unwrap().push((begun, Instant::now(), booked));
        }
    }));
    // When the first order was taken that was begun after this moment.
    let taken_since = async |since: Instant| {
        let first = || {
            let orders = orders.lock().unwrap();
            let mut good =
                orders.iter().filter(|(begun, _, booked)| *begun > since && matches!(booked.status, 201 | 202));
            good.next().map(|(_, ended, _)| *ended)
        };
        fixture.until("an order is taken", async || first().is_some()).await;
        first().unwrap()
    };
    let break_it = async {
        taken_since(Instant::now()).await;
        let (hung_at, hung) = hang(fixture, &client).await;
        let flow = taken_since(Instant::now()).await - hung_at;
        // And they go on to.
        let slowest = hung_at + Duration::from_secs(5);
        taken_since(slowest).await;
        over.store(true, Ordering::Relaxed);
        (flow, hung)
    };
    let ((flow, hung), _) = tokio::join!(break_it, buy);
    assert!(flow < Duration::from_secs(5), "orders flow again after {flow:?}");
    for of in [Port::Booking, Port::Payment, Port::Catalog, Port::Notification] {
        assert_eq!(fixture.metric(of, "database_connection_resets_total").await, 0, "nobody reset anything");
    }
    let replaced = fixture.metric(Port::Booking, "database_unresponsive_connections_total").await;
    let count = hung.0.len();
    drop(hung);
    for (service, ..) in SERVICES {
        fixture.configure(service, policy(service)).await;
    }
    let orders = orders.into_inner().unwrap();
    let confirmed: Vec<_> = orders.iter().map(|(.., booked)| booked).filter(|booked| booked.status == 201).collect();
    for booked in confirmed.iter().rev().take(20) {
        assert_eq!(fixture.charged(booked).await.len(), 1, "each is charged once");
    }
    assert_eq!(missing_seats(&client).await, 0);
    fixture.until_well().await;
    let sees = format!("{} x 201 Confirmed, {} x other", confirmed.len(), orders.len() - confirmed.len());
    let slowest = orders.iter().map(|(.., booked)| booked.took).max().unwrap();
    let metrics = format!("booking: {replaced} connections replaced, nothing reset");
    fixture.record(&format!("all {count} connections hang"), &sees, slowest, flow, &metrics);
}

/// Connections break in the middle of bookings: they are made again on new ones, and no seat is taken twice.
async fn connections_killed(fixture: &mut Fixture) {
    let client = connect(fixture).await;
    let before = fixture.metrics(Port::Booking, RETRIES).await;
    // Until ten have met a statement on its way: those between two statements are replaced without a retry.
    let over = AtomicBool::new(false);
    let kill = async {
        fixture
            .until("ten statements have lost their connection", async || {
                let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                        WHERE application_name <> '' AND pid <> pg_backend_pid()";
                client.execute(kill, &[]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
                fixture.metrics(Port::Booking, RETRIES).await >= before + 10
            })
            .await;
        over.store(true, Ordering::Relaxed);
    };
    let buy = join_all((0..4).map(|_| async {
        let mut seen = Vec::new();
        while !over.load(Ordering::Relaxed) {
            // Who is unlucky four times in a row comes back with the same key.
            let mut wanted = order();
            wanted["idempotencyKey"] = json!(format!("{}", rand::random::<u64>()));
            let mut booked = fixture.post("/api/bookings", &wanted).await;
            while !matches!(booked.status, 201 | 202) {
                assert!(matches!(booked.status, 503 | 504), "{}", booked.in_words());
                booked = fixture.post("/api/bookings", &wanted).await;
            }
            seen.push(booked);
        }
        seen
    }));
    let ((), seen) = tokio::join!(kill, buy);
    let seen = seen.into_iter().flatten().collect::<Vec<_>>();
    let begin = Instant::now();
    for booked in &seen {
        fixture.until_confirmed(booked).await;
        assert_eq!(fixture.charged(booked).await.len(), 1, "each is charged once");
    }
    let retried = fixture.metrics(Port::Booking, RETRIES).await - before;
    assert_eq!(missing_seats(&client).await, 0);
    fixture.until_well().await;
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let later = seen.iter().filter(|one| one.status == 202).count();
    let sees = format!("{} x 201 Confirmed, {later} x 202", seen.len() - later);
    let metrics = format!("booking: database retries +{retried}");
    fixture.record("all connections killed, again and again", &sees, slowest, begin.elapsed(), &metrics);
}

/// Deadlocks that PostgreSQL has counted so far; it takes up to a second to do so.
async fn deadlocks_seen(client: &Client) -> i64 {
    let count = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    client.query_one(count, &[]).await.unwrap().get(0)
}

/// A real deadlock: the booking has the event and waits for a key that somebody else is writing, who then wants the event.
/// PostgreSQL breaks it by failing the booking (40P01), which is made again.
async fn deadlocks(fixture: &mut Fixture) {
    let setting = connect(fixture).await;
    for statement in [
        "ALTER SYSTEM SET deadlock_timeout = '400ms'",
        "SELECT pg_reload_conf()",
        "INSERT INTO events (id, name, capacity, available) VALUES (gen_random_uuid(), 'Elsewhere', 9, 9)",
    ] {
        setting.batch_execute(statement).await.unwrap();
    }
    let before = fixture.metrics(Port::Booking, RETRIES).await;
    let mut slowest = Duration::ZERO;
    let mut tries = 0;
    // On a busy machine the other one may come too late for a deadlock; then it is only a wait.
    while deadlocks_seen(&setting).await < 3 {
        let nth = tries;
        tries += 1;
        assert!(tries < 30, "PostgreSQL sees no deadlocks");
        let other = connect(fixture).await;
        let key = format!("deadlock-{nth}");
        // Only the booking looks for a deadlock, so it is the one that loses.
        let write = format!(
            "SET deadlock_timeout = '60s'; BEGIN;
             INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key)
             SELECT gen_random_uuid(), id, 'eve', 1, 'Cancelled', '{key}' FROM events WHERE name = 'Elsewhere'"
        );
        other.batch_execute(&write).await.unwrap();
        let mut wanted = order();
        wanted["idempotencyKey"] = json!(key);
        let book = fixture.post("/api/bookings", &wanted);
        let cross = async {
            fixture
                .until("the booking waits", async || {
                    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'";
                    setting.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) > 0
                })
                .await;
            let want = format!("UPDATE events SET name = name WHERE id = '{OPENING_NIGHT}'; ROLLBACK");
            other.batch_execute(&want).await.unwrap();
        };
        let (booked, ()) = tokio::join!(book, cross);
        assert_eq!(booked.in_words(), "201 Confirmed");
        slowest = slowest.max(booked.took);
    }
    let retried = fixture.metrics(Port::Booking, RETRIES).await - before;
    assert!(retried >= 3, "{retried}");
    let well = fixture.until_well().await;
    let metrics = format!("{} deadlocks, database retries +{retried}, nothing opened", deadlocks_seen(&setting).await);
    fixture.record("deadlocks forced", "201 Confirmed", slowest, well, &metrics);
}
