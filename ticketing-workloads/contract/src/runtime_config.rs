//! The document that the operator publishes for one workload.

use crate::{DOCUMENT_VERSION, FlagsSettings, MAX_CONFIG_BYTES, PolicySettings, WorkloadId, canonical};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Everything that one workload runs by: two independent sections under one revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeConfig {
    /// Oldest contract whose readers can run by this document ([`DOCUMENT_VERSION`]).
    pub contract_version: u32,
    /// Whom the document is for.
    pub workload: WorkloadId,
    /// Order among documents of this workload; see [`crate::revision`].
    pub revision: i64,
    /// Meaning of both sections; see [`RuntimeConfig::hash`].
    pub content_hash: String,
    /// Resilience settings, from the policy that owns the workload.
    #[serde(default)]
    pub policy: Section<PolicySettings>,
    /// Feature flags, from all flag sets that target the workload.
    #[serde(default)]
    pub flags: Section<FlagsSettings>,
}

/// Settings and where they come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Section<T> {
    /// The resources that the settings were made from; empty: these are the defaults. Not part of the meaning.
    pub sources: Vec<Source>,
    /// The settings.
    pub settings: T,
}

/// A resource that a section was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Name, in the workload's namespace.
    pub name: String,
    /// Which object of that name.
    pub uid: String,
    /// Which edit of that object.
    pub generation: i64,
    /// For flags: the keys that were taken from this object.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// For flags: the object's priority, which is not known any more once it cannot be read.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// For flags: those of this object that are behind another one's of the same key. Pods have no use for them; if that one goes while
    /// this one is invalid, they are what it gave last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadowed: Option<FlagsSettings>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(number: &i32) -> bool {
    *number == 0
}

/// Why a document cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Larger than [`MAX_CONFIG_BYTES`].
    #[error(
        "the document has {0} bytes, more than the {MAX_CONFIG_BYTES} that are allowed; target fewer flags at this workload"
    )]
    TooLarge(usize),
    /// Not a document of this contract.
    #[error("not a runtime configuration: {0}")]
    Malformed(String),
    /// Its content was changed after it was published.
    #[error(
        "its content does not match its hash ({stated} stated, {actual} found): it was edited by hand or cut short"
    )]
    HashMismatch {
        /// The hash that the document states.
        stated: String,
        /// The hash of its content.
        actual: String,
    },
}

impl RuntimeConfig {
    /// A document of the current contract over the two sections; its hash is computed here.
    pub fn new(
        workload: WorkloadId,
        revision: i64,
        policy: Section<PolicySettings>,
        flags: Section<FlagsSettings>,
    ) -> Self {
        let content_hash = Self::hash(&policy.settings, &flags.settings);
        Self { contract_version: DOCUMENT_VERSION, workload, revision, content_hash, policy, flags }
    }

    /// Hash over what the two sections mean. Revision and sources have no part in it.
    pub fn hash(policy: &PolicySettings, flags: &FlagsSettings) -> String {
        canonical::content_hash(&json!({ "policy": policy, "flags": flags }))
    }

    /// Reads a document and checks it against its hash.
    ///
    /// The second value lists the paths that this reader does not know: they were ignored, and the operator reports them.
    pub fn parse(bytes: &[u8]) -> Result<(Self, Vec<String>), ConfigError> {
        if bytes.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLarge(bytes.len()));
        }
        let raw: Value = serde_json::from_slice(bytes).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        let config: Self =
            serde_json::from_value(raw.clone()).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        // Over the raw value, so that fields this reader does not know count too.
        let actual = canonical::content_hash(&json!({
            "policy": raw.pointer("/policy/settings").cloned().unwrap_or_else(|| json!(PolicySettings::default())),
            "flags": raw.pointer("/flags/settings").cloned().unwrap_or_else(|| json!(FlagsSettings::default())),
        }));
        if actual != config.content_hash {
            return Err(ConfigError::HashMismatch { stated: config.content_hash, actual });
        }
        let mut unknown = Vec::new();
        if let Ok(understood) = serde_json::to_value(&config) {
            unknown_paths(&raw, &understood, "", &mut unknown);
        }
        Ok((config, unknown))
    }

    /// The document as it is published.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ConfigError> {
        let bytes = serde_json::to_vec(self).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        if bytes.len() > MAX_CONFIG_BYTES { Err(ConfigError::TooLarge(bytes.len())) } else { Ok(bytes) }
    }
}

