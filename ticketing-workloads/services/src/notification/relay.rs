//! Whether the mail server takes this service's mails: sending pauses while it does not, and goes on by itself. Pure but for
//! [`RelayWatch`], which holds the state and publishes it.
//!
//! A pause begins with an answer that is about this service, such as a refused name or login, or with no answer at all. What
//! may as well be about one mail or one domain is counted by domain: one domain is set aside on its own, and gets one mail at
//! a time until it takes one; several in a row begin a pause. What is refused by
//! policy (relaying, block list, quota) costs its mail no try in either case. A pause lasts a second, then one mail is sent as a probe, to a
//! domain that took one before, or at least is not suspected, if there is one. Each probe that fails doubles the time, up to a limit that depends on why
//! it is paused. The pause is over when the server takes a mail, or says of one that its recipient does not exist, or greets
//! and lets this service in while there is nothing to send.

use super::domains::{Limits, site};
use super::mail::MailError;
use super::refusal::{Fault, Reply, fault};
use contract::CheckStatus;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use resilience::clock::in_words;
use resilience::{Check, CheckOutcome, Metrics};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Name of the check.
pub const CHECK: &str = "mail";
/// First pause.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Mails to one domain that are refused, for whatever may be about it, before it is set aside.
const REFUSED_OF_A_DOMAIN: usize = 3;
/// Domains that are refused in a row before that is taken to be about the server.
const REFUSED_DOMAINS: usize = 3;
/// The same of a server that has taken no mail lately.
const REFUSED_DOMAINS_AT_FIRST: usize = 2;
/// How long a refusal counts.
const SUSPICION: Duration = Duration::from_secs(10 * 60);
/// Refusals that are kept; the oldest go.
const MAX_REFUSED: usize = 64;
/// How long a mail that was taken says that the server takes mails.
const LATELY: Duration = Duration::from_secs(15 * 60);
/// Tries of a mail after which its refusal says nothing new: it is left over, and will be refused again and again.
pub const LEFT_OVER_TRIES: i32 = 9;
/// Tries of a mail before a bare 550 to its recipient is believed.
const BARE_REFUSALS: i32 = 3;
/// Tries of a mail that the server cannot take for what it lacks, such as SMTPUTF8: a quarter of an hour.
const UNFIT_TRIES: i32 = 10;
/// Recipients that do not exist, one after the other and with none taken between, before the server's list is doubted.
const UNKNOWN_IN_A_ROW: usize = 10;
/// How many domains those must be of.
const UNKNOWN_DOMAINS: usize = 3;
/// Domains that are put off while none is taken before that is taken to be about the server, and for how long.
const DEFERRED_DOMAINS: usize = 3;
const DEFERRED: Duration = Duration::from_secs(3 * 60);
/// How long a domain is set aside at first, and at most.
const FIRST_ASIDE: Duration = Duration::from_secs(5);
const LONGEST_ASIDE: Duration = Duration::from_secs(60);
/// Domains that are set aside at once; those that were refused longest ago go.
const MAX_ASIDE: usize = 64;
/// Mails that were refused by policy and whose refusals are remembered; those that were refused longest ago go.
const MAX_BY_POLICY: usize = 256;
/// Domains that are remembered for having taken a mail, the latest ones.
const MAX_TAKEN: usize = 32;

/// The outcome of an attempt, as far as it says something about the server.
#[derive(Clone, Debug)]
pub enum Attempt<'a> {
    /// The mail was taken.
    Taken,
    /// There was nothing to send: the server greeted, and took name and login.
    LetIn,
    /// The server said no.
    Refused(&'a Reply),
    /// The server did not answer, or is not asked for the time given because its circuit is open. `about_a_mail`: it was asked
    /// about a recipient or a text by then, which may be slow on their own account.
    Silent { words: &'a str, not_before: Option<Duration>, about_a_mail: bool },
    /// The server took name and login, and lacks what this mail needs.
    Unfit,
    /// The server was not asked.
    NotTried,
}

/// The mail of an attempt.
#[derive(Clone, Copy, Debug)]
pub struct Mail<'a> {
    /// Its place in the outbox.
    pub id: i64,
    pub domain: &'a str,
    /// How often it was tried, this time included.
    pub tries: i32,
    /// Whether it is the one mail of a pause.
    pub is_probe: bool,
}

/// What to do with the mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Sent,
    /// It can never be sent.
    DeadLetter,
    /// Tried again later; this try counts.
    Later,
    /// It waits for the server; this try does not count.
    Held,
    /// Tried again later, and this try does not count: the server refused it by policy, for the so many-th time.
    HeldByPolicy {
        times: i32,
    },
}

/// Why sending is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The server refuses this service.
    Service,
    /// The server does not answer.
    Silence,
    /// The mails to several domains are refused: any of those may have been meant.
    Refusals,
    /// The mails to several domains had no answer.
    Silences,
    /// All mails are put off.
    Deferrals,
    /// No recipient exists.
    NoRecipients,
}

impl Cause {
    /// Longest time to the next probe. A client that asks a block list too often stays on it; asking a server that is away
    /// costs nothing; and where mails are only put off, the next ones must come to their turn.
    fn longest(self) -> Duration {
        Duration::from_secs(match self {
            Self::Service | Self::Refusals => 60,
            Self::Silence | Self::Silences => 10,
            Self::Deferrals | Self::NoRecipients => 5,
        })
    }

    /// Whether it is of no use that the server listens as far as a recipient: only a mail that is taken tells.
    fn is_about_mails(self) -> bool {
        !matches!(self, Self::Service | Self::Silence)
    }
}

