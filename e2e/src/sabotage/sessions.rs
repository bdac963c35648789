//! Sessions that answer and are of no use any more.

use super::{backends, join, quoted, sql};
use crate::testbed::{Testbed, TestbedError, until};
use std::time::{Duration, Instant};

/// Changes the type of a column to another one that the services read as well, `text` or `varchar`. What a session has
/// prepared before fails from then on: "cached plan must not change result type". As a migration does, it waits for the
/// table no longer than others can wait for it.
const MIGRATE: &str = "set lock_timeout = '300ms'; \
    do $$ begin execute format('alter table bookings alter column cancel_reason type %s', \
        (select case data_type when 'text' then 'varchar' else 'text' end from information_schema.columns \
         where table_name = 'bookings' and column_name = 'cancel_reason')); end $$; ";

/// Database sessions of some pods that were opened before a migration. They answer, and fail every booking for as long as they
/// live; new ones do well. The schema after it is as good as the one before, and stays.
#[derive(Debug)]
pub struct OutdatedSessions {
    /// The database processes that serve them.
    pub pids: Vec<u32>,
    /// When they became outdated.
    pub since: Instant,
}

impl OutdatedSessions {
    /// Migrates the database, and has the pods `others` begin new sessions, as if they had been started since: so only those
    /// of `pods` are older.
    pub async fn of(testbed: &Testbed, pods: &[&str], others: &[&str]) -> Result<Self, TestbedError> {
        // In the transaction of the migration: none of the others works with an old session in between.
        let end = format!(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = any(array[{}]::text[])",
            quoted(others)
        );
        let script = format!("{MIGRATE}{end}");
        until(Duration::from_secs(20), "the database migrated", || async {
            let old = backends(testbed, pods).await?;
            if old.is_empty() {
                return Ok(Err(format!("{pods:?} have no database connections")));
            }
            let before = Instant::now();
            sql(testbed, &script).await?;
            Ok(Ok(Self { pids: old, since: before }))
        })
        .await
    }

    /// Ends those that are still there.
    pub async fn end(&self, testbed: &Testbed) -> Result<(), TestbedError> {
        let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where pid = any(array[{}]::integer[])";
        sql(testbed, &end.replace("{}", &join(&self.pids, ","))).await.map(drop)
    }
}
