//! Jobs.

use super::{Facts, RawCondition, RawMeta, Uid, owning_workload};
use crate::kubernetes::meta::{INTENT_LABEL, cut};
use contract::WorkloadId;
use engine::recovery::JobState;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use serde::Deserialize;

/// Longest text of a Job's condition that is kept, in bytes.
const MAX_JOB_MESSAGE: usize = 512;

/// A Job that was made for an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFacts {
    /// Id of the intent.
    pub intent: String,
    /// The workload that owns it.
    pub owner: Option<(WorkloadId, Uid)>,
    /// Its name.
    pub name: String,
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// Its outcome so far.
    pub state: JobState,
}

/// The parts of a Job that are read.
#[derive(Deserialize)]
pub struct RawJob {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    status: RawJobStatus,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawJobStatus {
    conditions: Option<Vec<RawCondition>>,
}

impl Facts for JobFacts {
    type Kind = Job;
    type Raw = RawJob;

    fn pick(raw: RawJob) -> (RawMeta, Self) {
        let RawJob { metadata, status } = raw;
        let owners = metadata.owner_references.as_deref().unwrap_or_default();
        let facts = Self {
            intent: metadata.labels.as_ref().and_then(|labels| labels.get(INTENT_LABEL)).cloned().unwrap_or_default(),
            owner: owning_workload(metadata.namespace.as_deref().unwrap_or_default(), owners),
            name: metadata.name.clone().unwrap_or_default(),
            created_at: metadata.created_at(),
            state: job_state(&status),
        };
        (metadata, facts)
    }
}

/// The outcome of a Job, as its conditions say.
fn job_state(status: &RawJobStatus) -> JobState {
    for condition in status.conditions.iter().flatten().filter(|condition| condition.status == "True") {
        match condition.type_.as_str() {
            "Complete" => return JobState::Complete,
            "Failed" => {
                let words = [condition.reason.as_deref(), condition.message.as_deref()];
                let text = words.into_iter().flatten().collect::<Vec<_>>().join(": ");
                return JobState::Failed(cut(&text, MAX_JOB_MESSAGE).to_owned());
            }
            _ => {}
        }
    }
    JobState::Running
}

#[cfg(test)]
mod tests {
    use super::{super::read, *};
    use serde_json::{Value, json};

    #[rstest::rstest]
    #[case::new(json!({}), JobState::Running)]
    #[case::not_really(json!({ "conditions": [{ "type": "Failed", "status": "False" }] }), JobState::Running)]
    #[case::done(json!({ "conditions": [{ "type": "SuccessCriteriaMet", "status": "True" }, { "type": "Complete", "status": "True" }] }), JobState::Complete)]
    #[case::failed(json!({ "conditions": [{ "type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "too often" }] }), JobState::Failed("BackoffLimitExceeded: too often".into()))]
    fn conditions_tell_the_outcome_of_a_job(#[case] status: Value, #[case] expected: JobState) {
        assert_eq!(read::<JobFacts>(&json!({ "metadata": {}, "status": status })).facts.state, expected);
    }
}