/// A pause that is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    pub since: Instant,
    /// When the next probe goes.
    pub until: Instant,
    length: Duration,
    pub probes: u32,
    /// What the server said, or how it failed.
    pub words: String,
    cause: Cause,
}

#[derive(Debug)]
struct Refused {
    domain: String,
    at: Instant,
}

/// A domain whose mails are refused or unanswered while it is not known whether that is the server's fault.
#[derive(Debug)]
struct Aside {
    /// Mails that were refused, until it is set aside.
    refused: BTreeSet<i64>,
    at: Instant,
    /// Until when no mail goes there; then one at a time.
    until: Option<Instant>,
    length: Duration,
    words: String,
    /// When a mail was refused that is not left over.
    new_at: Option<Instant>,
}

/// Refusals by policy of one mail.
#[derive(Debug)]
struct ByPolicy {
    times: i32,
    at: Instant,
}

#[derive(Debug)]
struct Deferred {
    since: Instant,
    at: Instant,
    domains: BTreeSet<String>,
}

/// What is known of the server.
#[derive(Debug, Default)]
pub struct Relay {
    pause: Option<Pause>,
    /// Messages that were refused since the last one that was taken.
    refused: BTreeMap<i64, Refused>,
    /// Messages whose recipient did not exist since the last one that was taken.
    unknown: BTreeMap<i64, Refused>,
    /// Since when and of which domains mails were put off, since the last one that was taken.
    deferred: Option<Deferred>,
    aside: BTreeMap<String, Aside>,
    /// Mails that were refused by policy: their tries do not count in the outbox.
    by_policy: BTreeMap<i64, ByPolicy>,
    taken_at: Option<Instant>,
    /// Domains that took a mail, the latest one last.
    taken: VecDeque<String>,
}

