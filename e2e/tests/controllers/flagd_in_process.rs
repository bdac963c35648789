//! The in-process provider of flagd for Node.js, as it is published, follows the flags of the operator.

use crate::{
    flag_sync::prepared,
    ofrep::address,
    ofrep_tls::ask,
    support::{World, cluster::apply, eventually, flag_set, operator::Operator},
};
use e2e::{checkout, progress::Progress, sdk_clients};
use reqwest::Client;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdin, ChildStdout, Command},
};

/// Longest wait for a line of the client.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the client is, with what it needs.
async fn installed() -> PathBuf {
    sdk_clients::ready("flagd-in-process", &Progress::new()).await.unwrap()
}

/// A program that follows flags.
struct Provider {
    _process: Child,
    questions: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    events: Vec<Value>,
}

impl Provider {
    async fn start(listen: &str, selector: &str) -> Self {
        Self::trusting(listen, selector, None).await
    }

    /// One that speaks TLS with a server of this certificate, if there is one.
    async fn trusting(listen: &str, selector: &str, certificate: Option<&Path>) -> Self {
        let folder = installed().await;
        let (host, port) = listen.rsplit_once(':').unwrap();
        let mut process = Command::new("node")
            .args(["client.mjs", host, port, selector])
            .args(certificate)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("node cannot be started; install Node.js 20 or newer: {error}"));
        let questions = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut provider = Self { _process: process, questions, answers, events: Vec::new() };
        provider.event("ready").await;
        provider
    }

    async fn line(&mut self) -> Value {
        let line = tokio::time::timeout(PATIENCE, self.answers.next_line()).await.expect("a line in time");
        serde_json::from_str(&line.unwrap().expect("it goes on")).unwrap()
    }

    /// Waits for the next event of that name.
    async fn event(&mut self, name: &str) {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                self.events.drain(..=at);
                return;
            }
            let event = self.line().await;
            self.events.push(event);
        }
    }

    /// What the provider says about a flag.
    async fn flag(&mut self, (kind, fallback): (&str, Value), key: &str, context: &Value) -> Value {
        let question = json!({ "type": kind, "key": key, "fallback": fallback, "context": context });
        self.questions.write_all(format!("{question}\n").as_bytes()).await.unwrap();
        loop {
            let mut line = self.line().await;
            if let Some(details) = line.get_mut("details") {
                return details.take();
            }
            self.events.push(line);
        }
    }

    async fn value(&mut self, asked: (&str, Value), key: &str, context: &Value) -> Value {
        self.flag(asked, key, context).await["value"].take()
    }
}

/// A set with a flag of each kind.
fn flags() -> Value {
    let mut set = flag_set("flags", "booking");
    let flag =
        |variants: Value, default: &str| json!({ "state": "ENABLED", "variants": variants, "defaultVariant": default });
    let flags = &mut set["spec"]["flagSpec"]["flags"];
    flags["Text"] = flag(json!({ "a": "A", "b": "B" }), "a");
    flags["Number"] = flag(json!({ "a": 7, "b": 8 }), "a");
    flags["Float"] = flag(json!({ "a": 1.5, "b": 2.5 }), "a");
    flags["Object"] = flag(json!({ "a": { "x": [1, { "y": null }] } }), "a");
    flags["Disabled"] = flag(json!({ "on": true }), "on");
    flags["Disabled"]["state"] = json!("DISABLED");
    flags["NoDefault"] = json!({ "state": "ENABLED", "variants": { "on": true } });
    flags["Country"] = flag(json!({ "on": true, "off": false }), "off");
    flags["Country"]["targeting"] = json!({ "if": [{ "$ref": "austrian" }, "on"] });
    flags["Killed"] = flags["Country"].clone();
    flags["Split"] = flag(json!({ "red": "red", "green": "green", "blue": "blue" }), "red");
    flags["Split"]["targeting"] = json!({ "fractional": [["red", 50], ["green", 20], ["blue", 30]] });
    flags["SplitV2"] = flags["Split"].clone();
    flags["SplitV2"]["targeting"] = json!({ "fractional_v2": [["red", 50], ["green", 20], ["blue", 30]] });
    let in_eu = json!({ "in": [{ "var": "country" }, ["AT", "DE"]] });
    set["spec"]["flagSpec"]["$evaluators"] = json!({
        "eu": in_eu,
        "austrian": { "and": [{ "$ref": "eu" }, { "==": [{ "var": "country" }, "AT"] }] },
    });
    set["spec"]["overrides"] = json!([{ "key": "Killed", "variant": "off", "reason": "a test" }]);
    set
}

fn switch() -> (&'static str, Value) {
    ("boolean", json!(false))
}

