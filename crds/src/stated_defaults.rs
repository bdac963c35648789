//! Every default that the documentation and `kubectl explain` state is the code's.

#![allow(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

use crate::{bounded::spell, manifests};
use contract::{
    BulkheadSettings, DependencySettings, HealthCheckSettings, ManualState, RetryOn, TripRule, WaitingRoomSettings,
    defaults as adr,
};
use serde_json::Value;
use std::collections::BTreeMap;

/// What holds of a dependency where neither the policy nor the workload says anything: field, value in words.
fn of_a_dependency() -> BTreeMap<&'static str, String> {
    let DependencySettings { timeout, retry, circuit_breaker, bulkhead, fallback } = DependencySettings::default();
    assert!((timeout.connect_ms, &retry.budget, &bulkhead) == (None, &None, &None) && fallback.is_empty());
    assert!(circuit_breaker.max_break_ms.is_none() && circuit_breaker.slow_call.is_none());
    assert_eq!(circuit_breaker.manual_state, ManualState::Auto);
    let TripRule::ConsecutiveFailures { failures } = circuit_breaker.trip else { panic!("{:?}", circuit_breaker.trip) };
    let word = |on: &RetryOn| serde_json::to_value(on).unwrap().as_str().unwrap().to_owned();
    let listed = |mut words: Vec<String>, order: &[&str]| {
        words.sort_by_key(|word| order.iter().position(|known| known == word));
        words.join(", ")
    };
    [
        ("timeout.request", spell(timeout.request_ms)),
        ("timeout.perTry", spell(timeout.per_try_ms)),
        ("timeout.connect", "bounded by perTry".to_owned()),
        ("retry.numRetries", retry.num_retries.to_string()),
        ("retry.backOff.baseInterval", spell(retry.base_interval_ms)),
        ("retry.backOff.factor", retry.factor.to_string()),
        ("retry.backOff.maxInterval", spell(retry.max_interval_ms)),
        ("retry.backOff.jitterPercent", retry.jitter_percent.to_string()),
        ("retry.retryOn", listed(retry.retry_on.iter().map(word).collect(), &["Timeout", "ConnectFailure", "5xx"])),
        ("retry.httpStatusCodes", if retry.http_status_codes.is_empty() { "none" } else { "some" }.to_owned()),
        (
            "retry.methods",
            listed(retry.methods.iter().cloned().collect(), &["GET", "HEAD", "OPTIONS", "PUT", "DELETE"]),
        ),
        ("retry.budget", "none".to_owned()),
        ("retry.budget.percent", adr::RETRY_BUDGET.percent.to_string()),
        ("retry.budget.interval", spell(adr::RETRY_BUDGET.interval_ms)),
        ("retry.budget.minRetries", adr::RETRY_BUDGET.min_retries.to_string()),
        ("circuitBreaker.consecutiveFailures", failures.to_string()),
        ("circuitBreaker.failureRatioPercent", "not used".to_owned()),
        ("circuitBreaker.minimumThroughput", adr::MINIMUM_THROUGHPUT.to_string()),
        ("circuitBreaker.samplingDuration", spell(adr::SAMPLING_MS)),
        ("circuitBreaker.breakDuration", spell(circuit_breaker.break_ms)),
        ("circuitBreaker.maxBreakDuration", "the break does not grow".to_owned()),
        ("circuitBreaker.halfOpenMaxRequests", circuit_breaker.half_open_max_requests.to_string()),
        ("circuitBreaker.slowCall", "none".to_owned()),
        ("circuitBreaker.slowCall.percent", adr::SLOW_CALL_PERCENT.to_string()),
        ("circuitBreaker.manualState", "Auto".to_owned()),
        ("bulkheadRef", "none".to_owned()),
        ("fallback", "none".to_owned()),
        ("fallback[].cache.ttl", spell(adr::CACHE_TTL_MS)),
        ("fallback[].cache.maxStale", spell(adr::CACHE_MAX_STALE_MS)),
        ("fallback[].response.statusCode", adr::STATIC_STATUS_CODE.to_string()),
        ("fallback[].response.body", "empty".to_owned()),
    ]
    .into()
}

/// The schema of a policy's spec.
fn schema() -> Value {
    let policy = manifests::definitions().into_iter().find(|one| one.spec.names.kind == "ResiliencePolicy").unwrap();
    let policy = serde_json::to_value(policy).unwrap();
    policy.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec").unwrap().clone()
}

/// Schema of the field at `path`, in which `[]` stands for the items of a list.
fn field(path: &str) -> Option<Value> {
    path.split('.').try_fold(schema(), |schema, name| {
        let (name, items) = name.strip_suffix("[]").map_or((name, false), |name| (name, true));
        let field = schema.pointer(&format!("/properties/{name}"))?;
        Some(if items { field.get("items")? } else { field }.clone())
    })
}

/// The default in the schema, in words.
fn of_the_schema(path: &str) -> Option<String> {
    match field(path)?.get("default")? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn described(path: &str) -> String {
    field(path).and_then(|field| Some(field.get("description")?.as_str()?.to_owned())).unwrap_or_default()
}

/// Rows of the table of defaults: field, default.
fn rows() -> Vec<(String, String)> {
    let page = include_str!("../../docs/resiliencepolicy.md");
    let table = page.split("\n## Defaults\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let mut cells = row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', ""));
        (cells.next().unwrap(), cells.next().unwrap())
    })
    .collect()
}

