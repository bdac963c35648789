//! Works off the outbox, several messages at once, and as one probe at a time while the mail server takes nothing. Who is
//! killed in the wrong moment sends one mail twice at most for each that was on its way.

use super::domains::{Domains, Place};
use super::mail::{MailError, Mailer, NotSent};
use super::outbox::{self, Kind, Message};
use super::relay::{RelayWatch, Told, Verdict};
use super::ticket;
use crate::database::{Database, DatabaseError};
use crate::mail_address::redacted_address;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::{CallError, Rejection, Resilience, deadline};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
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
    relay: Arc<RelayWatch>,
    domains: Arc<Domains>,
    /// Mails at once.
    places: Arc<Semaphore>,
    /// A mail is over: its domain has a place again.
    over: Notify,
    outcomes: Family<OutcomeLabel, Counter>,
    duplicates: Counter,
}

/// How many mails may be under way at once.
#[derive(Clone, Copy, Debug)]
pub struct AtOnce {
    pub all: usize,
    pub per_domain: usize,
}

/// The outcome of a try to send a message.
enum Outcome {
    Sent {
        ticket_follows: bool,
    },
    NoRecipient,
    Later {
        unanswered: bool,
        why: String,
    },
    Held {
        why: String,
    },
    /// Somebody else has it by now.
    NotOurs,
    Never {
        reason: String,
    },
}

/// What a look into the outbox brought.
enum Look {
    /// As many as there were places for: there may be more.
    Full,
    /// Fewer.
    Empty,
    /// Fewer, beside those to the domains that had no place: only they are left.
    Only(Vec<String>),
}

/// The domains that all mails are to which are left, until it is time to look whether others have come. To find that out, all
/// of those are gone through: with thousands of mails to one domain, not for each of them.
struct Left {
    domains: Vec<String>,
    until: Instant,
}

impl Drain {
    /// Sends with `mailer` what is in the outbox of `database`.
    pub fn new(
        resilience: Arc<Resilience>,
        database: Arc<Database>,
        mailer: Mailer,
        relay: Arc<RelayWatch>,
        at_once: AtOnce,
    ) -> Arc<Self> {
        let (outcomes, duplicates) = (Family::<OutcomeLabel, Counter>::default(), Counter::default());
        resilience.metrics().register(|registry| {
            registry.register("notifications", "Tries to send messages of the outbox, by outcome", outcomes.clone());
            let help = "Mails that may have been sent twice, with the same Message-ID";
            registry.register("notification_possible_duplicates", help, duplicates.clone());
        });
        let (domains, places) = (Domains::new(at_once.per_domain), Arc::new(Semaphore::new(at_once.all)));
        Arc::new(Self {
            resilience,
            database,
            mailer,
            relay,
            domains,
            places,
            over: Notify::new(),
            outcomes,
            duplicates,
        })
    }

