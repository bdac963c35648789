//! The targets of cargo-fuzz (`fuzz/`), without it: on their corpus, and on changes of the corpus with a fixed seed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests say what is wrong by panicking")]

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::path::Path;

const SEED: u64 = 13;
/// Inputs for each target. More of them: `FUZZ_INPUTS=100000 cargo test --package resilience-operator --test fuzz`.
const INPUTS: usize = 6_000;
/// Most changes of one input.
const CHANGES: usize = 6;
/// Largest input, in bytes.
const MOST: usize = 16 * 1024;

/// Values that are at some bound, or that mean something in a rule.
fn values() -> Vec<Value> {
    let numbers =
        ["0", "-0.0", "1e-7", "1e21", "1e300", "0.1", "970034019735371.5", "9007199254740992", "18446744073709551615"];
    let mut values: Vec<Value> = numbers.iter().map(|number| serde_json::from_str(number).unwrap()).collect();
    values.extend([
        json!(null),
        json!(true),
        json!([]),
        json!({}),
        json!(""),
        json!("a"),
        json!("ü水"),
        json!("1.2.3-beta"),
        json!("v2"),
        json!("a.b.c"),
        json!("on"),
        json!("$flagd.timestamp"),
        json!("x".repeat(300)),
        json!(i64::MIN),
        json!(2_147_483_647),
        json!(-1),
        json!({"var": "a"}),
        json!({"var": ""}),
        json!({"var": [["a"]]}),
        json!({"$ref": "a"}),
        json!({"$ref": "ü"}),
        json!({"fractional": [["a", 1], ["b", 2_147_483_647]]}),
        json!({"cat": [{"var": "accumulator"}, {"var": "accumulator"}]}),
        json!({"reduce": [vec![1; 30], {"merge": [{"var": "accumulator"}, {"var": "accumulator"}]}, ["a"]]}),
        json!({"sem_ver": ["1", "~", {"var": "a"}]}),
        json!({"missing": [{"var": "list"}]}),
    ]);
    values
}

/// Operators and members of documents, in place of one another.
const NAMES: [&str; 45] = [
    "var",
    "if",
    "?:",
    "==",
    "===",
    "!=",
    "!==",
    "<",
    "<=",
    ">",
    ">=",
    "+",
    "-",
    "*",
    "/",
    "%",
    "min",
    "max",
    "in",
    "cat",
    "substr",
    "missing",
    "missing_some",
    "merge",
    "map",
    "filter",
    "reduce",
    "all",
    "some",
    "none",
    "and",
    "or",
    "!",
    "!!",
    "fractional",
    "fractional_v2",
    "sem_ver",
    "starts_with",
    "ends_with",
    "$ref",
    "targeting",
    "variants",
    "$evaluators",
    "targetingKey",
    "context",
];

/// All places in `value`, from the outside in.
fn places(value: &Value, at: &mut Vec<Step>, found: &mut Vec<Vec<Step>>) {
    found.push(at.clone());
    let mut inside = |step: Step, value: &Value| {
        at.push(step);
        places(value, at, found);
        at.pop();
    };
    match value {
        Value::Array(items) => items.iter().enumerate().for_each(|(index, item)| inside(Step::Item(index), item)),
        Value::Object(members) => members.iter().for_each(|(name, member)| inside(Step::Member(name.clone()), member)),
        _ => {}
    }
}

#[derive(Clone)]
enum Step {
    Item(usize),
    Member(String),
}

fn at<'v>(value: &'v mut Value, place: &[Step]) -> Option<&'v mut Value> {
    place.iter().try_fold(value, |value, step| match step {
        Step::Item(index) => value.get_mut(*index),
        Step::Member(name) => value.get_mut(name),
    })
}

fn any_place(random: &mut StdRng, value: &Value) -> Vec<Step> {
    let mut found = Vec::new();
    places(value, &mut Vec::new(), &mut found);
    found.choose(random).cloned().unwrap_or_default()
}

