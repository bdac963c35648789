//! Buyers before a real gateway: with tokens of an issuer, with sessions, with forged ones, and too often. Booking and the
//! issuer are servers of the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Parser;
use reqwest::RequestBuilder;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use ticketing_services::buyer::{BUYER, BUYER_NETWORK, BUYER_SESSION, Buyer};
use ticketing_services::gateway;
use ticketing_services::http_client::{IDEMPOTENCY_KEY, INTERNAL};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

const ISSUER: &str = "https://id.example";
const COOKIE: &str = "ticketwave-session";

async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// A booking, and a payment, that only writes down what it was asked. Its answers say all that services of ours say to each
/// other.
#[derive(Clone, Default)]
struct Stub(Arc<Mutex<Vec<(Method, String, HeaderMap)>>>);

impl Stub {
    async fn start(&self) -> SocketAddr {
        let answer = |State(stub): State<Self>, method: Method, uri: Uri, headers: HeaderMap, _: Bytes| async move {
            stub.answer(method, &uri, headers)
        };
        serve(Router::new().fallback(answer).with_state(self.clone())).await
    }

    fn answer(&self, method: Method, uri: &Uri, headers: HeaderMap) -> Response {
        if uri.path() != "/readyz" {
            self.0.lock().unwrap().push((method, uri.path().to_owned(), headers));
        }
        let mut response = (StatusCode::CREATED, "{}").into_response();
        for name in INTERNAL {
            response.headers_mut().insert(name, HeaderValue::from_static("true"));
        }
        response
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// The headers of the last request.
    fn last(&self) -> HeaderMap {
        self.0.lock().unwrap().last().unwrap().2.clone()
    }

    /// Who has made it.
    fn buyer(&self) -> Buyer {
        Buyer::of(&self.last(), &BUYER).expect("no buyer was named")
    }

    fn network(&self) -> String {
        self.last()[BUYER_NETWORK].to_str().unwrap().to_owned()
    }
}

/// An issuer with one key.
struct Issuer {
    key: Ed25519KeyPair,
}

impl Issuer {
    fn new() -> Self {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self { key: Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap() }
    }

    fn router(&self) -> Router {
        let point = URL_SAFE_NO_PAD.encode(self.key.public_key());
        let keys = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "one", "x": point}]}).to_string();
        Router::new().route("/keys", axum::routing::get(move || async move { keys }))
    }

    fn token(&self, subject: &str, audience: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let header = json!({"alg": "EdDSA", "kid": "one"});
        let claims = json!({"iss": ISSUER, "aud": audience, "sub": subject, "exp": now + 60});
        let signed = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
        let signature = URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    settings: gateway::Settings,
}

struct Gateway {
    address: SocketAddr,
    admin: SocketAddr,
    client: reqwest::Client,
    _stop: DropGuard,
}

impl Gateway {
    /// A gateway before these, with these settings besides.
    async fn start(stub: &Stub, more: &[(&str, &str)]) -> Self {
        let url = format!("http://{}", stub.start().await);
        let mut all = vec![
            ("--bind-address", "127.0.0.1"),
            ("--port", "0"),
            ("--admin-port", "0"),
            ("--shutdown-delay-seconds", "0"),
            ("--catalog-url", &url),
            ("--booking-url", &url),
            ("--payment-url", &url),
            // All requests that the services get are of a test.
            ("--hold-back", "no"),
        ];
        all.extend(more);
        let arguments = all.into_iter().flat_map(|(name, value)| [name, value]);
        let settings = Cli::parse_from(std::iter::once("gateway").chain(arguments)).settings;
        let service = gateway::start(settings).unwrap();
        let (address, admin) = (service.address().unwrap(), service.admin_address().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn(service.run(stop.clone().cancelled_owned()));
        let client = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
        Self { address, admin, client, _stop: stop.drop_guard() }
    }

    /// One that takes tokens of this issuer.
    async fn with_issuer(stub: &Stub, issuer: &Issuer, more: &[(&str, &str)]) -> Self {
        let url = format!("http://{}/keys", serve(issuer.router()).await);
        let tokens = [("--token-jwks-url", url.as_str()), ("--token-issuer", ISSUER), ("--token-audience", "tickets")];
        Self::start(stub, &[&tokens, more].concat()).await
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("http://{}{path}", self.address))
    }

