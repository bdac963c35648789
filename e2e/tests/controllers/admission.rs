//! What the API server takes, and what it refuses and in which words.

use crate::support::{World, flag_set, policy, recovery_policy};
use axum::http::Request;
use e2e::checkout;
use serde_json::{Value, json};

/// Creates `manifest` as `kubectl apply` does, but only for show: it must be refused. The answer is what the API server
/// says to the person.
async fn refusal(world: &World, manifest: &Value) -> String {
    let plural = if manifest["kind"] == "FeatureFlag" { "featureflags" } else { "resiliencepolicies" };
    let base = format!("/apis/resilience.ticketwave.io/v1alpha1/namespaces/{}/{plural}", world.namespace);
    let request = Request::post(format!("{base}?dryRun=All&fieldValidation=Strict"))
        .header("content-type", "application/json")
        .body(manifest.to_string().into_bytes())
        .unwrap();
    match world.client.request::<Value>(request).await {
        Ok(_) => panic!("this was taken: {manifest}"),
        Err(kube::Error::Api(status)) => status.message.clone(),
        Err(other) => panic!("{other}"),
    }
}

/// `manifest` with the value at `pointer` replaced.
fn with(mut manifest: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = manifest.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}"));
    match parent {
        Value::Array(items) if key == "-" => items.push(value),
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
        other => other[key] = value,
    }
    manifest
}

#[tokio::test(flavor = "multi_thread")]
async fn the_samples_are_taken() {
    let world = World::new().await;
    let mut seen = 0;
    for file in std::fs::read_dir(checkout::root().join("crds/samples")).unwrap() {
        let file = file.unwrap().path();
        let text = std::fs::read_to_string(&file).unwrap();
        for document in text.split("\n---") {
            let mut manifest: Value = serde_saphyr::from_str(document).unwrap();
            manifest["metadata"].as_object_mut().unwrap().remove("namespace");
            let taken = world.try_apply(&manifest).await;
            taken.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            seen += 1;
        }
    }
    assert!(seen >= 6, "{seen}");
}

