use super::*;
use contract::{DependencySettings, PolicySettings, Section, WorkloadId, canonical};
use serde_json::{Value, json};

const NOW: i64 = 1_800_000_000_000;

fn id() -> WorkloadId {
    WorkloadId::deployment("ticketing", "booking")
}

fn store() -> Arc<ConfigStore> {
    ConfigStore::new(Resilience::builder(id()).dependency("database").build())
}

fn document(revision: i64, request_ms: u64) -> Vec<u8> {
    let mut policy = PolicySettings::default();
    for name in ["database", "payment"] {
        let mut settings = DependencySettings::default();
        settings.timeout.request_ms = request_ms;
        policy.dependencies.insert(name.into(), settings);
    }
    let policy = Section { sources: Vec::new(), settings: policy };
    RuntimeConfig::new(id(), revision, policy, Section::default()).to_bytes().unwrap()
}

/// A document changed by `edit`, with the hash that its writer would have given it.
fn edited(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(&document(NOW, 5_000)).unwrap();
    edit(&mut value);
    let sections = json!({"policy": value["policy"]["settings"], "flags": value["flags"]["settings"]});
    value["contentHash"] = json!(canonical::content_hash(&sections));
    value.to_string().into_bytes()
}

fn request_ms(store: &ConfigStore) -> u64 {
    store.resilience.dependency("database").unwrap().settings().timeout.request_ms
}

fn push(store: &ConfigStore, bytes: &[u8]) -> PushAnswer {
    store.apply(bytes, AppliedFrom::Push, NOW)
}

#[test]
fn starts_on_the_defaults_of_the_adr() {
    let store = store();
    assert_eq!(store.applied(), Applied { contract_version: CONTRACT_VERSION, ..Applied::default() });
    assert_eq!(request_ms(&store), 15_000);
}

#[test]
fn applies_what_is_newer_and_names_what_the_workload_lacks() {
    let store = store();
    let answer = push(&store, &document(NOW, 5_000));
    assert_eq!(answer.outcome, PushOutcome::Applied);
    assert_eq!(answer.applied.unknown_dependencies, ["payment"]);
    assert_eq!(
        (answer.applied.revision, answer.applied.from, answer.applied.applied_at_ms),
        (NOW, AppliedFrom::Push, NOW)
    );
    assert_eq!(request_ms(&store), 5_000);
}

#[test]
fn the_same_meaning_at_a_newer_revision_changes_only_the_order() {
    let store = store();
    push(&store, &document(NOW, 5_000));
    let again = push(&store, &document(NOW + 5, 5_000));
    assert_eq!((again.outcome, again.applied.revision), (PushOutcome::Unchanged, NOW + 5));
    assert_eq!(push(&store, &document(NOW + 4, 6_000)).outcome, PushOutcome::RefusedOlder);
    assert_eq!(store.history().len(), 1);
}

#[rstest::rstest]
#[case::garbage(b"}{ not json".to_vec(), PushOutcome::RefusedInvalid, "not a runtime configuration")]
#[case::empty(Vec::new(), PushOutcome::RefusedInvalid, "not a runtime configuration")]
#[case::half_written(document(NOW + 1, 9)[..200].to_vec(), PushOutcome::RefusedInvalid, "not a runtime configuration")]
#[case::too_large(vec![b' '; contract::MAX_CONFIG_BYTES + 1], PushOutcome::RefusedInvalid, "more than")]
#[case::edited_by_hand(
    String::from_utf8(document(NOW + 1, 5_000)).unwrap().replace("5000", "5001").into_bytes(),
    PushOutcome::RefusedInvalid,
    "edited by hand"
)]
#[case::older(document(NOW - 1, 9), PushOutcome::RefusedOlder, "is older than")]
#[case::far_future(document(NOW + MAX_AHEAD_MS + 1, 9), PushOutcome::RefusedFuture, "60 min ahead")]
#[case::wrong_workload(
    edited(|value| value["workload"]["name"] = json!("catalog")),
    PushOutcome::RefusedInvalid,
    "the document is for ticketing/catalog"
)]
#[case::wrong_kind(
    edited(|value| value["workload"]["kind"] = json!("StatefulSet")),
    PushOutcome::RefusedInvalid,
    "the document is for ticketing/booking (StatefulSet), and this pod belongs to ticketing/booking"
)]
#[case::unknown_kind(
    edited(|value| value["workload"]["kind"] = json!("DaemonSet")),
    PushOutcome::RefusedInvalid,
    "unknown variant `DaemonSet`, expected `Deployment` or `StatefulSet`"
)]
#[case::wrong_namespace(
    edited(|value| value["workload"]["namespace"] = json!("other")),
    PushOutcome::RefusedInvalid,
    "the document is for other/booking"
)]
fn bad_input_leaves_the_last_good_configuration(
    #[case] bytes: Vec<u8>,
    #[case] outcome: PushOutcome,
    #[case] message: &str,
    #[values(AppliedFrom::Push, AppliedFrom::Mount)] from: AppliedFrom,
) {
    let store = store();
    let good = push(&store, &document(NOW, 5_000)).applied;
    let answer = store.apply(&bytes, from, NOW);
    assert_eq!(answer.outcome, outcome);
    assert!(answer.message.contains(message), "{}", answer.message);
    assert_eq!(answer.applied, good);
    assert_eq!(request_ms(&store), 5_000);
}

