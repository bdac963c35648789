//! The health check of the pooled connections, and the action that cures it.

use super::Database;
use contract::{Action, CheckStatus, HealthCheckSettings};
use resilience::clock::in_words;
use resilience::{Actions, Check, CheckOutcome, Resilience};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Name of the check.
const CHECK: &str = "database";

/// `database`: whether every pooled connection answers and can be worked with. `dependency` is the name under which it is called.
pub fn check(database: &Arc<Database>, dependency: &str) -> Check {
    let database = Arc::clone(database);
    let check = Check::new(CHECK, &["critical", "database"], move |settings| {
        let database = Arc::clone(&database);
        async move { connections(&database, &settings).await }
    });
    check.dependency(dependency)
}

/// Every pooled connection must answer. A few that hang are enough to fail bookings, so they are enough to fail this run;
/// they are replaced then, so it takes new ones that hang to fail the next.
async fn connections(database: &Database, settings: &HealthCheckSettings) -> CheckOutcome {
    // A little less than the check has, so that it can say how many are silent.
    let time = Duration::from_millis(settings.timeout_ms) * 9 / 10;
    let health = database.examine(time).await;
    let (status, mut message) = match (&health.error, &health.refused) {
        _ if health.hung > 0 => {
            let message = format!(
                "{} of {} pooled connections did not answer within {}",
                health.hung,
                health.open,
                in_words(time)
            );
            (CheckStatus::Unhealthy, message)
        }
        (Some(error), _) if health.failing > 0 => {
            let message = format!(
                "{} of {} pooled connections answer and cannot be worked with: {error}",
                health.failing, health.open
            );
            (CheckStatus::Unhealthy, message)
        }
        (Some(error), _) => (CheckStatus::Unhealthy, error.clone()),
        // No failure yet, and a reset would make it one: it would give up the connections that work.
        (None, Some(refused)) => {
            let message =
                format!("{} of {} pooled connections answered; new ones fail: {refused}", health.answered, health.open);
            (CheckStatus::Degraded, message)
        }
        (None, None) => {
            (CheckStatus::Healthy, format!("{} of {} pooled connections answered", health.answered, health.open))
        }
    };
    if let Some(error) = health.fresh_error.as_ref().filter(|error| **error != message) {
        message = format!("{message}; a new connection: {error}");
    }
    CheckOutcome::new(status, message)
        .dependency_answers(health.fresh_answers)
        .with("open", json!(health.open))
        .with("answered", json!(health.answered))
        .with("hung", json!(health.hung))
        .with("failing", json!(health.failing))
        .with("max", json!(health.max))
        .with("resets", json!(database.resets().get()))
}

/// ResetConnections for that check.
pub fn actions(resilience: &Resilience, database: Arc<Database>) -> Actions {
    let (resets, unresponsive) = (database.resets().clone(), database.unresponsive().clone());
    resilience.metrics().register(|registry| {
        let help = "Pooled connections that were replaced because they did not answer";
        registry.register("database_unresponsive_connections", help, unresponsive);
        registry.register("database_connection_resets", "Resets of all pooled connections", resets);
    });
    Actions::new(Arc::clone(resilience.metrics())).on(Action::ResetConnections, CHECK, move || {
        let database = Arc::clone(&database);
        async move {
            let given_up = database.reset().map_err(|error| error.to_string())?;
            Ok(format!("closed {given_up} pooled connections; calls open new ones"))
        }
    })
}