/// Every name that a flag or a variant may have can be overridden, by a person and by degradation.
#[tokio::test(flavor = "multi_thread")]
async fn flags_of_any_name_are_taken_and_so_are_overrides_of_them() {
    let world = World::new().await;
    let names = ["checkout/new-flow", "new_flow_", "größe.水", "-1", "v 2", &"ü".repeat(128)];
    let variants: serde_json::Map<_, _> = names.iter().map(|name| ((*name).to_owned(), json!(1))).collect();
    let mut set = flag_set("f", "w");
    set["spec"]["flagSpec"]["$schema"] = json!("https://flagd.dev/schema/v0/flags.json");
    for name in names {
        set["spec"]["flagSpec"]["flags"][name] =
            json!({ "state": "ENABLED", "valueType": "float", "variants": variants, "defaultVariant": "" });
    }
    set["spec"]["flagSpec"]["flags"]["none"] =
        json!({ "state": "ENABLED", "variants": variants, "defaultVariant": null });
    set["spec"]["overrides"] = names.iter().map(|name| json!({ "key": name, "variant": name })).collect();
    world.try_apply(&set).await.unwrap();
    let degraded: Vec<_> = names.iter().map(|name| json!({ "key": name, "variant": name })).collect();
    let policy = with(policy("p", "w"), "/spec/degradation", json!({ "flagOverrides": degraded }));
    world.try_apply(&policy).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_where_it_is_wrong_and_in_clear_words() {
    let world = World::new().await;
    let plain = || policy("p", "w");
    let dependency = "/spec/dependencies/0";
    let at = |rest: &str| format!("{dependency}{rest}");
    let recovering = || recovery_policy("p", "w");
    let targets: Vec<_> =
        (0..17).map(|n| json!({ "group": "apps", "kind": "Deployment", "name": format!("w{n}") })).collect();
    let two_of = |item: Value| json!([item.clone(), item]);
    let long_name = "n".repeat(64);
    let site = |said: &Value| {
        let mut http = json!({ "service": "web", "port": 443 });
        http.as_object_mut().unwrap().extend(said.as_object().unwrap().clone());
        with(plain(), "/spec/healthChecks", json!([{ "name": "site", "http": http }]))
    };

    // Name of the case, the manifest, the field that must be named, and what must be said of it.
    let cases: Vec<(&str, Value, &str, &str)> = vec![
        (
            "a try longer than the whole call",
            with(plain(), &at("/timeout/perTry"), json!("6s")),
            "spec.dependencies[0].timeout.perTry",
            "must not be longer than request (5s): perTry is 6s",
        ),
        (
            "a connect longer than the whole call",
            with(plain(), &at("/timeout"), json!({ "request": "1s", "connect": "2s" })),
            "spec.dependencies[0].timeout.connect",
            "must not be longer than request (1s): connect is 2s",
        ),
        (
            "waits longer than the whole call, however they grow",
            with(plain(), &at("/retry/backOff/baseInterval"), json!("2s")),
            "spec.dependencies[0].retry",
            "3 retries wait at least 6000ms together, and timeout.request is 5s, so the last retry could never start: use fewer retries, a shorter baseInterval, or a request longer than 6000ms",
        ),
        (
            "waits exactly as long as the whole call",
            with(
                with(plain(), &at("/timeout"), json!({ "request": "1400ms" })),
                &at("/retry/backOff"),
                json!({ "baseInterval": "200ms", "factor": 2, "maxInterval": "2s" }),
            ),
            "spec.dependencies[0].retry",
            "the waits between 3 retries are 1400ms together, and timeout.request is 1400ms",
        ),
        (
            "a duration of very many hours",
            with(plain(), &at("/timeout/request"), json!("99999999999999999999h")),
            "spec.dependencies[0].timeout.request",
            "should match",
        ),
        (
            "a duration out of bounds",
            with(plain(), &at("/timeout/request"), json!("2h")),
            "spec.dependencies[0].timeout.request",
            "must be between 1ms and 5m",
        ),
        (
            "a duration that is a number",
            with(plain(), &at("/timeout/request"), json!(15)),
            "spec.dependencies[0].timeout.request",
            "must be of type string",
        ),
        (
            "both modes of a breaker",
            with(plain(), &at("/circuitBreaker"), json!({ "consecutiveFailures": 5, "failureRatioPercent": 50 })),
            "spec.dependencies[0].circuitBreaker.consecutiveFailures",
            "exclude each other",
        ),
        (
            "a throughput of failures in a row",
            with(plain(), &at("/circuitBreaker"), json!({ "minimumThroughput": 10, "consecutiveFailures": 5 })),
            "spec.dependencies[0].circuitBreaker",
            "belong to failureRatioPercent",
        ),
        (
            "a provider that is the dependency itself",
            with(plain(), &at("/fallback"), json!([{ "type": "Provider", "provider": "database" }])),
            "spec.dependencies",
            "must be another dependency than the one that failed",
        ),
        (
            "a fallback to a provider without its name",
            with(plain(), &at("/fallback"), json!([{ "type": "Provider" }])),
            "spec.dependencies[0].fallback[0].provider",
            "must be set for type Provider",
        ),
        (
            "a ladder for a check that is not there",
            with(recovering(), "/spec/recovery/ladders/0/check", json!("memory")),
            "spec.recovery",
            "must name an entry of healthChecks",
        ),
        (
            "a cleanup job without a CronJob",
            with(recovering(), "/spec/recovery/ladders/0/steps/0", json!({ "action": "RunCleanupJob" })),
            "spec.recovery.ladders[0].steps[0].cronJobRef",
            "must be set for action RunCleanupJob",
        ),
        (
            "an action that does not exist",
            with(recovering(), "/spec/recovery/ladders/0/steps/0", json!({ "action": "TurnItOffAndOn" })),
            "spec.recovery.ladders[0].steps[0].action",
            "supported values",
        ),
        (
            "a step without time",
            with(recovering(), "/spec/recovery/ladders/0/steps/0/timeout", json!("999ms")),
            "spec.recovery.ladders[0].steps[0].timeout",
            "must be between 1s and",
        ),
        (
            "two checks of one name",
            with(recovering(), "/spec/healthChecks", two_of(json!({ "name": "database" }))),
            "spec.healthChecks",
            "Duplicate value",
        ),
        (
            "two dependencies of one name",
            with(plain(), "/spec/dependencies/-", json!({ "name": "database" })),
            "spec.dependencies",
            "Duplicate value",
        ),
        (
            "a degradation that would flap",
            with(
                plain(),
                "/spec/degradation",
                json!({ "enter": { "loadPercent": 60 }, "exit": { "loadPercent": 60 } }),
            ),
            "spec.degradation.exit",
            "must be below enter.loadPercent",
        ),
        (
            "a waiting room that would open and close all the time",
            with(plain(), "/spec/waitingRoom", json!({ "enterLoadPercent": 50, "exitLoadPercent": 50 })),
            "spec.waitingRoom.exitLoadPercent",
            "must be below enterLoadPercent",
        ),
        (
            "a waiting room that lets in more at least than at most",
            with(plain(), "/spec/waitingRoom", json!({ "admitPerSecond": { "min": 9, "max": 8 } })),
            "spec.waitingRoom.admitPerSecond.min",
            "must not be more than max (8): min is 9",
        ),
        (
            "an HTTP check that takes longer than half a minute",
            with(
                plain(),
                "/spec/healthChecks",
                json!([{ "name": "site", "http": { "service": "web", "port": 80 }, "interval": "1h", "timeout": "31s" }]),
            ),
            "spec.healthChecks[0].timeout",
            "must not be longer than 30s",
        ),
        (
            "HTTPS without certificates to verify against",
            site(&json!({ "scheme": "HTTPS" })),
            "spec.healthChecks[0].http.tls",
            "HTTPS needs tls.caConfigMapRef",
        ),
        (
            "certificates for plain HTTP",
            site(&json!({ "tls": { "caConfigMapRef": { "name": "ca" } } })),
            "spec.healthChecks[0].http.scheme",
            "must be HTTPS",
        ),
        (
            "certificates that are not verified",
            site(
                &json!({ "scheme": "HTTPS", "tls": { "caConfigMapRef": { "name": "ca" }, "insecureSkipVerify": true } }),
            ),
            "spec.healthChecks[0].http.tls.insecureSkipVerify",
            "must not be true beside caConfigMapRef",
        ),
        (
            "status codes backwards",
            site(&json!({ "expectedStatuses": [{ "start": 300, "end": 200 }] })),
            "spec.healthChecks[0].http.expectedStatuses[0].end",
            "must not be below start",
        ),
        (
            "a path with a line break",
            site(&json!({ "path": "/ HTTP/1.1\r\nHost: other" })),
            "spec.healthChecks[0].http.path",
            "should match",
        ),
        (
            "a check with two probes",
            with(
                plain(),
                "/spec/healthChecks",
                json!([{ "name": "site", "scope": "Workload", "http": { "service": "web", "port": 80 }, "tcp": { "service": "web", "port": 80 } }]),
            ),
            "spec.healthChecks[0]",
            "at most one of http, tcp and memory",
        ),
        ("no target", with(plain(), "/spec/targetRefs", json!([])), "spec.targetRefs", "at least 1"),
        ("seventeen targets", with(plain(), "/spec/targetRefs", json!(targets)), "spec.targetRefs", "at most 16"),
        (
            "one target twice",
            with(plain(), "/spec/targetRefs", two_of(json!({ "group": "apps", "kind": "Deployment", "name": "w" }))),
            "spec.targetRefs",
            "Duplicate value",
        ),
        (
            "a target of another kind",
            with(plain(), "/spec/targetRefs/0/kind", json!("DaemonSet")),
            "spec.targetRefs[0].kind",
            "supported values: \"Deployment\"",
        ),
        ("a field that does not exist", with(plain(), "/spec/timeouts", json!("5s")), "spec.timeouts", "unknown field"),
        (
            "a field that does not exist, deep inside",
            with(plain(), &at("/retry/attempts"), json!(3)),
            "spec.dependencies[0].retry.attempts",
            "unknown field",
        ),
        (
            "too many retries",
            with(plain(), &at("/retry/numRetries"), json!(11)),
            "spec.dependencies[0].retry.numRetries",
            "less than or equal to 10",
        ),
        ("a name that is too long", policy(&long_name, "w"), "", "a policy's name must have at most 63 characters"),
        (
            "a flag set's name that is too long",
            flag_set(&long_name, "w"),
            "",
            "a flag set's name must have at most 63 characters",
        ),
        (
            "an override of a flag that is not there",
            with(flag_set("f", "w"), "/spec/overrides", json!([{ "key": "EnableMail", "variant": "off" }])),
            "spec.overrides",
            "must name a flag of flagSpec.flags",
        ),
        (
            "a flag without a key",
            with(flag_set("f", "w"), "/spec/flagSpec/flags/", json!({ "state": "ENABLED", "variants": { "x": 1 } })),
            "spec.flagSpec.flags",
            "every key of a flag must have 1 to 128 characters",
        ),
        (
            "a flag with a key that is too long",
            with(
                flag_set("f", "w"),
                &format!("/spec/flagSpec/flags/{}", "k".repeat(129)),
                json!({ "state": "ENABLED", "variants": { "x": 1 } }),
            ),
            "spec.flagSpec.flags",
            "every key of a flag must have 1 to 128 characters",
        ),
        (
            "an override with a variant of two lines",
            with(flag_set("f", "w"), "/spec/overrides", json!([{ "key": "EnablePdf", "variant": "o\nff" }])),
            "spec.overrides[0].variant",
            "should match",
        ),
        (
            "a type of values that OpenFeature does not have",
            with(flag_set("f", "w"), "/spec/flagSpec/flags/EnablePdf/valueType", json!("bool")),
            "spec.flagSpec.flags.EnablePdf.valueType",
            "supported values",
        ),
        (
            "a default variant that YAML reads as a boolean",
            with(flag_set("f", "w"), "/spec/flagSpec/flags/EnablePdf/defaultVariant", json!(true)),
            "spec.flagSpec.flags.EnablePdf.defaultVariant",
            "must be of type string",
        ),
        (
            "a list of flags",
            with(flag_set("f", "w"), "/spec/flagSpec/flags", json!([{ "key": "EnablePdf", "state": "ENABLED" }])),
            "spec.flagSpec.flags[0].key",
            "unknown field",
        ),
        (
            "a flag in a state of its own",
            with(flag_set("f", "w"), "/spec/flagSpec/flags/EnablePdf/state", json!("MAYBE")),
            "spec.flagSpec.flags.EnablePdf.state",
            "supported values: \"ENABLED\", \"DISABLED\"",
        ),
        (
            "a priority out of bounds",
            with(flag_set("f", "w"), "/spec/priority", json!(1001)),
            "spec.priority",
            "less than or equal to 1000",
        ),
        (
            "an override until some day",
            with(
                flag_set("f", "w"),
                "/spec/overrides",
                json!([{ "key": "EnablePdf", "variant": "off", "until": "some day" }]),
            ),
            "spec.overrides[0].until",
            "date-time",
        ),
    ];
    for (case, manifest, field, words) in cases {
        let said = refusal(&world, &manifest).await;
        assert!(said.contains(field) && said.contains(words), "{case}: {field:?} and {words:?} should be in:\n{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unusual_but_right_is_taken() {
    let world = World::new().await;
    let base = || policy("p", "w");
    let retry = "/spec/dependencies/0/retry";
    let timeout = "/spec/dependencies/0/timeout";
    let cases = [
        (
            "no retries, whatever the waits",
            with(base(), retry, json!({ "numRetries": 0, "backOff": { "baseInterval": "30s" } })),
        ),
        (
            "ten retries without a wait",
            with(base(), retry, json!({ "numRetries": 10, "backOff": { "baseInterval": "0s" } })),
        ),
        (
            "the ADR's minute between checks",
            with(base(), "/spec/healthChecks", json!([{ "name": "database", "interval": "1m" }])),
        ),
        (
            "a breaker on a ratio",
            with(
                base(),
                "/spec/dependencies/0/circuitBreaker",
                json!({ "failureRatioPercent": 50, "minimumThroughput": 10 }),
            ),
        ),
        (
            "an HTTPS check of each pod",
            with(
                base(),
                "/spec/healthChecks",
                json!([{ "name": "site", "scope": "Pod", "interval": "1m", "timeout": "30s", "http": {
                    "service": "web", "port": 443, "path": "/ready?a=b", "scheme": "HTTPS",
                    "expectedStatuses": [{ "start": 200, "end": 299 }, { "start": 404 }],
                    "tls": { "caConfigMapRef": { "name": "ca.example" }, "serverName": "web.example" },
                }}]),
            ),
        ),
        ("a timeout and nothing else", with(with(base(), retry, json!({})), timeout, json!({ "request": "5s" }))),
        ("a long try and nothing else", with(base(), timeout, json!({ "perTry": "20s" }))),
        (
            "waits that can be fitted",
            with(with(base(), retry, json!({ "numRetries": 10 })), timeout, json!({ "request": "1s" })),
        ),
        (
            "part of a ratio that is built in",
            with(base(), "/spec/dependencies/0/circuitBreaker", json!({ "minimumThroughput": 10 })),
        ),
        (
            "a bulkhead that may be built in",
            with(base(), "/spec/dependencies/0/bulkheadRef", json!({ "name": "critical" })),
        ),
        (
            "a provider that may be built in",
            with(base(), "/spec/dependencies/0/fallback", json!([{ "type": "Provider", "provider": "paypal" }])),
        ),
        ("no fallback at all", with(base(), "/spec/dependencies/0/fallback", json!([]))),
        // Templates write these where a value is not set.
        ("members that are null", with(with(base(), retry, json!(null)), timeout, json!(null))),
        (
            "members that are null, deep inside",
            with(
                with(
                    base(),
                    retry,
                    json!({ "numRetries": null, "backOff": { "baseInterval": null, "factor": null, "maxInterval": null } }),
                ),
                timeout,
                json!({ "request": null, "perTry": null, "connect": null }),
            ),
        ),
        (
            "null fallback and breaker",
            with(
                with(base(), "/spec/dependencies/0/fallback", json!(null)),
                "/spec/dependencies/0/circuitBreaker",
                json!({ "consecutiveFailures": null, "failureRatioPercent": 50, "breakDuration": null, "maxBreakDuration": null }),
            ),
        ),
        ("no dependencies", with(base(), "/spec/dependencies", json!([]))),
        ("a duration in parts", with(base(), "/spec/dependencies/0/timeout/request", json!("1m30s500ms"))),
    ];
    for (case, manifest) in cases {
        world.try_apply(&manifest).await.unwrap_or_else(|error| panic!("{case}: {error}"));
    }
}

/// What is absent stays absent: a default that the API server writes down could not be told from what a person wrote.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_into_a_dependency() {
    let world = World::new().await;
    let said = json!([{ "name": "a" }, { "name": "b", "timeout": { "request": "5s" }, "retry": { "budget": {} }, "fallback": [{ "type": "Cache" }] }]);
    world.apply(&with(policy("p", "w"), "/spec/dependencies", said.clone())).await;
    let base = format!("/apis/resilience.ticketwave.io/v1alpha1/namespaces/{}/resiliencepolicies/p", world.namespace);
    let stored: Value = world.client.request(Request::get(base).body(Vec::new()).unwrap()).await.unwrap();
    assert_eq!(stored["spec"]["dependencies"], said);
}
