//! Flag documents over `flagd.sync.v1`: who gets them, what is in them, and how soon a change is there.

use crate::ofrep::{address, let_read};
use crate::support::{World, cluster::apply, eventually, flag_set, operator::Operator, within};
use http::uri::PathAndQuery;
use operator::flag_sync::wire::{
    FetchAllFlagsRequest, GetMetadataRequest, GetMetadataResponse, SyncFlagsRequest, SyncFlagsResponse, path,
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tonic::{Code, IntoRequest, Request, Status, Streaming, client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;

/// Longest wait for a document.
const PATIENCE: Duration = Duration::from_secs(30);

/// A world whose operator may review tokens, and in which `user-1` may read the flags.
pub async fn prepared() -> World {
    let world = World::new().await;
    for right in world.cluster.flag_sync_rights(&world.home).await {
        apply(&world.client, "", &right).await.unwrap();
    }
    let_read(&world).await;
    world
}

/// An operator that serves documents, and clients of it.
struct Served {
    world: World,
    operator: Operator,
    channel: Channel,
}

impl Served {
    async fn start(extra: &[&str]) -> Self {
        let (world, listen) = (prepared().await, address());
        let operator = operator(&world, &listen, extra).await;
        Self { world, operator, channel: channel(&listen) }
    }

    /// The selector of the world's namespace.
    fn all(&self) -> String {
        format!("namespace={}", self.world.namespace)
    }

    fn token(&self, user: &str) -> String {
        self.world.cluster.server.user_token(user).unwrap_or(user).to_owned()
    }

    async fn follow(&self, user: &str, selector: &str) -> Result<Follower, Status> {
        Follower::open(&self.channel, Some(&self.token(user)), selector).await
    }

    /// The answer to somebody whom the operator refuses.
    async fn refused(&self, token: Option<&str>, selector: &str) -> (Code, String) {
        let status = Follower::open(&self.channel, token, selector).await.err().unwrap();
        (status.code(), status.message().to_owned())
    }

    /// The present document.
    async fn fetch(&self, selector: &str) -> Result<Value, Status> {
        let message = FetchAllFlagsRequest { provider_id: String::new(), selector: selector.to_owned() };
        let request = with_token(message, Some(&self.token("user-1")));
        let mut client = client(&self.channel).await;
        let codec = ProstCodec::<FetchAllFlagsRequest, SyncFlagsResponse>::default();
        let answer = client.unary(request, PathAndQuery::from_static(path::FETCH_ALL_FLAGS), codec).await?;
        Ok(serde_json::from_str(&answer.into_inner().flag_configuration).unwrap())
    }
}

async fn operator(world: &World, listen: &str, extra: &[&str]) -> Operator {
    let line: Vec<_> = ["--flag-sync-listen", listen].into_iter().chain(extra.iter().copied()).collect();
    let operator = Operator::start(world, &line).await;
    eventually("it is ready", async || match operator.readiness().await {
        (true, _) => Ok(()),
        (false, why) => Err(why),
    })
    .await;
    operator
}

fn channel(listen: &str) -> Channel {
    Channel::from_shared(format!("http://{listen}")).unwrap().connect_lazy()
}

async fn client(channel: &Channel) -> Grpc<Channel> {
    let mut client = Grpc::new(channel.clone()).max_decoding_message_size(4 * 1024 * 1024);
    client.ready().await.unwrap();
    client
}

fn with_token<M>(message: M, token: Option<&str>) -> Request<M> {
    let mut request = message.into_request();
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    request
}

/// A client with a stream.
struct Follower {
    stream: Streaming<SyncFlagsResponse>,
    stale: bool,
}

impl Follower {
    async fn open(channel: &Channel, token: Option<&str>, selector: &str) -> Result<Self, Status> {
        let message = SyncFlagsRequest { provider_id: "test".to_owned(), selector: selector.to_owned() };
        Self::request(channel, with_token(message, token)).await
    }

    async fn request(channel: &Channel, request: Request<SyncFlagsRequest>) -> Result<Self, Status> {
        let codec = ProstCodec::<SyncFlagsRequest, SyncFlagsResponse>::default();
        let mut client = client(channel).await;
        let answer = client.server_streaming(request, PathAndQuery::from_static(path::SYNC_FLAGS), codec).await?;
        let stale = answer.metadata().contains_key("x-resilience-stale");
        Ok(Self { stream: answer.into_inner(), stale })
    }

    /// The next document.
    async fn next(&mut self) -> Value {
        let message = tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("a document in time");
        serde_json::from_str(&message.unwrap().unwrap().flag_configuration).unwrap()
    }

    /// Documents up to the one that is as wanted.
    async fn until(&mut self, is_wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let document = self.next().await;
            if is_wanted(&document) {
                return document;
            }
        }
    }

    /// How the stream ends.
    async fn end(&mut self) -> Status {
        loop {
            match tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("an end in time") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended with success, which some clients take for the last change"),
                Err(status) => return status,
            }
        }
    }
}

