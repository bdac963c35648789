//! The texts say what is so: links lead somewhere, and what a page repeats from the code is what the code says.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests say what is wrong by panicking")]

use e2e::checkout;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    checkout::root()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a folder whose names end so, without what is built or fetched.
fn files(below: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(below).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            if name != "target" && name != ".git" {
                files(&path, ending, found);
            }
        } else if name.ends_with(ending) {
            found.push(path);
        }
    }
}

/// Lines of a page outside of its code blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// The anchors of a page, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let keep = |c: char| c.is_alphanumeric() || c == '-' || c == '_' || c == ' ';
    headings
        .map(|heading| heading.to_lowercase().chars().filter(|c| keep(*c)).collect::<String>().replace(' ', "-"))
        .collect()
}

fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(text) {
        for part in line.split("](").skip(1) {
            let target = part.split(')').next().unwrap_or_default();
            if !target.contains("://") && !target.starts_with("mailto:") {
                found.push(target.to_owned());
            }
        }
    }
    found
}

#[test]
fn every_link_leads_somewhere() {
    let mut pages = Vec::new();
    files(&root(), ".md", &mut pages);
    assert!(pages.len() > 40, "{pages:?}");
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in &pages {
        for link in links(&std::fs::read_to_string(page).unwrap()) {
            seen += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let found = target.exists()
                && (anchor.is_empty()
                    || anchors(&std::fs::read_to_string(&target).unwrap_or_default()).contains(anchor));
            if !found {
                wrong.push(format!("{}: {link}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(seen > 100, "links are found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_runbook_is_listed_and_named_for_its_reason() {
    let index = read("docs/runbooks/README.md");
    let listed: BTreeSet<_> = links(&index).into_iter().filter(|link| !link.contains('/')).collect();
    let mut pages = Vec::new();
    files(&root().join("docs/runbooks"), ".md", &mut pages);
    for page in pages {
        let name = page.file_name().unwrap().to_string_lossy().into_owned();
        if name == "README.md" {
            continue;
        }
        assert!(listed.contains(&name), "{name} is not in docs/runbooks/README.md");
        let title = std::fs::read_to_string(&page).unwrap().lines().next().unwrap().trim_start_matches("# ").to_owned();
        let mut expected = String::new();
        for c in title.chars() {
            if c.is_uppercase() && !expected.is_empty() {
                expected.push('-');
            }
            expected.extend(c.to_lowercase());
        }
        assert_eq!(expected.replace(' ', "-").replace("--", "-") + ".md", name, "the title of {name} is {title}");
    }
}

/// Pages of `docs/runbooks` that are not about the reason of a condition.
const OTHER_PAGES: [&str; 5] =
    ["no-leader", "payments-differ", "reconcile-timed-out", "recovery-refused", "unreachable-pods"];

#[test]
fn every_reason_has_a_page_and_no_page_is_without_a_reason() {
    let index = read("docs/runbooks/README.md");
    for reason in crds::Reason::ALL {
        let page = reason.runbook();
        assert!(
            root().join(format!("docs/runbooks/{page}.md")).exists(),
            "{reason} has no page docs/runbooks/{page}.md"
        );
        assert!(index.contains(&format!("[{reason}]({page}.md)")), "{reason} has no row in docs/runbooks/README.md");
    }
    let mut pages = Vec::new();
    files(&root().join("docs/runbooks"), ".md", &mut pages);
    let names = pages.iter().map(|page| page.file_stem().unwrap().to_string_lossy().into_owned());
    let pages: BTreeSet<_> = names.filter(|name| name != "README").collect();
    let reasons = crds::Reason::ALL.iter().map(|reason| reason.runbook());
    let expected: BTreeSet<_> = reasons.chain(OTHER_PAGES.map(str::to_owned)).collect();
    assert_eq!(pages, expected);
}

/// The person who is woken up by the comparison of payments looks for the first word of each line.
#[test]
fn every_difference_between_payments_and_charges_has_a_row() {
    let source = read("ticketing-workloads/services/src/payment/reconcile.rs");
    let source = source.split("#[cfg(test)]").next().unwrap();
    let words = source.split(" key={key}").filter_map(|part| part.rsplit('"').next());
    let words: BTreeSet<_> =
        words.filter(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase() || c == '_')).collect();
    let page = read("docs/runbooks/payments-differ.md");
    let rows = page.lines().filter_map(|line| line.trim_start().strip_prefix("| `")?.split('`').next());
    assert_eq!(rows.collect::<BTreeSet<_>>(), words, "the table of docs/runbooks/payments-differ.md");
    assert_eq!(words.len(), 9);
}

#[test]
fn every_event_is_explained() {
    let text = read("docs/runbooks/README.md");
    let events = text.split("\n## Events\n").nth(1).unwrap().split("\n## ").next().unwrap();
    // The first column of the table.
    let rows = events.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let named: BTreeSet<_> = rows.flat_map(|names| names.split('`').skip(1).step_by(2)).collect();
    let expected: BTreeSet<_> = crds::EventReason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(named, expected, "the table of Events in docs/runbooks/README.md");
}

/// Names of metrics between quotes, where the code registers or encodes them.
fn metric_names(source: &str) -> BTreeSet<String> {
    let source = source.split("#[cfg(test)]").next().unwrap();
    let mut found = BTreeSet::new();
    for start in ["registry.register(", "counters(", "gauges("] {
        for part in source.split(start).skip(1) {
            let part = part.trim_start().trim_start_matches("&mut encoder,").trim_start();
            let name = part.strip_prefix('"').and_then(|rest| rest.split('"').next());
            found.extend(name.map(str::to_owned));
        }
    }
    found
}

#[test]
fn every_metric_has_a_row_and_no_row_is_without_a_metric() {
    let text = read("docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next().map(str::to_owned));
    let rows: BTreeSet<_> = rows.collect();
    let mut sources = Vec::new();
    for folder in ["resilience", "services"] {
        files(&root().join(format!("ticketing-workloads/{folder}/src")), ".rs", &mut sources);
    }
    let mut metrics: BTreeSet<_> =
        sources.iter().flat_map(|file| metric_names(&std::fs::read_to_string(file).unwrap())).collect();
    assert!(metrics.len() > 20, "{metrics:?}");
    metrics.extend(operator::telemetry::metrics::MetricName::ALL.iter().map(|name| name.full()));
    metrics.extend(operator::telemetry::process::METRICS.map(|(name, _)| name.to_owned()));
    let missing: Vec<_> = metrics.difference(&rows).collect();
    let stale: Vec<_> = rows.difference(&metrics).collect();
    assert!(missing.is_empty() && stale.is_empty(), "docs/metrics.md lacks {missing:?} and has too many: {stale:?}");
}

/// Names in capitals between quotes, in the code and not in its tests.
fn codes(source: &str) -> BTreeSet<String> {
    let source = source.split("#[cfg(test)]").next().unwrap();
    let lines = source.lines().filter(|line| !line.contains("env = ") && !line.contains("Some("));
    let words = lines.flat_map(|line| line.split('"').skip(1).step_by(2));
    let code = |word: &&str| word.contains('_') && word.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    words.filter(code).map(str::to_owned).collect()
}

#[test]
fn every_error_code_that_a_buyer_can_get_is_documented() {
    let text = read("ticketing-workloads/README.md");
    let mut sources = vec![];
    for folder in ["gateway", "catalog", "booking"] {
        files(&root().join("ticketing-workloads/services/src").join(folder), ".rs", &mut sources);
    }
    sources.extend(["host.rs", "answers.rs"].map(|file| root().join("ticketing-workloads/services/src").join(file)));
    let all: BTreeSet<_> = sources.iter().flat_map(|file| codes(&std::fs::read_to_string(file).unwrap())).collect();
    assert!(all.len() > 10 && all.contains("TOO_MANY_REQUESTS_UNDER_WAY"), "{all:?}");
    let missing: Vec<_> = all.iter().filter(|code| !text.contains(&format!("`{code}`"))).collect();
    assert!(missing.is_empty(), "not in ticketing-workloads/README.md: {missing:?}");
}

/// A row that a test prints and nobody can read is none, nor is one that no test measures any more.
#[test]
fn the_failure_table_has_a_row_for_each_that_the_local_stack_prints() {
    let mut sources = vec![];
    files(&root().join("e2e/tests/local_stack"), ".rs", &mut sources);
    let printed: usize =
        sources.iter().map(|file| std::fs::read_to_string(file).unwrap().matches("fixture.record(").count()).sum();
    let text = read("ticketing-workloads/README.md");
    let (_, table) = text.split_once("| What fails | What the buyer sees | Answer |").unwrap();
    // Below the line that its heads end with.
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|')).count();
    assert!(printed > 50, "{printed}");
    assert_eq!(rows, printed, "rows in ticketing-workloads/README.md, and rows that tests/local_stack prints");
}

/// The value of a constant, as it is written.
fn constant(file: &str, name: &str) -> String {
    let source = read(file);
    let line = source.lines().find(|line| line.contains(&format!("const {name}:")));
    let line = line.unwrap_or_else(|| panic!("there is no {name} in {file}"));
    line.split('=').nth(1).unwrap().trim().trim_end_matches(';').replace('_', "")
}

#[test]
fn limits_that_pages_state_are_those_of_the_code() {
    let validation = "operator/engine/src/report_validation.rs";
    let meaning: BTreeMap<&str, &str> = [
        ("64", "64"),
        ("256", "256"),
        ("63", "63"),
        ("100000", "100,000"),
        ("900 * 1024", "900 KiB"),
        ("256 * 1024", "256 KiB"),
        ("60 * 60 * 1000", "1 h"),
        ("Duration::fromsecs(10)", "10 s"),
    ]
    .into();
    for (file, name, page, words) in [
        (validation, "MAX_CHECKS", "docs/architecture.md", "more than {} checks"),
        (validation, "MAX_CIRCUITS", "docs/architecture.md", "or {} circuits"),
        (validation, "MAX_NAME", "docs/architecture.md", "a name of more than {} bytes"),
        (validation, "MAX_LOAD", "docs/architecture.md", "more than {} percent"),
        (validation, "MAX_NAME", "docs/security.md", "names of at most {} bytes"),
        ("ticketing-workloads/contract/src/revision.rs", "MAX_AHEAD_MS", "docs/failure-modes.md", "more than {} ahead"),
        (
            "operator/src/kubernetes/clients.rs",
            "API_DEADLINE",
            "docs/runbooks/publish-failed.md",
            "did not answer within {}",
        ),
    ] {
        let value = constant(file, name);
        let said = meaning.get(value.as_str()).unwrap_or_else(|| panic!("how is {value} ({name}) said in {page}?"));
        // Lines are broken anywhere.
        let text = read(page).split_whitespace().collect::<Vec<_>>().join(" ");
        let words = words.replace("{}", said);
        assert!(text.contains(&words), "{page} does not say {words:?}, as {name} in {file}");
    }
}

#[test]
fn the_oldest_compiler_is_no_younger_than_the_one_that_is_used() {
    let version = |file: &str, key: &str| {
        let text = read(file);
        let line = text.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
        let digits = line.split('"').nth(1).unwrap().split('.').map(|part| part.parse::<u32>().unwrap());
        digits.take(2).collect::<Vec<_>>()
    };
    let (oldest, used) = (version("Cargo.toml", "rust-version"), version("rust-toolchain.toml", "channel"));
    assert!(oldest <= used, "{oldest:?} {used:?}");
    let image = format!("FROM rust:{}.{}-", used[0], used[1]);
    assert!(read("Dockerfile").contains(&image), "the image is built with another compiler than {image}");
}

/// The recipes of CONTRIBUTING.md: what to do, and the files that it is about.
fn recipes() -> Vec<(String, BTreeSet<String>)> {
    let text = read("CONTRIBUTING.md");
    let mut found: Vec<(String, BTreeSet<String>)> = Vec::new();
    let part = text.split("\n## Recipes").nth(1).unwrap().split("\n## ").next().unwrap();
    for line in part.lines() {
        if let Some(title) = line.strip_prefix("### ") {
            found.push((title.to_owned(), BTreeSet::new()));
        } else if let Some((_, files)) = found.last_mut() {
            let words = line.split('`').skip(1).step_by(2);
            let path = |word: &&str| word.contains('/') && !word.contains(' ');
            files.extend(words.filter(path).map(str::to_owned));
        }
    }
    found
}

#[test]
fn recipes_name_few_files_and_each_of_them_exists() {
    let recipes = recipes();
    assert!(recipes.len() >= 12, "{recipes:?}");
    for (title, files) in recipes {
        assert!((1..=5).contains(&files.len()), "{title}: {files:?}");
        for file in files {
            assert!(root().join(&file).exists(), "{title}: there is no {file}");
        }
    }
}
