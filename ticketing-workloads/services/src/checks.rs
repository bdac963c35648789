//! Health checks that several services have.

use crate::http_client::{self, HttpCall};
use axum::http::StatusCode;
use contract::CheckStatus;
use resilience::Attempt;
use resilience::control::memory::MemoryProbe;
use resilience::{Check, CheckOutcome};
use serde_json::json;
use std::sync::Arc;
use tower::ServiceExt;

/// `memory`: degraded above its limits.
pub fn memory() -> Check {
    let memory = Arc::new(MemoryProbe::default());
    Check::new("memory", &["resource"], move |settings| {
        let memory = Arc::clone(&memory);
        async move { memory.check(&settings) }
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
