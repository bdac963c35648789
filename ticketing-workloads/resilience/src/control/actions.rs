//! Recovery actions that the operator may ask for. Each intent is acted on once, however often it arrives.

use crate::metrics::Metrics;
use crate::sync::lock;
use contract::{Action, ActionAnswer, ActionOutcome, ActionRequest};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Intents that are remembered. The operator has one in flight per pod, so this is hours of a bad night.
const REMEMBERED: usize = 256;
/// Longest time that an action may take.
const ACTION_TIMEOUT: Duration = Duration::from_secs(30);

/// What an action found to say; an error means that it did not work.
pub type ActionResult = Result<String, String>;
type Handler = Box<dyn Fn() -> BoxFuture<'static, ActionResult> + Send + Sync>;

/// The actions of a workload.
pub struct Actions {
    handlers: HashMap<(Action, String), Handler>,
    /// Ids of the intents that are done. Held while one is under way, so actions happen one after the other and a
    /// duplicate that arrives meanwhile finds it done.
    done: tokio::sync::Mutex<VecDeque<String>>,
    counts: Mutex<BTreeMap<String, u64>>,
    metrics: Arc<Metrics>,
    instance: String,
}

impl Actions {
    /// A workload that can do nothing yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let instance = format!("{:016x}", rand::random::<u64>());
        let (done, counts) = Default::default();
        Self { handlers: HashMap::new(), done, counts, metrics, instance }
    }

    /// Which process this is: what it has done is forgotten when it ends.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Registers what to do when `action` is asked for because of `check`.
    #[must_use]
    pub fn on<F, Fut>(mut self, action: Action, check: &str, handler: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ActionResult> + Send + 'static,
    {
        self.handlers.insert((action, check.to_owned()), Box::new(move || handler().boxed()));
        self
    }

    /// How often each action took effect since the process started.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        lock(&self.counts).clone()
    }

    /// Does what is asked for, unless that intent is done already. Runs to its end once it is polled, even if the
    /// caller goes away.
    pub async fn act(self: &Arc<Self>, request: ActionRequest) -> ActionAnswer {
        let (actions, intent_id) = (Arc::clone(self), request.intent_id.clone());
        let task = tokio::spawn(async move { actions.act_once(&request).await });
        let (outcome, message) = task.await.unwrap_or_else(|error| (ActionOutcome::Failed, error.to_string()));
        ActionAnswer { intent_id, outcome, message }
    }

    /// What an action is about: what its check looks at, and everything that it can be done to if no check is named.
    fn handlers_of(&self, request: &ActionRequest) -> Option<Vec<&Handler>> {
        if !request.check.is_empty() {
            return self.handlers.get(&(request.action, request.check.clone())).map(|handler| vec![handler]);
        }
        let mut all: Vec<_> = self.handlers.iter().filter(|((action, _), _)| *action == request.action).collect();
        all.sort_by_key(|((_, check), _)| check);
        (!all.is_empty()).then(|| all.into_iter().map(|(_, handler)| handler).collect())
    }

    async fn act_once(&self, request: &ActionRequest) -> (ActionOutcome, String) {
        let name = format!("{:?}", request.action);
        let mut done = self.done.lock().await;
        let (outcome, message) = if request.instance.as_ref().is_some_and(|meant| *meant != self.instance) {
            (
                ActionOutcome::OtherInstance,
                "the action was meant for an earlier process of this pod; nothing was done".to_owned(),
            )
        } else if done.contains(&request.intent_id) {
            (ActionOutcome::AlreadyDone, "this intent was executed before; nothing was done again".to_owned())
        } else if let Some(handlers) = self.handlers_of(request) {
            match run_all(&handlers).await {
                Ok(message) => {
                    *lock(&self.counts).entry(name.clone()).or_default() += 1;
                    done.push_front(request.intent_id.clone());
                    done.truncate(REMEMBERED);
                    (ActionOutcome::Done, message)
                }
                Err(message) => (ActionOutcome::Failed, message),
            }
        } else if request.check.is_empty() {
            (ActionOutcome::Unsupported, format!("this workload has no action {name}"))
        } else {
            (ActionOutcome::Unsupported, format!("this workload has no action {name} for the check {}", request.check))
        };
        drop(done);
        self.metrics.action(&name, outcome);
        tracing::info!(intent = %request.intent_id, action = %name, check = %request.check, ?outcome, %message, "action");
        (outcome, message)
    }
}

/// Runs all of them, also if one fails.
async fn run_all(handlers: &[&Handler]) -> ActionResult {
    let (mut said, mut failed) = (Vec::new(), Vec::new());
    for handler in handlers {
        match run(handler).await {
            Ok(message) => said.push(message),
            Err(message) => failed.push(message),
        }
    }
    if failed.is_empty() { Ok(said.join("; ")) } else { Err(failed.join("; ")) }
}

