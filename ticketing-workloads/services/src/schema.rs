//! The schema of the ticketing database, step by step. Whichever service comes first brings it up to date.

use crate::database::Connector;
use crate::database::migrations::{self, Migration, Progress, State};
use crate::{booking, catalog, notification, payment};
use contract::CheckStatus;
use resilience::{Check, CheckOutcome, Dependency};
use std::time::Duration;

/// What the steps are recorded under.
const OWNER: &str = "booking";

/// The step after which mails can be sent: everything that is written down of them has its column.
pub const MAIL: i32 = 8;

/// The step after which a mail is written down at each turn of an order, and tickets are signed.
pub const TICKETS: i32 = 13;

/// The step after which numbers of the waiting room can be drawn.
pub const WAITING_ROOM: i32 = 14;

/// The step after which a buyer is asked by a mail of its own to confirm the payment.
pub const CONFIRM_PAYMENT: i32 = 15;

/// The step that builds the indexes for looks past many mails.
pub const MAIL_INDEXES: i32 = 42;

/// The step that builds the indexes for looks at payments: for what is owed, and by what a provider calls it.
pub const MONEY_INDEXES: i32 = 41;

/// The step after which a booking says whose it is.
pub const BUYERS: i32 = 12;

/// The step that builds the indexes by which buyers are counted.
pub const BUYER_INDEXES: i32 = 43;

/// The step that builds the index of what was cancelled by hand.
pub const REFUND_INDEX: i32 = 44;

/// Time between two looks whether the schema is up to date.
const POLL: Duration = Duration::from_millis(500);

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
    Migration { version: MAIL, name: "mail", sql: include_str!("../migrations/booking/0008_mail.sql") },
    Migration { version: 9, name: "mail: rows", sql: include_str!("../migrations/booking/0009_mail_rows.sql") },
    Migration { version: 10, name: "money", sql: include_str!("../migrations/booking/0010_money.sql") },
    Migration { version: 11, name: "money: rows", sql: include_str!("../migrations/booking/0011_money_rows.sql") },
    Migration { version: BUYERS, name: "buyers", sql: include_str!("../migrations/booking/0012_buyers.sql") },
    Migration { version: TICKETS, name: "tickets", sql: include_str!("../migrations/booking/0013_tickets.sql") },
    Migration {
        version: WAITING_ROOM,
        name: "waiting room",
        sql: include_str!("../migrations/booking/0014_waiting_room.sql"),
    },
    Migration {
        version: CONFIRM_PAYMENT,
        name: "confirm payment",
        sql: include_str!("../migrations/booking/0015_confirm_payment.sql"),
    },
    // From here on a step may wait for hours, for a report or a vacuum: no service needs one of them in order to serve.
    Migration { version: 40, name: "money: checks", sql: include_str!("../migrations/booking/0040_money_checks.sql") },
    Migration {
        version: MONEY_INDEXES,
        name: "money: indexes",
        sql: include_str!("../migrations/booking/0041_money_indexes.sql"),
    },
    Migration {
        version: MAIL_INDEXES,
        name: "hot queries",
        sql: include_str!("../migrations/booking/0042_hot_queries.sql"),
    },
    Migration {
        version: BUYER_INDEXES,
        name: "buyers: indexes",
        sql: include_str!("../migrations/booking/0043_buyer_indexes.sql"),
    },
    Migration {
        version: REFUND_INDEX,
        name: "refunds: index",
        sql: include_str!("../migrations/booking/0044_refund_index.sql"),
    },
];

/// The schema of the database, and how far it is.
#[derive(Clone, Default)]
pub struct Schema(Progress);

impl Schema {
    /// Brings the schema of the database behind `dependency` up to date, however long that takes.
    pub async fn bring_up_to_date(self, connector: Connector, dependency: &'static Dependency) {
        let progress = self.0.clone();
        // Calls that came before may have opened the circuit; what they lacked is there now, and what is left may take long.
        let follow = async {
            let mut done = progress.done();
            loop {
                tokio::time::sleep(POLL).await;
                let now = progress.done();
                if now != done {
                    dependency.end_break();
                    done = now;
                }
            }
        };
        tokio::select! {
            () = migrations::run_until_done(connector, OWNER, MIGRATIONS, self.0) => {}
            () = follow => {}
        }
        dependency.end_break();
    }

