//! Health checks that several services have.

use crate::http_client::{self, HttpCall};
use axum::http::StatusCode;
use contract::{Action, CheckStatus};
use resilience::control::memory::MemoryProbe;
use resilience::{Actions, Attempt, Check, CheckOutcome, Checks, Resilience};
use serde_json::json;
use std::sync::Arc;
use tower::ServiceExt;

/// Name of the memory check.
const MEMORY: &str = "memory";

/// `memory`: degraded above its limits, and unhealthy if it stays there.
pub fn memory() -> Check {
    let memory = Arc::new(MemoryProbe::default());
    Check::new(MEMORY, &["resource"], move |settings| {
        let memory = Arc::clone(&memory);
        async move { memory.check(&settings) }
    })
}

/// TrimMemory for that check: every cache is emptied, and the check runs at once.
pub fn trim_memory(actions: Actions, resilience: &Arc<Resilience>, checks: &Arc<Checks>) -> Actions {
    let (resilience, checks) = (Arc::clone(resilience), Arc::clone(checks));
    actions.on(Action::TrimMemory, MEMORY, move || {
        let (resilience, checks) = (Arc::clone(&resilience), Arc::clone(&checks));
        async move {
            let given_back = tokio::task::spawn_blocking(move || resilience.spare_memory().give_back()).await;
            checks.run_now(MEMORY);
            given_back.map_err(|error| error.to_string())
        }
    })
}

/// `<service>-service`: whether another service says that it is ready. Asked past the circuit, so that it shows the
/// service and not the circuit.
pub fn service(name: &str, base: &str) -> Check {
    let service = http_client::bare(base);
    Check::new(&format!("{name}-service"), &["service", name], move |_| {
        let service = service.clone();
        async move {
            match service.oneshot(Attempt::first(HttpCall::get("/readyz"), None)).await {
                Ok(answer) if answer.status == StatusCode::OK => CheckOutcome::new(CheckStatus::Healthy, "ready"),
                Ok(answer) => CheckOutcome::new(CheckStatus::Unhealthy, format!("status {}", answer.status))
                    .with("status", json!(answer.status.as_u16())),
                Err(error) => CheckOutcome::new(CheckStatus::Unhealthy, error.to_string()),
            }
        }
    })
    .dependency(name)
}
