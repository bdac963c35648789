//! The schema of the ticketing database, step by step. Whichever service comes first brings it up to date.

use crate::database::Connector;
use crate::database::migrations::{self, Migration};
use resilience::Dependency;

/// What the steps are recorded under.
const OWNER: &str = "booking";

const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "events and bookings",
        sql: include_str!("../migrations/booking/0001_events_and_bookings.sql"),
    },
    Migration { version: 2, name: "first event", sql: include_str!("../migrations/booking/0002_first_event.sql") },
    Migration { version: 3, name: "catalog", sql: include_str!("../migrations/booking/0003_catalog.sql") },
    Migration { version: 4, name: "payments", sql: include_str!("../migrations/booking/0004_payments.sql") },
    Migration { version: 5, name: "paid bookings", sql: include_str!("../migrations/booking/0005_paid_bookings.sql") },
    Migration { version: 6, name: "notifications", sql: include_str!("../migrations/booking/0006_notifications.sql") },
    Migration {
        version: 7,
        name: "possible duplicates",
        sql: include_str!("../migrations/booking/0007_possible_duplicates.sql"),
    },
    Migration { version: 11, name: "money", sql: include_str!("../migrations/booking/0011_money.sql") },
    Migration { version: 12, name: "money: rows", sql: include_str!("../migrations/booking/0012_money_rows.sql") },
    Migration {
        version: 13,
        name: "money: indexes",
        sql: include_str!("../migrations/booking/0013_money_indexes.sql"),
    },
];

/// Brings the schema of the database behind `dependency` up to date, however long that takes.
pub async fn bring_up_to_date(connector: Connector, dependency: &'static Dependency) {
    migrations::run_until_done(connector, OWNER, MIGRATIONS).await;
    // Calls that came before may have opened the circuit; what they lacked is there now.
    dependency.end_break();
}
