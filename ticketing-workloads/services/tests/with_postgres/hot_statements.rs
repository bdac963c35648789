//! What is asked all the time reads only what it needs, however much is in the tables.

use crate::support::app::App;
use crate::support::postgres::Postgres;
use ticketing_services::schema;
use tokio_postgres::Client;

/// Enough rows that a table is never read from end to end for want of an index, in shares as in a year of sales.
const FILL: &str = "
    INSERT INTO events (id, name, capacity, available)
    SELECT gen_random_uuid(), 'Evening ' || nth, 1000000, 1000000 FROM generate_series(1, 5000) nth;
    INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, held_until, settle_at,
                          amount_cents, owner, network, cancel_reason, created_at)
    SELECT gen_random_uuid(), e.id, 'ann', 1, s.status, gen_random_uuid()::text,
           CASE s.status WHEN 'Held' THEN now() + interval '5 minutes' END,
           CASE s.status WHEN 'PaymentPending' THEN now() + interval '5 minutes' END, 100,
           'session:' || nth % 20000, 'network ' || nth % 2000,
           CASE s.status WHEN 'Cancelled' THEN 'expired' END, now() - nth * interval '10 minutes'
    FROM (SELECT id, row_number() OVER () AS place FROM events) e
    JOIN generate_series(1, 50000) nth ON e.place = nth % 5000
    CROSS JOIN LATERAL (SELECT CASE WHEN nth % 1000 = 0 THEN 'Held' WHEN nth % 1000 = 1 THEN 'PaymentPending'
                                    WHEN nth % 5 = 2 THEN 'Cancelled' ELSE 'Confirmed' END AS status) s;
    INSERT INTO outbox (booking_id, kind, done_at)
    SELECT id, 'BookingConfirmed', CASE WHEN random() < 0.99 THEN created_at END
    FROM bookings WHERE status = 'Confirmed';
    INSERT INTO ticket_keys (id, public_key) SELECT nth::text, decode(repeat('00', 32), 'hex') FROM generate_series(1, 5000) nth;
    INSERT INTO dead_letters SELECT id, 'refused' FROM outbox WHERE id % 500 = 0;
    INSERT INTO payments (key, amount_cents, currency, created_at)
    SELECT id::text, 100, 'eur', created_at FROM bookings WHERE status <> 'Held';
    INSERT INTO payment_attempts (key, provider, state, object_id, charge_id, began_at)
    SELECT key, 'stripe', state, key, CASE WHEN state = 'Charged' THEN key END, created_at
    FROM (SELECT key, created_at, row_number() OVER () AS nth FROM payments) p
    CROSS JOIN LATERAL (SELECT CASE WHEN nth % 1000 = 0 THEN 'Confirming' ELSE 'Charged' END AS state) s;
    INSERT INTO refunds (key, provider, charge_id, reason, done_at)
    SELECT key, provider, charge_id, 'cancelled', CASE WHEN random() < 0.99 THEN now() END
    FROM payment_attempts WHERE state = 'Charged' AND random() < 0.2;
    INSERT INTO webhook_events (provider, event_id, object_id, received_at, done_at)
    SELECT provider, 'event ' || key, object_id, began_at, CASE WHEN random() < 0.99 THEN began_at END
    FROM payment_attempts;";

async fn fill(postgres: &Postgres) {
    let client = postgres.connect().await;
    client.batch_execute(FILL).await.unwrap();
    // Outside of that transaction.
    client.batch_execute("ANALYZE").await.unwrap();
}

/// What the function that counts buyers looks up, each with the types of its parameters: the plans of statements inside of a
/// function are seen by nobody else.
async fn looks_of_limits(client: &Client) -> Vec<(String, String, String)> {
    let source = "SELECT prosrc, oidvectortypes(proargtypes) FROM pg_proc WHERE proname = 'buyer_limit'";
    let row = client.query_one(source, &[]).await.unwrap();
    let (source, types): (String, String) = (row.get(0), row.get(1));
    let looks = source.split(":= (SELECT").skip(1).map(|rest| {
        let (look, _) = rest.split_once(");").expect("the end of a look");
        format!("SELECT{look}")
    });
    let looks = looks.map(|look| look.replace("$7[6] - have - 1", "$7[6] - 1")).enumerate();
    let all: Vec<_> = looks.map(|(nth, look)| (format!("limit {nth}"), format!("({types})"), look)).collect();
    assert_eq!(all.len(), 12);
    all
}

/// The highest parameter.
fn parameters(statement: &str) -> usize {
    (1..20).rev().find(|nth| statement.contains(&format!("${nth}"))).unwrap_or_default()
}

