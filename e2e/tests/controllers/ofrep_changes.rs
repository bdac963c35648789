//! Changes over OFREP: who is told, how soon, and until when; and the flags as flagd reads them.

use crate::{
    ofrep::{Served, flags, prepared, read},
    support::{eventually, flag_set},
};
use futures::future::join_all;
use jiff::{Timestamp, ToSpan};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const BULK: &str = "/ofrep/v1/evaluate/flags";
const TOKEN: &str = "page-token-0123456789";

/// What listens to a stream, as a browser does.
struct Listener {
    answer: Response,
    unread: String,
}

#[derive(Debug)]
struct Event {
    id: String,
    data: Value,
}

impl Listener {
    async fn open(request: RequestBuilder) -> Result<Self, StatusCode> {
        let answer = request.header("accept", "text/event-stream").send().await.unwrap();
        if answer.status() != StatusCode::OK {
            return Err(answer.status());
        }
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Ok(Self { answer, unread: String::new() })
    }

    /// The next event; none: the stream has ended. Comments alone are not waited with for long.
    async fn next(&mut self) -> Option<Event> {
        tokio::time::timeout(Duration::from_secs(30), self.read()).await.expect("an event, or the end")
    }

    async fn read(&mut self) -> Option<Event> {
        loop {
            while let Some((block, rest)) = self.unread.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.unread = rest;
                let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                if let Some(data) = field("data:") {
                    assert_eq!(field("event:"), Some("message"));
                    let (id, data) = (field("id:").unwrap().to_owned(), serde_json::from_str(data).unwrap());
                    return Some(Event { id, data });
                }
                assert!(block.starts_with(':') || field("retry:").is_some(), "{block}");
            }
            let chunk = self.answer.chunk().await.expect("it ends in order");
            self.unread.push_str(std::str::from_utf8(&chunk?).unwrap());
        }
    }
}

/// A file with a static token for the namespace.
struct Tokens(tempfile::TempDir);

impl Tokens {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> String {
        self.0.path().join("tokens").to_str().unwrap().to_owned()
    }

    fn write(&self, token: &str, namespace: &str) {
        std::fs::write(self.path(), format!("page {token} {namespace}\n")).unwrap();
    }
}

/// An operator with flags that a page may read.
async fn with_page(rate: &str) -> (Served, Tokens) {
    let tokens = Tokens::new();
    let served = Served::start(&["--ofrep-tokens", &tokens.path(), "--ofrep-rate", rate]).await;
    tokens.write(TOKEN, &served.world.namespace);
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    eventually("the token is known", async || {
        let (status, answer) = read(served.call(TOKEN, BULK, &json!({}))).await;
        if status == StatusCode::OK { Ok(()) } else { Err(answer.to_string()) }
    })
    .await;
    (served, tokens)
}

/// Where the stream of an answer is, without any header.
async fn stream_of(served: &Served, user: &str, path: &str) -> String {
    let (status, answer) = read(served.call(user, path, &json!({}))).await;
    assert_eq!((status, &answer["eventStreams"][0]["type"]), (StatusCode::OK, &json!("sse")), "{answer}");
    format!("{}{}", served.base, answer["eventStreams"][0]["endpoint"]["requestUri"].as_str().unwrap())
}