/// The variant that `EnablePdf` has without a rule.
fn pdf(document: &Value) -> Option<&str> {
    document["flags"]["EnablePdf"]["defaultVariant"].as_str()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_brings_the_document_and_each_change_of_it() {
    let served = Served::start(&[]).await;
    let mut set = flag_set("flags", "booking");
    served.world.apply(&set).await;
    let mut follower = served.follow("user-1", &served.all()).await.unwrap();
    assert!(!follower.stale);
    let first = follower.until(|document| pdf(document).is_some()).await;
    let flag = &first["flags"]["EnablePdf"];
    assert_eq!((&flag["state"], &flag["variants"]), (&json!("ENABLED"), &json!({ "on": true, "off": false })));
    assert_eq!(flag["metadata"]["flagSetId"], format!("{}/flags", served.world.namespace));
    assert_eq!(served.fetch(&served.all()).await.unwrap(), first);

    let mut times = Vec::new();
    for variant in ["off", "on", "off"] {
        set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": variant, "reason": "a test" }]);
        served.world.apply(&set).await;
        let begun = Instant::now();
        follower.until(|document| pdf(document) == Some(variant)).await;
        times.push(begun.elapsed());
    }
    // The median: a machine that is busy for a moment proves nothing.
    times.sort();
    assert!(times[1] < Duration::from_secs(1), "{times:?}");

    // Another reason changes nothing in the document, so the next one shows what comes after it.
    set["spec"]["overrides"][0]["reason"] = json!("another one");
    served.world.apply(&set).await;
    let mut other = flag_set("other", "payment");
    other["spec"]["flagSpec"]["flags"] = json!({ "Other": set["spec"]["flagSpec"]["flags"]["EnablePdf"] });
    served.world.apply(&other).await;
    assert!(follower.next().await["flags"].get("Other").is_some());
    assert_eq!(served.operator.metric("resilience_operator_flag_sync_streams").await, 1);
    assert!(served.operator.metric("resilience_operator_flag_sync_documents_total").await >= 5);
    drop(follower);
    let ended = "resilience_operator_flag_sync_streams_ended_total{reason=\"client\"}";
    eventually("its end is counted", async || match served.operator.metric(ended).await {
        1 => Ok(()),
        other => Err(other.to_string()),
    })
    .await;
}

/// One that is invalid keeps its flags; what has the higher priority is in the document.
#[tokio::test(flavor = "multi_thread")]
async fn sets_are_merged_as_for_the_pods() {
    let served = Served::start(&[]).await;
    let mut set = flag_set("flags", "booking");
    served.world.apply(&set).await;
    let mut high = flag_set("high", "payment");
    high["spec"]["priority"] = json!(10);
    high["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("off");
    served.world.apply(&high).await;
    let mut of_all = served.follow("user-1", &served.all()).await.unwrap();
    of_all.until(|document| pdf(document) == Some("off")).await;
    let of = |workload: &str| format!("{},workload={workload}", served.all());
    let mut of_booking = served.follow("user-1", &of("booking")).await.unwrap();
    assert_eq!(pdf(&of_booking.next().await), Some("on"), "a set for others has no say here");
    assert_eq!(pdf(&served.fetch(&of("payment")).await.unwrap()), Some("off"));

    set["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("no-such-variant");
    served.world.apply(&set).await;
    served.world.until_flags_say("flags", "Accepted", "False", "InvalidFlagSet").await;
    let mut more = flag_set("more", "booking");
    more["spec"]["flagSpec"]["flags"] = json!({ "More": high["spec"]["flagSpec"]["flags"]["EnablePdf"] });
    served.world.apply(&more).await;
    let document = of_booking.until(|document| document["flags"].get("More").is_some()).await;
    assert_eq!(pdf(&document), Some("on"), "what it gave last stays");

    let (code, message) = served.refused(Some(&served.token("user-1")), &of("nobody")).await;
    assert_eq!(code, Code::NotFound);
    assert!(message.contains("nobody"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_override_that_ends_is_a_change() {
    let served = Served::start(&[]).await;
    let mut set = flag_set("flags", "booking");
    let until = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(4);
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "off", "until": until.to_string() }]);
    served.world.apply(&set).await;
    let mut follower = served.follow("user-1", &served.all()).await.unwrap();
    follower.until(|document| pdf(document) == Some("off")).await;
    follower.until(|document| pdf(document) == Some("on")).await;
    let late = jiff::Timestamp::now().duration_since(until);
    assert!(!late.is_negative() && late < jiff::SignedDuration::from_secs(5), "{late}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reads_what_rbac_lets_it_read() {
    let served = Served::start(&["--flag-sync-streams", "2"]).await;
    served.world.apply(&flag_set("flags", "booking")).await;
    let (user_1, user_2) = (served.token("user-1"), served.token("user-2"));
    let all = served.all();
    for (token, selector, code, words) in [
        (None, all.as_str(), Code::Unauthenticated, "authorization: Bearer TOKEN"),
        (Some("no-such-token"), &all, Code::Unauthenticated, "not valid"),
        (Some(&user_2), &all, Code::PermissionDenied, "user-2 may not get featureflags"),
        (Some(&user_1), "namespace=default", Code::PermissionDenied, "user-1 may not get featureflags"),
        (Some(&user_1), "", Code::InvalidArgument, "namespace=NAMESPACE"),
        (Some(&user_1), "flagSetId=a", Code::InvalidArgument, "part 1"),
        (Some(served.world.cluster.server.token()), "namespace=default", Code::NotFound, "does not watch"),
    ] {
        let (found, message) = served.refused(token, selector).await;
        assert_eq!(found, code, "{selector}: {message}");
        assert!(message.contains(words), "{message}");
    }

    // The token may stand in the selector, and the selector in the metadata or in the client's name.
    let in_selector = format!("{all},token={user_1}");
    let mut first = Follower::open(&served.channel, None, &in_selector).await.unwrap();
    first.until(|document| pdf(document) == Some("on")).await;
    let mut request = with_token(SyncFlagsRequest { provider_id: all.clone(), selector: String::new() }, Some(&user_1));
    let mut second = Follower::request(&served.channel, request).await.unwrap();
    assert_eq!(pdf(&second.next().await), Some("on"));
    let (code, message) = served.refused(Some(&user_1), &all).await;
    assert_eq!(code, Code::ResourceExhausted);
    assert!(message.contains("2 streams"), "{message}");
    drop(second);
    request = with_token(SyncFlagsRequest { provider_id: String::new(), selector: "nonsense".into() }, Some(&user_1));
    request.metadata_mut().insert("flagd-selector", all.parse().unwrap());
    let mut third = eventually("there is a place again", async || {
        let mut again = with_token(request.get_ref().clone(), None);
        *again.metadata_mut() = request.metadata().clone();
        Follower::request(&served.channel, again).await.map_err(|status| status.to_string())
    })
    .await;
    assert_eq!(pdf(&third.next().await), Some("on"));

    let codec = ProstCodec::<GetMetadataRequest, GetMetadataResponse>::default();
    let metadata = PathAndQuery::from_static(path::GET_METADATA);
    let answer = client(&served.channel).await.unary(GetMetadataRequest {}.into_request(), metadata, codec).await;
    assert!(answer.unwrap().into_inner().metadata.is_some());
    let codec = ProstCodec::<GetMetadataRequest, GetMetadataResponse>::default();
    let unknown = PathAndQuery::from_static("/flagd.sync.v1.FlagSyncService/Nonsense");
    let answer = client(&served.channel).await.unary(GetMetadataRequest {}.into_request(), unknown, codec).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_token_reaches_its_namespaces() {
    const TOKEN: &str = "sync-token-0123456789";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens");
    std::fs::write(&file, format!("sidecar {TOKEN} elsewhere\n")).unwrap();
    let served = Served::start(&["--flag-sync-tokens", file.to_str().unwrap()]).await;
    served.world.apply(&flag_set("flags", "booking")).await;
    let (code, message) =
        eventually("the token is known", async || match served.refused(Some(TOKEN), &served.all()).await {
            (Code::Unauthenticated, message) => Err(message),
            other => Ok(other),
        })
        .await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(message.contains("the token sidecar is not for"), "{message}");
    std::fs::write(&file, format!("sidecar {TOKEN} {}\n", served.world.namespace)).unwrap();
    let mut follower = eventually("the file is read again", async || {
        let opened = Follower::open(&served.channel, Some(TOKEN), &served.all()).await;
        opened.map_err(|status| status.to_string())
    })
    .await;
    follower.until(|document| pdf(document) == Some("on")).await;
}

/// A replica that stops tells its clients so, and they find the next one, or the same one again.
#[tokio::test(flavor = "multi_thread")]
async fn streams_end_with_their_replica_and_go_on_at_the_next() {
    let (world, listen) = (prepared().await, address());
    let first = operator(&world, &listen, &[]).await;
    let set = flag_set("flags", "booking");
    world.apply(&set).await;
    let channel = channel(&listen);
    let token = world.cluster.server.user_token("user-1").unwrap().to_owned();
    let all = format!("namespace={}", world.namespace);
    let mut follower = Follower::open(&channel, Some(&token), &all).await.unwrap();
    follower.until(|document| pdf(document) == Some("on")).await;
    let (status, ()) = tokio::join!(follower.end(), first.stop());
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("connect again"), "{status}");

    let mut set = set;
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "off" }]);
    world.apply(&set).await;
    let _second = operator(&world, &listen, &[]).await;
    let mut follower = within(PATIENCE, "the next one serves", async || {
        Follower::open(&channel, Some(&token), &all).await.map_err(|status| status.to_string())
    })
    .await;
    follower.until(|document| pdf(document) == Some("off")).await;
}

/// Clients do not take more than 4 MiB, and would say so where nobody looks.
#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_clients_would_not_take_is_refused_and_a_smaller_one_is_sent() {
    let served = Served::start(&[]).await;
    let mut set = flag_set("flags", "booking");
    served.world.apply(&set).await;
    let mut follower = served.follow("user-1", &served.all()).await.unwrap();
    follower.until(|document| pdf(document).is_some()).await;
    let flag = set["spec"]["flagSpec"]["flags"]["EnablePdf"].clone();
    let many = (0..500).map(|number| (format!("flag-{number}"), flag.clone())).collect::<serde_json::Map<_, _>>();
    set["spec"]["flagSpec"]["flags"] = many.into();
    // Each flag has it in the document.
    set["spec"]["flagSpec"]["metadata"] = json!({ "note": "x".repeat(10_000) });
    served.world.apply(&set).await;
    let status = follower.end().await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("workload=NAME"), "{status}");
    assert_eq!(served.fetch(&served.all()).await.unwrap_err().code(), Code::ResourceExhausted);

    set["spec"]["flagSpec"]["metadata"] = json!({ "note": "x".repeat(6_000) });
    served.world.apply(&set).await;
    let document = eventually("a document that is large, but not too large", async || {
        served.fetch(&served.all()).await.map_err(|status| status.to_string())
    })
    .await;
    assert_eq!(document["flags"].as_object().unwrap().len(), 500);
    let mut follower = served.follow("user-1", &served.all()).await.unwrap();
    assert_eq!(follower.next().await, document);
}