    /// Waits until it is up to date, if ever.
    pub async fn is_up_to_date(&self) {
        while !matches!(self.0.state(), State::Done(_)) {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether this step is done; those behind it need not be.
    pub fn has(&self, version: i32) -> bool {
        self.0.is_done(version)
    }

    /// Whether this step is known not to be done: a pod that has just started, or cannot ask, knows of none.
    pub fn lacks(&self, version: i32) -> bool {
        self.0.is_missing(version)
    }

    /// Waits until this step is done, if ever. An index of a later one may wait for a report for hours.
    pub async fn reaches(&self, version: i32) {
        while !self.has(version) {
            tokio::time::sleep(POLL).await;
        }
    }

    /// `schema`: whether the tables are as the service needs them. A schema that cannot be created is unhealthy, with the
    /// server's words; one that is waited for is degraded.
    pub fn check(&self, dependency: &str) -> Check {
        let progress = self.0.clone();
        Check::new("schema", &["database"], move |_| {
            let (status, message) = match progress.state() {
                State::Unknown(why) => (CheckStatus::Unknown, why),
                State::UnderWay(what) => (CheckStatus::Degraded, what),
                State::Failed(why) => (CheckStatus::Unhealthy, why),
                State::Done(what) => (CheckStatus::Healthy, what),
            };
            async move { CheckOutcome::new(status, message) }
        })
        .dependency(dependency)
    }
}

/// The statements that services make for each order, mail or payment, or all the time, by name: no one of them may read a
/// table from end to end.
pub fn hot_statements() -> impl Iterator<Item = (&'static str, &'static str)> {
    let others = notification::hot_statements().chain(catalog::HOT.iter().copied());
    booking::hot_statements().chain(payment::hot_statements()).chain(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buyer would wait for all the rows.
    #[test]
    fn no_step_goes_through_rows_of_tables_that_it_keeps_others_from() {
        // Those before are released.
        for step in MIGRATIONS.iter().filter(|step| step.version >= MAIL) {
            let code: Vec<_> = step.sql.lines().filter(|line| !line.starts_with("--")).collect();
            let code = code.join("\n");
            let statements: Vec<_> = code.split(';').map(str::trim).collect();
            let keeps_out = |one: &&str| one.starts_with("ALTER TABLE") && !one.contains("VALIDATE CONSTRAINT");
            let reads_rows = |one: &&str| ["UPDATE", "DELETE", "INSERT"].iter().any(|word| one.starts_with(word));
            assert!(!(statements.iter().any(keeps_out) && statements.iter().any(reads_rows)), "{}", step.name);
        }
    }

    /// What a service needs in order to serve would wait for the report, too, that an index waits for.
    #[test]
    fn steps_that_may_wait_for_hours_come_last() {
        let waits = |step: &&Migration| {
            step.version >= MAIL && ["CONCURRENTLY", "VALIDATE"].iter().any(|word| step.sql.contains(word))
        };
        let first = MIGRATIONS.iter().position(|step| waits(&step)).unwrap();
        let late: Vec<_> = MIGRATIONS[first..].iter().filter(|step| !waits(step)).map(|step| step.name).collect();
        assert_eq!(late, Vec::<&str>::new());
        assert!(MIGRATIONS.is_sorted_by_key(|step| step.version));
    }

    #[test]
    fn steps_that_others_wait_for_are_there() {
        let name = |version| MIGRATIONS.iter().find(|step| step.version == version).map(|step| step.name);
        let names = [
            MAIL,
            BUYERS,
            TICKETS,
            WAITING_ROOM,
            CONFIRM_PAYMENT,
            MONEY_INDEXES,
            MAIL_INDEXES,
            BUYER_INDEXES,
            REFUND_INDEX,
        ]
        .map(name);
        let expected = [
            "mail",
            "buyers",
            "tickets",
            "waiting room",
            "confirm payment",
            "money: indexes",
            "hot queries",
            "buyers: indexes",
            "refunds: index",
        ];
        assert_eq!(names, expected.map(Some));
    }
}
