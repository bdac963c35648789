//! What it costs to ask for a flag. The rules and the contexts are the same for everybody; the peer gets its context
//! parsed, as a caller that asks for many flags would keep it.

use crate::{Case, case};
use ::flags::targeting::{Evaluators, Request, Rule};
use ::flags::{Attribute, Context};
use contract::{AppliedFrom, RuntimeConfig, Section, WorkloadId};
use datalogic_rs::bumpalo::Bump;
use datalogic_rs::{Engine, ParsedData};
use resilience::{ConfigStore, Flags, Resilience};
use serde_json::{Value, json};
use std::error::Error;
use std::hint::black_box;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

const EMAIL: &str = "alice.liddell@example.com";

/// The rules, by what they are called below.
fn rules() -> [(&'static str, Value); 3] {
    let split = || json!({"fractional": [{"var": "email"}, ["on", 50], ["off", 50]]});
    let staff = || json!({"ends_with": [{"var": "email"}, "@staff.example"]});
    [
        ("ends_with", json!({"if": [staff(), "on", "off"]})),
        ("fractional", split()),
        ("ends_with, then fractional", json!({"if": [staff(), "on", split()]})),
    ]
}

/// The flags: one for each rule, and two without.
fn document() -> Value {
    let flag = |rule: &Value| json!({"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on", "targeting": rule});
    let mut flags: serde_json::Map<_, _> =
        rules().iter().map(|(name, rule)| ((*name).to_owned(), flag(rule))).collect();
    flags.insert("static".to_owned(), flag(&Value::Null));
    flags.insert("another".to_owned(), flag(&Value::Null));
    json!({ "flags": flags })
}

/// A workload that runs by them.
fn workload() -> Arc<Resilience> {
    let settings = serde_json::from_value(document()).expect("flags");
    let id = WorkloadId::deployment("bench", "bench");
    let resilience = Resilience::builder(id.clone()).build();
    let document = RuntimeConfig::new(id, 1, Section::default(), Section { sources: Vec::new(), settings });
    let store = ConfigStore::new(Arc::clone(&resilience));
    store.apply(&document.to_bytes().expect("a document"), AppliedFrom::Push, 0);
    resilience
}

fn with_context(ask: impl Fn(&Context<'_>)) {
    let attributes = [("country", Attribute::Text("AT")), ("email", Attribute::Text(black_box(EMAIL)))];
    ask(&Context::new(&attributes).with_key("user-4711"));
}

/// Flags, and the cases in which they are asked for.
const ASKED: [(&str, &str); 4] = [
    ("static", "flag without a rule"),
    ("ends_with", "flag with ends_with"),
    ("fractional", "flag with fractional"),
    ("ends_with, then fractional", "flag with ends_with, then fractional"),
];

/// The same flags asked for in Node, by the evaluator that is installed at `place`: the case, and nanoseconds of an evaluation. It
/// has an older `fractional`, which hashes a text with less around it.
pub fn in_node(place: &Path) -> Result<Vec<(&'static str, f64)>, Box<dyn Error>> {
    let context = json!({"country": "AT", "email": EMAIL, "targetingKey": "user-4711"});
    let asks = ASKED.map(|(key, _)| json!({"key": key, "context": context}));
    let request = json!({"document": document(), "asks": asks}).to_string();
    let mut node = Command::new("node")
        .arg(place.join("flagd_core_bench.mjs"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    node.stdin.take().ok_or("its input")?.write_all(request.as_bytes())?;
    let output = node.wait_with_output()?;
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    let medians = answer["medians"].as_array().ok_or("no figures")?;
    Ok(ASKED.iter().zip(medians).filter_map(|((_, case), median)| Some((*case, median.as_f64()?))).collect())
}

pub fn cases() -> Vec<Case> {
    let resilience = workload();
    let swap = arc_swap::ArcSwap::from_pointee(true);
    let asked = |name, ask: fn(&Flags)| {
        let resilience = Arc::clone(&resilience);
        case(name, move |count| (0..count).for_each(|_| ask(resilience.flags())))
    };
    let mut cases = vec![
        case("floor: ArcSwap's load", move |count| {
            for _ in 0..count {
                black_box(**swap.load());
            }
        }),
        asked("flag without a rule", |flags| {
            black_box(flags.bool(black_box("static"), false));
        }),
        asked("flag with ends_with", |flags| {
            with_context(|context| {
                black_box(flags.bool_for(black_box("ends_with"), false, context));
            });
        }),
        asked("flag with fractional", |flags| {
            with_context(|context| {
                black_box(flags.bool_for(black_box("fractional"), false, context));
            });
        }),
        asked("flag with ends_with, then fractional", |flags| {
            with_context(|context| {
                black_box(flags.bool_for(black_box("ends_with, then fractional"), false, context));
            });
        }),
    ];
    let names = [
        ["rule alone: ends_with", "peer: datalogic-rs, ends_with"],
        ["rule alone: fractional", "peer: datalogic-rs, fractional (an older hash)"],
        ["rule alone: ends_with, then fractional", "peer: datalogic-rs, ends_with, then fractional"],
    ];
    for ([mine, peer], (_, logic)) in names.into_iter().zip(rules()) {
        let rule = Rule::compile(&logic, &Evaluators::default()).expect("it compiles").expect("it is one");
        cases.push(case(mine, move |count| {
            for _ in 0..count {
                with_context(|context| {
                    let request = Request { flag_key: "flag", now_ms: 0, context: *context };
                    black_box(rule.evaluate(&request).is_ok());
                });
            }
        }));
        let engine = Engine::new();
        let compiled = engine.compile(logic.to_string().as_str()).expect("it compiles");
        let context =
            json!({"country": "AT", "email": EMAIL, "targetingKey": "user-4711", "$flagd": {"flagKey": "flag"}});
        let context = context.to_string();
        cases.push(case(peer, move |count| {
            let data = ParsedData::from_json(&context).expect("JSON");
            let mut arena = Bump::new();
            for _ in 0..count {
                black_box(engine.evaluate(&compiled, black_box(data.value()), &arena).is_ok());
                arena.reset();
            }
        }));
    }
    cases
}
