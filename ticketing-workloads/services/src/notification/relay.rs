//! Whether the mail server takes this service's mails: sending pauses while it does not, and goes on by itself. Pure but for
//! [`RelayWatch`], which holds the state and tells of it.
//!
//! A pause begins with an answer that is about this service, such as a refused name or login, or with no answer at all. What
//! may as well be about one mail begins it only if the server has taken none lately, or refuses several in a row. It lasts a
//! second, then one mail is sent as a probe; each one that fails doubles the time, up to a minute, or up to ten seconds while
//! there is no answer at all. The pause is over when the
//! server takes a mail, or says of one that its recipient does not exist.

use super::mail::MailError;
use super::refusal::{Fault, Reply, fault};
use contract::CheckStatus;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use resilience::clock::in_words;
use resilience::{Check, CheckOutcome, Metrics};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Name of the check.
pub const CHECK: &str = "mail";
/// First pause.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause between two probes. Who asks a block list too often stays on it.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The same of a server that does not answer: asking it costs nobody anything.
const LONGEST_SILENCE: Duration = Duration::from_secs(10);
/// Mails that the server refuses in a row, for whatever may be about it, before it is taken to be about it.
const REFUSED_IN_A_ROW: usize = 3;
/// How long a mail that was taken says that the server takes mails.
const LATELY: Duration = Duration::from_secs(15 * 60);
/// Tries of a mail before a bare 550 to its recipient is believed.
const BARE_REFUSALS: i32 = 3;

/// What came of sending a mail.
#[derive(Clone, Debug)]
pub enum Told<'a> {
    /// It was taken.
    Taken,
    /// The server said no.
    Refused(&'a Reply),
    /// The server did not answer, or is not asked for the time given because its circuit is open. `about_a_mail`: it was asked
    /// about a recipient or a text by then, which may be slow on their own account.
    Silent { words: &'a str, not_before: Option<Duration>, about_a_mail: bool },
}

/// What becomes of the mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Sent,
    /// It can never be sent.
    DeadLetter,
    /// Tried again later; this try counts.
    Later,
    /// It waits for the server; this try does not count.
    Held,
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
    /// Whether the answer may as well have been about one mail.
    unclear: bool,
}

/// Why a pause begins or goes on.
struct Why {
    words: String,
    unclear: bool,
    /// Longest time to the next probe.
    longest: Duration,
}

/// What is known of the server.
#[derive(Debug, Default)]
pub struct Relay {
    pause: Option<Pause>,
    /// Messages that were refused since the last one that was taken.
    refused: BTreeSet<i64>,
    taken_at: Option<Instant>,
}