    fn post(&self, path: &str) -> RequestBuilder {
        self.client.post(format!("http://{}{path}", self.address)).body("{}")
    }

    async fn metric(&self, line: &str) -> u64 {
        let text = reqwest::get(format!("http://{}/metrics", self.admin)).await.unwrap().text().await.unwrap();
        text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok()).unwrap_or(0)
    }
}

/// The status and the code of an answer.
async fn said(request: RequestBuilder) -> (u16, String) {
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap_or_default();
    (status, body["errorCode"].as_str().unwrap_or_default().to_owned())
}

/// What a browser would send back.
fn cookie_of(answer: &reqwest::Response) -> Option<String> {
    let cookie = answer.headers().get(header::SET_COOKIE)?.to_str().unwrap();
    Some(cookie.split(';').next().unwrap().to_owned())
}

/// An order in a new session; the answer is its cookie.
async fn new_session(gateway: &Gateway) -> String {
    cookie_of(&gateway.post("/api/bookings").send().await.unwrap()).unwrap()
}

fn with_key(path: &Path) -> (&'static str, String) {
    std::fs::write(path, "one key of 32 bytes, or even more\n").unwrap();
    ("--session-key-file", path.display().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_a_token_is_named_to_booking_and_nobody_else_says_who_he_is() {
    let (stub, issuer) = (Stub::default(), Issuer::new());
    let gateway = Gateway::with_issuer(&stub, &issuer, &[]).await;
    let mut forged = HeaderMap::new();
    for name in INTERNAL {
        forged.insert(name, HeaderValue::from_static("user:forged"));
    }
    let token = issuer.token("ann", "tickets");
    for request in [gateway.post("/api/bookings"), gateway.get("/api/bookings/1"), gateway.post("/api/reservations")] {
        let answer = request.headers(forged.clone()).bearer_auth(&token).send().await.unwrap();
        assert_eq!((answer.status(), cookie_of(&answer)), (StatusCode::CREATED, None));
        assert_eq!(answer.headers()[header::CACHE_CONTROL], "no-store");
        assert!(INTERNAL.iter().all(|name| !answer.headers().contains_key(name)), "{:?}", answer.headers());
        assert_eq!(stub.buyer(), Buyer::user(ISSUER, "ann"));
        let told = stub.last();
        assert!(!told.values().any(|value| value == "user:forged"), "{told:?}");
        assert!(!told.contains_key(BUYER_NETWORK) && !told.contains_key(BUYER_SESSION), "{told:?}");
        assert!(!told.contains_key(header::AUTHORIZATION), "booking need not know the token");
    }
    gateway.post("/api/bookings").headers(forged).send().await.unwrap();
    assert!(matches!(stub.buyer(), Buyer::Session(_)));
    assert!(!stub.last().values().any(|value| value == "user:forged"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_gets_no_further() {
    let (stub, issuer, other) = (Stub::default(), Issuer::new(), Issuer::new());
    let gateway = Gateway::with_issuer(&stub, &issuer, &[]).await;
    for token in [other.token("ann", "tickets"), issuer.token("ann", "other"), "x".to_owned(), "x".repeat(9_000)] {
        let answer = gateway.post("/api/bookings").bearer_auth(token).send().await.unwrap();
        assert_eq!(answer.status(), 401);
        assert_eq!(answer.headers()[header::WWW_AUTHENTICATE], r#"Bearer error="invalid_token""#);
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["errorCode"], "INVALID_TOKEN");
        assert!(!body["message"].as_str().unwrap().contains("eyJ"), "{body}");
    }
    let twice = gateway.get("/api/bookings/1").bearer_auth(issuer.token("ann", "tickets")).bearer_auth("x");
    assert_eq!(said(twice).await, (401, "INVALID_TOKEN".to_owned()));
    assert_eq!(stub.count(), 0);
    assert_eq!(gateway.metric(r#"gateway_tokens_total{outcome="invalid"}"#).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_issuer_is_away_from_the_start_only_those_with_a_token_wait() {
    let (stub, issuer) = (Stub::default(), Issuer::new());
    let place = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys", place.local_addr().unwrap());
    let address = place.local_addr().unwrap();
    drop(place);
    let settings = [("--token-jwks-url", url.as_str()), ("--token-issuer", ISSUER), ("--token-audience", "tickets")];
    let gateway = Gateway::start(&stub, &settings).await;
    let ask = || gateway.get("/api/bookings/1").bearer_auth(issuer.token("ann", "tickets"));
    let answer = ask().send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()[header::RETRY_AFTER]), (503, &"5".parse().unwrap()));
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "TOKENS_UNAVAILABLE");
    assert_eq!(said(gateway.post("/api/bookings")).await.0, 201);

    let listener = TcpListener::bind(address).await.unwrap();
    let router = issuer.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let deadline = Instant::now() + Duration::from_secs(30);
    while said(ask()).await.0 != 201 {
        assert!(Instant::now() < deadline, "the keys are not fetched");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(stub.buyer(), Buyer::user(ISSUER, "ann"));
}

/// Anybody can ask for the end of a sale, at any address, and would go before all who order.
#[tokio::test(flavor = "multi_thread")]
async fn who_has_ordered_nothing_finishes_nothing_before_others() {
    let (stub, issuer) = (Stub::default(), Issuer::new());
    let gateway = Gateway::with_issuer(&stub, &issuer, &[]).await;
    let cookie = new_session(&gateway).await;
    let confirm = || gateway.post("/api/reservations/1/confirm");
    for (request, expected) in [
        (confirm(), "look"),
        (confirm().header(header::COOKIE, "ticketwave-session=forged"), "look"),
        (confirm().header("x-priority", "finish"), "look"),
        (confirm().header(header::COOKIE, cookie), "finish"),
        (confirm().bearer_auth(issuer.token("ann", "tickets")), "finish"),
        (gateway.get("/api/tickets/1"), "start"),
    ] {
        request.send().await.unwrap();
        assert_eq!(stub.last()["x-priority"], expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_without_a_token_begins_a_session() {
    let stub = Stub::default();
    let gateway = Gateway::start(&stub, &[]).await;
    for path in ["/api/events", "/api/bookings/1"] {
        assert_eq!(cookie_of(&gateway.get(path).send().await.unwrap()), None, "{path}");
    }
    let nobody = stub.buyer();
    let cookie = new_session(&gateway).await;
    let (buyer, network) = (stub.buyer(), stub.network());
    assert!(matches!(buyer, Buyer::Session(_)) && buyer != nobody);
    assert!(!network.contains("127") && network.len() == 22, "{network}");

    let answer = gateway.get("/api/bookings/1").header(header::COOKIE, &cookie).send().await.unwrap();
    assert_eq!((stub.buyer(), cookie_of(&answer)), (buyer.clone(), None));
    let answer = gateway.post("/api/reservations").header(header::COOKIE, &cookie).send().await.unwrap();
    assert_eq!((stub.buyer(), cookie_of(&answer)), (buyer.clone(), Some(cookie.clone())), "kept for another 30 days");

    let (name, value) = cookie.split_once('=').unwrap();
    let flipped = if value.ends_with('A') { "Q" } else { "A" };
    let forged = format!("{name}={}{flipped}", &value[..value.len() - 1]);
    let answer = gateway.post("/api/bookings").header(header::COOKIE, forged).send().await.unwrap();
    assert!(stub.buyer() != buyer && cookie_of(&answer).unwrap() != cookie, "as without one");
    gateway.client.delete(format!("http://{}/api/reservations/1", gateway.address)).send().await.unwrap();
    assert!(stub.buyer() != buyer, "who has no session is somebody else, and never nobody: booking trusts that");
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_one_key_know_each_others_sessions_and_others_do_not() {
    let stub = Stub::default();
    let files = tempfile::tempdir().unwrap();
    let (name, path) = with_key(&files.path().join("keys"));
    let settings = [(name, path.as_str())];
    let pods = [(); 2].map(|()| Gateway::start(&stub, &settings));
    let [one, other] = <[Gateway; 2]>::try_from(futures::future::join_all(pods).await).ok().unwrap();
    let cookie = new_session(&one).await;
    let (buyer, network) = (stub.buyer(), stub.network());
    other.get("/api/bookings/1").header(header::COOKIE, &cookie).send().await.unwrap();
    assert_eq!((stub.buyer(), stub.network()), (buyer.clone(), network.clone()));
    let without_a_key = Gateway::start(&stub, &[]).await;
    without_a_key.get("/api/bookings/1").header(header::COOKIE, &cookie).send().await.unwrap();
    assert!(stub.buyer() != buyer && stub.network() != network);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_logs_in_keeps_what_was_booked_before() {
    let (stub, issuer) = (Stub::default(), Issuer::new());
    let gateway = Gateway::with_issuer(&stub, &issuer, &[]).await;
    let cookie = new_session(&gateway).await;
    let before = stub.buyer();
    let request = gateway.get("/api/bookings/1").header(header::COOKIE, cookie);
    request.bearer_auth(issuer.token("ann", "tickets")).send().await.unwrap();
    assert_eq!(stub.buyer(), Buyer::user(ISSUER, "ann"));
    assert_eq!(Buyer::of(&stub.last(), &BUYER_SESSION), Some(before));
    let request = gateway.get("/api/bookings/1").header(header::COOKIE, format!("{COOKIE}=forged"));
    request.bearer_auth(issuer.token("ann", "tickets")).send().await.unwrap();
    assert!(!stub.last().contains_key(BUYER_SESSION));
}

/// The answer with the cookie may be lost; a second order would be paid for, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_order_that_is_sent_again_without_its_cookie_is_of_the_same_buyer() {
    let stub = Stub::default();
    let gateway = Gateway::start(&stub, &[]).await;
    let order = async |key: &str| {
        gateway.post("/api/bookings").header(IDEMPOTENCY_KEY, key).send().await.unwrap();
        stub.buyer()
    };
    let key = "5b0e1d0c-7c1f-4d8e-9b0a-2f6f3c1d7e55";
    let first = order(key).await;
    assert_eq!(order(key).await, first);
    assert_ne!(order("5b0e1d0c-7c1f-4d8e-9b0a-2f6f3c1d7e56").await, first);
    assert_ne!(order("once").await, order("once").await, "others may guess it");
    gateway.get("/api/bookings/1").header(IDEMPOTENCY_KEY, key).send().await.unwrap();
    assert_ne!(stub.buyer(), first, "only an order");

    let answer = gateway.post("/api/bookings").send().await.unwrap();
    let (first, key) = (stub.buyer(), answer.headers()[IDEMPOTENCY_KEY].to_str().unwrap().to_owned());
    assert_eq!(order(&key).await, first, "with the key that the answer has");

    // With the key in the body, too, and as somebody who has logged in since.
    let in_body = async |key: &str| {
        let answer =
            gateway.post("/api/bookings").body(json!({"idempotencyKey": key}).to_string()).send().await.unwrap();
        (stub.buyer(), cookie_of(&answer))
    };
    let key = "5b0e1d0c-7c1f-4d8e-9b0a-2f6f3c1d7e57";
    let (first, cookie) = in_body(key).await;
    assert_eq!(in_body(key).await.0, first);
    assert_eq!(order(key).await, first);
    gateway.get("/api/bookings/1").header(header::COOKIE, cookie.unwrap()).send().await.unwrap();
    assert_eq!(stub.buyer(), first, "the cookie is that session's");
    assert_ne!(in_body("once").await.0, in_body("once").await.0);
}

/// A proxy or a client may have something there that is not for us.
#[tokio::test(flavor = "multi_thread")]
async fn where_no_tokens_are_taken_none_is_looked_at() {
    let stub = Stub::default();
    let gateway = Gateway::start(&stub, &[]).await;
    let answer = gateway.post("/api/bookings").bearer_auth("of somebody else").send().await.unwrap();
    assert_eq!(answer.status(), 201);
    assert!(matches!(stub.buyer(), Buyer::Session(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_another_site_cannot_order_nor_replace_a_session() {
    let stub = Stub::default();
    let gateway = Gateway::start(&stub, &[]).await;
    let evil = [("sec-fetch-site", "cross-site"), ("origin", "https://evil.example")];
    for (name, value) in evil {
        for path in ["/api/bookings", "/api/reservations/1/confirm"] {
            let answer = gateway.post(path).header(name, value).send().await.unwrap();
            assert_eq!((answer.status().as_u16(), cookie_of(&answer)), (403, None), "{name} {path}");
            assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "CROSS_SITE");
        }
    }
    assert_eq!(stub.count(), 0);
    let own = gateway.post("/api/bookings").header("sec-fetch-site", "same-origin");
    assert_eq!(said(own).await.0, 201);
    assert_eq!(said(gateway.get("/api/events").header("sec-fetch-site", "cross-site")).await.0, 201, "a link");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_buyer_who_asks_too_often_keeps_nobody_else_out() {
    let (stub, issuer) = (Stub::default(), Issuer::new());
    let limits = [("--requests-per-user", "0.001:3"), ("--requests-per-session", "0.001:2")];
    let gateway = Gateway::with_issuer(&stub, &issuer, &limits).await;
    let ask = |subject: &str| gateway.get("/api/bookings/1").bearer_auth(issuer.token(subject, "tickets"));
    for _ in 0..3 {
        assert_eq!(said(ask("ann")).await.0, 201);
    }
    let answer = ask("ann").send().await.unwrap();
    assert_eq!(answer.status(), 429);
    let wait: u64 = answer.headers()[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((990..=1_000).contains(&wait), "{wait}");
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "TOO_MANY_REQUESTS");
    assert_eq!(said(ask("bob")).await.0, 201);

    // Before the body, which never comes.
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let token = issuer.token("ann", "tickets");
    let head =
        format!("POST /api/bookings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: 9\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 429");

    let cookie = new_session(&gateway).await;
    let of_session = || gateway.get("/api/bookings/1").header(header::COOKIE, &cookie);
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(said(of_session()).await.0);
    }
    assert_eq!(seen, [201, 201, 429]);
    new_session(&gateway).await;
    for (kind, count) in [("user", 2), ("session", 1), ("network", 0)] {
        let line = format!(r#"gateway_requests_refused_total{{kind="{kind}"}}"#);
        assert_eq!(gateway.metric(&line).await, count, "{kind}");
    }
    assert_eq!(gateway.metric(r#"circuit_breaker_opened_total{service="booking"}"#).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_is_bounded_in_what_it_asks_without_a_good_token() {
    let (stub, issuer) = (Stub::default(), Issuer::new());
    let limits = [
        ("--requests-per-network", "0.001:4"),
        ("--new-sessions-per-network", "0.001:1"),
        ("--event-requests-per-network", "0.001:2"),
        ("--trusted-proxies", "1"),
    ];
    let gateway = Gateway::with_issuer(&stub, &issuer, &limits).await;
    let from =
        |request: RequestBuilder, address: &str| request.header("x-forwarded-for", format!("6.6.6.6, {address}"));
    let (one, same, other) = ("2001:db8:1:2::3", "2001:db8:1:ffff::1", "2001:db8:2::1");
    let post = |address: &str| from(gateway.post("/api/bookings"), address);
    assert_eq!(said(post(one)).await.0, 201);
    let network = stub.network();
    assert_eq!(said(post(same)).await, (429, "TOO_MANY_REQUESTS".to_owned()), "a second session");
    assert_eq!(said(post(other)).await.0, 201);
    assert_ne!(stub.network(), network);
    // Bad tokens count, and those after them that would be good do not.
    let look = |token: &str| from(gateway.get("/api/bookings/1"), same).bearer_auth(token);
    assert_eq!([said(look("bad")).await.0, said(look("bad")).await.0, said(look("bad")).await.0], [401, 401, 429]);
    assert_eq!(said(look(&issuer.token("ann", "tickets"))).await.0, 201);
    assert_eq!(said(from(gateway.get("/api/bookings/1"), one)).await.0, 429);
    let mut events = Vec::new();
    for _ in 0..3 {
        events.push(said(from(gateway.get("/api/events"), one)).await.0);
    }
    assert_eq!(events, [201, 201, 429]);
    for _ in 0..5 {
        assert_eq!(said(from(gateway.post("/api/webhooks/stripe"), one)).await.0, 201, "providers are no buyers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_trusted_proxy_nobody_says_where_he_comes_from() {
    let stub = Stub::default();
    let gateway = Gateway::start(&stub, &[]).await;
    let mut networks = Vec::new();
    for address in ["192.0.2.1", "192.0.2.2"] {
        let request = gateway.post("/api/bookings").header("x-forwarded-for", address);
        let answer = request.header("x-forwarded-proto", "https").send().await.unwrap();
        assert!(!answer.headers()[header::SET_COOKIE].to_str().unwrap().contains("Secure"));
        networks.push(stub.network());
    }
    assert_eq!(networks[0], networks[1]);
    let behind = Gateway::start(&stub, &[("--trusted-proxies", "127.0.0.0/8")]).await;
    let request = behind.post("/api/bookings").header("x-forwarded-proto", "https");
    let answer = request.send().await.unwrap();
    assert!(answer.headers()[header::SET_COOKIE].to_str().unwrap().ends_with("; Secure"));
    let told = Gateway::start(&stub, &[("--secure-cookies", "yes")]).await;
    let answer = told.post("/api/bookings").send().await.unwrap();
    assert!(answer.headers()[header::SET_COOKIE].to_str().unwrap().ends_with("; Secure"));
}

/// What is said of the inside is no business of strangers.
#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_are_on_the_admin_port_only() {
    let gateway = Gateway::start(&Stub::default(), &[]).await;
    let status = async |address: SocketAddr, path: &str| {
        gateway.client.get(format!("http://{address}{path}")).send().await.unwrap().status().as_u16()
    };
    for path in ["/health", "/metrics", "/report"] {
        assert_eq!(status(gateway.address, path).await, 404, "{path}");
    }
    for path in ["/livez", "/readyz"] {
        assert_eq!((status(gateway.address, path).await, status(gateway.admin, path).await), (200, 200), "{path}");
    }
    for (path, expected) in [("/metrics", 200), ("/report", 200), ("/health", 401)] {
        assert_eq!(status(gateway.admin, path).await, expected, "{path}");
    }
    let health = tokio::process::Command::new(env!("CARGO_BIN_EXE_ticketing"))
        .args(["health", "--bind-address", "127.0.0.1", "--admin-port", &gateway.admin.port().to_string()])
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(health.stdout).unwrap();
    assert!(said.contains("booking-service") && said.contains("memory"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_command_is_taken_by_a_gateway_with_the_same_secret() {
    let stub = Stub::default();
    let files = tempfile::tempdir().unwrap();
    let [own, other] = ["own", "other"].map(|name| files.path().join(name));
    std::fs::write(&own, "a secret of 32 bytes, or even more\n").unwrap();
    std::fs::write(&other, "another secret of 32 bytes, or more\n").unwrap();
    let gateway = Gateway::start(&stub, &[("--token-hmac-file", own.to_str().unwrap())]).await;
    let token = async |file: &Path| {
        let command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ticketing"))
            .args(["token", "--subject", "ann", "--ttl", "5m", "--hmac-file"])
            .arg(file)
            .output()
            .await
            .unwrap();
        String::from_utf8(command.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(said(gateway.post("/api/bookings").bearer_auth(token(&own).await)).await.0, 201);
    assert_eq!(stub.buyer(), Buyer::user("ticketing-local", "ann"));
    assert_eq!(said(gateway.post("/api/bookings").bearer_auth(token(&other).await)).await.0, 401);
}

#[test]
fn settings_that_would_let_anybody_in_are_refused() {
    let start = |more: &[&str]| {
        let settings = Cli::try_parse_from([&["gateway"], more].concat()).unwrap().settings;
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        gateway::start(settings).err().unwrap().to_string()
    };
    let url = "https://id.example/keys";
    assert!(start(&["--token-jwks-url", url, "--token-issuer", ISSUER]).contains("TOKEN_AUDIENCE"));
    assert!(start(&["--token-jwks-url", url, "--token-audience", "a"]).contains("TOKEN_ISSUER"));
    assert!(start(&["--session-key-file", "/there/is/none"]).starts_with("SESSION_KEY_FILE: cannot read"));
    let files = tempfile::tempdir().unwrap();
    let short = files.path().join("short");
    std::fs::write(&short, "short").unwrap();
    let refused = start(&["--token-hmac-file", short.to_str().unwrap()]);
    assert!(refused.starts_with("TOKEN_HMAC_FILE: ") && refused.contains("32 bytes"), "{refused}");
}