#[test]
fn the_page_states_what_holds() {
    let mut known: BTreeMap<String, String> =
        of_a_dependency().into_iter().map(|(path, value)| (format!("dependencies[].{path}"), value)).collect();
    for (path, value) in [
        ("dependencies, bulkheads, healthChecks, recovery.ladders", "none"),
        ("healthChecks[].memory.max, maxPercentOfLimit", "1Gi, 80 when neither is set"),
        ("healthChecks[].http.expectedStatuses", "200–399"),
        ("healthChecks[].http.tls.serverName", "<service>.<namespace>.svc"),
        ("recovery.ladders[].steps", "–"),
        ("recovery.ladders[].steps[].cronJobRef", "none; RunCleanupJob needs it, and no other step takes it"),
        ("degradation.flagOverrides", "none"),
        ("degradation.forcedStage", "all stages"),
        ("degradation.enter.circuits", "none"),
        ("degradation.stages", "one, of enter.loadPercent and flagOverrides"),
        ("waitingRoom", "none"),
        ("degradation", "as the workload has it built in (booking: as when set), else never"),
    ] {
        known.insert(path.to_owned(), value.to_owned());
    }
    known.insert("healthChecks[].memory.degradedFor".to_owned(), spell(adr::MEMORY_DEGRADED_FOR_MS));
    for (name, path) in [("enter", "degradation.enter"), ("exit", "degradation.exit")] {
        let default = field("degradation").unwrap().pointer(&format!("/properties/{name}/default")).unwrap().clone();
        let words = format!("{} % for {}", default["loadPercent"], default["for"].as_str().unwrap());
        known.insert(path.to_owned(), words);
    }
    let rows = rows();
    for (path, stated) in &rows {
        let holds = known.remove(path).or_else(|| of_the_schema(path));
        // The schema writes a minute as 1m, people often as 60s.
        let same = holds.as_ref().is_some_and(|holds| in_seconds(holds) == in_seconds(stated));
        assert!(same, "{path}: the page says {stated:?}, what holds is {holds:?}");
    }
    assert!(known.is_empty(), "missing on the page: {known:?}");
    assert!(rows.len() > 50);
}

fn in_seconds(words: &str) -> String {
    words.split(' ').map(|word| if word == "1m" { "60s" } else { word }).collect::<Vec<_>>().join(" ")
}

#[test]
fn kubectl_explain_states_what_holds_where_nobody_says_anything() {
    for (path, value) in of_a_dependency() {
        let path = format!("dependencies[].{path}");
        let words = described(&path);
        let value = match value.as_str() {
            "bounded by perTry" => "bounded by perTry alone".to_owned(),
            "none" if path.ends_with("slowCall") => "they do not".to_owned(),
            "none" if path.ends_with("[].fallback") => "nothing".to_owned(),
            _ => value,
        };
        let stated = words.split("else ").nth(1).unwrap_or_default();
        let rest = stated.strip_prefix(&value);
        let ends = rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric()));
        assert!(words.contains("Absent") && ends, "{path}: {value:?} holds, it says {words:?}");
    }
}

/// Adds the path and default of every field that has a simple one.
fn simple_defaults(path: &str, schema: &Value, all: &mut Vec<String>) {
    for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        if of_the_schema(&path).is_some() {
            all.push(path.clone());
        }
        simple_defaults(&path, field, all);
        if let Some(items) = field.get("items") {
            simple_defaults(&format!("{path}[]"), items, all);
        }
    }
}

#[test]
fn kubectl_explain_states_the_defaults_of_the_schema() {
    let mut all = Vec::new();
    simple_defaults("", &schema(), &mut all);
    // Their one value says it all.
    all.retain(|path| !["targetRefs[].group", "targetRefs[].kind"].contains(&path.as_str()));
    assert!(all.len() > 15, "{all:?}");
    for path in all {
        let (words, value) = (described(&path), of_the_schema(&path).unwrap());
        let stated = words.split("Default: ").nth(1).map(|stated| stated.trim_end_matches('.'));
        let same = stated.is_some_and(|stated| in_seconds(stated) == in_seconds(&value))
            || words.contains(&format!("{value} (the default)"));
        assert!(same, "{path}: the default is {value:?}, it says {words:?}");
    }
}

#[test]
fn what_pods_run_without_a_policy_is_what_an_empty_entry_gives() {
    let BulkheadSettings { max_concurrent, max_queued, max_wait_ms } = BulkheadSettings::default();
    assert_eq!(of_the_schema("bulkheads[].maxConcurrent").unwrap(), max_concurrent.to_string());
    assert_eq!(of_the_schema("bulkheads[].maxQueued").unwrap(), max_queued.to_string());
    assert_eq!(of_the_schema("bulkheads[].maxWait").unwrap(), spell(max_wait_ms));
    let room = WaitingRoomSettings::default();
    for (path, value) in [
        ("enterLoadPercent", room.enter_load_percent.to_string()),
        ("exitLoadPercent", room.exit_load_percent.to_string()),
        ("exitFor", spell(room.exit_for_ms)),
        ("admitPerSecond.min", room.min_admit_per_second.to_string()),
        ("admitPerSecond.max", room.max_admit_per_second.to_string()),
        ("admissionTtl", spell(room.admission_ttl_ms)),
    ] {
        assert_eq!(of_the_schema(&format!("waitingRoom.{path}")).unwrap(), value, "{path}");
    }
    let HealthCheckSettings { interval_ms, timeout_ms, memory_max_bytes, memory_max_percent, memory_degraded_for_ms } =
        HealthCheckSettings::default();
    assert_eq!(of_the_schema("healthChecks[].interval").unwrap(), spell(interval_ms));
    assert_eq!(of_the_schema("healthChecks[].timeout").unwrap(), spell(timeout_ms));
    assert_eq!((memory_max_bytes, memory_max_percent, memory_degraded_for_ms), (None, None, None));
    let patience = in_seconds(&format!("Default: {}", spell(adr::MEMORY_DEGRADED_FOR_MS))) + ".";
    assert!(described("healthChecks[].memory.degradedFor").ends_with(&patience), "{patience}");
}