/// Most paths that are reported back; more than this says nothing new.
const MAX_UNKNOWN_PATHS: usize = 20;

/// Collects the paths of `raw` that did not survive reading: members that are gone, and values that became another.
fn unknown_paths(raw: &Value, understood: &Value, path: &str, out: &mut Vec<String>) {
    if out.len() >= MAX_UNKNOWN_PATHS {
        return;
    }
    match (raw, understood) {
        (Value::Object(raw), Value::Object(understood)) => {
            for (key, member) in raw.iter().filter(|(_, member)| !member.is_null()) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match understood.get(key) {
                    Some(known) => unknown_paths(member, known, &path, out),
                    None => out.push(path),
                }
            }
        }
        (Value::Array(raw), Value::Array(understood)) if raw.len() == understood.len() => {
            for (index, (item, known)) in raw.iter().zip(understood).enumerate() {
                unknown_paths(item, known, &format!("{path}[{index}]"), out);
            }
        }
        _ if canonical::content_hash(raw) == canonical::content_hash(understood) => {}
        _ => out.push(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DependencySettings, RetryOn, TripRule};

    /// A document as version 0.1 wrote it.
    fn sample() -> RuntimeConfig {
        let mut policy = PolicySettings::default();
        policy.dependencies.insert("database".into(), DependencySettings::default());
        RuntimeConfig::new(
            WorkloadId::deployment("ticketing", "booking"),
            7,
            Section { sources: Vec::new(), settings: policy },
            Section::default(),
        )
    }

    /// Publishes `value` as a writer would: with the hash of whatever it holds.
    fn sealed(mut value: Value) -> Vec<u8> {
        let hash = canonical::content_hash(
            &json!({"policy": value["policy"]["settings"], "flags": value["flags"]["settings"]}),
        );
        value["contentHash"] = json!(hash);
        value.to_string().into_bytes()
    }

    #[test]
    fn reads_back_what_it_wrote() {
        let config = sample();
        assert_eq!(RuntimeConfig::parse(&config.to_bytes().unwrap()).unwrap(), (config, vec![]));
    }

    #[test]
    fn revision_and_sources_do_not_change_the_hash() {
        let mut other = sample();
        other.revision += 1;
        other.policy.sources.push(Source { name: "p".into(), uid: "u".into(), generation: 2, ..Source::default() });
        assert_eq!(RuntimeConfig::hash(&other.policy.settings, &other.flags.settings), sample().content_hash);
    }

    #[test]
    fn an_edit_by_hand_is_noticed() {
        let text = String::from_utf8(sample().to_bytes().unwrap()).unwrap();
        let edited = text.replace("15000", "15001");
        assert!(matches!(RuntimeConfig::parse(edited.as_bytes()), Err(ConfigError::HashMismatch { .. })));
    }

    #[test]
    fn a_half_written_document_is_refused() {
        let bytes = sample().to_bytes().unwrap();
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            assert!(matches!(RuntimeConfig::parse(&bytes[..cut]), Err(ConfigError::Malformed(_))), "cut at {cut}");
        }
    }

    #[test]
    fn a_newer_writer_is_understood_as_far_as_possible() {
        let mut value = json!(sample());
        value["hedging"] = json!({"enabled": true});
        let database = &mut value["policy"]["settings"]["dependencies"]["database"];
        database["hedge"] = json!({"after": 10});
        database["retry"]["retryOn"] = json!(["Timeout", "Sunspots"]);
        database["circuitBreaker"]["trip"] = json!({"type": "Entropy", "bits": 3});
        let (config, unknown) = RuntimeConfig::parse(&sealed(value)).unwrap();
        let database = &config.policy.settings.dependencies["database"];
        assert!(database.retry.retry_on.contains(&RetryOn::Unknown));
        assert_eq!(database.circuit_breaker.trip, TripRule::Unknown);
        let at = |path: &str| unknown.iter().any(|p| p.starts_with(path));
        assert!(at("hedging"), "{unknown:?}");
        assert!(at("policy.settings.dependencies.database.hedge"), "{unknown:?}");
        assert!(at("policy.settings.dependencies.database.retry.retryOn"), "{unknown:?}");
        assert!(at("policy.settings.dependencies.database.circuitBreaker.trip"), "{unknown:?}");
    }

    /// A document of a policy that says little.
    fn sparse(words: Value) -> RuntimeConfig {
        let mut policy = PolicySettings::default();
        policy.insert_dependency("payment".into(), serde_json::from_value(words).unwrap());
        let policy = Section { sources: Vec::new(), settings: policy };
        RuntimeConfig::new(sample().workload, 7, policy, Section::default())
    }

    #[test]
    fn a_document_carries_what_the_policy_says_and_nothing_else() {
        let value = json!(sparse(json!({"timeout": {"requestMs": 5_000}})));
        let said = json!({"payment": {"timeout": {"requestMs": 5_000}}});
        assert_eq!(value["policy"]["settings"]["dependencyPolicies"], said);
        assert_eq!(value["contractVersion"], 1, "readers of contract 1 can run by it");
    }

    /// What a pod of version 0.1 makes of it: it knows every member of `dependencies`, takes what is absent for the
    /// ADR's number, and reports what it does not know. So everything is filled in for it, fitted, and one path is new.
    #[test]
    fn a_reader_of_contract_1_finds_everything_filled_in() {
        let value = json!(sparse(json!({"timeout": {"requestMs": 5_000}})));
        let mut members = value["policy"]["settings"].clone();
        let members = members.as_object_mut().unwrap();
        assert!(members.remove("dependencyPolicies").is_some());
        let older: PolicySettings = serde_json::from_value(json!(members)).unwrap();
        let payment = &older.dependencies["payment"];
        assert_eq!(json!(older), json!(members), "nothing that it would have to fill in itself, nothing unknown");
        assert!(payment.timeout.per_try_ms <= 5_000 && payment.retry.total_wait_ms() < 5_000, "{payment:?}");
        let known = ["dependencies", "bulkheads", "healthChecks", "degradation"];
        assert!(members.keys().all(|name| known.contains(&name.as_str())), "{members:?}");
    }

    /// The hash is the meaning: to say the ADR's number is not to say nothing.
    #[test]
    fn the_hash_tells_what_is_said_from_what_is_filled_in() {
        let silent = sparse(json!({}));
        let said = sparse(json!({"retry": {"numRetries": 3}}));
        assert_eq!(silent.policy.settings.dependencies, said.policy.settings.dependencies);
        assert_ne!(silent.content_hash, said.content_hash);
        assert_eq!(sparse(json!({"retry": {}})).content_hash, silent.content_hash);
    }

    /// A pod that has no waiting room yet ignores one, and says so: the operator then reports what does not run there.
    #[test]
    fn a_waiting_room_is_there_only_where_the_policy_has_one() {
        let without = sparse(json!({}));
        assert!(json!(without)["policy"]["settings"].get("waitingRoom").is_none(), "nothing new for older readers");
        let mut policy = without.policy.settings.clone();
        policy.waiting_room = Some(crate::WaitingRoomSettings::default());
        let policy = Section { sources: Vec::new(), settings: policy };
        let with = RuntimeConfig::new(without.workload.clone(), 8, policy, Section::default());
        assert_ne!(with.content_hash, without.content_hash);
        assert_eq!(RuntimeConfig::parse(&with.to_bytes().unwrap()).unwrap(), (with, vec![]));
    }

    /// A pod of version 0.1 checks the hash over what it does not know, too, and says that it ignores it.
    #[test]
    fn what_a_fleet_says_of_a_flag_has_a_part_in_the_hash_and_is_no_news_to_an_older_pod() {
        let flags = |degraded: Value| -> Section<FlagsSettings> {
            let flag =
                json!({"state": "ENABLED", "variants": {"on": true}, "defaultVariant": "on", "degraded": degraded});
            let settings = serde_json::from_value(json!({ "flags": { "a.b/c": flag } })).unwrap();
            Section { sources: Vec::new(), settings }
        };
        let of = |degraded| RuntimeConfig::new(sample().workload, 7, Section::default(), flags(degraded));
        let plain = of(Value::Null);
        assert!(!json!(plain).to_string().contains("degraded"), "as version 0.1 wrote it");
        let with = of(json!({"variant": "on", "untilMs": 5, "by": "booking", "loadPercent": 80}));
        assert_ne!(plain.content_hash, with.content_hash);
        assert_eq!(RuntimeConfig::parse(&with.to_bytes().unwrap()).unwrap(), (with.clone(), vec![]));
        // What a reader that does not know the member finds.
        let mut unknown = Vec::new();
        unknown_paths(&json!(with), &json!(plain), "", &mut unknown);
        unknown.retain(|path| path != "contentHash");
        assert_eq!(unknown, ["flags.settings.flags.a.b/c.degraded"]);
        assert!(crate::is_said_otherwise(1, &unknown[0]) && !crate::is_said_otherwise(2, &unknown[0]));
    }

    /// Written by version 0.1, to the byte.
    const OLDER: &str = include_str!("../tests/fixtures/document-0.1.json");

    #[test]
    fn a_document_of_version_0_1_means_what_it_meant() {
        let (config, unknown) = RuntimeConfig::parse(OLDER.trim_end().as_bytes()).unwrap();
        assert_eq!(unknown, Vec::<String>::new());
        assert!(config.policy.settings.dependency_policies.is_empty());
        let payment = &config.policy.settings.dependencies["payment"];
        assert_eq!((payment.retry.num_retries, payment.fallback.len()), (0, 0), "it takes the built-in fallback away");
        let again = RuntimeConfig::hash(&config.policy.settings, &config.flags.settings);
        assert_eq!(again, config.content_hash, "written again, it means the same");
    }

    #[test]
    fn an_empty_document_has_the_hash_that_version_0_1_gave_it() {
        let hash = RuntimeConfig::hash(&PolicySettings::default(), &FlagsSettings::default());
        assert_eq!(hash, "72d0ceb5bc18b9c8167381daaa931ac54e6956a74e7a0e1d516f307eeb7980c4");
    }

    #[test]
    fn no_digit_of_a_number_is_lost_on_the_way() {
        let config = sparse(json!({"retry": {"factor": 1.478_497_582_705_478_3}}));
        assert_eq!(RuntimeConfig::parse(&config.to_bytes().unwrap()).unwrap(), (config, vec![]));
    }

    #[test]
    fn an_older_writer_is_filled_with_defaults() {
        let value = json!({
            "contractVersion": 1, "workload": {"namespace": "n", "name": "w"}, "revision": 1, "contentHash": "",
            "policy": {"settings": {"dependencies": {"database": {"timeout": {"requestMs": 5000}}}}},
            "flags": {"settings": {}},
        });
        let (config, unknown) = RuntimeConfig::parse(&sealed(value)).unwrap();
        assert_eq!(unknown, Vec::<String>::new());
        assert_eq!(config.policy.settings.dependencies["database"].timeout.request_ms, 5_000);
        assert_eq!(config.policy.settings.dependencies["database"].timeout.per_try_ms, 10_000);
    }

    #[test]
    fn too_large_is_said_before_it_is_read() {
        let bytes = vec![b' '; MAX_CONFIG_BYTES + 1];
        assert_eq!(RuntimeConfig::parse(&bytes), Err(ConfigError::TooLarge(MAX_CONFIG_BYTES + 1)));
    }
}