/// What the operator says over OFREP, which evaluates as the pods do.
async fn over_ofrep(world: &World, listen: &str, key: &str, context: &Value) -> Value {
    let url = format!("http://{listen}/namespaces/{}/ofrep/v1/evaluate/flags/{key}", world.namespace);
    let client = Client::builder().no_proxy().build().unwrap();
    let token = world.cluster.server.user_token("user-1").unwrap();
    let body = json!({ "context": context }).to_string();
    let answer = client.post(url).bearer_auth(token).body(body).send().await.unwrap();
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}

async fn start(world: &World, listen: &str, ofrep: &str) -> Operator {
    let operator = Operator::start(world, &["--flag-sync-listen", listen, "--ofrep-listen", ofrep]).await;
    eventually("it is ready", async || match operator.readiness().await {
        (true, _) => Ok(()),
        (false, why) => Err(why),
    })
    .await;
    operator
}

#[tokio::test(flavor = "multi_thread")]
async fn the_in_process_provider_gives_what_the_pods_give() {
    let (world, listen, ofrep) = (prepared().await, address(), address());
    for right in world.cluster.ofrep_rights(&world.home).await {
        apply(&world.client, "", &right).await.unwrap();
    }
    let first = start(&world, &listen, &ofrep).await;
    let mut set = flags();
    world.apply(&set).await;
    let token = world.cluster.server.user_token("user-1").unwrap();
    let mut provider = Provider::start(&listen, &format!("namespace={},token={token}", world.namespace)).await;

    let nobody = json!({});
    while provider.flag(switch(), "EnablePdf", &nobody).await["reason"] == "ERROR" {
        provider.event("changed").await;
    }
    for (asked, key, value, reason) in [
        (switch(), "EnablePdf", json!(true), "STATIC"),
        (("string", json!("-")), "Text", json!("A"), "STATIC"),
        (("number", json!(0)), "Number", json!(7), "STATIC"),
        (("number", json!(0)), "Float", json!(1.5), "STATIC"),
        (("object", json!({})), "Object", json!({ "x": [1, { "y": null }] }), "STATIC"),
        (switch(), "Disabled", json!(false), "DISABLED"),
        (switch(), "NoDefault", json!(false), "DEFAULT"),
        (switch(), "Country", json!(false), "DEFAULT"),
    ] {
        let details = provider.flag(asked, key, &nobody).await;
        assert_eq!((&details["value"], &details["reason"]), (&value, &json!(reason)), "{details}");
    }
    let austrian = json!({ "targetingKey": "u", "country": "AT" });
    let details = provider.flag(switch(), "Country", &austrian).await;
    assert_eq!((&details["value"], &details["reason"]), (&json!(true), &json!("TARGETING_MATCH")), "{details}");
    assert_eq!(details["flagMetadata"]["flagSetId"], format!("{}/flags", world.namespace));
    assert_eq!(provider.value(switch(), "Country", &json!({ "country": "DE" })).await, false);
    assert_eq!(provider.value(switch(), "Killed", &austrian).await, false, "a person's word stands above the rule");

    for country in ["AT", "DE", "CH"] {
        for key in ["Country", "Killed", "EnablePdf"] {
            let context = json!({ "targetingKey": "u", "country": country });
            let own = provider.value(switch(), key, &context).await;
            assert_eq!(own, over_ofrep(&world, &ofrep, key, &context).await["value"], "{key} in {country}");
        }
    }
    // The provider has the second version of `fractional` and our pods the third, so the buckets are others (docs/featureflag.md); they
    // are the same where the rule names the second one.
    let mut seen = BTreeSet::new();
    for number in 0..60 {
        let context = json!({ "targetingKey": format!("user-{number}") });
        let own = provider.value(("string", json!("-")), "SplitV2", &context).await;
        assert_eq!(own, over_ofrep(&world, &ofrep, "SplitV2", &context).await["value"], "user-{number}");
        let details = provider.flag(("string", json!("-")), "Split", &context).await;
        assert_eq!(details["reason"], "TARGETING_MATCH", "{details}");
        assert_eq!(provider.value(("string", json!("-")), "Split", &context).await, details["value"]);
        seen.insert(details["value"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen, BTreeSet::from(["blue", "green", "red"].map(str::to_owned)));

    let mut times = Vec::new();
    for (variant, value) in [("off", false), ("on", true), ("off", false)] {
        set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": variant }]);
        provider.events.clear();
        world.apply(&set).await;
        let begun = Instant::now();
        while provider.value(("boolean", json!(!value)), "EnablePdf", &nobody).await != value {
            provider.event("changed").await;
        }
        times.push(begun.elapsed());
    }
    // The median: a machine that is busy for a moment proves nothing.
    times.sort();
    assert!(times[1] < Duration::from_secs(1), "{times:?}");

    // While the operator is away the flags stay as they were; when it is there again they are as they are.
    provider.events.clear();
    first.stop().await;
    provider.event("stale").await;
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "on" }]);
    world.apply(&set).await;
    assert_eq!(provider.value(("boolean", json!(true)), "EnablePdf", &nobody).await, false);
    let _second = start(&world, &listen, &ofrep).await;
    while provider.value(switch(), "EnablePdf", &nobody).await != true {
        provider.event("changed").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_follows_over_tls_and_a_new_certificate_ends_nothing() {
    let (world, listen, folder) = (prepared().await, address(), tempfile::tempdir().unwrap());
    let (own, _) = listen.rsplit_once(':').unwrap();
    let mounted = folder.path().join("mounted");
    // As the kubelet does it: both files are there at once.
    let put = |name: &str| {
        let signed = rcgen::generate_simple_self_signed(["flags.example".to_owned(), own.to_owned()]).unwrap();
        let (place, link) = (folder.path().join(name), folder.path().join("link"));
        std::fs::create_dir(&place).unwrap();
        std::fs::write(place.join("tls.crt"), signed.cert.pem()).unwrap();
        std::fs::write(place.join("tls.key"), signed.signing_key.serialize_pem()).unwrap();
        std::os::unix::fs::symlink(&place, &link).unwrap();
        std::fs::rename(link, &mounted).unwrap();
        signed.cert.pem()
    };
    let first = put("first");
    let arguments = ["--flag-sync-listen", &listen, "--flag-sync-certificates", mounted.to_str().unwrap()];
    let operator = Operator::start(&world, &arguments).await;
    let reads = async |result: &str| {
        let metric = format!("resilience_operator_flag_sync_certificate_reads_total{{result=\"{result}\"}}");
        operator.metric(&metric).await
    };
    let mut set = flag_set("flags", "booking");
    world.apply(&set).await;
    let trusted = folder.path().join("first/tls.crt");
    let selector =
        format!("namespace={},token={}", world.namespace, world.cluster.server.user_token("user-1").unwrap());
    let mut provider = Provider::trusting(&listen, &selector, Some(&trusted)).await;
    let nobody = json!({});
    while provider.value(switch(), "EnablePdf", &nobody).await != true {
        provider.event("changed").await;
    }
    // Who comes now has to trust the new one, and who is there goes on.
    let second = put("second");
    eventually("the new certificate is read", async || match reads("ok").await {
        times if times > 1 => Ok(()),
        _ => Err("not yet".to_owned()),
    })
    .await;
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "off" }]);
    world.apply(&set).await;
    while provider.value(("boolean", json!(true)), "EnablePdf", &nobody).await != false {
        provider.event("changed").await;
    }
    let request = "GET / HTTP/1.1\r\nhost: flags.example\r\n\r\n";
    // It is no HTTP/1 that is spoken there, but first comes the certificate.
    let is_refused = async |trusted: &str| {
        let said = ask(&listen, trusted, request).await;
        said.is_err_and(|error| error.contains("invalid peer certificate"))
    };
    assert_eq!((is_refused(&first).await, is_refused(&second).await), (true, false));
    // Without TLS nobody is told anything.
    let mut plain = TcpStream::connect(&listen).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut said = Vec::new();
    let _ = plain.read_to_end(&mut said).await;
    assert_ne!(said.first(), Some(&0), "a frame of HTTP/2: {said:?}");
    operator.assert_alive().await;
}

