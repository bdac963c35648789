//! The SDKs of OpenFeature in other languages, each with its provider for OFREP, against the running operator.

use crate::ofrep::{Served, address};
use crate::support::eventually;
use crate::support::manifests::flag_set;
use contract::FlagsSettings;
use e2e::command::find_program;
use e2e::progress::Progress;
use e2e::sdk_clients::{self, PYTHON};
use flags::{Attribute, Context, FlagSet, Inputs};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// A browser takes long to start where others have the processors.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Which SDK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sdk {
    Python,
    JavaScript,
    Web,
}

/// A program that reads flags: a line of calls in, a line of answers out.
struct SdkClient {
    sdk: Sdk,
    process: Child,
    calls: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl SdkClient {
    async fn start(sdk: Sdk, program: impl AsRef<Path>, arguments: &[&str]) -> Self {
        let mut command = Command::new(program.as_ref());
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().unwrap();
        let calls = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut client = Self { sdk, process, calls, answers };
        assert_eq!(client.next(START_TIMEOUT).await, "ready");
        client
    }

    async fn next(&mut self, within: Duration) -> Value {
        let line = tokio::time::timeout(within, self.answers.next_line()).await;
        let line = line.unwrap_or_else(|_| panic!("no answer within {} s", within.as_secs())).unwrap();
        let Some(line) = line else { panic!("it has ended: {:?}", self.process.wait().await) };
        serde_json::from_str(&line).unwrap()
    }

    async fn read(&mut self, calls: &[Value]) -> Vec<Value> {
        self.calls.write_all(format!("{}\n", json!(calls)).as_bytes()).await.unwrap();
        serde_json::from_value(self.next(ANSWER_TIMEOUT).await).unwrap()
    }

    /// Until a Boolean flag has this value; the answer is how long that took.
    async fn until(&mut self, key: &str, value: bool) -> Duration {
        let begin = Instant::now();
        loop {
            let answer = self.read(&[call("boolean", key, &json!(!value), None)]).await.remove(0);
            if answer["value"] == value {
                return begin.elapsed();
            }
            assert!(begin.elapsed() < ANSWER_TIMEOUT, "{key} is not {value}: {answer}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn call(kind: &str, key: &str, fallback: &Value, context: Option<Value>) -> Value {
    json!({"type": kind, "key": key, "fallback": fallback, "context": context.unwrap_or(json!({}))})
}

/// A flag of each kind.
fn set() -> Value {
    let mut set = flag_set("flags", "booking");
    let flag =
        |variants: Value, default: Value| json!({"state": "ENABLED", "variants": variants, "defaultVariant": default});
    let flags = &mut set["spec"]["flagSpec"]["flags"];
    flags["Greeting"] = flag(json!({"short": "hi", "long": "good evening"}), json!("long"));
    flags["Seats"] = flag(json!({"few": 4, "many": 10}), json!("many"));
    flags["Price"] = flag(json!({"low": 1.5, "high": 2.25}), json!("low"));
    flags["Page"] = flag(json!({"a": {"rows": 3, "tags": ["x", "y"]}}), json!("a"));
    flags["Off"] = flag(json!({"on": true, "off": false}), json!("on"));
    flags["Off"]["state"] = json!("DISABLED");
    flags["NoDefault"] = flag(json!({"on": true}), Value::Null);
    flags["Country"] = flag(json!({"on": true, "off": false}), json!("off"));
    flags["Country"]["targeting"] = json!({"if": [{"==": [{"var": "country"}, "AT"]}, "on"]});
    flags["Split"] = flag(json!({"a": "A", "b": "B"}), json!("a"));
    flags["Split"]["targeting"] = json!({"fractional": [["a", 50], ["b", 50]]});
    set
}

/// What is asked, and the value, the variant, the reason and the error of the answer.
fn cases(sdk: Sdk) -> Vec<(Value, Value)> {
    let austrian = json!({"targetingKey": "u", "country": "AT"});
    let german = json!({"targetingKey": "u", "country": "DE"});
    let page = json!({"rows": 3, "tags": ["x", "y"]});
    // The protocol lets an answer have no value, for the code's own default. The older providers call that an error, and
    // give the code's default all the same.
    let own_default = |value: bool, reason: &str| match sdk {
        Sdk::Web => json!([value, null, reason, null]),
        Sdk::Python | Sdk::JavaScript => json!([value, null, "ERROR", "GENERAL"]),
    };
    let whole = if sdk == Sdk::Python { "integer" } else { "number" };
    vec![
        (call("boolean", "EnablePdf", &json!(false), None), json!([true, "on", "STATIC", null])),
        (call("string", "Greeting", &json!(""), None), json!(["good evening", "long", "STATIC", null])),
        (call(whole, "Seats", &json!(0), None), json!([10, "many", "STATIC", null])),
        (call("number", "Price", &json!(0), None), json!([1.5, "low", "STATIC", null])),
        (call("object", "Page", &json!({}), None), json!([page, "a", "STATIC", null])),
        (call("boolean", "Off", &json!(false), None), own_default(false, "DISABLED")),
        (call("boolean", "NoDefault", &json!(true), None), own_default(true, "DEFAULT")),
        (call("boolean", "Country", &json!(false), Some(austrian)), json!([true, "on", "TARGETING_MATCH", null])),
        (call("boolean", "Country", &json!(true), Some(german)), json!([false, "off", "DEFAULT", null])),
        (call("boolean", "Absent", &json!(true), None), json!([true, null, "ERROR", "FLAG_NOT_FOUND"])),
        (call("string", "EnablePdf", &json!("other"), None), json!(["other", null, "ERROR", "TYPE_MISMATCH"])),
    ]
}

/// The four members of an answer that every SDK has.
fn core(answer: &Value) -> Value {
    json!([answer["value"], answer["variant"], answer["reason"], answer["errorCode"]])
}

/// What the library in our own workloads says of `Split`.
fn in_our_workloads(key: &str) -> Value {
    let settings: FlagsSettings = serde_json::from_value(set()["spec"]["flagSpec"].clone()).unwrap();
    let flags = FlagSet::compile(settings);
    let attributes: [(&str, Attribute<'_>); 0] = [];
    let inputs = Inputs { context: Context::new(&attributes).with_key(key), ..Inputs::default() };
    flags.find("Split").unwrap().evaluate("Split", &inputs, || 0).unwrap().unwrap().clone()
}

/// Everything that each client is asked.
async fn all_answers_are_right(client: &mut SdkClient) {
    let (calls, expected): (Vec<_>, Vec<_>) = cases(client.sdk).into_iter().unzip();
    let answers = client.read(&calls).await;
    let found: Vec<_> = answers.iter().map(core).collect();
    assert_eq!(found, expected, "{answers:#?}");
    let keys: Vec<_> = (0..20).map(|number| format!("buyer-{number}")).collect();
    let calls: Vec<_> =
        keys.iter().map(|key| call("string", "Split", &json!(""), Some(json!({"targetingKey": key})))).collect();
    let found: Vec<_> = client.read(&calls).await.iter().map(|answer| answer["value"].clone()).collect();
    let ours: Vec<_> = keys.iter().map(|key| in_our_workloads(key)).collect();
    assert_eq!(found, ours, "a share of buyers is the same wherever it is asked for");
    assert!(ours.contains(&json!("A")) && ours.contains(&json!("B")), "{ours:?}");
}

/// Turns `EnablePdf` off as a person does in an incident, and on again.
async fn turned_off_and_on(served: &Served, client: &mut SdkClient) {
    let mut off = set();
    off["spec"]["overrides"] = json!([{"key": "EnablePdf", "variant": "off", "reason": "printer away"}]);
    for (set, value) in [(off, false), (set(), true)] {
        served.world.apply(&set).await;
        let took = client.until("EnablePdf", value).await;
        println!("EnablePdf is {value} after {} ms", took.as_millis());
    }
}

async fn served(extra: &[&str]) -> Served {
    let served = Served::start(extra).await;
    served.world.apply(&set()).await;
    served.until("EnablePdf", &json!(true)).await;
    served
}

fn base(served: &Served) -> String {
    format!("{}/namespaces/{}", served.base, served.world.namespace)
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_with_the_python_sdk_read_flags() {
    let folder = sdk_clients::ready("ofrep-python", &Progress::new()).await.unwrap();
    let served = served(&[]).await;
    let token = served.world.cluster.server.user_token("user-1").unwrap();
    let script = folder.join("client.py");
    let mut client =
        SdkClient::start(Sdk::Python, folder.join(PYTHON), &[script.to_str().unwrap(), &base(&served), token]).await;
    all_answers_are_right(&mut client).await;
    turned_off_and_on(&served, &mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_with_the_javascript_sdk_read_flags() {
    let folder = sdk_clients::ready("ofrep-js", &Progress::new()).await.unwrap();
    let served = served(&[]).await;
    let token = served.world.cluster.server.user_token("user-1").unwrap();
    let script = folder.join("server.mjs");
    let mut client =
        SdkClient::start(Sdk::JavaScript, "node", &[script.to_str().unwrap(), &base(&served), token]).await;
    all_answers_are_right(&mut client).await;
    turned_off_and_on(&served, &mut client).await;
}

/// With a token of its own, which everybody can read in the page, and from another origin. It never asks on its own: the stream of
/// changes tells it.
#[tokio::test(flavor = "multi_thread")]
async fn pages_in_a_browser_read_flags() {
    const TOKEN: &str = "page-token-of-the-shop-0123456789";
    let folder = sdk_clients::ready("ofrep-js", &Progress::new()).await.unwrap();
    let origin = format!("http://{}", address());
    let tokens = tempfile::NamedTempFile::new().unwrap();
    let extra = ["--ofrep-tokens", tokens.path().to_str().unwrap(), "--ofrep-cors-origins", &origin];
    let served = served(&extra).await;
    std::fs::write(tokens.path(), format!("page {TOKEN} {}\n", served.world.namespace)).unwrap();
    let url = format!("{}/ofrep/v1/evaluate/flags", base(&served));
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    eventually("the token is known", async || {
        let answer = client.post(&url).bearer_auth(TOKEN).body("{}").send().await.unwrap();
        if answer.status() == 200 { Ok(()) } else { Err(answer.status().to_string()) }
    })
    .await;
    let script = folder.join("web.mjs");
    let browser = find_program("chromium").unwrap();
    let arguments = [script.to_str().unwrap(), &base(&served), TOKEN, browser.to_str().unwrap(), origin.as_str()];
    let mut page = SdkClient::start(Sdk::Web, "node", &arguments).await;
    all_answers_are_right(&mut page).await;
    turned_off_and_on(&served, &mut page).await;
}