/// A part of it becomes a part of another one, a value from the list, or is doubled, wrapped or renamed.
fn change_tree(random: &mut StdRng, tree: &mut Value, other: &Value, values: &[Value]) {
    let place = any_place(random, tree);
    let part = match random.random_range(0..3) {
        0 => values.choose(random).cloned(),
        1 => at(&mut other.clone(), &any_place(random, other)).cloned(),
        _ => at(&mut tree.clone(), &any_place(random, tree)).cloned(),
    };
    let (Some(part), Some(target)) = (part, at(tree, &place)) else { return };
    match (random.random_range(0..5), target) {
        (0, Value::Array(items)) => {
            let at = random.random_range(0..=items.len());
            items.insert(at, part);
        }
        (1, Value::Array(items)) if !items.is_empty() => {
            let at = random.random_range(0..items.len());
            items.remove(at);
        }
        (0 | 1, Value::Object(members)) => {
            let names: Vec<_> = members.keys().cloned().collect();
            let value = names.choose(random).and_then(|name| members.remove(name)).unwrap_or(part);
            members.insert((*NAMES.choose(random).unwrap()).to_owned(), value);
        }
        (2, target) => {
            let inner = target.take();
            *target = json!({ *NAMES.choose(random).unwrap(): [inner, part] });
        }
        (_, target) => *target = part,
    }
}

fn change_bytes(random: &mut StdRng, bytes: &mut Vec<u8>, other: &[u8]) {
    let (from, to) = (random.random_range(0..=bytes.len()), random.random_range(0..=bytes.len()));
    let range = from.min(to)..from.max(to).min(from.min(to) + 64);
    match random.random_range(0..4) {
        0 => drop(bytes.drain(range)),
        1 => {
            let copy = bytes[range].to_vec();
            bytes.splice(to..to, copy);
        }
        2 => {
            let (start, end) = (random.random_range(0..=other.len()), random.random_range(0..=other.len()));
            bytes.splice(range, other[start.min(end)..start.max(end)].iter().copied());
        }
        _ => bytes.iter_mut().skip(from).take(1).for_each(|byte| *byte ^= 1 << random.random_range(0..8)),
    }
}

fn changed(random: &mut StdRng, corpus: &[Vec<u8>], values: &[Value]) -> Vec<u8> {
    let mut bytes = corpus.choose(random).cloned().unwrap_or_default();
    let other = corpus.choose(random).cloned().unwrap_or_default();
    let (tree, other_tree) =
        (serde_json::from_slice::<Value>(&bytes), serde_json::from_slice(&other).unwrap_or_default());
    // What is no JSON any more is soon refused, so most changes keep it JSON.
    if let (Ok(mut tree), true) = (tree, random.random_ratio(4, 5)) {
        (0..random.random_range(1..=CHANGES)).for_each(|_| change_tree(random, &mut tree, &other_tree, values));
        bytes = tree.to_string().into_bytes();
    } else {
        (0..random.random_range(1..=CHANGES)).for_each(|_| change_bytes(random, &mut bytes, &other));
    }
    bytes.truncate(MOST);
    bytes
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// On a thread of its own, so that the input can be told when it panics.
fn run(target: fn(&[u8]), name: &str, input: &[u8]) {
    let caught = std::panic::catch_unwind(|| target(input));
    if let Err(panic) = caught {
        println!("{name} fails for {}", String::from_utf8_lossy(input));
        std::panic::resume_unwind(panic);
    }
}

#[rstest::rstest]
#[case(0)]
#[case(1)]
#[case(2)]
#[case(3)]
fn a_target_holds_for_its_corpus_and_changes_of_it(#[case] nth: usize) {
    let (name, target) = targets::TARGETS[nth];
    let corpus = corpus(name);
    assert!(corpus.len() >= 10, "{name}: a corpus of {} files", corpus.len());
    for input in &corpus {
        run(target, name, input);
    }
    let inputs = std::env::var("FUZZ_INPUTS").ok().and_then(|inputs| inputs.parse().ok()).unwrap_or(INPUTS);
    let (mut random, values) = (StdRng::seed_from_u64(SEED), values());
    let (mut pool, mut parsed) = (corpus.clone(), 0);
    for _ in 0..inputs {
        let input = changed(&mut random, &pool, &values);
        parsed += usize::from(serde_json::from_slice::<Value>(&input).is_ok());
        run(target, name, &input);
        // Changes of changes reach further.
        if pool.len() < 10 * corpus.len() {
            pool.push(input);
        } else if random.random_ratio(1, 20) {
            let at = random.random_range(corpus.len()..pool.len());
            pool[at] = input;
        }
    }
    assert!(
        name == "sync_messages" || parsed * 3 > inputs,
        "{parsed} of {inputs} inputs are JSON: the others test the parser only"
    );
}

/// What cargo-fuzz builds is what is tested here.
#[test]
fn each_target_is_built_by_cargo_fuzz() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    for (name, _) in targets::TARGETS {
        let program = std::fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(program.contains(&format!("ticketwave_fuzz::{name}(data)")), "{program}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
    }
}