/// A pod of a StatefulSet takes only what says so: a document of version 0.1, without a kind, is a Deployment's.
#[test]
fn a_pod_of_a_stateful_set_refuses_a_document_without_a_kind() {
    let stateful = WorkloadId::new("ticketing", contract::WorkloadKind::StatefulSet, "booking");
    let store = ConfigStore::new(Resilience::builder(stateful.clone()).dependency("database").build());
    assert_eq!(push(&store, &document(NOW, 5_000)).outcome, PushOutcome::RefusedInvalid);
    let own = RuntimeConfig::new(stateful, NOW, Section::default(), Section::default()).to_bytes().unwrap();
    assert_eq!(push(&store, &own).outcome, PushOutcome::Applied);
}

#[test]
fn what_a_newer_operator_adds_is_ignored_and_reported() {
    let store = store();
    let answer = push(&store, &edited(|value| value["policy"]["settings"]["hedging"] = json!({"after": 10})));
    assert_eq!(answer.outcome, PushOutcome::Applied);
    assert_eq!(answer.applied.unsupported, ["policy.settings.hedging"]);
}

#[test]
fn a_newer_contract_is_taken_as_far_as_it_is_understood_and_that_is_reported() {
    let store = store();
    let answer = push(&store, &edited(|value| value["contractVersion"] = json!(CONTRACT_VERSION + 1)));
    assert_eq!(answer.outcome, PushOutcome::Applied);
    assert_eq!(answer.applied.unsupported, [format!("contractVersion {}", CONTRACT_VERSION + 1)]);
}

#[test]
fn an_empty_document_brings_the_defaults_back() {
    let store = store();
    push(&store, &document(NOW, 5_000));
    let defaults = RuntimeConfig::new(id(), NOW + 1, Section::default(), Section::default()).to_bytes().unwrap();
    assert_eq!(push(&store, &defaults).outcome, PushOutcome::Applied);
    assert_eq!(request_ms(&store), 15_000);
}

#[test]
fn the_history_is_bounded_and_newest_first() {
    let store = store();
    for step in 0..100 {
        assert_eq!(push(&store, &document(NOW + step, 1_000 + step.unsigned_abs())).outcome, PushOutcome::Applied);
    }
    let history = store.history();
    assert_eq!((history.len(), history[0].revision, history[63].revision), (64, NOW + 99, NOW + 36));
}

#[tokio::test(start_paused = true)]
async fn a_reload_keeps_the_state_of_the_circuit() {
    #[derive(Debug, thiserror::Error)]
    #[error("down")]
    struct Down;
    impl crate::Failure for Down {
        fn kind(&self) -> crate::FailureKind {
            crate::FailureKind::Other
        }
    }
    let store = store();
    let database = store.resilience.dependency("database").unwrap();
    for _ in 0..5 {
        assert!(database.call(|| async { Err::<(), _>(Down) }).await.is_err());
    }
    assert_eq!(database.circuit().state, contract::CircuitState::Open);
    push(&store, &document(NOW, 5_000));
    assert_eq!(database.circuit().state, contract::CircuitState::Open);
    assert_eq!(database.circuit().opened_total, 1);
}

/// A workload as booking is: payment is called once, and queued when it fails.
fn booking() -> Arc<ConfigStore> {
    let payment = DependencySettings {
        timeout: contract::TimeoutSettings { request_ms: 20_000, per_try_ms: 20_000, connect_ms: None },
        retry: contract::RetrySettings { num_retries: 0, ..Default::default() },
        bulkhead: Some("external".into()),
        fallback: vec![contract::FallbackSettings::Queue],
        ..Default::default()
    };
    let defaults = PolicySettings {
        dependencies: [("payment".to_owned(), payment)].into(),
        bulkheads: [("external".to_owned(), contract::BulkheadSettings::default())].into(),
        ..Default::default()
    };
    let resilience = Resilience::builder(id()).dependency("database").dependency("payment").defaults(defaults).build();
    ConfigStore::new(resilience)
}

