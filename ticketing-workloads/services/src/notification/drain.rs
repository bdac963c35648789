//! Works off the outbox, several messages at once, and as one probe at a time while the mail server takes nothing. A process
//! that is killed in the wrong moment sends one mail twice at most for each that was on its way.

use super::domains::{Domains, Limits, Place};
use super::mail::{MailError, Mailer, NotSent};
use super::outbox::{self, Candidate, Kind, Message};
use super::refusal::plain;
use super::relay::{Attempt, LEFT_OVER_TRIES, Mail, RelayWatch, Verdict};
use super::signer::Signer;
use super::ticket;
use crate::database::{Database, DatabaseError};
use crate::mail_address::redacted_address;
use crate::schema::{self, Schema};
use futures::FutureExt;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use resilience::{CallError, Rejection, Resilience, deadline};
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

/// Flags (ADR-007 §5).
const MAILS: &str = "EnableEmailNotifications";
const TICKETS: &str = "EnablePdfGeneration";
/// Time between two looks into an empty outbox.
const LOOK: Duration = Duration::from_millis(500);
/// Time between two looks at how old the oldest mail is.
const LOOK_AT_AGE: Duration = Duration::from_secs(30);
/// Wait after the first failure of a message; doubled each time.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// Messages that are chosen beyond those that there are places for: other processes choose among the same.
const SPARE: usize = 8;
/// Times that a mail may leave without an answer. Each may have been taken, so a person decides after that.
const UNANSWERED_TRIES: i32 = 5;
/// Times that the database may refuse to take down an outcome, before the place is given to other mails.
const WRITES: u32 = 10;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Works off the outbox.
pub struct Drain {
    resilience: Arc<Resilience>,
    database: Arc<Database>,
    schema: Schema,
    signer: Arc<Signer>,
    mailer: Mailer,
    relay: Arc<RelayWatch>,
    domains: Arc<Domains>,
    /// For how long a mail is tried.
    give_up_after: Duration,
    /// Mails at once.
    places: Arc<Semaphore>,
    /// A mail is over: its domain has a place again.
    over: Notify,
    /// The domain that the last look from one to the next ended with, by kind.
    seen: Mutex<BTreeMap<&'static str, String>>,
    /// Messages of a claim whose outcome is not known: they may have to be given back.
    unsettled: Mutex<Option<(Uuid, Vec<i64>)>>,
    outcomes: Family<OutcomeLabel, Counter>,
    duplicates: Counter,
    oldest: Gauge,
}

/// How many mails may be under way at once, and for how long one is tried.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub at_once: usize,
    pub per_domain: usize,
    pub give_up_after: Duration,
}

/// The outcome of a try to send a message.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Sent {
        ticket_follows: bool,
    },
    NoRecipient,
    /// The booking has gone on: another message says how it stands.
    Outdated,
    Later {
        unanswered: bool,
        why: String,
    },
    /// The try does not count.
    Held {
        /// When it is tried again; its place stays as it was without it.
        wait: Option<Duration>,
        why: String,
    },
    /// Another process has it by now.
    NotOurs,
    Never {
        reason: String,
    },
}

/// What a look into the outbox brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// There may be more.
    Full,
    /// All that is due is on its way.
    Empty,
    /// The same, beside mails to domains that have no place.
    Blocked,
}

/// Which messages a look is for.
#[derive(Clone, Copy)]
enum Among<'a> {
    /// `deep`: past any number of mails to domains without a place.
    All { deep: bool },
    /// Those to these domains.
    These(&'a [String]),
}

/// Messages that were chosen, each with its place among those to its domain.
#[derive(Default)]
struct Chosen {
    places: BTreeMap<i64, Place>,
    /// There was no place for some.
    some_had_none: bool,
}

/// Messages that are ours to send.
struct Claimed {
    messages: Vec<(Message, Place)>,
    /// Whether tickets may be made, and there is a key to sign them with.
    tickets: bool,
    look: Look,
    /// No mail may be sent at all.
    is_off: bool,
}

impl Claimed {
    fn nothing(look: Look, is_off: bool) -> Self {
        Self { messages: Vec::new(), tickets: false, look, is_off }
    }
}

type DatabaseFailure = CallError<DatabaseError>;

