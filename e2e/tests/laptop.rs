//! A sale through all services as real processes, while one thing after the other fails. What a buyer sees, and how long
//! it takes until all is well again, is printed as a table.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use e2e::laptop::{Laptop, Port};
use e2e::progress::Progress;
use reqwest::Client;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

const OPENING_NIGHT: &str = "11111111-1111-4111-8111-111111111111";
const PATIENCE: Duration = Duration::from_secs(60);

struct Shop {
    laptop: Laptop,
    client: Client,
    rows: Vec<String>,
}

impl Shop {
    async fn open() -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_ticketwave-e2e")).with_file_name("ticketing");
        assert!(program.is_file(), "build it first: cargo build --workspace --bins");
        let laptop = Laptop::start(program, free_ports(), false, &Progress::quiet()).await.unwrap();
        Self { laptop, client: Client::builder().pool_max_idle_per_host(0).build().unwrap(), rows: Vec::new() }
    }

    async fn get(&self, of: Port, path: &str) -> (u16, Value) {
        let answer = self.client.get(self.laptop.url(of) + path).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn behave(&self, of: Port, path: &str, behaviour: Value) {
        let answer = self.client.put(self.laptop.url(of) + path).body(behaviour.to_string()).send().await.unwrap();
        assert_eq!(answer.status(), 200);
    }

    async fn stripe(&self, behaviour: Value) {
        self.behave(Port::Providers, "/providers/stripe", behaviour).await;
    }

    /// Books one seat: the status, the body, and how long it took.
    async fn book(&self) -> (u16, Value, Duration) {
        let url = self.laptop.url(Port::Gateway) + "/api/bookings";
        let body = json!({"eventId": OPENING_NIGHT, "userId": "ann", "ticketCount": 1, "email": "ann@example.com"});
        let begin = Instant::now();
        let answer = self.client.post(url).body(body.to_string()).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap(), begin.elapsed())
    }

    /// Who has charged for a booking.
    async fn charged(&self, booking: &Value) -> Vec<String> {
        let (_, charges) = self.get(Port::Providers, "/charges").await;
        let of_booking = charges["charges"].as_array().unwrap().iter().filter(|charge| charge["key"] == *booking);
        of_booking.map(|charge| charge["provider"].as_str().unwrap().to_owned()).collect()
    }

    async fn mails(&self) -> usize {
        self.get(Port::Mails, "/mails").await.1["mails"].as_array().unwrap().len()
    }

    /// Waits until `done`; the answer is how long that took.
    async fn until<Fut: Future<Output = bool>>(&self, what: &str, done: impl Fn() -> Fut) -> Duration {
        let begin = Instant::now();
        while !done().await {
            assert!(begin.elapsed() < PATIENCE, "not within {} s: {what}", PATIENCE.as_secs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        begin.elapsed()
    }

    async fn until_confirmed(&self, booking: &Value) -> Duration {
        let path = format!("/api/bookings/{}", booking.as_str().unwrap());
        self.until("the booking is confirmed", async || self.get(Port::Gateway, &path).await.1["status"] == "Confirmed")
            .await
    }

    fn tell(&mut self, what: &str, sees: &str, took: Duration, well_after: Duration) {
        self.rows.push(format!("{what:<42} {sees:<44} {:>6} ms {:>6} ms", took.as_millis(), well_after.as_millis()));
    }
}

/// The first of eleven free ports in a row.
fn free_ports() -> u16 {
    let free = |first: u16| (first..first + 11).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    let start = 20_000 + u16::try_from(std::process::id() % 500).unwrap() * 20;
    (start..60_000).step_by(20).find(|first| free(*first)).unwrap()
}

#[tokio::test]
async fn a_sale_goes_through_all_services_whatever_fails() {
    let mut shop = Shop::open().await;
    let (status, booked, took) = shop.book().await;
    assert_eq!((status, &booked["status"]), (201, &json!("Confirmed")));
    assert_eq!(shop.charged(&booked["bookingId"]).await, ["stripe"]);
    let well = shop.until("its mail is there", async || shop.mails().await == 1).await;
    shop.tell("nothing", "201 Confirmed, and a mail", took, well);

    shop.stripe(json!({"chargeThenHang": true})).await;
    let (status, booked, took) = shop.book().await;
    assert_eq!((status, &booked["status"]), (201, &json!("Confirmed")));
    assert_eq!(shop.charged(&booked["bookingId"]).await, ["stripe"], "once, and by nobody else");
    shop.tell(
        "the provider charges and never answers",
        "201 Confirmed, once its charge is found",
        took,
        Duration::ZERO,
    );

    shop.stripe(json!({"chargeThenHang": true, "hide": true})).await;
    let (status, booked, took) = shop.book().await;
    assert_eq!((status, &booked["status"]), (202, &json!("PaymentPending")));
    shop.stripe(json!({})).await;
    let well = shop.until_confirmed(&booked["bookingId"]).await;
    assert_eq!(shop.charged(&booked["bookingId"]).await, ["stripe"]);
    shop.tell("... and cannot be asked either", "202 PaymentPending, Confirmed later", took, well);

    shop.stripe(json!({"refuse": true})).await;
    for _ in 0..4 {
        let (status, booked, took) = shop.book().await;
        assert_eq!((status, &booked["status"]), (201, &json!("Confirmed")));
        assert_eq!(shop.charged(&booked["bookingId"]).await, ["paypal"]);
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    let (_, _, took) = shop.book().await;
    shop.stripe(json!({})).await;
    shop.tell("the provider is down", "201 Confirmed, by the other provider", took, Duration::ZERO);

    shop.laptop.kill("payment").await;
    let (status, booked, took) = shop.book().await;
    assert_eq!((status, &booked["success"], &booked["status"]), (202, &json!(true), &json!("PaymentPending")));
    shop.laptop.restart("payment").unwrap();
    let well = shop.until_confirmed(&booked["bookingId"]).await;
    assert_eq!(shop.charged(&booked["bookingId"]).await.len(), 1);
    shop.tell("payment is killed", "202 PaymentPending, Confirmed later", took, well);

    let (status, before) = shop.get(Port::Gateway, "/api/events").await;
    assert_eq!((status, &before["isFromCache"]), (200, &json!(false)));
    shop.laptop.kill("catalog").await;
    let begin = Instant::now();
    let url = shop.laptop.url(Port::Gateway) + "/api/events";
    // Who waits for a second only is answered within it; the ADR's own waits between attempts are longer.
    let answer = shop.client.get(&url).header("x-deadline-ms", "1000").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["x-served-from"]), (200, &"cache".parse().unwrap()));
    assert_eq!(answer.json::<Value>().await.unwrap(), before);
    let took = begin.elapsed();
    let (status, ..) = shop.book().await;
    assert_eq!(status, 201, "nobody is kept from booking");
    shop.laptop.restart("catalog").unwrap();
    let begin = Instant::now();
    shop.until("the catalog answers again", async || {
        let answer = shop.client.get(&url).header("x-deadline-ms", "1000").send().await.unwrap();
        answer.headers().get("x-served-from").is_none()
    })
    .await;
    shop.tell("the catalog is killed", "200 from memory", took, begin.elapsed());

    let before = shop.until("all mails so far are there", async || shop.mails().await == 10).await;
    assert!(before < PATIENCE);
    shop.behave(Port::Mails, "/behaviour", json!({"down": true})).await;
    let (status, _, took) = shop.book().await;
    assert_eq!(status, 201, "a mail that cannot be sent is no reason not to sell");
    tokio::time::sleep(Duration::from_secs(1)).await;
    shop.behave(Port::Mails, "/behaviour", json!({})).await;
    let well = shop.until("the mail is there", async || shop.mails().await == 11).await;
    shop.tell("the mail server is down", "201 Confirmed, the mail comes later", took, well);

    println!("\n{:<42} {:<44} {:>9} {:>9}", "what fails", "what the buyer sees", "answer", "well in");
    println!("{}\n", shop.rows.join("\n"));
    shop.laptop.stop().await;
}