/// A document of a policy that says `words` of payment.
fn says(revision: i64, words: Value) -> Vec<u8> {
    let mut policy = PolicySettings::default();
    policy.insert_dependency("payment".into(), serde_json::from_value(words).unwrap());
    let policy = Section { sources: Vec::new(), settings: policy };
    RuntimeConfig::new(id(), revision, policy, Section::default()).to_bytes().unwrap()
}

#[test]
fn a_policy_that_names_only_a_timeout_keeps_the_built_in_fallback_and_retries() {
    let store = booking();
    let answer = push(&store, &says(NOW, json!({"timeout": {"requestMs": 25_000}})));
    assert_eq!((answer.outcome, answer.applied.unsupported), (PushOutcome::Applied, vec![]));
    let payment = store.resilience.dependency("payment").unwrap();
    let settings = payment.settings();
    assert_eq!(settings.timeout.request_ms, 25_000);
    assert_eq!(settings.fallback, [contract::FallbackSettings::Queue]);
    assert_eq!((settings.retry.num_retries, settings.timeout.per_try_ms), (0, 20_000));
    assert!(payment.bulkhead().is_some() && payment.has_fallback());

    push(&store, &says(NOW + 1, json!({"fallback": []})));
    assert!(!payment.has_fallback(), "none is said explicitly");
    assert_eq!(payment.settings().timeout.request_ms, 20_000, "and the timeout is the built-in one again");
}

#[test]
fn a_misspelt_bulkhead_takes_no_protection_away() {
    let store = booking();
    push(&store, &says(NOW, json!({"bulkhead": "extrenal"})));
    assert!(store.resilience.dependency("payment").unwrap().bulkhead().is_some());
}

#[test]
fn a_document_of_version_0_1_replaces_what_is_built_in_as_it_did() {
    let store = booking();
    push(&store, &document(NOW, 5_000));
    let payment = store.resilience.dependency("payment").unwrap();
    assert_eq!((payment.settings().timeout.request_ms, payment.settings().retry.num_retries), (5_000, 3));
    assert!(!payment.has_fallback() && payment.bulkhead().is_some());
}

#[test]
fn the_effective_report_says_where_values_come_from() {
    let store = booking();
    let before = store.effective();
    assert_eq!((before.content_hash.as_str(), before.contract_version), ("", CONTRACT_VERSION));
    assert_eq!(before.dependencies["payment"].origins["timeout.request"], contract::Origin::BuiltIn);
    let answer = push(&store, &says(NOW, json!({"timeout": {"requestMs": 5_000}})));
    let after = store.effective();
    assert_eq!(after.content_hash, answer.applied.content_hash);
    let payment = &after.dependencies["payment"];
    assert_eq!(payment.built_in.as_ref().unwrap().timeout.request_ms, 20_000);
    assert_eq!(payment.effective, *store.resilience.dependency("payment").unwrap().settings());
    assert_eq!(payment.origins["timeout.request"], contract::Origin::Policy);
    assert_eq!(payment.origins["timeout.perTry"], contract::Origin::Fitted);
    assert_eq!(payment.origins["fallback"], contract::Origin::BuiltIn);
    assert!(after.dependencies["database"].built_in.is_none());
    assert!(contract::EffectiveReport::parse(&serde_json::to_vec(&after).unwrap()).is_ok());
}

/// A document with one flag, whose variant `on` is this.
fn with_flag(revision: i64, on: &Value) -> Vec<u8> {
    edited(|value| {
        value["revision"] = json!(revision);
        value["flags"]["settings"]["flags"] =
            json!({"Pdf": {"state": "ENABLED", "variants": {"on": on}, "defaultVariant": "on"}});
    })
}

#[test]
fn what_code_reads_wrongly_is_told_until_a_document_makes_it_right() {
    let store = store();
    let first = push(&store, &with_flag(NOW, &json!("true")));
    assert_eq!((first.outcome, first.applied.flag_problems), (PushOutcome::Applied, vec![]), "nobody has read it yet");
    assert!(store.resilience.flags().bool("Pdf", true));
    let told = store.applied().flag_problems;
    assert_eq!((told.len(), told[0].key.as_str()), (1, "Pdf"));

    let same = push(&store, &with_flag(NOW + 1, &json!("yes")));
    assert_eq!((same.outcome, same.applied.flag_problems), (PushOutcome::Applied, told), "still a text");
    let mended = push(&store, &with_flag(NOW + 2, &json!(true)));
    assert_eq!((mended.outcome, mended.applied.flag_problems), (PushOutcome::Applied, vec![]));
    assert_eq!(store.applied().flag_problems, []);
}