impl Relay {
    pub fn pause(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// Takes in what came of a message that was tried `tries` times, and says what becomes of it.
    pub fn settle(&mut self, message: i64, tries: i32, is_probe: bool, told: &Told<'_>, now: Instant) -> Verdict {
        let takes_mails = self.taken_at.is_some_and(|at| now.duration_since(at) < LATELY);
        let reply = match told {
            Told::Taken => {
                self.goes_on();
                self.taken_at = Some(now);
                return Verdict::Sent;
            }
            Told::Silent { words, about_a_mail: true, .. } if takes_mails && self.pause.is_none() => {
                return if self.suspect(message, words, is_probe, now) { Verdict::Held } else { Verdict::Later };
            }
            Told::Silent { words, not_before, about_a_mail } => {
                let why = Why { words: (*words).to_owned(), unclear: *about_a_mail, longest: LONGEST_SILENCE };
                self.stop(why, is_probe, *not_before, now);
                return Verdict::Held;
            }
            Told::Refused(reply) => *reply,
        };
        let words = MailError::Refused(reply.clone()).to_string();
        let why = |unclear| Why { words: words.clone(), unclear, longest: LONGEST_PAUSE };
        match fault(reply) {
            Fault::Recipient => {
                self.goes_on();
                Verdict::DeadLetter
            }
            Fault::PerhapsRecipient if takes_mails && self.pause.is_none() && tries >= BARE_REFUSALS => {
                Verdict::DeadLetter
            }
            Fault::Mail => {
                match &self.pause {
                    // It has come as far as this mail, so it answers, and takes name and login.
                    Some(pause) if is_probe && !pause.unclear => self.goes_on(),
                    Some(_) if is_probe => self.stop(why(true), true, None, now),
                    _ => {}
                }
                Verdict::Later
            }
            Fault::PerhapsRecipient | Fault::Unclear => {
                self.suspect(message, &words, is_probe, now);
                Verdict::Later
            }
            // From here on the answer is about this service; only whether others get through is not known.
            Fault::Relay if reply.is_about_a_mail() && takes_mails && self.pause.is_none() => {
                if self.suspect(message, &words, is_probe, now) { Verdict::Held } else { Verdict::Later }
            }
            Fault::Relay => {
                self.stop(why(reply.is_about_a_mail()), is_probe, None, now);
                Verdict::Held
            }
        }
    }

    /// Notes a refusal that may be about the server; `true`: sending is paused now.
    fn suspect(&mut self, message: i64, words: &str, is_probe: bool, now: Instant) -> bool {
        self.refused.insert(message);
        if self.refused.len() >= REFUSED_IN_A_ROW || self.pause.is_some() {
            let why = Why { words: words.to_owned(), unclear: true, longest: LONGEST_PAUSE };
            self.stop(why, is_probe, None, now);
        }
        self.pause.is_some()
    }

    fn goes_on(&mut self) {
        self.pause = None;
        self.refused.clear();
    }

    /// Begins a pause, or makes it longer after a probe that failed. Mails that were on their way when it began change nothing.
    fn stop(&mut self, why: Why, is_probe: bool, not_before: Option<Duration>, now: Instant) {
        let Why { words, unclear, longest } = why;
        self.refused.clear();
        let not_before = now + not_before.unwrap_or_default();
        match &mut self.pause {
            None => {
                let until = not_before.max(now + FIRST_PAUSE);
                self.pause = Some(Pause { since: now, until, length: FIRST_PAUSE, probes: 0, words, unclear });
            }
            Some(pause) if is_probe => {
                pause.length = (pause.length * 2).min(longest);
                pause.until = not_before.max(now + pause.length);
                pause.probes += 1;
                // That the circuit is open says less than why.
                if not_before == now {
                    pause.words = words;
                    pause.unclear = unclear;
                }
            }
            Some(pause) => pause.until = pause.until.max(not_before),
        }
    }
}

/// The state, its metrics, and whoever waits for the end of a pause.
pub struct RelayWatch {
    relay: Mutex<Relay>,
    paused: Gauge,
    pauses: Counter,
    changed: Notify,
}

impl RelayWatch {
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        let (paused, pauses) = (Gauge::default(), Counter::default());
        metrics.register(|registry| {
            let help = "1 while sending is paused because the mail server takes nothing from this service";
            registry.register("notification_paused", help, paused.clone());
            registry.register("notification_pauses", "Pauses that have begun", pauses.clone());
        });
        Arc::new(Self { relay: Mutex::default(), paused, pauses, changed: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Relay> {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the next probe goes; `None`: nothing is paused.
    pub fn paused_until(&self) -> Option<Instant> {
        self.lock().pause().map(|pause| pause.until)
    }

    /// Until a pause ends early, because a mail that was on its way was taken.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// [`Relay::settle`], told in the log and the metrics.
    pub fn settle(&self, message: i64, tries: i32, is_probe: bool, told: &Told<'_>) -> Verdict {
        let mut relay = self.lock();
        let before = relay.pause().cloned();
        let verdict = relay.settle(message, tries, is_probe, told, Instant::now());
        let after = relay.pause().cloned();
        drop(relay);
        self.paused.set(i64::from(after.is_some()));
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
            let outcome = outcome(own.lock().pause(), Instant::now());
            std::future::ready(outcome)
        });
        check.dependency(dependency)
    }
}

fn outcome(pause: Option<&Pause>, now: Instant) -> CheckOutcome {
    let Some(pause) = pause else { return CheckOutcome::new(CheckStatus::Healthy, "mails are sent") };
    let since = now.saturating_duration_since(pause.since);
    let next = pause.until.saturating_duration_since(now);
    let message = format!(
        "sending is paused, no mail is lost: {}. Next probe in {}; paused for {} so far",
        pause.words,
        in_words(next),
        in_words(since)
    );
    CheckOutcome::new(CheckStatus::Unhealthy, message)
        .with("pausedSeconds", json!(since.as_secs()))
        .with("probes", json!(pause.probes))
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

        fn taken(&mut self) {
            assert_eq!(self.relay.settle(0, 1, self.relay.pause.is_some(), &Told::Taken, self.now), Verdict::Sent);
        }

        fn refused(&mut self, message: i64, tries: i32, phase: Phase, text: &str) -> Verdict {
            let is_probe = self.relay.pause.as_ref().is_some_and(|pause| pause.until <= self.now);
            let reply = reply(phase, text);
            self.relay.settle(message, tries, is_probe, &Told::Refused(&reply), self.now)
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        /// Time until the next probe.
        fn wait(&self) -> u64 {
            self.relay.pause().unwrap().until.duration_since(self.now).as_secs()
        }
    }

    const RELAY_DENIED: &str = "554 5.7.1 Relay access denied";

    #[test]
    fn a_pause_doubles_up_to_a_minute_and_ends_with_a_mail_that_is_taken() {
        let mut scene = Scene::new();
        let mut waits = Vec::new();
        for message in 0..9 {
            assert_eq!(scene.refused(message, 1, Phase::Connect, "504 5.5.2 need a name with a dot"), Verdict::Held);
            waits.push(scene.wait());
            scene.pass(Duration::from_secs(scene.wait()));
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        scene.taken();
        assert_eq!(scene.relay.pause(), None);
        scene.refused(9, 1, Phase::Login, "535 5.7.8 no");
        assert_eq!(scene.wait(), 1, "the next one begins anew");
    }

    #[test]
    fn a_server_that_is_away_is_asked_more_often() {
        let mut scene = Scene::new();
        let mut waits = Vec::new();
        for message in 0..6 {
            let told = Told::Silent { words: "connection refused", not_before: None, about_a_mail: false };
            assert_eq!(scene.relay.settle(message, 1, message > 0, &told, scene.now), Verdict::Held);
            waits.push(scene.wait());
        }
        assert_eq!(waits, [1, 2, 4, 8, 10, 10]);
    }

    #[test]
    fn mails_that_were_on_their_way_make_a_pause_no_longer() {
        let mut scene = Scene::new();
        for message in 0..8 {
            assert_eq!(scene.refused(message, 1, Phase::Recipient, RELAY_DENIED), Verdict::Held);
            assert_eq!(scene.wait(), 1);
        }
        assert_eq!(scene.relay.pause().unwrap().probes, 0);
    }

    /// Such as a relay whose next server refuses the mails to one domain.
    #[test]
    fn one_mail_that_is_refused_holds_up_no_other_where_others_are_taken() {
        let mut scene = Scene::new();
        scene.taken();
        for tries in 1..9 {
            assert_eq!(scene.refused(1, tries, Phase::Recipient, RELAY_DENIED), Verdict::Later);
            assert_eq!(scene.refused(1, tries, Phase::End, "550 5.7.1 our policy forbids it"), Verdict::Later);
        }
        assert_eq!(scene.refused(2, 1, Phase::Recipient, RELAY_DENIED), Verdict::Later);
        assert_eq!(scene.refused(3, 1, Phase::Recipient, RELAY_DENIED), Verdict::Held, "three in a row are no chance");
    }

    /// Such as a server that asks the recipient's before it answers.
    #[test]
    fn a_recipient_that_makes_the_server_slow_holds_up_no_other() {
        let mut scene = Scene::new();
        let told = Told::Silent { words: "timed out", not_before: None, about_a_mail: true };
        scene.taken();
        for message in 1..3 {
            assert_eq!(scene.relay.settle(message, 1, false, &told, scene.now), Verdict::Later);
        }
        scene.taken();
        assert_eq!(scene.relay.settle(3, 1, false, &told, scene.now), Verdict::Later);
        let gone = Told::Silent { words: "connection refused", not_before: None, about_a_mail: false };
        assert_eq!(scene.relay.settle(4, 1, false, &gone, scene.now), Verdict::Held);
        assert!(scene.relay.pause().is_some());
    }

    #[test]
    fn full_mailboxes_wait_and_many_in_a_row_are_a_quota() {
        let mut scene = Scene::new();
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
        scene.taken();
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

    #[test]
    fn no_probe_goes_while_the_circuit_is_open_and_the_reason_stays() {
        let mut scene = Scene::new();
        scene.refused(1, 1, Phase::Connect, "554 5.7.1 go away");
        scene.pass(FIRST_PAUSE);
        let told = Told::Silent {
            words: "the circuit is open",
            not_before: Some(Duration::from_secs(30)),
            about_a_mail: false,
        };
        assert_eq!(scene.relay.settle(2, 1, true, &told, scene.now), Verdict::Held);
        assert_eq!(scene.wait(), 30);
        assert!(scene.relay.pause().unwrap().words.contains("go away"));
    }

    #[test]
    fn the_check_says_it_in_the_servers_words() {
        assert_eq!(outcome(None, Instant::now()).status(), CheckStatus::Healthy);
        let mut scene = Scene::new();
        scene.refused(1, 1, Phase::Recipient, "554 5.7.1 <ann@example.com>: Relay access denied");
        scene.pass(Duration::from_secs(40));
        let outcome = outcome(scene.relay.pause(), scene.now);
        assert_eq!(outcome.status(), CheckStatus::Unhealthy);
        assert!(
            outcome.message().contains("at RCPT TO: 554 5.7.1 <a…@example.com>: Relay access denied"),
            "{outcome:?}"
        );
        assert!(
            outcome.message().starts_with("sending is paused, no mail is lost: the mail server refused at RCPT TO")
        );
        assert!(outcome.message().contains("paused for 40 s so far"), "{outcome:?}");
    }
}