impl Drain {
    /// Sends with `mailer` what is in the outbox of `database`.
    pub fn new(
        resilience: Arc<Resilience>,
        database: Arc<Database>,
        schema: Schema,
        signer: Arc<Signer>,
        mailer: Mailer,
        relay: Arc<RelayWatch>,
        bounds: Bounds,
    ) -> Arc<Self> {
        let (outcomes, duplicates) = (Family::<OutcomeLabel, Counter>::default(), Counter::default());
        let oldest = Gauge::default();
        resilience.metrics().register(|registry| {
            registry.register("notifications", "Tries to send messages of the outbox, by outcome", outcomes.clone());
            let help = "Mails that may have been sent twice, with the same Message-ID";
            registry.register("notification_possible_duplicates", help, duplicates.clone());
            let help = "For how long the oldest message of the outbox waits, in seconds";
            registry.register("notification_oldest_mail_seconds", help, oldest.clone());
        });
        Arc::new(Self {
            resilience,
            database,
            schema,
            signer,
            mailer,
            relay,
            domains: Domains::new(bounds.per_domain),
            give_up_after: bounds.give_up_after,
            places: Arc::new(Semaphore::new(bounds.at_once)),
            over: Notify::new(),
            seen: Mutex::default(),
            unsettled: Mutex::default(),
            outcomes,
            duplicates,
            oldest,
        })
    }

    /// For as long as it is polled. A message is worked on among `work`, to its end: breaking off in the middle of one would
    /// send it twice.
    pub async fn run(self: Arc<Self>, work: TaskTracker) {
        tokio::join!(Arc::clone(&self).send_all(work), self.watch_age());
    }