async fn set_pdf(served: &Served, variant: &str) {
    let mut set = flags();
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": variant }]);
    served.world.apply(&set).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_told_of_changes_as_long_as_its_token_is_valid() {
    let (served, tokens) = with_page("500").await;
    let url = stream_of(&served, TOKEN, BULK).await;
    assert_eq!(stream_of(&served, TOKEN, BULK).await, url, "it stays the same, or each answer would be another one");
    assert!(!url.contains(TOKEN));
    let mut listener = Listener::open(served.client.get(&url)).await.unwrap();
    let first = listener.next().await.unwrap();
    assert_eq!(first.data["type"], "refetchEvaluation");
    let mut times = Vec::new();
    let mut last = first.id;
    for variant in ["off", "on", "off"] {
        set_pdf(&served, variant).await;
        let begun = Instant::now();
        let event = listener.next().await.unwrap();
        times.push(begun.elapsed());
        assert!(event.id != last && event.data["etag"] == format!("\"{}\"", event.id), "{event:?}");
        assert!(event.data["lastModified"].as_i64().unwrap() > 1_700_000_000);
        served.until("EnablePdf", &json!(variant == "on")).await;
        last = event.id;
    }
    times.sort();
    assert!(times[1] < Duration::from_secs(1), "{times:?}");

    // Who comes again is told what it has missed, and nothing that it has seen.
    let again = |id: &str| served.client.get(&url).header("last-event-id", id);
    let mut up_to_date = Listener::open(again(&last)).await.unwrap();
    let missed = Listener::open(again("before")).await.unwrap().next().await.unwrap();
    assert_eq!(missed.id, last);
    set_pdf(&served, "on").await;
    assert_ne!(up_to_date.next().await.unwrap().id, last);

    // The ticket is for this stream alone, and ends with the token.
    let elsewhere = url.replace("/ofrep/", "/workloads/booking/ofrep/");
    assert_eq!(Listener::open(served.client.get(elsewhere)).await.err(), Some(StatusCode::UNAUTHORIZED));
    let document = url.replace("ofrep/v1/events", "flagd.json");
    assert_eq!(served.client.get(document).send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    let url_of_document = format!("{}/namespaces/{}/flagd.json", served.base, served.world.namespace);
    let (status, answer) = read(served.client.get(url_of_document).bearer_auth(TOKEN)).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "who sees a page does not see the rules: {answer}");
    tokens.write("another-token-0123456789", &served.world.namespace);
    while listener.next().await.is_some() {}
    assert_eq!(Listener::open(served.client.get(&url)).await.err(), Some(StatusCode::UNAUTHORIZED));
    let ended = "resilience_operator_ofrep_stream_ends_total{reason=\"forbidden\"}";
    eventually("it is counted", async || match served.operator.metric(ended).await {
        0 => Err("not yet".to_owned()),
        _ => Ok(()),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_is_told_with_its_token_or_a_ticket_and_of_its_workload_alone() {
    let served = Served::start(&[]).await;
    served.world.apply(&flags()).await;
    let mut other = flag_set("other", "payment");
    served.world.apply(&other).await;
    served.until("EnablePdf", &json!(true)).await;
    let base = format!("{}/namespaces/{}/workloads", served.base, served.world.namespace);
    let token = |user: &str| served.world.cluster.server.user_token(user).unwrap().to_owned();
    let events = served.client.get(format!("{base}/booking/ofrep/v1/events"));
    let with_token = |user: &str| events.try_clone().unwrap().bearer_auth(token(user));
    assert_eq!(Listener::open(events.try_clone().unwrap()).await.err(), Some(StatusCode::UNAUTHORIZED));
    assert_eq!(Listener::open(with_token("user-2")).await.err(), Some(StatusCode::FORBIDDEN));
    let mut booking = Listener::open(with_token("user-1")).await.unwrap();
    let url = stream_of(&served, "user-1", &format!("/workloads/payment{BULK}")).await;
    let mut payment = Listener::open(served.client.get(url)).await.unwrap();
    let (first, _) = (booking.next().await.unwrap(), payment.next().await.unwrap());

    other["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("off");
    served.world.apply(&other).await;
    payment.next().await.unwrap();
    set_pdf(&served, "off").await;
    let next = booking.next().await.unwrap();
    assert_ne!(next.id, first.id);
    let (_, document) =
        read(served.client.get(format!("{base}/booking/flagd.json")).bearer_auth(token("user-1"))).await;
    assert_eq!(document["flags"]["EnablePdf"]["defaultVariant"], "off", "the change of the other was no news");
    let Served { operator, .. } = served;
    operator.stop().await;
    assert!(booking.next().await.is_none(), "it ends in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_an_override_is_told() {
    let served = Served::start(&[]).await;
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let url = stream_of(&served, "user-1", BULK).await;
    let mut listener = Listener::open(served.client.get(&url)).await.unwrap();
    let first = listener.next().await.unwrap();
    let mut set = flags();
    let until = Timestamp::now() + 3.seconds();
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "off", "until": until }]);
    served.world.apply(&set).await;
    let (begin, end) = (listener.next().await.unwrap(), listener.next().await.unwrap());
    assert!(Timestamp::now() >= until && begin.id != first.id);
    assert_eq!(end.id, first.id, "the flags are what they were");
    assert_eq!(served.flag("EnablePdf", json!({})).await.1["value"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_are_told_and_may_all_ask_at_once() {
    const CLIENTS: usize = 250;
    // All visitors of a page are one client. What they are asked for comes beside its rate, or most of them would be told to wait.
    let (served, _tokens) = with_page("20").await;
    let url = stream_of(&served, TOKEN, BULK).await;
    let mut listeners = Vec::new();
    for _ in 0..CLIENTS {
        let mut listener = Listener::open(served.client.get(&url)).await.unwrap();
        listener.next().await.unwrap();
        listeners.push(listener);
    }
    assert_eq!(served.operator.metric("resilience_operator_ofrep_streams").await, CLIENTS as u64);
    set_pdf(&served, "off").await;
    let begun = Instant::now();
    let asked = listeners.iter_mut().map(|listener| async {
        listener.next().await.unwrap();
        let told = begun.elapsed();
        let (status, answer) = read(served.call(TOKEN, BULK, &json!({}))).await;
        let pdf = answer["flags"].as_array().unwrap().iter().find(|flag| flag["key"] == "EnablePdf").unwrap();
        assert_eq!((status, &pdf["value"]), (StatusCode::OK, &json!(false)));
        told
    });
    let mut times = join_all(asked).await;
    times.sort();
    println!("{CLIENTS} clients were told: p50 {:?}, p99 {:?}", times[CLIENTS / 2], times[CLIENTS * 99 / 100]);
    drop(listeners);
    eventually("the streams are gone", async || {
        match served.operator.metric("resilience_operator_ofrep_streams").await {
            0 => Ok(()),
            open => Err(format!("{open} streams")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_bounded_and_may_be_off() {
    let served = Served::start(&["--ofrep-streams", "2"]).await;
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let url = stream_of(&served, "user-1", BULK).await;
    let open = async || Listener::open(served.client.get(&url)).await;
    let (first, _second) = (open().await.unwrap(), open().await.unwrap());
    assert_eq!(open().await.err(), Some(StatusCode::TOO_MANY_REQUESTS));
    drop(first);
    eventually("there is a place again", async || open().await.map(drop).map_err(|status| status.to_string())).await;

    let world = prepared().await;
    let listen = crate::ofrep::address();
    let extra = ["--ofrep-listen", &listen, "--ofrep-streams", "0"];
    let operator = crate::support::operator::Operator::start(&world, &extra).await;
    let served = Served::of(world, operator, &listen);
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let (_, answer) = read(served.call("user-1", BULK, &json!({}))).await;
    assert!(answer.get("eventStreams").is_none());
    let url = format!("{}/namespaces/{}/ofrep/v1/events", served.base, served.world.namespace);
    let token = served.world.cluster.server.user_token("user-1").unwrap();
    let refused = Listener::open(served.client.get(url).bearer_auth(token)).await;
    assert_eq!(refused.err(), Some(StatusCode::NOT_FOUND));
}

/// As flagd's source `http` asks.
#[tokio::test(flavor = "multi_thread")]
async fn flagd_reads_what_we_answer() {
    let served = Served::start(&[]).await;
    served.world.apply(&flags()).await;
    let mut high = flag_set("high", "payment");
    high["spec"]["priority"] = json!(10);
    high["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "off" }]);
    served.world.apply(&high).await;
    served.until("EnablePdf", &json!(false)).await;
    let get = |scope: &str, tag: Option<&str>| {
        let url = format!("{}/namespaces/{}{scope}/flagd.json", served.base, served.world.namespace);
        let get = served.client.get(url).header("accept", "application/json").header("accept", "application/yaml");
        let get = get.bearer_auth(served.world.cluster.server.user_token("user-1").unwrap());
        if let Some(tag) = tag { get.header("if-none-match", tag) } else { get }
    };
    let answer = get("", None).send().await.unwrap();
    assert_eq!(
        (answer.status(), &answer.headers()["content-type"]),
        (StatusCode::OK, &"application/json".parse().unwrap())
    );
    let tag = answer.headers()["etag"].to_str().unwrap().to_owned();
    let document: Value = answer.json().await.unwrap();
    assert_eq!(document["$schema"], "https://flagd.dev/schema/v0/flags.json");
    assert_eq!(document["flags"].as_object().unwrap().len(), 5);
    assert_eq!(document["flags"]["EnablePdf"]["defaultVariant"], "off", "the priority and the override");
    assert_eq!(document["flags"]["Country"]["targeting"], flags()["spec"]["flagSpec"]["flags"]["Country"]["targeting"]);
    let same = get("", Some(&tag)).send().await.unwrap();
    assert_eq!((same.status(), same.headers()["etag"].to_str().unwrap()), (StatusCode::NOT_MODIFIED, tag.as_str()));
    let (_, payment) = read(get("/workloads/payment", Some(&tag))).await;
    assert_eq!(payment["flags"].as_object().unwrap().keys().collect::<Vec<_>>(), ["EnablePdf"]);
    let (status, _) = read(get("/workloads/nobody", None)).await;
    assert_eq!(status, StatusCode::NOT_FOUND);

    high["spec"]["overrides"] = json!([]);
    served.world.apply(&high).await;
    eventually("flagd sees the edit", async || match get("", Some(&tag)).send().await.unwrap().status() {
        StatusCode::OK => Ok(()),
        other => Err(other.to_string()),
    })
    .await;
    let url = format!("{}/namespaces/{}/flagd.json", served.base, served.world.namespace);
    assert_eq!(served.client.get(&url).send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    assert_eq!(served.client.post(&url).send().await.unwrap().status(), StatusCode::METHOD_NOT_ALLOWED);
}
