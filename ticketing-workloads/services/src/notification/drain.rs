//! Works off the outbox, one message after the other: so that a kill in the wrong moment sends one mail twice at most.

use super::mail::{MailError, Mailer, NotSent};
use super::outbox::{self, Kind, Message};
use super::ticket;
use crate::database::{Database, DatabaseError};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::{CallError, Resilience, deadline};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

/// Flags (ADR-007 §5).
const MAILS: &str = "EnableEmailNotifications";
const TICKETS: &str = "EnablePdfGeneration";
/// Time between two looks into an empty outbox.
const LOOK: Duration = Duration::from_millis(500);
/// Wait after the first failure of a message; doubled each time.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Works off the outbox.
pub struct Drain {
    resilience: Arc<Resilience>,
    database: Arc<Database>,
    mailer: Mailer,
    outcomes: Family<OutcomeLabel, Counter>,
    duplicates: Counter,
}

/// The outcome of a try to send a message.
enum Outcome {
    Sent { ticket_follows: bool },
    NoRecipient,
    Later { unanswered: bool, wait: Option<Duration> },
    Never { reason: String },
}

impl Drain {
    /// Sends with `mailer` what is in the outbox of `database`.
    pub fn new(resilience: Arc<Resilience>, database: Arc<Database>, mailer: Mailer) -> Arc<Self> {
        let (outcomes, duplicates) = (Family::<OutcomeLabel, Counter>::default(), Counter::default());
        resilience.metrics().register(|registry| {
            registry.register("notifications", "Tries to send messages of the outbox, by outcome", outcomes.clone());
            let help = "Mails that may have been sent twice, with the same Message-ID";
            registry.register("notification_possible_duplicates", help, duplicates.clone());
        });
        Arc::new(Self { resilience, database, mailer, outcomes, duplicates })
    }

    /// For as long as it is polled. A message is worked on among `work`, to its end: who stops in the middle of one would send
    /// it twice.
    pub async fn run(self: Arc<Self>, work: TaskTracker) {
        loop {
            let own = Arc::clone(&self);
            match work.spawn(async move { own.next().await }).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => tokio::time::sleep(LOOK).await,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "failed to read or write the outbox");
                    tokio::time::sleep(LOOK * 4).await;
                }
                Err(error) => {
                    tracing::error!(%error, "sending a message panicked");
                    tokio::time::sleep(LOOK * 4).await;
                }
            }
        }
    }

    /// Sends one message; `false`: there is none.
    async fn next(&self) -> Result<bool, CallError<DatabaseError>> {
        let flags = self.resilience.flags();
        if !flags.bool(MAILS, true) {
            return Ok(false);
        }
        let tickets = flags.bool(TICKETS, true);
        let mut kinds = vec![Kind::BookingConfirmed.name(), Kind::BookingCancelled.name()];
        kinds.extend(tickets.then_some(Kind::Ticket.name()));
        let kinds = &kinds;
        let Some(message) = self.database.call(|connection| outbox::claim(connection, kinds)).await? else {
            return Ok(false);
        };
        let message = &message;
        let outcome = self.send(message, tickets).await?;
        let label = outcome.name();
        // Only this process knows the outcome, so it is recorded as soon as that is possible.
        while let Err(error) = self.write(message, &outcome).await {
            tracing::warn!(message = message.id, %error, "failed to record the outcome of a message; retrying");
            tokio::time::sleep(LOOK).await;
        }
        self.outcomes.get_or_create(&OutcomeLabel { outcome: label }).inc();
        Ok(true)
    }

    async fn write(&self, message: &Message, outcome: &Outcome) -> Result<u64, CallError<DatabaseError>> {
        let database = &self.database;
        match outcome {
            Outcome::Sent { ticket_follows } => {
                database.call(|connection| outbox::done(connection, message, *ticket_follows)).await
            }
            Outcome::NoRecipient => database.call(|connection| outbox::done(connection, message, false)).await,
            Outcome::Later { unanswered, wait } => {
                let wait = wait.unwrap_or_default().max(wait_after(message.tries));
                database.call(|connection| outbox::later(connection, message, wait, *unanswered)).await
            }
            Outcome::Never { reason } => {
                tracing::error!(message = message.id, booking = %message.booking, %reason, "undeliverable; moved to dead_letters");
                database.call(|connection| outbox::never(connection, message, reason)).await
            }
        }
    }

    async fn send(&self, message: &Message, tickets: bool) -> Result<Outcome, CallError<DatabaseError>> {
        let Some(address) = &message.email else { return Ok(Outcome::NoRecipient) };
        let has_ticket = message.kind != Kind::BookingCancelled;
        let ticket = (tickets && has_ticket).then(|| ticket::pdf(message));
        let mail = match self.mailer.compose(message, address, ticket) {
            Ok(mail) => mail,
            Err(error) => return Ok(Outcome::Never { reason: error.to_string() }),
        };
        if !self.database.call(|connection| outbox::sending(connection, message)).await? {
            // Somebody else has it by now; nothing is written down for it.
            return Ok(Outcome::Later { unanswered: false, wait: None });
        }
        // Before the claim ends, or somebody else would send it, too.
        let until = Instant::now() + outbox::CLAIM.mul_f32(0.8);
        let sent = deadline::within(Some(until), self.mailer.send(&mail)).await;
        let has_left = sent.as_ref().map_or_else(|not_sent| not_sent.may_be_sent, |()| true);
        if message.may_be_sent && has_left {
            self.duplicates.inc();
            tracing::warn!(message = message.id, booking = %message.booking, "mail possibly sent twice");
        }
        Ok(match sent {
            Ok(()) => Outcome::Sent { ticket_follows: !tickets && has_ticket },
            Err(not_sent) => {
                let error = &not_sent.error;
                tracing::warn!(message = message.id, booking = %message.booking, tries = message.tries, %error, "mail not sent");
                outcome(not_sent)
            }
        })
    }
}

impl Outcome {
    fn name(&self) -> &'static str {
        match self {
            Self::Sent { .. } => "sent",
            Self::NoRecipient => "no_recipient",
            Self::Later { .. } => "later",
            Self::Never { .. } => "never",
        }
    }
}

/// What becomes of a message that was not sent.
fn outcome(NotSent { error, may_be_sent }: NotSent) -> Outcome {
    match error {
        CallError::Failed { source: MailError::Refused(reason), .. } => Outcome::Never { reason },
        error => Outcome::Later { unanswered: may_be_sent, wait: error.retry_after() },
    }
}

/// The wait after as many tries.
fn wait_after(tries: i32) -> Duration {
    let doublings = u32::try_from(tries.saturating_sub(1)).unwrap_or(0).min(16);
    (FIRST_WAIT * 2u32.pow(doublings)).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_five_minutes() {
        assert_eq!([1, 2, 3, 9, 10, i32::MAX].map(|tries| wait_after(tries).as_secs()), [1, 2, 4, 256, 300, 300]);
    }
}