    async fn send_all(self: Arc<Self>, work: TaskTracker) {
        // Only domains without a place were left: until then nobody looks for others behind them.
        let mut blocked_until: Option<Instant> = None;
        loop {
            let own = Arc::clone(&self);
            let look = if let Some(until) = self.relay.paused_until() {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => {}
                    () = self.relay.changed() => continue,
                }
                work.spawn(async move { own.probe().await }).await
            } else {
                let Ok(first) = Arc::clone(&self.places).acquire_owned().await else { return };
                if self.relay.paused_until().is_some() {
                    continue;
                }
                let tracker = work.clone();
                let deep = blocked_until.is_none_or(|until| until <= Instant::now());
                work.spawn(async move { own.next(first, deep, &tracker).await }).await
            };
            match look {
                Ok(Ok(Look::Full)) => {}
                Ok(Ok(Look::Blocked)) => {
                    let now = Instant::now();
                    let until = blocked_until.filter(|until| *until > now).unwrap_or(now + LOOK);
                    blocked_until = Some(until);
                    tokio::select! {
                        () = tokio::time::sleep_until(until) => {}
                        () = self.over.notified() => {}
                    }
                }
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

    async fn watch_age(&self) {
        loop {
            if let Ok(age) = self.database.call(outbox::oldest).await {
                self.oldest.set(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
            }
            tokio::time::sleep(LOOK_AT_AGE).await;
        }
    }

    /// Sends one message and nothing beside it, to see whether the mail server takes it: to a domain that took one before, or
    /// at least is not suspected of being the reason itself, if there is one. With nothing to send, the server only has to let
    /// this service in.
    async fn probe(&self) -> Result<Look, DatabaseFailure> {
        let all_but = Limits { closed: self.relay.suspects(), ..Limits::default() };
        let trusted = self.relay.trusted();
        let mut claimed = self.claim(1, &all_but, Among::These(&trusted)).await?;
        if claimed.messages.is_empty() && !claimed.is_off {
            claimed = self.claim(1, &all_but, Among::All { deep: true }).await?;
        }
        if claimed.messages.is_empty() && claimed.look == Look::Blocked {
            claimed = self.claim(1, &Limits::default(), Among::All { deep: true }).await?;
        }
        let probe = Mail { id: 0, domain: "", tries: 0, is_probe: true };
        match claimed.messages.first() {
            Some((message, _place)) => {
                self.work_on(message, claimed.tickets, true).await?;
                Ok(Look::Full)
            }
            None if claimed.is_off => {
                self.relay.settle(probe, &Attempt::LetIn);
                Ok(Look::Empty)
            }
            None if claimed.look == Look::Empty => {
                match self.mailer.greet().await {
                    Ok(()) => self.relay.settle(probe, &Attempt::LetIn),
                    Err(not_sent) => self.relay.settle(probe, &attempt(&not_sent, &words(&not_sent.error))),
                };
                Ok(Look::Full)
            }
            // Those that are left are on their way already.
            None => Ok(Look::Empty),
        }
    }

    /// Begins to send as many messages as there are places for, `first` being one of them. `deep`: looks past any number of
    /// mails to domains without a place.
    async fn next(
        self: Arc<Self>,
        first: OwnedSemaphorePermit,
        deep: bool,
        work: &TaskTracker,
    ) -> Result<Look, DatabaseFailure> {
        let more = std::iter::from_fn(|| Arc::clone(&self.places).try_acquire_owned().ok());
        let places: Vec<_> = std::iter::once(first).chain(more).collect();
        let among = Among::All { deep };
        let Claimed { messages, tickets, look, .. } = self.claim(places.len(), &self.relay.limits(), among).await?;
        for ((message, at_domain), place) in messages.into_iter().zip(places) {
            let own = Arc::clone(&self);
            work.spawn(async move { own.send_one(&message, tickets, (place, at_domain)).await });
        }
        Ok(look)
    }

    async fn send_one(&self, message: &Message, tickets: bool, places: (OwnedSemaphorePermit, Place)) {
        match AssertUnwindSafe(self.work_on(message, tickets, false)).catch_unwind().await {
            Ok(Ok(())) => {}
            // Its claim runs out, and it is taken up again.
            Ok(Err(error)) => tracing::debug!(message = message.id, %error, "failed to read or write the outbox"),
            Err(_) => tracing::error!(message = message.id, booking = %message.booking, "sending a message panicked"),
        }
        drop(places);
        self.over.notify_one();
    }

    /// The next messages of the kinds that may be sent.
    async fn claim(&self, most: usize, limits: &Limits, among: Among<'_>) -> Result<Claimed, DatabaseFailure> {
        let flags = self.resilience.flags();
        if !flags.bool(MAILS, true) {
            return Ok(Claimed::nothing(Look::Empty, true));
        }
        let may_make_tickets = flags.bool(TICKETS, true);
        let tickets = may_make_tickets && self.signer.key(&self.database, &self.schema).await.is_some();
        let is_wanted = |kind: &Kind| *kind != Kind::Ticket || tickets;
        let kinds: Vec<_> = Kind::ALL.into_iter().filter(is_wanted).map(Kind::name).collect();
        self.settle_claim().await?;
        let (chosen, blocked) = self.choose(&kinds, most, limits, among).await?;
        if chosen.places.is_empty() {
            return Ok(Claimed::nothing(if blocked { Look::Blocked } else { Look::Empty }, false));
        }
        let mut places = chosen.places;
        let ids: Vec<_> = places.keys().copied().collect();
        let claim = Uuid::new_v4();
        *lock(&self.unsettled) = Some((claim, ids.clone()));
        let (calls, wanted) = (AtomicU32::new(0), &ids);
        let messages = self
            .database
            .call(|connection| {
                calls.fetch_add(1, Ordering::Relaxed);
                outbox::claim(connection, claim, wanted, most)
            })
            .await?;
        let is_ours = |id: &i64| messages.iter().any(|message| message.id == *id);
        let doubtful: Vec<_> = ids.iter().filter(|id| !is_ours(id)).copied().collect();
        // Only an attempt without an answer can have claimed what this answer does not have.
        *lock(&self.unsettled) = (calls.into_inner() > 1 && !doubtful.is_empty()).then_some((claim, doubtful));
        // A slow database may have taken so long that they were turned off meanwhile.
        let now = self.resilience.flags();
        if !now.bool(MAILS, true) || now.bool(TICKETS, true) != may_make_tickets {
            *lock(&self.unsettled) = Some((claim, ids));
            self.settle_claim().await?;
            return Ok(Claimed::nothing(Look::Empty, !now.bool(MAILS, true)));
        }
        let look = match messages.len() {
            count if count == most => Look::Full,
            // Other processes were faster: there may be others.
            count if count < ids.len() => Look::Full,
            _ if blocked => Look::Blocked,
            _ => Look::Empty,
        };
        let with_place = |message: Message| places.remove(&message.id).map(|place| (message, place));
        Ok(Claimed { messages: messages.into_iter().filter_map(with_place).collect(), tickets, look, is_off: false })
    }

    /// Gives back the messages of a claim whose outcome was not known.
    async fn settle_claim(&self) -> Result<(), DatabaseFailure> {
        let unsettled = lock(&self.unsettled).clone();
        if let Some((claim, ids)) = &unsettled {
            self.database.call(|connection| outbox::give_back(connection, *claim, ids)).await?;
            *lock(&self.unsettled) = None;
        }
        Ok(())
    }

    /// Chooses messages to claim, some more than are wanted, and says whether there may be others whose domain has no place.
    async fn choose(
        &self,
        kinds: &[&'static str],
        most: usize,
        limits: &Limits,
        among: Among<'_>,
    ) -> Result<(Chosen, bool), DatabaseFailure> {
        let mut chosen = Chosen::default();
        let deep = match among {
            Among::These([]) => return Ok((chosen, true)),
            Among::These(domains) => {
                for kind in kinds {
                    let due =
                        self.database.call(|connection| outbox::due_of(connection, kind, domains, 1, most + SPARE));
                    self.enter(&mut chosen, due.await?, most, limits);
                }
                return Ok((chosen, true));
            }
            Among::All { deep } => deep,
        };
        let full: Vec<_> = self.domains.full(limits).into_iter().collect();
        let due = self.database.call(|connection| outbox::due(connection, kinds, &full)).await?;
        self.enter(&mut chosen, due, most, limits);
        let blocked = !full.is_empty() || chosen.some_had_none;
        // Without its index, a look that is deep would read all mails over and over.
        let deep = deep && self.schema.has(schema::MAIL_INDEXES);
        // Tickets that must wait may be as many, and in front.
        if deep && chosen.places.len() < most && (blocked || kinds.len() < Kind::ALL.len()) {
            for kind in kinds {
                self.choose_by_domain(&mut chosen, kind, most, limits).await?;
            }
        }
        Ok((chosen, blocked))
    }

    /// Goes on from the domain where the last look ended, and once around.
    async fn choose_by_domain(
        &self,
        chosen: &mut Chosen,
        kind: &'static str,
        most: usize,
        limits: &Limits,
    ) -> Result<(), DatabaseFailure> {
        let mut after = lock(&self.seen).get(kind).cloned().unwrap_or_default();
        loop {
            let domains = {
                let after = &after;
                self.database.call(|connection| outbox::open_domains(connection, kind, after)).await?
            };
            let wanted: Vec<_> = std::iter::once(String::new())
                .chain(domains.iter().filter(|domain| !self.domains.is_full(domain, limits)).cloned())
                .collect();
            let of_each = self.domains.limit();
            let due = self
                .database
                .call(|connection| outbox::due_of(connection, kind, &wanted, of_each, most + SPARE))
                .await?;
            let last = due.last().map(|candidate| candidate.domain.clone()).filter(|domain| !domain.is_empty());
            self.enter(chosen, due, most, limits);
            let is_end = domains.len() < outbox::DOMAINS;
            let begin_again = is_end && !after.is_empty() && chosen.places.len() < most;
            // Where enough were found, there may be others right behind them.
            after = if is_end && chosen.places.len() < most {
                String::new()
            } else {
                last.or_else(|| domains.last().cloned()).unwrap_or_default()
            };
            lock(&self.seen).insert(kind, after.clone());
            if !begin_again {
                return Ok(());
            }
        }
    }

    /// Takes those of the candidates that there is a place for.
    fn enter(&self, chosen: &mut Chosen, candidates: Vec<Candidate>, most: usize, limits: &Limits) {
        for Candidate { id, domain } in candidates {
            if chosen.places.len() >= most + SPARE {
                return;
            }
            if chosen.places.contains_key(&id) {
                continue;
            }
            match self.domains.enter(&domain, limits) {
                Some(place) => drop(chosen.places.insert(id, place)),
                None => chosen.some_had_none = true,
            }
        }
    }

    /// Sends one message, and writes the outcome down.
    async fn work_on(&self, message: &Message, tickets: bool, is_probe: bool) -> Result<(), DatabaseFailure> {
        let outcome = match sent_too_often(message) {
            Some(outcome) => outcome,
            None => give_up(self.send(message, tickets, is_probe).await?, message, self.give_up_after),
        };
        let label = outcome.name();
        if let Outcome::Never { reason } = &outcome {
            tracing::error!(message = message.id, booking = %message.booking, %reason, "undeliverable; moved to dead_letters");
        }
        let mut failures = 0;
        // Only this process knows the outcome, so it is recorded as soon as that is possible.
        while let Err(error) = self.write(message, &outcome).await {
            failures += 1;
            if failures >= WRITES && is_refusal(&error) {
                tracing::error!(message = message.id, booking = %message.booking, outcome = label, %error, "the database refuses to record the outcome of a message; it will be tried again");
                return Err(error);
            }
            tracing::warn!(message = message.id, %error, "failed to record the outcome of a message; retrying");
            tokio::time::sleep(LOOK).await;
        }
        self.outcomes.get_or_create(&OutcomeLabel { outcome: label }).inc();
        Ok(())
    }

    async fn write(&self, message: &Message, outcome: &Outcome) -> Result<u64, DatabaseFailure> {
        let database = &self.database;
        match outcome {
            Outcome::Sent { ticket_follows } => {
                database.call(|connection| outbox::done(connection, message, *ticket_follows)).await
            }
            Outcome::NoRecipient | Outcome::Outdated => {
                database.call(|connection| outbox::done(connection, message, false)).await
            }
            Outcome::Later { unanswered, why } => {
                let wait = wait_after(message.tries);
                database.call(|connection| outbox::later(connection, message, wait, *unanswered, why)).await
            }
            Outcome::Held { wait, why } => {
                database.call(|connection| outbox::hold(connection, message, *wait, why)).await
            }
            Outcome::NotOurs => Ok(0),
            Outcome::Never { reason } => database.call(|connection| outbox::never(connection, message, reason)).await,
        }
    }

    async fn send(&self, message: &Message, tickets: bool, is_probe: bool) -> Result<Outcome, DatabaseFailure> {
        let Some(address) = &message.email else { return Ok(Outcome::NoRecipient) };
        // A probe goes behind those that are due: the next one is another mail.
        let behind_others = is_probe.then_some(Duration::ZERO);
        if message.is_outdated() {
            return Ok(Outcome::Outdated);
        }
        let has_ticket = message.kind.has_tickets();
        // As it is now: the one before may have been replaced because others have it.
        let key = if tickets && has_ticket { self.signer.key(&self.database, &self.schema).await } else { None };
        if key.is_none() && message.kind == Kind::Ticket {
            return Ok(Outcome::Held { wait: behind_others, why: "there is no key to sign tickets with".to_owned() });
        }
        let ticket = key.map(|key| ticket::pdf(message, &key));
        let ticket_follows = ticket.is_none() && has_ticket;
        let mail = match self.mailer.compose(message, address, ticket) {
            Ok(mail) => mail,
            Err(error) => return Ok(Outcome::Never { reason: plain(&error.to_string()) }),
        };
        if !self.database.call(|connection| outbox::sending(connection, message)).await? {
            return Ok(Outcome::NotOurs);
        }
        // Before the claim ends, or another process would send it, too.
        let until = Instant::now() + outbox::CLAIM.mul_f32(0.8);
        let sent = deadline::within(Some(until), self.mailer.send(&mail, until)).await;
        let has_left = sent.as_ref().map_or_else(|not_sent| not_sent.may_be_sent, |()| true);
        if message.may_be_sent && has_left {
            self.duplicates.inc();
            tracing::warn!(message = message.id, booking = %message.booking, "mail possibly sent twice");
        }
        let Message { id, ref domain, tries, .. } = *message;
        let of = Mail { id, domain, tries, is_probe };
        Ok(match sent {
            Ok(()) => {
                self.relay.settle(of, &Attempt::Taken);
                Outcome::Sent { ticket_follows }
            }
            Err(not_sent) => {
                let (error, to) = (&not_sent.error, redacted_address(address));
                tracing::warn!(message = id, booking = %message.booking, tries, %to, %error, "mail not sent");
                let (why, unanswered) = (words(error), not_sent.may_be_sent);
                match self.relay.settle(of, &attempt(&not_sent, &why)) {
                    Verdict::DeadLetter => Outcome::Never { reason: why },
                    Verdict::Held if !unanswered => Outcome::Held { wait: behind_others, why },
                    Verdict::HeldByPolicy { times } if !unanswered => {
                        Outcome::Held { wait: Some(wait_after(times)), why }
                    }
                    // A mail that may have been taken is not sent again at once.
                    Verdict::Held | Verdict::HeldByPolicy { .. } | Verdict::Later | Verdict::Sent => {
                        Outcome::Later { unanswered, why }
                    }
                }
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a mail was not sent, in words that a database takes.
fn words(error: &CallError<MailError>) -> String {
    plain(&match error {
        CallError::Failed { source, .. } => source.to_string(),
        error => error.to_string(),
    })
}

/// What a mail that was not sent says about the server; `words` say why.
fn attempt<'a>(not_sent: &'a NotSent, words: &'a str) -> Attempt<'a> {
    match &not_sent.error {
        CallError::Failed { source: MailError::Refused(reply), .. } => Attempt::Refused(reply),
        CallError::Failed { source: MailError::NoSmtpUtf8, .. } => Attempt::Unfit,
        // The service's own limits were in the way.
        CallError::Rejected { rejection, .. } if !rejection.is_open_circuit() => Attempt::NotTried,
        CallError::Rejected { rejection: Rejection::CircuitOpen { retry_in }, .. } => {
            Attempt::Silent { words, not_before: Some(*retry_in), about_a_mail: false }
        }
        error => Attempt::Silent { words, not_before: error.retry_after(), about_a_mail: not_sent.about_a_mail },
    }
}

/// Whether the database has answered with a "no" that it will repeat: about the data, a constraint or the statement. All else,
/// such as a full disk, passes.
fn is_refusal(error: &DatabaseFailure) -> bool {
    let CallError::Failed { source, .. } = error else { return false };
    source.sql_state().is_some_and(|state| ["22", "23", "42"].iter().any(|class| state.code().starts_with(class)))
}

/// A mail that has left so often, and of which nobody could write down what became of it, does not leave again: a database that
/// refuses to take that down would have it sent once for each claim, without end.
fn sent_too_often(message: &Message) -> Option<Outcome> {
    let times = message.unanswered;
    (message.may_be_sent && times >= UNANSWERED_TRIES).then(|| Outcome::Never {
        reason: format!(
            "given up: it has left {times} times, nobody could write down what became of it, and it may have arrived"
        ),
    })
}

/// Nothing is tried for ever: in the end a person decides. What was never really tried, such as in a pause of days, is.
fn give_up(outcome: Outcome, message: &Message, after: Duration) -> Outcome {
    match outcome {
        Outcome::Later { unanswered: true, why } if message.unanswered.saturating_add(1) >= UNANSWERED_TRIES => {
            let times = message.unanswered.saturating_add(1);
            Outcome::Never {
                reason: format!("given up after {times} times without an answer, and may have arrived: {why}"),
            }
        }
        Outcome::Later { why, .. } if message.age >= after && message.tries >= LEFT_OVER_TRIES => {
            Outcome::Never { reason: format!("given up after {} h: {why}", message.age.as_secs() / 3_600) }
        }
        other => other,
    }
}

impl Outcome {
    fn name(&self) -> &'static str {
        match self {
            Self::Sent { .. } => "sent",
            Self::NoRecipient => "no_recipient",
            Self::Outdated => "outdated",
            Self::Later { .. } => "later",
            Self::Held { .. } => "held",
            Self::NotOurs => "taken_over",
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

    #[test]
    fn nothing_is_tried_for_ever() {
        const DAY: Duration = Duration::from_secs(86_400);
        let message = |age, tries, unanswered| {
            let mut message = Message::example(Kind::Ticket, "Opening Night");
            (message.age, message.tries, message.unanswered) = (age, tries, unanswered);
            message
        };
        let later = |unanswered| Outcome::Later { unanswered, why: "451 no".to_owned() };
        let never = |reason: &str| Outcome::Never { reason: reason.to_owned() };
        let after = |outcome, age, tries, unanswered| give_up(outcome, &message(age, tries, unanswered), DAY * 5);
        assert_eq!(after(later(false), DAY * 4, 9, 9), later(false));
        assert_eq!(after(later(false), DAY * 5, 9, 0), never("given up after 120 h: 451 no"));
        assert_eq!(after(later(false), DAY * 9, 8, 0), later(false), "it waited for the end of a pause");
        assert_eq!(after(later(true), DAY, 4, 3), later(true));
        let unknown = never("given up after 5 times without an answer, and may have arrived: 451 no");
        assert_eq!(after(later(true), DAY, 5, 4), unknown);
        let held = || Outcome::Held { wait: Some(Duration::ZERO), why: String::new() };
        assert_eq!(after(held(), DAY * 9, 9, 9), held(), "a pause loses no mail");
    }

    #[rstest::rstest]
    #[case::nobody_knows(true, 5, true)]
    #[case::not_often(true, 4, false)]
    #[case::put_back_by_a_person(false, 5, false)]
    fn what_may_have_arrived_too_often_leaves_no_more(
        #[case] may_be_sent: bool,
        #[case] unanswered: i32,
        #[case] over: bool,
    ) {
        let mut message = Message::example(Kind::Ticket, "Opening Night");
        (message.may_be_sent, message.unanswered) = (may_be_sent, unanswered);
        assert_eq!(matches!(sent_too_often(&message), Some(Outcome::Never { .. })), over);
    }
}