    /// For as long as it is polled. A message is worked on among `work`, to its end: who stops in the middle of one would send
    /// it twice.
    pub async fn run(self: Arc<Self>, work: TaskTracker) {
        let mut left: Option<Left> = None;
        loop {
            left = left.filter(|left| left.until > Instant::now());
            let own = Arc::clone(&self);
            let look = if let Some(until) = self.relay.paused_until() {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => {}
                    () = self.relay.changed() => continue,
                }
                work.spawn(async move { own.probe().await }).await
            } else {
                let Ok(first) = Arc::clone(&self.places).acquire_owned().await else { return };
                let full = self.domains.full();
                if let Some(left) = &left
                    && left.domains.iter().all(|domain| full.contains(domain))
                {
                    drop(first);
                    tokio::select! {
                        () = tokio::time::sleep_until(left.until) => {}
                        () = self.over.notified() => {}
                    }
                    continue;
                }
                // Those that are left go one by one, each into the place that the one before it gave up.
                let most = if left.is_some() { 1 } else { usize::MAX };
                let tracker = work.clone();
                work.spawn(async move { own.next(first, most, full, &tracker).await }).await
            };
            match look {
                Ok(Ok(Look::Full)) => {}
                Ok(Ok(Look::Only(domains))) => left = Some(Left { domains, until: Instant::now() + LOOK }),
                Ok(Ok(Look::Empty)) => {
                    self.mailer.end_idle();
                    tokio::time::sleep(LOOK).await;
                }
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

    /// Sends one message and nothing beside it, to see whether the mail server takes it.
    async fn probe(&self) -> Result<Look, CallError<DatabaseError>> {
        let (messages, tickets) = self.claim(&[], 1).await?;
        let Some(message) = messages.first() else { return Ok(Look::Empty) };
        self.work_on(message, tickets, true).await?;
        Ok(Look::Full)
    }

    /// Begins to send as many messages as there are places for, `first` being one of them, and `most` at most; none to the
    /// `full` domains.
    async fn next(
        self: Arc<Self>,
        first: OwnedSemaphorePermit,
        most: usize,
        full: Vec<String>,
        work: &TaskTracker,
    ) -> Result<Look, CallError<DatabaseError>> {
        let more = std::iter::from_fn(|| Arc::clone(&self.places).try_acquire_owned().ok());
        let mut places: Vec<_> = std::iter::once(first).chain(more).take(most).collect();
        let wanted = places.len();
        let (messages, tickets) = self.claim(&full, wanted).await?;
        let are_all = messages.len() < wanted;
        let mut too_many = Vec::new();
        for message in messages {
            match (self.domains.enter(&message.domain), places.pop()) {
                (Some(at_domain), Some(place)) => {
                    let own = Arc::clone(&self);
                    work.spawn(async move { own.send_one(&message, tickets, (place, at_domain)).await });
                }
                _ => too_many.push(message),
            }
        }
        let too_many = &too_many;
        if !too_many.is_empty() {
            self.database.call(|connection| outbox::give_back(connection, too_many)).await?;
        }
        Ok(match (are_all, full.is_empty(), too_many.is_empty()) {
            // Of those that were given back there may be more, and others behind them.
            (false, ..) | (true, _, false) => Look::Full,
            (true, true, true) => Look::Empty,
            (true, false, true) => Look::Only(full),
        })
    }

    async fn send_one(&self, message: &Message, tickets: bool, places: (OwnedSemaphorePermit, Place)) {
        if let Err(error) = self.work_on(message, tickets, false).await {
            // Its claim runs out, and somebody takes it up again.
            tracing::debug!(message = message.id, %error, "failed to read or write the outbox");
        }
        drop(places);
        self.over.notify_one();
    }

    /// The next messages of the kinds that may be sent, and whether tickets may be made.
    async fn claim(&self, full: &[String], most: usize) -> Result<(Vec<Message>, bool), CallError<DatabaseError>> {
        let flags = self.resilience.flags();
        if !flags.bool(MAILS, true) {
            return Ok((Vec::new(), false));
        }
        let tickets = flags.bool(TICKETS, true);
        let mut kinds = vec![Kind::BookingConfirmed.name()];
        kinds.extend(tickets.then_some(Kind::Ticket.name()));
        let kinds = &kinds;
        let messages = self.database.call(|connection| outbox::claim(connection, kinds, full, most)).await?;
        // A slow database may have taken so long that they were turned off meanwhile.
        let now = self.resilience.flags();
        if !now.bool(MAILS, true) || now.bool(TICKETS, true) != tickets {
            let messages = &messages;
            self.database.call(|connection| outbox::give_back(connection, messages)).await?;
            return Ok((Vec::new(), false));
        }
        Ok((messages, tickets))
    }

    /// Sends one message, and writes down what came of it.
    async fn work_on(&self, message: &Message, tickets: bool, is_probe: bool) -> Result<(), CallError<DatabaseError>> {
        let outcome = self.send(message, tickets, is_probe).await?;
        let label = outcome.name();
        // Only this process knows the outcome, so it is recorded as soon as that is possible.
        while let Err(error) = self.write(message, &outcome).await {
            tracing::warn!(message = message.id, %error, "failed to record the outcome of a message; retrying");
            tokio::time::sleep(LOOK).await;
        }
        self.outcomes.get_or_create(&OutcomeLabel { outcome: label }).inc();
        Ok(())
    }

    async fn write(&self, message: &Message, outcome: &Outcome) -> Result<u64, CallError<DatabaseError>> {
        let database = &self.database;
        match outcome {
            Outcome::Sent { ticket_follows } => {
                database.call(|connection| outbox::done(connection, message, *ticket_follows)).await
            }
            Outcome::NoRecipient => database.call(|connection| outbox::done(connection, message, false)).await,
            Outcome::Later { unanswered, why } => {
                let wait = wait_after(message.tries);
                database.call(|connection| outbox::later(connection, message, wait, *unanswered, why)).await
            }
            Outcome::Held { why } => database.call(|connection| outbox::hold(connection, message, why)).await,
            Outcome::NotOurs => Ok(0),
            Outcome::Never { reason } => {
                tracing::error!(message = message.id, booking = %message.booking, %reason, "undeliverable; moved to dead_letters");
                database.call(|connection| outbox::never(connection, message, reason)).await
            }
        }
    }

    async fn send(
        &self,
        message: &Message,
        tickets: bool,
        is_probe: bool,
    ) -> Result<Outcome, CallError<DatabaseError>> {
        let Some(address) = &message.email else { return Ok(Outcome::NoRecipient) };
        let ticket = tickets.then(|| ticket::pdf(message));
        let mail = match self.mailer.compose(message, address, ticket) {
            Ok(mail) => mail,
            Err(error) => return Ok(Outcome::Never { reason: error.to_string() }),
        };
        if !self.database.call(|connection| outbox::sending(connection, message)).await? {
            return Ok(Outcome::NotOurs);
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
            Ok(()) => {
                self.relay.settle(message.id, message.tries, is_probe, &Told::Taken);
                Outcome::Sent { ticket_follows: !tickets }
            }
            Err(not_sent) => {
                let (error, to) = (&not_sent.error, redacted_address(address));
                tracing::warn!(message = message.id, booking = %message.booking, tries = message.tries, %to, %error, "mail not sent");
                self.not_sent(message, is_probe, not_sent)
            }
        })
    }

    /// What becomes of a message that was not sent, and of all that follow.
    fn not_sent(&self, message: &Message, is_probe: bool, not_sent: NotSent) -> Outcome {
        let NotSent { error, may_be_sent: unanswered, about_a_mail } = not_sent;
        let why = match &error {
            CallError::Failed { source, .. } => source.to_string(),
            error => error.to_string(),
        };
        let told = match &error {
            CallError::Failed { source: MailError::Refused(reply), .. } => Told::Refused(reply),
            // It is about this mail alone, until there is another server.
            CallError::Failed { source: MailError::NoSmtpUtf8, .. } => return Outcome::Later { unanswered, why },
            CallError::Rejected { rejection, .. } if !rejection.is_open_circuit() => {
                // The server was not asked: the service's own limits were in the way.
                return Outcome::Later { unanswered, why };
            }
            CallError::Rejected { rejection: Rejection::CircuitOpen { retry_in }, .. } => {
                Told::Silent { words: &why, not_before: Some(*retry_in), about_a_mail: false }
            }
            error => Told::Silent { words: &why, not_before: error.retry_after(), about_a_mail },
        };
        match self.relay.settle(message.id, message.tries, is_probe, &told) {
            Verdict::DeadLetter => Outcome::Never { reason: why },
            Verdict::Held if !unanswered => Outcome::Held { why },
            // A mail that may have been taken is not sent again at once.
            Verdict::Held | Verdict::Later | Verdict::Sent => Outcome::Later { unanswered, why },
        }
    }
}

impl Outcome {
    fn name(&self) -> &'static str {
        match self {
            Self::Sent { .. } => "sent",
            Self::NoRecipient => "no_recipient",
            Self::Later { .. } => "later",
            Self::Held { .. } | Self::NotOurs => "held",
            Self::Never { .. } => "never",
        }
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