/// Whether this line reads an index from end to end: one without a condition, that has all rows, and of which not only the
/// first entries are wanted.
fn reads_whole_index(plan: &[String], nth: usize, partial: &[String]) -> bool {
    let depth = |line: &String| line.len() - line.trim_start().len();
    let Some(line) = plan.get(nth).filter(|line| line.contains("Index") && line.contains("Scan ")) else {
        return false;
    };
    let has_condition = plan.get(nth + 1).is_some_and(|next| next.contains("Index Cond"));
    let is_partial = partial.iter().any(|index| line.contains(index.as_str()));
    let is_limited = plan[..nth].iter().any(|above| above.contains("Limit") && depth(above) < depth(line));
    !has_condition && !is_partial && !is_limited
}

#[test]
fn an_index_that_is_read_from_end_to_end_is_seen() {
    let plan = |lines: [&str; 3]| lines.map(String::from);
    let whole = plan(["Aggregate", "  ->  Index Only Scan using events_pkey on events", "  Filter: x"]);
    assert!(reads_whole_index(&whole, 1, &[]));
    assert!(!reads_whole_index(&whole, 1, &["events_pkey".to_owned()]), "it has few entries");
    let first = plan(["Limit", "  ->  Index Scan using events_by_age on events", "  Filter: x"]);
    assert!(!reads_whole_index(&first, 1, &[]));
    let one = plan(["Aggregate", "  ->  Index Scan using events_pkey on events", "        Index Cond: (id = $1)"]);
    assert!(!reads_whole_index(&one, 1, &[]));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_hot_statement_reads_a_table_from_end_to_end() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    app.schema_is_done().await;
    fill(&postgres).await;
    let client = postgres.connect().await;
    // As it is planned for a statement that was prepared and made often.
    client.batch_execute("SET plan_cache_mode = force_generic_plan").await.unwrap();
    let mut failed = Vec::new();
    // Some are for nearly all rows, such as those of mails that were sent.
    let partial = "SELECT indexrelid::regclass::text FROM pg_index
                   JOIN pg_class i ON i.oid = indexrelid JOIN pg_class t ON t.oid = indrelid
                   WHERE indpred IS NOT NULL AND i.reltuples * 20 < t.reltuples";
    let partial: Vec<String> = client.query(partial, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    let is_small = |index: &str| partial.iter().any(|small| small == index);
    assert!(is_small("outbox_open") && !is_small("outbox_done"), "{partial:?}");
    let of_services =
        schema::hot_statements().map(|(name, statement)| (name.to_owned(), String::new(), statement.to_owned()));
    let all: Vec<_> = of_services.chain(looks_of_limits(&client).await).collect();
    assert!(all.len() > 30, "{}", all.len());
    for (nth, (name, types, statement)) in all.iter().enumerate() {
        client.batch_execute(&format!("PREPARE hot_{nth} {types} AS {statement}")).await.unwrap();
        let count = if types.is_empty() { parameters(statement) } else { types.split(',').count() };
        let values = vec!["NULL"; count].join(", ");
        let values = if values.is_empty() { values } else { format!("({values})") };
        let rows = client.simple_query(&format!("EXPLAIN EXECUTE hot_{nth}{values}")).await.unwrap();
        let plan: Vec<_> = rows
            .iter()
            .filter_map(|row| match row {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(String::from),
                _ => None,
            })
            .collect();
        // Of events, the page counts them all, and checks look which of them were changed, and whether one has a price where
        // nobody can charge: there are thousands, not millions.
        let may_read_events = ["list", "overview", "priced events"].contains(&name.as_str());
        let reads_all = |(nth, line): &(usize, &String)| {
            let reads_table = line.contains("Seq Scan on") && !(may_read_events && line.contains("Seq Scan on events"));
            reads_table || reads_whole_index(&plan, *nth, &partial)
        };
        // Others look smaller at times, and are read from end to end: all reservations, or all bookings of an event.
        let of_limits = ["bookings_by_owner", "bookings_by_network", "bookings_declined", "bookings_idempotency_key"];
        let is_other = |line: &String| {
            line.contains("Scan using") && !of_limits.iter().any(|index| line.contains(&format!("using {index}")))
        };
        if let Some(line) = plan.iter().find(|line| name.starts_with("limit ") && is_other(line)) {
            failed.push(format!("{name}: {}\n{}", line.trim(), plan.join("\n")));
        }
        if let Some((_, line)) = plan.iter().enumerate().find(reads_all) {
            failed.push(format!("{name}: {}\n{}", line.trim(), plan.join("\n")));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}