/// What the documentation says works when it is pasted.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_program_runs() {
    let (world, listen, ofrep) = (prepared().await, address(), address());
    let _operator = start(&world, &listen, &ofrep).await;
    let mut set = flag_set("flags", "booking");
    let mut flag = set["spec"]["flagSpec"]["flags"]["EnablePdf"].take();
    flag["defaultVariant"] = json!("off");
    set["spec"]["flagSpec"]["flags"] = json!({ "EnablePdfGeneration": flag });
    world.apply(&set).await;
    // The operator has seen it.
    world.until_flags_say("flags", "Ready", "False", "TargetNotFound").await;

    let page = std::fs::read_to_string(checkout::root().join("docs/flag-sync.md")).unwrap();
    let mut program = page.split("```js\n").nth(1).unwrap().split("```").next().unwrap().to_owned();
    let (host, port) = listen.rsplit_once(':').unwrap();
    for (documented, here) in [
        ("resilience-operator-flag-sync.resilience-system", host),
        ("8015", port),
        ("namespace=ticketing,", &format!("namespace={},", world.namespace)),
    ] {
        assert!(program.contains(documented), "{documented}");
        program = program.replace(documented, here);
    }
    let mut process = Command::new("node")
        .args(["--input-type=module", "--eval", &program])
        .current_dir(installed().await)
        .env("FLAGS_TOKEN", world.cluster.server.user_token("user-1").unwrap())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("a line in time").unwrap();
    assert_eq!(line.as_deref(), Some("false"));
}
