//! What is old and done is deleted, some rows at a time, so that tables and their indexes do not grow for ever.
//!
//! Every pod does it; rows that one pod has locked the others pass over.

use crate::database::{Connection, Database, DatabaseError};
use crate::schema::Schema;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::{Priority, Resilience, priority};
use std::sync::Arc;
use std::time::Duration;

/// Rows that one statement deletes: few enough that nobody waits for it.
const AT_ONCE: i64 = 500;
/// Time between two statements, for the calls of buyers.
const PAUSE: Duration = Duration::from_millis(500);
/// Time from the last one until the next round, or until it is tried again after a failure.
const ROUND: Duration = Duration::from_secs(600);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatLabel {
    what: &'static str,
}

/// What is deleted when it is old.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Its name, as the metric has it.
    pub what: &'static str,
    /// Deletes up to `$2` rows that are older than `$1` days: those of an array, so that they are looked up one by one,
    /// however many the server expects.
    pub sql: &'static str,
}

/// Deletes what is older than `days`, for as long as it is polled; 0 days: never. It begins when the schema is up to date:
/// without the indexes of its last step, each statement would read whole tables.
pub async fn run(database: Arc<Database>, resilience: Arc<Resilience>, schema: Schema, rule: Rule, days: u32) {
    let deleted = Family::<WhatLabel, Counter>::default();
    resilience.metrics().register(|registry| {
        registry.register("retention_deleted", "Rows that were deleted because they were old", deleted.clone());
    });
    if days == 0 {
        return;
    }
    schema.is_up_to_date().await;
    loop {
        // Nobody waits for it.
        let deleting = database.call(|connection| delete(connection, rule, days));
        match priority::within(Priority::Look, deleting).await {
            Ok(count) => {
                deleted.get_or_create(&WhatLabel { what: rule.what }).inc_by(count);
                if count > 0 {
                    tracing::info!(what = rule.what, count, days, "deleted old rows");
                }
                let is_all = i64::try_from(count).is_ok_and(|count| count < AT_ONCE);
                tokio::time::sleep(if is_all { ROUND } else { PAUSE }).await;
            }
            Err(error) => {
                tracing::warn!(what = rule.what, %error, "failed to delete old rows; trying again later");
                tokio::time::sleep(ROUND).await;
            }
        }
    }
}

async fn delete(connection: Connection, rule: Rule, days: u32) -> Result<u64, DatabaseError> {
    let delete = connection.prepare_cached(rule.sql).await?;
    Ok(connection.execute(&delete, &[&f64::from(days), &AT_ONCE]).await?)
}