/// A panic or a hang of one action must not take the others with it.
async fn run(handler: &Handler) -> ActionResult {
    match tokio::time::timeout(ACTION_TIMEOUT, AssertUnwindSafe(async { handler().await }).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err("the action panicked; see the log of the pod".to_owned()),
        Err(_) => Err(format!("timed out after {}", crate::clock::in_words(ACTION_TIMEOUT))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn request(id: &str, check: &str) -> ActionRequest {
        ActionRequest { intent_id: id.into(), action: Action::ResetConnections, check: check.into(), instance: None }
    }

    fn counting() -> (Arc<Actions>, Arc<AtomicU32>) {
        let runs = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&runs);
        let actions = Actions::new(Arc::new(Metrics::new("test")))
            .on(Action::ResetConnections, "database", move || {
                let counter = Arc::clone(&counter);
                async move {
                    tokio::task::yield_now().await;
                    Ok(format!("run {}", counter.fetch_add(1, Ordering::SeqCst) + 1))
                }
            })
            .on(Action::ResetConnections, "broken", || async { Err("no way".to_owned()) })
            .on(Action::ResetConnections, "panics", || async { panic!("on purpose") });
        (Arc::new(actions), runs)
    }

    #[tokio::test]
    async fn one_intent_acts_once_also_when_it_arrives_many_times_at_once() {
        let (actions, runs) = counting();
        let answers = join_all((0..20).map(|_| actions.act(request("a", "database")))).await;
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert_eq!(answers.iter().filter(|answer| answer.outcome == ActionOutcome::Done).count(), 1);
        assert_eq!(answers.iter().filter(|answer| answer.outcome == ActionOutcome::AlreadyDone).count(), 19);
        assert_eq!(actions.act(request("b", "database")).await.outcome, ActionOutcome::Done);
        assert_eq!(actions.counts(), BTreeMap::from([("ResetConnections".to_owned(), 2)]));
    }

    #[tokio::test]
    async fn an_action_for_another_process_is_not_done() {
        let (actions, runs) = counting();
        let meant = |instance: &str| ActionRequest { instance: Some(instance.into()), ..request("a", "database") };
        assert_eq!(actions.act(meant("the one before")).await.outcome, ActionOutcome::OtherInstance);
        assert_eq!(runs.load(Ordering::SeqCst), 0);
        assert_eq!(actions.act(meant(actions.instance())).await.outcome, ActionOutcome::Done);
        assert_ne!(actions.instance(), counting().0.instance());
    }

    #[tokio::test]
    async fn a_failure_is_said_and_may_be_tried_again() {
        let (actions, _) = counting();
        for check in ["broken", "panics"] {
            for _ in 0..2 {
                assert_eq!(actions.act(request("a", check)).await.outcome, ActionOutcome::Failed, "{check}");
            }
        }
        assert_eq!(actions.act(request("a", "database")).await.outcome, ActionOutcome::Done);
        assert_eq!(actions.act(request("c", "memory")).await.outcome, ActionOutcome::Unsupported);
    }

    #[tokio::test]
    async fn without_a_check_all_of_an_action_is_done() {
        let done = || async { Ok("done".to_owned()) };
        let actions = Actions::new(Arc::new(Metrics::new("test")))
            .on(Action::ResetConnections, "database", done)
            .on(Action::ResetConnections, "mail", || async { Ok("too".to_owned()) })
            .on(Action::TrimMemory, "memory", || async { Err("no way".to_owned()) });
        let actions = Arc::new(actions);
        let answer = actions.act(request("a", "")).await;
        assert_eq!((answer.outcome, answer.message.as_str()), (ActionOutcome::Done, "done; too"));
        assert_eq!(actions.counts(), BTreeMap::from([("ResetConnections".to_owned(), 1)]));
        let trim = ActionRequest { action: Action::TrimMemory, ..request("b", "") };
        assert_eq!(actions.act(trim.clone()).await.outcome, ActionOutcome::Failed);
        let nothing = Arc::new(Actions::new(Arc::new(Metrics::new("test"))));
        assert_eq!(nothing.act(trim).await.outcome, ActionOutcome::Unsupported);
    }

    #[tokio::test]
    async fn a_caller_that_leaves_does_not_stop_it() {
        let (actions, runs) = counting();
        assert!(actions.act(request("a", "database")).now_or_never().is_none());
        assert_eq!(actions.act(request("a", "database")).await.outcome, ActionOutcome::AlreadyDone);
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn memory_of_intents_is_bounded() {
        let (actions, _) = counting();
        for id in 0..=REMEMBERED {
            actions.act(request(&id.to_string(), "database")).await;
        }
        assert_eq!(actions.done.lock().await.len(), REMEMBERED);
        assert_eq!(actions.act(request("1", "database")).await.outcome, ActionOutcome::AlreadyDone);
    }
}
