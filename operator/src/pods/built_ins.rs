//! Learns what workloads have built in, so that a policy can be judged on what its pods will run by.
//!
//! That changes only with the image. So one pod of a workload is asked, once, after it has reported its health, and
//! another one when that pod is gone. Nothing is asked of pods that speak contract 1: they cannot tell.

use super::{
    client::{Access, PodError},
    fair_queue::Class,
};
use crate::{context::Context, telemetry::metrics::PodCallLabels};
use contract::{BuiltIns, WorkloadId};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::debug;

/// The first contract whose pods can tell.
const FIRST_CONTRACT: u32 = 2;
/// Time until a pod that gave no answer, or any other one, is asked again.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// What is known of the built-in values of a workload.
#[derive(Debug, Default)]
pub struct Learned {
    /// What a pod told last; kept while another one is asked.
    pub built_ins: Option<Arc<BuiltIns>>,
    /// Uid of the pod that was asked.
    asked: Option<String>,
    /// It has not answered: not to be asked again before.
    again_at: Option<Instant>,
    /// It is being asked.
    asking: bool,
}

impl Learned {
    /// Forgets whom it asked if that pod is gone, so that another one is asked.
    pub fn keep(&mut self, exists: impl Fn(&str) -> bool) {
        if self.asked.as_deref().is_some_and(|uid| !exists(uid)) {
            (self.asked, self.again_at, self.asking) = (None, None, false);
        }
    }

    /// Whether a pod is being asked, and none has told before.
    pub fn is_asking(&self) -> bool {
        self.built_ins.is_none() && self.asking
    }

    /// Whether the pod `uid` is to be asked now; from then on it counts as asked.
    fn begin(&mut self, uid: &str, now: Instant) -> bool {
        let wanted = match (&self.asked, self.again_at) {
            (None, _) => true,
            (Some(_), Some(again_at)) => again_at <= now,
            (Some(_), None) => false,
        };
        if wanted {
            self.asked = Some(uid.to_owned());
            self.asking = true;
            // A question that is dropped half-way is asked again.
            self.again_at = Some(now + RETRY_AFTER);
        }
        wanted
    }

    /// Takes what the pod `uid` told; `None`: that it cannot tell.
    fn settle(&mut self, uid: &str, told: Option<BuiltIns>) {
        if self.asked.as_deref() == Some(uid) {
            (self.again_at, self.asking) = (None, false);
            if self.built_ins.as_deref() != told.as_ref() {
                self.built_ins = told.map(Arc::new);
            }
        }
    }

    /// The pod `uid` gave no answer; what is known stays.
    fn give_up(&mut self, uid: &str) {
        self.asking &= self.asked.as_deref() != Some(uid);
    }
}

/// Asks a pod that has just reported its health, if its workload's built-in values are not known. `contract_version` is
/// the one that the pod speaks.
pub async fn learn(ctx: &Context, id: &WorkloadId, access: &mut Access<'_>, contract_version: u32) {
    let uid = access.uid;
    let wanted = contract_version >= FIRST_CONTRACT
        && ctx.fleet.lock().get_mut(id).is_some_and(|workload| workload.learned.begin(uid, Instant::now()));
    if !wanted {
        return;
    }
    let result = {
        let _slot = ctx.shared.pod_calls.slot(id, Class::Probe, false).await;
        ctx.shared.pods.effective(access).await
    };
    let label = result.as_ref().map_or_else(PodError::label, |_| "ok");
    ctx.shared.metrics.pod_calls.get_or_create(&PodCallLabels { call: "effective", result: label }).inc();
    if let Err(error) = &result {
        debug!(workload = %id, pod = %access.to.pod, %error, "the pod does not tell what it has built in");
    }
    if let Some(workload) = ctx.fleet.lock().get_mut(id) {
        match result {
            Ok(report) => workload.learned.settle(uid, Some(report.built_ins())),
            // It may answer another time.
            Err(PodError::Deadline(_) | PodError::Unreachable(_) | PodError::Unauthorized) => {
                workload.learned.give_up(uid);
            }
            Err(_) => workload.learned.settle(uid, None),
        }
    }
    // Also when nothing is known now: a new leader has waited for it.
    ctx.enqueue_status(id);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built_ins(name: &str) -> BuiltIns {
        BuiltIns { dependencies: [(name.to_owned(), None)].into(), ..BuiltIns::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn one_pod_is_asked_once_and_another_one_when_it_is_gone() {
        let mut learned = Learned::default();
        assert!(learned.begin("a", Instant::now()));
        assert!(!learned.begin("b", Instant::now()), "a is being asked");
        assert!(learned.is_asking());
        learned.settle("a", Some(built_ins("database")));
        assert!(!learned.is_asking());
        tokio::time::advance(RETRY_AFTER * 10).await;
        assert!(!learned.begin("b", Instant::now()), "a has told");
        learned.keep(|uid| uid == "a");
        assert!(!learned.begin("b", Instant::now()));
        learned.asking = true;
        learned.keep(|uid| uid == "b");
        assert!(!learned.asking, "nobody waits for a pod that is gone");
        assert_eq!(learned.built_ins.as_deref(), Some(&built_ins("database")), "what is known stays meanwhile");
        assert!(learned.begin("b", Instant::now()));
        assert!(!learned.is_asking(), "something is known meanwhile");
    }

    #[tokio::test(start_paused = true)]
    async fn who_gave_no_answer_is_not_asked_with_every_report() {
        let mut learned = Learned::default();
        assert!(learned.begin("a", Instant::now()));
        assert!(!learned.begin("a", Instant::now()));
        tokio::time::advance(RETRY_AFTER).await;
        assert!(learned.begin("b", Instant::now()));
        learned.settle("a", Some(built_ins("late")));
        assert!(learned.is_asking() && learned.built_ins.is_none(), "b is asked by now");
        learned.give_up("b");
        assert!(!learned.is_asking() && !learned.begin("b", Instant::now()), "not at once");
        tokio::time::advance(RETRY_AFTER).await;
        assert!(learned.begin("b", Instant::now()));
        learned.settle("b", None);
        tokio::time::advance(RETRY_AFTER).await;
        assert!(!learned.begin("b", Instant::now()), "and it will not learn to");
    }
}
