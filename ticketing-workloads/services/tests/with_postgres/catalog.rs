//! The catalog over HTTP, against a real PostgreSQL.

use crate::support::app::{App, OPENING_NIGHT};
use crate::support::postgres::Postgres;
use contract::{CheckStatus, FlagsSettings, PolicySettings};
use serde_json::{Value, json};

async fn page(app: &App, query: &str) -> Value {
    let answer = app.get(&format!("/api/events{query}")).await;
    assert_eq!(answer.status(), 200);
    answer.json().await.unwrap()
}

/// Free seats of the first event, and whether they are from memory.
async fn seats(app: &App) -> (i64, bool) {
    let page = page(app, "").await;
    (page["events"][0]["available"].as_i64().unwrap(), page["isFromCache"].as_bool().unwrap())
}

async fn sell(postgres: &Postgres, seats: i32) {
    let sell = "UPDATE events SET available = available - $1 WHERE id::text = $2";
    postgres.connect().await.execute(sell, &[&seats, &OPENING_NIGHT]).await.unwrap();
}

fn real_time(on: bool) -> FlagsSettings {
    let variant = if on { "on" } else { "off" };
    let flag = json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": variant});
    serde_json::from_value(json!({"flags": {"EnableRealTimeInventory": flag}})).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_in_pages_and_by_category() {
    let postgres = Postgres::start().await;
    let app = App::catalog(&postgres).await;
    let insert = "INSERT INTO events (id, name, category, capacity, available)
                  SELECT gen_random_uuid(), 'Match ' || n, 'sport', 10, 10 FROM generate_series(1, 5) n";
    postgres.connect().await.execute(insert, &[]).await.unwrap();
    let first = page(&app, "?pageSize=4").await;
    assert_eq!((first["total"].as_i64(), first["events"].as_array().unwrap().len()), (Some(6), 4));
    assert_eq!(
        first["events"][0],
        json!({
            "eventId": OPENING_NIGHT, "name": "Opening Night", "category": "concert", "priceCents": 4_500,
            "capacity": 100_000, "available": 100_000, "startsAt": "2027-06-18T19:30:00Z",
        })
    );
    assert_eq!(page(&app, "?pageSize=4&page=2").await["events"].as_array().unwrap().len(), 2);
    assert_eq!(page(&app, "?category=sport").await["total"], 5);
    assert_eq!(page(&app, "?category=opera").await["events"], json!([]));
    for wrong in ["?page=0", "?page=x", "?pageSize=1000", "?page=-1&pageSize=3"] {
        let answer = app.get(&format!("/api/events{wrong}")).await;
        assert_eq!(answer.status(), 400, "{wrong}");
        assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "INVALID_REQUEST");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn inventory_is_of_this_moment_unless_a_flag_says_otherwise() {
    let postgres = Postgres::start().await;
    let app = App::catalog(&postgres).await;
    assert_eq!(seats(&app).await, (100_000, false));
    sell(&postgres, 10).await;
    assert_eq!(seats(&app).await, (99_990, false));
    app.push(PolicySettings::default(), real_time(false)).await;
    sell(&postgres, 10).await;
    assert_eq!(seats(&app).await, (99_990, true), "as it was a moment ago, and says so");
    app.push(PolicySettings::default(), real_time(true)).await;
    assert_eq!(seats(&app).await, (99_980, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_it_shows_what_it_showed_last() {
    let postgres = Postgres::start().await;
    let app = App::catalog(&postgres).await;
    assert_eq!(seats(&app).await, (100_000, false));
    postgres.drop_database().await;
    let (shown, from_cache) = seats(&app).await;
    assert!(from_cache && shown == 100_000);
    let unseen = app.get("/api/events?category=sport").await;
    assert_eq!(unseen.status(), 503);
    assert!(unseen.headers().contains_key("retry-after"));
    assert_eq!(unseen.json::<Value>().await.unwrap()["errorCode"], "CATALOG_UNAVAILABLE");
    app.check("database", "the check says so", |check| check.status == CheckStatus::Unhealthy).await;
    assert_eq!(app.get("/readyz").await.status(), 200, "the pod itself is fine");
    let text = app.get("/metrics").await.text().await.unwrap();
    assert!(text.contains(r#"fallback_answers_total{service="database",source="cache"} 1"#), "{text}");
}
