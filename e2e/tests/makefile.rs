//! The Makefile names its test targets one by one. So each that there is must be named, or nobody ever runs it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests say what is wrong by panicking")]

use e2e::checkout;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

/// Test targets that `make test` leaves out, and the task that runs them; README.md has to name it.
const ELSEWHERE: &[(&str, &str)] = &[("e2e test upgrade", "e2e-upgrade")];

/// The tasks of the Makefile: what each calls for first, and the lines that it runs.
#[derive(Debug, Default)]
struct Task {
    before: Vec<String>,
    lines: Vec<String>,
}

fn tasks(makefile: &str) -> BTreeMap<String, Task> {
    let (mut tasks, mut current) = (BTreeMap::<String, Task>::new(), String::new());
    for line in makefile.replace("\\\n", " ").lines() {
        if let Some(command) = line.strip_prefix('\t') {
            let task = tasks.entry(current.clone()).or_default();
            // Words that a shell would expand hold blanks that separate nothing.
            let command = command.replace("$$(( ", "$$((").replace(" * ", "*").replace(" / ", "/").replace(" ))", "))");
            for part in command.split([';', '|']).flat_map(|part| part.split("&&")) {
                let words: Vec<_> = part.split_whitespace().collect();
                // A task that calls another one.
                let calls = words.iter().position(|word| *word == "$(MAKE)").and_then(|at| words.get(at + 1));
                task.before.extend(calls.map(|name| (*name).to_owned()));
                task.lines.push(part.trim().to_owned());
            }
        } else if let Some((name, rest)) = line.split_once(':').filter(|(name, _)| is_name(name)) {
            name.clone_into(&mut current);
            let before = rest.split("##").next().unwrap_or_default().split_whitespace().map(str::to_owned);
            tasks.entry(current.clone()).or_default().before.extend(before);
        }
    }
    tasks
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// What a task runs, with all that it calls for.
fn lines<'a>(tasks: &'a BTreeMap<String, Task>, name: &str, seen: &mut BTreeSet<String>) -> Vec<&'a str> {
    let Some(task) = tasks.get(name).filter(|_| seen.insert(name.to_owned())) else { return Vec::new() };
    let mut found: Vec<_> = task.before.iter().flat_map(|before| lines(tasks, before, seen)).collect();
    found.extend(task.lines.iter().map(String::as_str));
    found
}

/// A target that has tests.
#[derive(Debug)]
struct Target {
    package: String,
    /// As cargo has it, and `doc` for the examples in the documentation of a library.
    kind: String,
    name: String,
}

impl Target {
    fn title(&self) -> String {
        format!("{} {} {}", self.package, self.kind, self.name)
    }

    /// Whether this line has cargo run all tests of the target.
    fn is_run_by(&self, line: &str) -> bool {
        let Some((_, line)) = line.split_once("cargo test ") else { return false };
        let (options, of_tests) = line.split_once(" -- ").unwrap_or((line, ""));
        // A word among the options of the tests selects some of them, as does one that runs the ignored ones only.
        let is_part =
            |word: &str| !word.starts_with('-') || word == "--ignored" || word == "--skip" || word == "--exact";
        if of_tests.split_whitespace().any(is_part) {
            return false;
        }
        let (mut all, mut packages, mut chosen, mut kinds) = (false, Vec::new(), Vec::new(), Vec::new());
        let mut words = options.split_whitespace();
        while let Some(word) = words.next() {
            match word {
                "--workspace" => all = true,
                "--package" | "-p" => packages.extend(words.next()),
                "--lib" => kinds.push("lib"),
                "--bins" => kinds.push("bin"),
                "--examples" => kinds.push("example"),
                "--doc" => kinds.push("doc"),
                "--test" | "--bin" | "--example" => {
                    chosen.extend(words.next().map(|name| (word.trim_start_matches('-'), name)));
                }
                // What this test does not know does not count: it might leave something out.
                _ => return false,
            }
        }
        (all || packages.contains(&self.package.as_str()))
            && (kinds.contains(&self.kind.as_str()) || chosen.contains(&(self.kind.as_str(), self.name.as_str())))
    }
}

/// Every target of the workspace that has tests, as cargo finds them.
fn targets() -> Vec<Target> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let said = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(checkout::root())
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let metadata: Value = serde_json::from_slice(&said.stdout).unwrap();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        for target in package["targets"].as_array().unwrap() {
            let word = |value: &Value| value.as_str().unwrap().to_owned();
            let mut add = |kind: String| {
                found.push(Target { package: word(&package["name"]), kind, name: word(&target["name"]) });
            };
            if target["test"] == true {
                add(word(&target["kind"][0]));
            }
            if target["doctest"] == true {
                add("doc".to_owned());
            }
        }
    }
    found
}

#[test]
fn every_test_is_run_by_make_test() {
    let tasks = tasks(&std::fs::read_to_string(checkout::root().join("Makefile")).unwrap());
    let readme = std::fs::read_to_string(checkout::root().join("README.md")).unwrap();
    let of = |name: &str| lines(&tasks, name, &mut BTreeSet::new());
    let (run, targets) = (of("test"), targets());
    assert!(run.len() > 10 && targets.len() > 20, "{run:#?} {targets:#?}");
    let mut forgotten = Vec::new();
    for target in &targets {
        let title = target.title();
        let elsewhere = ELSEWHERE.iter().find(|(known, _)| *known == title).map(|(_, task)| *task);
        let is_run = match elsewhere {
            Some(task) => {
                assert!(readme.contains(&format!("make {task} ")), "README.md does not say `make {task}`");
                of(task).iter().any(|line| target.is_run_by(line))
            }
            None => run.iter().any(|line| target.is_run_by(line)),
        };
        if !is_run {
            forgotten.push(title);
        }
    }
    assert!(forgotten.is_empty(), "name them in the Makefile, or nobody runs them: {forgotten:?}");
    let stale = ELSEWHERE.iter().filter(|(known, _)| !targets.iter().any(|target| target.title() == *known));
    assert_eq!(stale.count(), 0);
}

#[test]
fn a_line_runs_what_it_names_and_nothing_else() {
    let target = |package: &str, kind: &str, name: &str| Target {
        package: package.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
    };
    let server = target("resilience", "test", "server");
    for (line, is_run) in [
        ("cargo test --workspace --test admin --test server -- --test-threads=$$(($$(nproc)*2))", true),
        ("NODES=1 cargo test -p resilience --test server", true),
        ("cargo test -p engine --test server", false),
        ("cargo test --workspace --lib --bins", false),
        ("cargo test --workspace --test admin", false),
        ("cargo test --workspace --test server -- --nocapture one_test_of_many", false),
        ("cargo test --workspace --exclude resilience --test server", false),
        ("cargo build --workspace --test server", false),
    ] {
        assert_eq!(server.is_run_by(line), is_run, "{line}");
    }
    let checks = "cargo test --workspace --doc";
    assert!(target("flags", "doc", "flags").is_run_by(checks) && !target("flags", "lib", "flags").is_run_by(checks));
}

#[test]
fn tasks_are_followed_to_those_that_they_call() {
    let text = "a: b ## does a\n\tif x; then $(MAKE) c NODES=2; fi\nb:\n\tcargo test --workspace \\\n\t  --lib\nc:\n\tlast\nd:\n\tnot\n";
    let tasks = tasks(text);
    let found = lines(&tasks, "a", &mut BTreeSet::new());
    assert!(
        found.iter().any(|line| line.split_whitespace().eq("cargo test --workspace --lib".split(' '))),
        "{found:?}"
    );
    assert!(found.contains(&"last") && !found.contains(&"not"), "{found:?}");
}
