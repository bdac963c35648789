//! Says what the flags of a scope are, for all of its streams, as long as there are some.

use super::{flagd::Version, hub, scopes::Scope, service::Service, stream::Event};
use crate::context::Context;
use jiff::Timestamp;
use std::{sync::Arc, time::Duration};
use tokio::time::sleep;
use tracing::debug;

/// Wait before another try, when the flags cannot be put together.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest wait for the end of an override, so that a clock that is put right is noticed.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// What was told last.
struct Told {
    /// Of which version of the namespace's flag sets.
    sets: Option<u64>,
    version: Version,
}

/// Tells what the flags are, and what they become.
pub async fn tell(service: Arc<Service>, ctx: Arc<Context>, scope: Scope, state: hub::State) {
    let mut changes = ctx.index.flag_changes();
    let mut told: Option<Told> = None;
    loop {
        changes.mark_unchanged();
        // Before they are put together: what changes in between makes another version.
        let sets = ctx.index.flag_sets_version(scope.namespace());
        let now = Timestamp::now();
        let is_known =
            told.as_ref().is_some_and(|told| told.sets == sets && told.version.holds_at(now.as_millisecond()));
        if !is_known {
            match service.version(&ctx, &scope, now.as_millisecond()).await {
                Ok(version) => {
                    if told.as_ref().is_none_or(|told| told.version.tag != version.tag) {
                        // When they came to be what they are at first, nobody knows.
                        let last_modified = told.is_some().then(|| now.as_second());
                        state.send_replace(Some(Arc::new(Event::new(&version, last_modified))));
                    }
                    told = Some(Told { sets, version });
                }
                Err(error) => {
                    debug!(%scope, %error, "OFREP: the flags cannot be put together for those that listen");
                    sleep(AGAIN).await;
                    continue;
                }
            }
        }
        let until = told.as_ref().and_then(|told| told.version.until_ms);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = until_ms(until) => {}
        }
    }
}

/// Waits until then, or until it is time to look at the clock again.
async fn until_ms(until: Option<i64>) {
    let Some(until) = until else { return std::future::pending().await };
    let left = u64::try_from(until - Timestamp::now().as_millisecond()).unwrap_or(0);
    sleep(Duration::from_millis(left).min(LOOK_EVERY)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn the_end_of_an_override_is_waited_for_and_the_clock_looked_at_before() {
        let now = Timestamp::now().as_millisecond();
        for (left, expected) in [(-5, 0), (0, 0), (10_000, 10), (i64::MAX / 4, 60)] {
            let begin = Instant::now();
            until_ms(Some(now.saturating_add(left))).await;
            let waited = begin.elapsed().as_secs_f64();
            assert!((waited - f64::from(expected)).abs() < 2.0, "{left}: {waited}");
        }
    }
}