impl Relay {
    pub fn pause(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// The domains that no mail goes to now, and those that get one at a time.
    pub fn limits(&self, now: Instant) -> Limits {
        let mut limits = Limits::default();
        let aside = self.aside.iter().filter(|(_, aside)| now.duration_since(aside.at) < LATELY);
        for (domain, until) in aside.filter_map(|(domain, aside)| Some((domain, aside.until?))) {
            if until > now {
                limits.closed.insert(domain.clone())
            } else {
                limits.single.insert(domain.clone())
            };
        }
        limits
    }

    /// The domains that a probe would tell little about.
    pub fn suspects(&self) -> BTreeSet<String> {
        let refused = self.refused.values().chain(self.unknown.values()).map(|refused| &refused.domain);
        let deferred = self.deferred.iter().flat_map(|deferred| &deferred.domains);
        refused.chain(self.aside.keys()).chain(deferred).filter(|domain| !domain.is_empty()).cloned().collect()
    }

    /// The domains that took a mail last, and are not suspected: a probe to one of them tells most.
    pub fn trusted(&self) -> Vec<String> {
        let suspects = self.suspects();
        self.taken.iter().filter(|domain| !suspects.contains(site(domain))).cloned().collect()
    }

    fn note_taken(&mut self, domain: &str) {
        if self.taken.back().is_some_and(|last| last == domain) || domain.is_empty() {
            return;
        }
        self.taken.retain(|other| other != domain);
        self.taken.push_back(domain.to_owned());
        if self.taken.len() > MAX_TAKEN {
            self.taken.pop_front();
        }
    }

    fn takes_mails(&self, now: Instant) -> bool {
        self.taken_at.is_some_and(|at| now.duration_since(at) < LATELY)
    }

    /// Takes in the outcome of an attempt, and says what to do with the mail. Names below one domain count as that domain: a
    /// stranger who orders to several of them must not look like several domains.
    pub fn settle(&mut self, mail: Mail<'_>, attempt: &Attempt<'_>, now: Instant) -> Verdict {
        if matches!(attempt, Attempt::Taken) {
            self.note_taken(mail.domain);
        }
        let mail = Mail { domain: site(mail.domain), ..mail };
        if matches!(attempt, Attempt::Taken) {
            self.by_policy.remove(&mail.id);
        }
        self.refused.retain(|_, refused| now.duration_since(refused.at) < SUSPICION);
        self.unknown.retain(|_, unknown| now.duration_since(unknown.at) < SUSPICION);
        self.aside.retain(|_, aside| now.duration_since(aside.at) < LATELY);
        self.by_policy.retain(|_, refused| now.duration_since(refused.at) < LATELY);
        match attempt {
            Attempt::Taken => {
                if self.pause.as_ref().is_some_and(|pause| pause.cause.is_about_mails()) {
                    // It was the server's fault, not theirs.
                    self.aside.clear();
                }
                self.goes_on();
                self.aside.remove(mail.domain);
                self.unknown.clear();
                self.deferred = None;
                self.taken_at = Some(now);
                Verdict::Sent
            }
            Attempt::LetIn => {
                self.goes_on();
                Verdict::Sent
            }
            Attempt::Unfit => {
                match &self.pause {
                    Some(pause) if mail.is_probe && !pause.cause.is_about_mails() => self.goes_on(),
                    _ => self.prolong(mail, now),
                }
                if mail.tries >= UNFIT_TRIES { Verdict::DeadLetter } else { Verdict::Later }
            }
            Attempt::NotTried => {
                self.prolong(mail, now);
                Verdict::Later
            }
            Attempt::Silent { words, about_a_mail: true, .. } => {
                if self.suspect(mail, words, Cause::Silences, now) {
                    Verdict::Held
                } else {
                    Verdict::Later
                }
            }
            Attempt::Silent { words, not_before, .. } => {
                self.stop(mail, Cause::Silence, words, *not_before, now);
                Verdict::Held
            }
            Attempt::Refused(reply) => self.refuse(mail, reply, now),
        }
    }

    fn refuse(&mut self, mail: Mail<'_>, reply: &Reply, now: Instant) -> Verdict {
        let words = MailError::Refused(reply.clone()).to_string();
        match fault(reply) {
            Fault::Recipient => {
                note(&mut self.unknown, UNKNOWN_IN_A_ROW, mail, now);
                let domains: BTreeSet<_> = self.unknown.values().map(|unknown| &unknown.domain).collect();
                if self.unknown.len() >= UNKNOWN_IN_A_ROW && domains.len() >= UNKNOWN_DOMAINS {
                    let words = format!("{UNKNOWN_IN_A_ROW} mails in a row, and none was taken between: {words}");
                    self.stop(mail, Cause::NoRecipients, &words, None, now);
                    return Verdict::Later;
                }
                self.goes_on();
                self.aside.remove(mail.domain);
                Verdict::DeadLetter
            }
            Fault::PerhapsRecipient if self.takes_mails(now) && self.pause.is_none() && mail.tries >= BARE_REFUSALS => {
                Verdict::DeadLetter
            }
            Fault::Mail => {
                self.defer(mail, &words, now);
                Verdict::Later
            }
            Fault::PerhapsRecipient | Fault::Unclear => {
                self.suspect(mail, &words, Cause::Refusals, now);
                Verdict::Later
            }
            // From here on the answer is about this service; only whether others get through is not known.
            Fault::Relay if reply.is_about_a_mail() => {
                let times = self.note_policy(mail.id, now);
                // So many tries as if they had counted.
                let tries = mail.tries.saturating_add(times - 1);
                if self.suspect(Mail { tries, ..mail }, &words, Cause::Refusals, now) {
                    Verdict::Held
                } else {
                    Verdict::HeldByPolicy { times }
                }
            }
            Fault::Relay => {
                self.stop(mail, Cause::Service, &words, None, now);
                Verdict::Held
            }
        }
    }

    /// Notes that a mail was refused by policy; the answer is how often it was.
    fn note_policy(&mut self, id: i64, now: Instant) -> i32 {
        let refused = self.by_policy.entry(id).or_insert(ByPolicy { times: 0, at: now });
        refused.times = refused.times.saturating_add(1);
        refused.at = now;
        let times = refused.times;
        if self.by_policy.len() > MAX_BY_POLICY {
            let oldest = self.by_policy.iter().min_by_key(|(_, refused)| refused.at).map(|(id, _)| *id);
            oldest.map(|id| self.by_policy.remove(&id));
        }
        times
    }

    /// Notes that a mail was put off.
    fn defer(&mut self, mail: Mail<'_>, words: &str, now: Instant) {
        let deferred = self.deferred.take().filter(|deferred| now.duration_since(deferred.at) < SUSPICION);
        let deferred =
            self.deferred.insert(deferred.unwrap_or(Deferred { since: now, at: now, domains: BTreeSet::new() }));
        if mail.tries < LEFT_OVER_TRIES {
            deferred.at = now;
            if deferred.domains.len() < DEFERRED_DOMAINS {
                deferred.domains.insert(mail.domain.to_owned());
            }
        }
        let are_all = deferred.domains.len() >= DEFERRED_DOMAINS && now.duration_since(deferred.since) >= DEFERRED;
        match &self.pause {
            // It has come as far as this mail, so it answers, and takes name and login.
            Some(pause) if mail.is_probe && !pause.cause.is_about_mails() => self.goes_on(),
            Some(_) if mail.is_probe => self.stop(mail, Cause::Deferrals, words, None, now),
            None if are_all => {
                let words = format!("all mails are put off, and none was taken: {words}");
                self.stop(mail, Cause::Deferrals, &words, None, now);
            }
            _ => {}
        }
    }

    /// Notes a refusal that may be about the server or about the domain; `true`: sending is paused now.
    fn suspect(&mut self, mail: Mail<'_>, words: &str, cause: Cause, now: Instant) -> bool {
        if mail.tries < LEFT_OVER_TRIES {
            note(&mut self.refused, MAX_REFUSED, mail, now);
        }
        self.set_aside(mail, words, now);
        let domains: BTreeSet<_> = self.refused.values().map(|refused| &refused.domain).collect();
        let limit = if self.takes_mails(now) { REFUSED_DOMAINS } else { REFUSED_DOMAINS_AT_FIRST };
        if domains.len() >= limit || self.pause.is_some() {
            self.stop(mail, cause, words, None, now);
        }
        self.pause.is_some()
    }

    /// Sets the domain aside if it was refused often enough, or for longer if it was set aside before.
    fn set_aside(&mut self, mail: Mail<'_>, words: &str, now: Instant) {
        if mail.domain.is_empty() {
            return;
        }
        if self.aside.len() >= MAX_ASIDE && !self.aside.contains_key(mail.domain) {
            let oldest = self.aside.iter().min_by_key(|(_, aside)| aside.at).map(|(domain, _)| domain.clone());
            oldest.map(|domain| self.aside.remove(&domain));
        }
        let aside = self.aside.entry(mail.domain.to_owned()).or_insert_with(|| Aside {
            refused: BTreeSet::new(),
            at: now,
            until: None,
            length: FIRST_ASIDE,
            words: String::new(),
            new_at: None,
        });
        if mail.tries < LEFT_OVER_TRIES {
            aside.new_at = Some(now);
        }
        words.clone_into(&mut aside.words);
        aside.at = now;
        match aside.until {
            None => {
                aside.refused.insert(mail.id);
                if aside.refused.len() >= REFUSED_OF_A_DOMAIN {
                    aside.until = Some(now + aside.length);
                }
            }
            Some(until) if until <= now => {
                aside.length = (aside.length * 2).min(LONGEST_ASIDE);
                aside.until = Some(now + aside.length);
            }
            // It was on its way when the domain was set aside.
            Some(_) => {}
        }
    }

    fn goes_on(&mut self) {
        self.pause = None;
        self.refused.clear();
    }

    /// After a probe that says nothing about the server.
    fn prolong(&mut self, mail: Mail<'_>, now: Instant) {
        if let Some(Pause { cause, words, .. }) = self.pause.clone() {
            self.stop(mail, cause, &words, None, now);
        }
    }

    /// Begins a pause, or makes it longer after a probe that failed. Mails that were on their way when it began change nothing.
    fn stop(&mut self, mail: Mail<'_>, cause: Cause, words: &str, not_before: Option<Duration>, now: Instant) {
        let not_before = now + not_before.unwrap_or_default();
        match &mut self.pause {
            None => {
                let until = not_before.max(now + FIRST_PAUSE);
                let words = words.to_owned();
                self.pause = Some(Pause { since: now, until, length: FIRST_PAUSE, probes: 0, words, cause });
            }
            Some(pause) if mail.is_probe => {
                pause.length = (pause.length * 2).min(cause.longest());
                pause.until = not_before.max(now + pause.length);
                pause.probes += 1;
                // That the circuit is open says less than why.
                if not_before == now {
                    words.clone_into(&mut pause.words);
                    pause.cause = cause;
                }
            }
            Some(pause) => pause.until = pause.until.max(not_before),
        }
    }
}

/// Keeps at most `most`; the oldest go.
fn note(refused: &mut BTreeMap<i64, Refused>, most: usize, mail: Mail<'_>, now: Instant) {
    refused.insert(mail.id, Refused { domain: mail.domain.to_owned(), at: now });
    if refused.len() > most {
        let oldest = refused.iter().min_by_key(|(_, refused)| refused.at).map(|(id, _)| *id);
        oldest.map(|id| refused.remove(&id));
    }
}

/// The state and its metrics, and a signal when a pause ends.
pub struct RelayWatch {
    relay: Mutex<Relay>,
    paused: Gauge,
    pauses: Counter,
    domains_aside: Gauge,
    changed: Notify,
}

impl RelayWatch {
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        let (paused, pauses, domains_aside) = (Gauge::default(), Counter::default(), Gauge::default());
        metrics.register(|registry| {
            let help = "1 while sending is paused because the mail server takes nothing from this service";
            registry.register("notification_paused", help, paused.clone());
            registry.register("notification_pauses", "Pauses that have begun", pauses.clone());
            let help = "Domains whose mails wait because they are refused or not answered, while others are sent";
            registry.register("notification_domains_set_aside", help, domains_aside.clone());
        });
        Arc::new(Self { relay: Mutex::default(), paused, pauses, domains_aside, changed: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Relay> {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next probe goes; `None`: nothing is paused.
    pub fn paused_until(&self) -> Option<Instant> {
        self.lock().pause().map(|pause| pause.until)
    }

    /// [`Relay::limits`], as of now.
    pub fn limits(&self) -> Limits {
        let limits = self.lock().limits(Instant::now());
        // Asked for all the time: also when nothing is tried any more, what is set aside is forgotten.
        let aside = limits.closed.len() + limits.single.len();
        self.domains_aside.set(i64::try_from(aside).unwrap_or(i64::MAX));
        limits
    }

    /// [`Relay::suspects`].
    pub fn suspects(&self) -> BTreeSet<String> {
        self.lock().suspects()
    }

    /// [`Relay::trusted`].
    pub fn trusted(&self) -> Vec<String> {
        self.lock().trusted()
    }

    /// Until a pause ends early, because a mail that was on its way was taken.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// [`Relay::settle`], published in the log and the metrics.
    pub fn settle(&self, mail: Mail<'_>, attempt: &Attempt<'_>) -> Verdict {
        let mut relay = self.lock();
        let before = relay.pause().cloned();
        let verdict = relay.settle(mail, attempt, Instant::now());
        let after = relay.pause().cloned();
        // Under the lock, or an older state would overwrite a newer one.
        self.paused.set(i64::from(after.is_some()));
        drop(relay);
        match (before, after) {
            (None, Some(pause)) => {
                self.pauses.inc();
                tracing::warn!(server = %pause.words, "sending is paused: the mail server takes nothing; probing");
            }
            (Some(before), Some(pause)) if pause.probes > before.probes => {
                let next = pause.until.saturating_duration_since(Instant::now());
                tracing::info!(server = %pause.words, probes = pause.probes, "still paused; next probe in {}", in_words(next));
            }
            (Some(pause), None) => {
                tracing::info!(probes = pause.probes, "sending goes on after {}", in_words(pause.since.elapsed()));
                self.changed.notify_one();
            }
            _ => {}
        }
        verdict
    }

    /// `mail`: whether sending is paused, in the server's words.
    pub fn check(self: &Arc<Self>, dependency: &str) -> Check {
        let own = Arc::clone(self);
        let check = Check::new(CHECK, &["service", dependency], move |_| {
            let outcome = outcome(&own.lock(), Instant::now());
            std::future::ready(outcome)
        });
        check.dependency(dependency)
    }
}

fn outcome(relay: &Relay, now: Instant) -> CheckOutcome {
    if let Some(pause) = relay.pause() {
        let since = now.saturating_duration_since(pause.since);
        let next = pause.until.saturating_duration_since(now);
        let message = format!(
            "sending is paused, no mail is lost: {}. Next probe in {}; paused for {} so far",
            pause.words,
            in_words(next),
            in_words(since)
        );
        return CheckOutcome::new(CheckStatus::Unhealthy, message)
            .with("pausedSeconds", json!(since.as_secs()))
            .with("probes", json!(pause.probes));
    }
    let is_aside = |aside: &&Aside| aside.until.is_some() && now.duration_since(aside.at) < LATELY;
    let set_aside = relay.aside.values().filter(is_aside).count();
    let last = relay.aside.iter().filter(|(_, aside)| is_aside(aside)).max_by_key(|(_, aside)| aside.at);
    let Some((domain, Aside { words, .. })) = last else {
        return CheckOutcome::new(CheckStatus::Healthy, "mails are sent");
    };
    let is_new = |aside: &Aside| aside.new_at.is_some_and(|at| now.duration_since(at) < LATELY);
    let (status, others) = if relay.takes_mails(now) {
        (CheckStatus::Degraded, "the other mails are sent")
    } else if relay.aside.values().filter(is_aside).any(is_new) {
        (CheckStatus::Unhealthy, "and no other mail was taken lately")
    } else {
        (CheckStatus::Degraded, "and there were no others lately")
    };
    let message =
        format!("mails to {set_aside} domain(s) wait, no mail is lost, {others}. The last one was {domain}: {words}");
    CheckOutcome::new(status, message).with("domainsSetAside", json!(set_aside))
}

#[cfg(test)]
mod tests {
    use super::super::refusal::Phase;
    use super::*;

    fn reply(phase: Phase, text: &str) -> Reply {
        let (code, text) = text.split_once(' ').unwrap();
        Reply::new(phase, code.parse().unwrap(), text)
    }

    /// A relay with a clock that is moved by hand.
    struct Scene {
        relay: Relay,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Self { relay: Relay::default(), now: Instant::now() }
        }

        /// Of one that took a mail before.
        fn sending() -> Self {
            let mut scene = Self::new();
            scene.taken("before.example");
            scene
        }

        fn settle(&mut self, id: i64, domain: &str, tries: i32, attempt: &Attempt<'_>) -> Verdict {
            let is_probe = self.relay.pause.as_ref().is_some_and(|pause| pause.until <= self.now);
            self.relay.settle(Mail { id, domain, tries, is_probe }, attempt, self.now)
        }

        fn taken(&mut self, domain: &str) {
            assert_eq!(self.settle(0, domain, 1, &Attempt::Taken), Verdict::Sent);
        }

        /// A mail to a domain of its own.
        fn refused(&mut self, id: i64, tries: i32, phase: Phase, text: &str) -> Verdict {
            self.refused_at(&format!("domain{id}.example"), id, tries, phase, text)
        }

        fn refused_at(&mut self, domain: &str, id: i64, tries: i32, phase: Phase, text: &str) -> Verdict {
            self.settle(id, domain, tries, &Attempt::Refused(&reply(phase, text)))
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        /// Time until the next probe, which is then passed.
        fn wait(&mut self) -> u64 {
            let wait = self.relay.pause().unwrap().until.duration_since(self.now);
            self.pass(wait);
            wait.as_secs()
        }

        fn is_closed(&self, domain: &str) -> bool {
            self.relay.limits(self.now).closed.contains(domain)
        }
    }

    const RELAY_DENIED: &str = "554 5.7.1 Relay access denied";
    const FIRST_REFUSAL: Verdict = Verdict::HeldByPolicy { times: 1 };
    const SLOW: Attempt<'_> = Attempt::Silent { words: "timed out", not_before: None, about_a_mail: true };
    const GONE: Attempt<'_> = Attempt::Silent { words: "connection refused", not_before: None, about_a_mail: false };

    #[test]
    fn a_pause_doubles_up_to_a_minute_and_ends_with_a_mail_that_is_taken() {
        let mut scene = Scene::new();
        let mut waits = Vec::new();
        for message in 0..9 {
            assert_eq!(scene.refused(message, 1, Phase::Connect, "504 5.5.2 need a name with a dot"), Verdict::Held);
            waits.push(scene.wait());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        scene.taken("a.example");
        assert_eq!(scene.relay.pause(), None);
        scene.refused(9, 1, Phase::Login, "535 5.7.8 no");
        assert_eq!(scene.wait(), 1, "the next one begins anew");
    }

    #[test]
    fn a_server_that_is_away_is_asked_more_often() {
        let mut scene = Scene::new();
        let mut waits = Vec::new();
        for message in 0..6 {
            assert_eq!(scene.settle(message, "a.example", 1, &GONE), Verdict::Held);
            waits.push(scene.wait());
        }
        assert_eq!(waits, [1, 2, 4, 8, 10, 10]);
    }

    #[test]
    fn mails_that_were_on_their_way_make_a_pause_no_longer() {
        let mut scene = Scene::new();
        scene.refused(0, 1, Phase::Recipient, RELAY_DENIED);
        for message in 1..8 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, RELAY_DENIED), Verdict::Held);
        }
        assert_eq!(scene.relay.pause().unwrap().probes, 0);
        assert_eq!(scene.wait(), 1);
    }

    /// Such as a relay whose next server refuses the mails to one domain.
    #[test]
    fn one_domain_that_is_refused_holds_up_no_other() {
        let mut scene = Scene::sending();
        for message in 0..50 {
            assert_eq!(scene.refused_at("a.example", message, 1, Phase::Recipient, RELAY_DENIED), FIRST_REFUSAL);
            assert_eq!(scene.relay.pause(), None);
        }
        assert!(scene.is_closed("a.example") && !scene.is_closed("b.example"));
        assert_eq!(scene.refused_at("b.example", 51, 1, Phase::End, RELAY_DENIED), FIRST_REFUSAL);
        assert_eq!(
            scene.refused_at("c.example", 52, 1, Phase::Recipient, RELAY_DENIED),
            Verdict::Held,
            "three domains in a row are no chance"
        );
        scene.wait();
        scene.taken("d.example");
        assert!(!scene.is_closed("a.example"), "it was the server's fault");
    }

    /// All buyers have their address at one provider: no other domain shows that it is the relay.
    #[rstest::rstest]
    #[case(Phase::Recipient, RELAY_DENIED)]
    #[case(Phase::Recipient, "550 5.7.1 blocked using list.example")]
    #[case(Phase::End, "550 5.7.1 Our policy forbids this mail")]
    #[case(Phase::End, "550 5.4.5 Daily sending quota exceeded")]
    fn what_is_refused_by_policy_costs_no_try_at_one_domain_either(#[case] phase: Phase, #[case] text: &str) {
        let mut scene = Scene::new();
        for round in 1..=1_000 {
            for message in 1..=3 {
                let verdict = scene.refused_at("a.example", message, 1, phase, text);
                assert_eq!(verdict, Verdict::HeldByPolicy { times: round });
            }
            scene.pass(Duration::from_secs(300));
        }
        assert_eq!(scene.relay.pause(), None);
        assert_eq!(scene.relay.limits(scene.now).single.len(), 1);
        // What is left over is told, and is no outage; the next mails that are refused are one.
        assert_eq!(outcome(&scene.relay, scene.now).status(), CheckStatus::Degraded);
        scene.refused_at("a.example", 4, 1, phase, text);
        let outcome = outcome(&scene.relay, scene.now);
        assert_eq!(outcome.status(), CheckStatus::Unhealthy);
        assert!(outcome.message().contains("mails to 1 domain(s) wait, no mail is lost"), "{outcome:?}");
        scene.settle(1, "a.example", 1, &Attempt::Taken);
        assert_eq!(scene.refused_at("a.example", 1, 1, phase, text), FIRST_REFUSAL, "it begins anew");
    }

    #[test]
    fn refusals_by_policy_are_remembered_of_some_mails_only() {
        let mut scene = Scene::sending();
        for message in 0..5_000 {
            scene.refused_at("a.example", message, 1, Phase::Recipient, RELAY_DENIED);
        }
        assert_eq!(scene.relay.by_policy.len(), MAX_BY_POLICY);
        scene.pass(LATELY);
        scene.taken("b.example");
        assert!(scene.relay.by_policy.is_empty());
    }

    /// Three orders of one stranger paused all mails, again and again.
    #[test]
    fn names_below_one_domain_are_one_domain() {
        let mut scene = Scene::sending();
        for message in 0..50 {
            let domain = format!("name{message}.stranger.example");
            assert_eq!(scene.refused_at(&domain, message, 1, Phase::Recipient, RELAY_DENIED), FIRST_REFUSAL);
            assert_eq!(scene.relay.pause(), None);
        }
        assert!(scene.is_closed("stranger.example"));
        for message in 50..100 {
            let domain = format!("name{message}.stranger.example");
            scene.refused_at(&domain, message, 1, Phase::Recipient, "550 5.1.1 nobody");
            scene.refused_at(&domain, message, 1, Phase::Recipient, "450 4.2.0 later");
            scene.pass(Duration::from_secs(60));
            assert_eq!(scene.relay.pause(), None);
        }
    }

    #[test]
    fn a_probe_goes_rather_where_a_mail_was_taken() {
        let mut scene = Scene::new();
        for nth in 0..100 {
            scene.taken(&format!("mx.domain{nth}.example"));
        }
        scene.taken("mx.domain98.example");
        let trusted = scene.relay.trusted();
        assert_eq!((trusted.len(), trusted[MAX_TAKEN - 1].as_str()), (MAX_TAKEN, "mx.domain98.example"));
        scene.refused_at("other.domain98.example", 1, 1, Phase::Recipient, RELAY_DENIED);
        let trusted = scene.relay.trusted();
        assert_eq!(
            (trusted.len(), trusted[MAX_TAKEN - 2].as_str()),
            (MAX_TAKEN - 1, "mx.domain99.example"),
            "it is suspected"
        );
    }

    /// Such as a server that asks the recipient's before it answers: three mails to one domain time out together.
    #[test]
    fn a_domain_that_makes_the_server_slow_is_set_aside_and_gets_one_mail_at_a_time() {
        for mut scene in [Scene::sending(), Scene::new()] {
            for message in 1..4 {
                assert!(!scene.is_closed("slow.example"));
                assert_eq!(scene.settle(message, "slow.example", 1, &SLOW), Verdict::Later);
            }
            assert_eq!(scene.relay.pause(), None);
            assert!(scene.is_closed("slow.example"));
            assert_eq!(scene.relay.suspects(), ["slow.example".to_owned()].into());
            let mut lengths = Vec::new();
            for message in 4..10 {
                let begin = scene.now;
                while scene.is_closed("slow.example") {
                    scene.pass(Duration::from_secs(1));
                }
                lengths.push(scene.now.duration_since(begin).as_secs());
                assert!(scene.relay.limits(scene.now).single.contains("slow.example"));
                assert_eq!(scene.settle(message, "slow.example", 1, &SLOW), Verdict::Later);
                // What was on its way changes nothing.
                assert_eq!(scene.settle(message + 100, "slow.example", 1, &SLOW), Verdict::Later);
            }
            assert_eq!(lengths, [5, 10, 20, 40, 60, 60]);
            scene.taken("other.example");
            assert!(scene.is_closed("slow.example"), "that says nothing about it");
            scene.taken("slow.example");
            assert_eq!(scene.relay.limits(scene.now), Limits::default());
        }
    }

    #[test]
    fn what_is_set_aside_is_bounded_and_forgotten() {
        let mut scene = Scene::sending();
        for message in 0..1_000 {
            // Or they would be several domains in a row.
            scene.relay.goes_on();
            scene.settle(message, &format!("domain{message}.example"), 1, &SLOW);
        }
        assert!(scene.relay.aside.len() <= MAX_ASIDE && scene.relay.refused.len() <= MAX_REFUSED);
        for message in 0..3 {
            scene.settle(message, "slow.example", 1, &SLOW);
        }
        assert!(scene.is_closed("slow.example"));
        scene.pass(LATELY);
        assert_eq!(scene.relay.limits(scene.now), Limits::default());
        assert_eq!(outcome(&scene.relay, scene.now).status(), CheckStatus::Healthy);
    }

    #[test]
    fn refusals_count_for_a_while() {
        let mut scene = Scene::sending();
        for message in 0..3 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, "552 5.2.2 full"), Verdict::Later);
            assert_eq!(scene.relay.pause(), None, "three left over ones are no outage");
            scene.pass(SUSPICION / 2);
        }
    }

    /// At night nothing else is sent.
    #[test]
    fn mails_that_are_left_over_are_no_outage() {
        let mut scene = Scene::new();
        for round in 0..100 {
            for message in 0..5 {
                let text = if message < 4 { "552 5.2.2 full" } else { "450 4.2.0 later" };
                scene.refused(message, 9 + round, Phase::Recipient, text);
                scene.refused_at("a.example", 10 + message, 9 + round, Phase::Recipient, RELAY_DENIED);
                scene.pass(Duration::from_secs(60));
            }
            assert_eq!(scene.relay.pause(), None);
            assert_ne!(outcome(&scene.relay, scene.now).status(), CheckStatus::Unhealthy);
        }
    }

    #[test]
    fn full_mailboxes_wait_and_many_in_a_row_are_a_quota() {
        let mut scene = Scene::sending();
        for message in 0..2 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, "552 5.2.2 full"), Verdict::Later);
            assert_eq!(scene.relay.pause(), None);
        }
        assert_eq!(scene.refused(3, 1, Phase::Recipient, "552 5.2.2 full"), Verdict::Later);
        assert!(scene.relay.pause().unwrap().words.contains("552 5.2.2 full"));
    }

    #[test]
    fn a_bare_550_is_believed_only_of_a_server_that_takes_others_and_says_it_again() {
        let mut scene = Scene::new();
        assert_eq!(scene.refused(1, 5, Phase::Recipient, "550 Unknown user"), Verdict::Later, "it took none yet");
        scene.taken("a.example");
        assert_eq!(scene.refused(1, 2, Phase::Recipient, "550 Unknown user"), Verdict::Later);
        assert_eq!(scene.refused(1, 3, Phase::Recipient, "550 Unknown user"), Verdict::DeadLetter);
        scene.pass(LATELY);
        assert_eq!(scene.refused(2, 3, Phase::Recipient, "550 Unknown user"), Verdict::Later, "it took none lately");
    }

    #[test]
    fn a_recipient_who_does_not_exist_is_a_dead_letter_and_ends_a_pause() {
        let mut scene = Scene::new();
        scene.refused(1, 1, Phase::Connect, "421 4.3.2 shutting down");
        scene.pass(FIRST_PAUSE);
        assert_eq!(scene.refused(2, 1, Phase::Recipient, "550 5.1.1 nobody"), Verdict::DeadLetter);
        assert_eq!(scene.relay.pause(), None);
    }

    /// A relay whose list of users is broken says it of all.
    #[test]
    fn recipients_of_whom_none_exists_are_not_believed_for_ever() {
        const NOBODY: &str = "550 5.1.1 no such user";
        let mut scene = Scene::sending();
        for message in 1..10 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, NOBODY), Verdict::DeadLetter);
        }
        scene.taken("a.example");
        for message in 11..20 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, NOBODY), Verdict::DeadLetter);
        }
        assert_eq!(scene.refused(20, 1, Phase::Recipient, NOBODY), Verdict::Later);
        assert!(scene.relay.pause().unwrap().words.contains("10 mails in a row"));
        let mut waits = Vec::new();
        for message in 21..26 {
            waits.push(scene.wait());
            assert_eq!(scene.refused(message, 1, Phase::Recipient, NOBODY), Verdict::Later);
        }
        assert_eq!(waits, [1, 2, 4, 5, 5]);
        assert!(scene.relay.unknown.len() <= UNKNOWN_IN_A_ROW);
        scene.taken("b.example");
        assert_eq!(scene.relay.pause(), None);
        for message in 30..60 {
            let verdict = scene.refused_at("typos.example", message, 1, Phase::Recipient, NOBODY);
            assert_eq!(verdict, Verdict::DeadLetter, "one domain alone says nothing about the server");
        }
    }

    /// The first contact is always put off by such a server: a pause for it would never end.
    #[test]
    fn greylisting_pauses_nothing() {
        let mut scene = Scene::new();
        for message in 0..100 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, "450 4.2.0 Greylisted"), Verdict::Later);
        }
        assert_eq!(scene.relay.pause(), None);
        scene.refused(1, 1, Phase::Login, "454 4.7.0 later");
        scene.pass(FIRST_PAUSE);
        scene.refused(2, 1, Phase::Recipient, "450 4.2.0 Greylisted");
        assert_eq!(scene.relay.pause(), None, "the login works again");
    }

    #[rstest::rstest]
    #[case("450 4.1.2 Domain not found")]
    #[case("451 4.7.1 Try again later")]
    #[case("450 4.2.0 Greylisted")]
    fn a_server_that_puts_off_everything_for_minutes_is_said_to(#[case] text: &str) {
        let mut scene = Scene::sending();
        let mut minutes = 0;
        while scene.relay.pause().is_none() {
            assert_eq!(scene.refused(minutes, 1, Phase::Recipient, text), Verdict::Later);
            scene.pass(Duration::from_secs(60));
            minutes += 1;
        }
        assert_eq!(minutes, 4);
        assert!(outcome(&scene.relay, scene.now).message().contains("all mails are put off, and none was taken"));
        let mut waits = Vec::new();
        for message in 10..14 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, text), Verdict::Later);
            waits.push(scene.wait());
        }
        assert_eq!(waits, [2, 4, 5, 5], "each has its turn soon");
        scene.taken("a.example");
        assert_eq!(scene.relay.pause(), None);
        for message in 0..100 {
            scene.refused_at("a.example", message, 1, Phase::Recipient, text);
            scene.pass(Duration::from_secs(60));
        }
        assert_eq!(scene.relay.pause(), None, "one domain alone says nothing about the server");
    }

    #[test]
    fn with_nothing_to_send_a_pause_ends_when_the_server_lets_this_service_in() {
        let mut scene = Scene::new();
        scene.refused(1, 1, Phase::Connect, "421 4.3.2 shutting down");
        scene.wait();
        assert_eq!(scene.settle(0, "", 0, &GONE), Verdict::Held);
        assert_eq!(scene.wait(), 2);
        scene.settle(0, "", 0, &Attempt::LetIn);
        assert_eq!(scene.relay.pause(), None);
        assert!(scene.relay.limits(scene.now) == Limits::default() && scene.relay.suspects().is_empty());
    }

    #[test]
    fn a_mail_that_the_server_cannot_take_is_given_up_and_moves_the_clock_of_a_pause() {
        let mut scene = Scene::new();
        for tries in 1..10 {
            assert_eq!(scene.settle(1, "a.example", tries, &Attempt::Unfit), Verdict::Later);
        }
        assert_eq!(scene.settle(1, "a.example", 10, &Attempt::Unfit), Verdict::DeadLetter);
        assert_eq!(scene.relay.pause(), None);
        scene.settle(2, "a.example", 1, &GONE);
        scene.wait();
        scene.settle(3, "a.example", 1, &Attempt::Unfit);
        assert_eq!(scene.relay.pause(), None, "it answers again");
        for message in 4..7 {
            scene.refused(message, 1, Phase::Recipient, RELAY_DENIED);
        }
        for attempt in [Attempt::Unfit, Attempt::NotTried] {
            scene.wait();
            let probes = scene.relay.pause().unwrap().probes;
            scene.settle(7, "a.example", 1, &attempt);
            assert_eq!(scene.relay.pause().unwrap().probes, probes + 1);
        }
        assert_eq!(scene.wait(), 4);
        assert!(scene.relay.pause().unwrap().words.contains(RELAY_DENIED));
    }

    #[test]
    fn no_probe_goes_while_the_circuit_is_open_and_the_reason_stays() {
        let mut scene = Scene::new();
        scene.refused(1, 1, Phase::Connect, "554 5.7.1 go away");
        scene.pass(FIRST_PAUSE);
        let not_before = Some(Duration::from_secs(30));
        let open = Attempt::Silent { words: "the circuit is open", not_before, about_a_mail: false };
        assert_eq!(scene.settle(2, "a.example", 1, &open), Verdict::Held);
        assert_eq!(scene.wait(), 30);
        assert!(scene.relay.pause().unwrap().words.contains("go away"));
    }

    #[test]
    fn the_check_says_it_in_the_servers_words() {
        let mut scene = Scene::new();
        assert_eq!(outcome(&scene.relay, scene.now).status(), CheckStatus::Healthy);
        scene.refused(1, 1, Phase::Sender, "554 5.7.1 <ann@example.com>: Relay access denied");
        scene.pass(Duration::from_secs(40));
        let outcome = outcome(&scene.relay, scene.now);
        assert_eq!(outcome.status(), CheckStatus::Unhealthy);
        assert!(
            outcome.message().contains("at MAIL FROM: 554 5.7.1 <a…@example.com>: Relay access denied"),
            "{outcome:?}"
        );
        assert!(
            outcome.message().starts_with("sending is paused, no mail is lost: the mail server refused at MAIL FROM")
        );
        assert!(outcome.message().contains("paused for 40 s so far"), "{outcome:?}");
    }

    #[test]
    fn the_check_names_a_domain_that_is_set_aside() {
        for (mut scene, status) in [(Scene::sending(), CheckStatus::Degraded), (Scene::new(), CheckStatus::Unhealthy)] {
            for message in 0..3 {
                assert_eq!(outcome(&scene.relay, scene.now).status(), CheckStatus::Healthy);
                scene.refused_at("a.example", message, 1, Phase::Recipient, RELAY_DENIED);
            }
            let outcome = outcome(&scene.relay, scene.now);
            assert_eq!(outcome.status(), status);
            assert!(outcome.message().contains("a.example: the mail server refused at RCPT TO"), "{outcome:?}");
        }
    }
}
