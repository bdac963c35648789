//! From an order to a charge: does what `decision.rs` says, and writes it down before it acts.

use super::decision::{self, Answer, Attempt, Found, Next, PROVIDERS, Purpose, Rules, State, Unpaid, Work};
use super::ledger::{Claim, Ledger, LedgerError, Order, Taken};
use super::providers::{ProviderClient, Reply};
use contract::FallbackSettings;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::{Attribute, Context, Resilience, deadline};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Steps of one request; a correct decision never needs as many.
const MAX_STEPS: usize = 30;
/// Why an attempt is expired.
const BUYER_TOO_LATE: &str = "the buyer did not act in time";
const NEVER_FOUND: &str = "a day after it was asked last, a search finds no charge";
/// Flag that stops all charging (ADR-007 §5).
const EXTERNAL_PROVIDERS: &str = "EnableExternalPaymentProviders";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
    provider: String,
}

/// What came of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Succeeded {
        provider: String,
        /// The provider's id of the charge.
        charge: String,
        /// Whether it was not the first provider.
        used_fallback: bool,
    },
    /// Every provider that could be asked has declined, does not take the order, or waited for the buyer in vain.
    Declined,
    /// The buyer has to act first, at that provider.
    NeedsBuyer { provider: String },
    /// Nothing is charged, and nothing ever will be.
    Closed,
    /// Somebody may have charged. It has to be asked for again, with the same key.
    Unknown,
    /// No provider has charged, and none could be asked. It may be asked for again.
    AllFailed {
        /// For each provider, in the ADR's words, why not.
        reasons: Vec<(String, &'static str)>,
    },
    /// Somebody works on the same order.
    UnderWay,
    /// The key belongs to an order of another amount.
    KeyReused,
    /// Charging is turned off.
    TurnedOff,
}

pub struct Payments {
    resilience: Arc<Resilience>,
    ledger: Ledger,
    providers: [Arc<dyn ProviderClient>; PROVIDERS],
    buyer_limit: Duration,
    outcomes: Family<OutcomeLabels, Counter>,
}

/// A request that is worked on, and what it is about.
struct Request<'a> {
    claim: &'a Claim,
    order: &'a Order,
    until: Option<Instant>,
    rules: Rules,
    work: Work,
    reasons: [Option<&'static str>; PROVIDERS],
    /// What each said that has refused to confirm an object: the attempt ends once that is cancelled.
    refusals: [Option<String>; PROVIDERS],
    /// Whether something new is written down.
    noted: bool,
}

/// What a look has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    pub outcome: Outcome,
    /// Whether something new is written down.
    pub noted: bool,
}

impl Payments {
    /// Charges with `providers`, the first one first. A buyer who has to act has `buyer_limit` for it.
    pub fn new(
        resilience: Arc<Resilience>,
        ledger: Ledger,
        providers: [Arc<dyn ProviderClient>; PROVIDERS],
        buyer_limit: Duration,
    ) -> Arc<Self> {
        let outcomes = Family::<OutcomeLabels, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("payments", "Requests to pay, by outcome and provider", outcomes.clone());
        });
        Arc::new(Self { resilience, ledger, providers, buyer_limit, outcomes })
    }

    /// Sees to it that the order is paid once, or says why it is not paid; or, to close it, that it never is. Providers are
    /// asked for somebody who waits until `until`; what they said is written down in any case.
    pub async fn pay(&self, order: &Order, purpose: Purpose, until: Option<Instant>) -> Result<Outcome, LedgerError> {
        Ok(self.ask_for(order, purpose, until).await?.outcome)
    }

    /// Sees how an order stands.
    pub async fn look(&self, order: &Order) -> Result<Looked, LedgerError> {
        self.ask_for(order, Purpose::Look, None).await
    }

    async fn ask_for(&self, order: &Order, purpose: Purpose, until: Option<Instant>) -> Result<Looked, LedgerError> {
        let (claim, closed) = match self.ledger.take(order, purpose == Purpose::Close).await? {
            Taken::Ours { claim, closed } => (claim, closed),
            Taken::UnderWay => return Ok(Looked { outcome: self.counted(Outcome::UnderWay), noted: false }),
            Taken::KeyReused => return Ok(Looked { outcome: self.counted(Outcome::KeyReused), noted: false }),
        };
        let purpose = if closed && purpose == Purpose::Pay { Purpose::Close } else { purpose };
        let looked = self.work(&claim, order, purpose, until).await;
        // Who pays hears of the charge, and knows whether the booking still wants it.
        if let Ok(Looked { outcome: Outcome::Succeeded { .. }, .. }) = &looked
            && purpose != Purpose::Pay
        {
            self.owe(order).await;
        }
        self.ledger.release(&claim).await;
        let looked = looked?;
        Ok(Looked { outcome: self.counted(looked.outcome), ..looked })
    }

    /// Writes down what it means that this provider has charged an object of the order, also one that was out of the question;
    /// `None`: somebody works on the order. The answer is whether that is new.
    pub async fn found(&self, order: &Order, index: usize, object: &str) -> Result<Option<bool>, LedgerError> {
        let Taken::Ours { claim, .. } = self.ledger.take(order, false).await? else { return Ok(None) };
        let noted = self.note_found(&claim, order, index, object).await;
        self.ledger.release(&claim).await;
        noted.map(Some)
    }

    async fn note_found(&self, claim: &Claim, order: &Order, index: usize, object: &str) -> Result<bool, LedgerError> {
        let (key, provider) = (&order.key, self.providers[index].name());
        if self.ledger.is_refunded(provider, object).await? {
            return Ok(false);
        }
        let rows = self.ledger.attempts_and_objects(key, self.names()).await?;
        let last = rows[index].as_ref().and_then(|(_, last)| last.clone());
        let attempts = rows.map(|one| Some(one?.0));
        match decision::found(&attempts, index, last.as_deref(), object) {
            Found::Known => Ok(false),
            Found::Ours(now) => {
                let before = attempts[index].as_ref();
                let is_open = |one: &Attempt| one.state.in_doubt() || matches!(one.state, State::NeedsBuyer { .. });
                if !before.is_some_and(is_open) {
                    tracing::error!(%key, provider, object, ?before, "charged although that was out of the question");
                }
                self.ledger.note(claim, provider, before, &now, None).await?;
                self.owe(order).await;
                Ok(true)
            }
            Found::Surplus => {
                tracing::error!(%key, provider, object, "charged besides the charge of the payment: it is refunded");
                self.ledger.owe_surplus(claim, provider, object).await?;
                Ok(false)
            }
        }
    }

    /// If this fails, the search for charges of cancelled bookings finds it.
    async fn owe(&self, order: &Order) {
        match self.ledger.owe(&order.key).await {
            Ok(true) => tracing::warn!(key = %order.key, "charged although the booking is cancelled: it is refunded"),
            Ok(false) => {}
            Err(error) => tracing::warn!(key = %order.key, %error, "failed to write a refund down"),
        }
    }

    fn names(&self) -> [&str; PROVIDERS] {
        self.providers.each_ref().map(|provider| provider.name())
    }

    async fn work(
        &self,
        claim: &Claim,
        order: &Order,
        purpose: Purpose,
        until: Option<Instant>,
    ) -> Result<Looked, LedgerError> {
        let work = Work::new(purpose, self.ledger.attempts(&order.key, self.names()).await?);
        let (rules, reasons, refusals) = (self.rules(order), Default::default(), Default::default());
        let mut request = Request { claim, order, until, rules, work, reasons, refusals, noted: false };
        for _ in 0..MAX_STEPS {
            let step = request.work.next(&request.rules);
            tracing::debug!(key = %order.key, ?step, "next step of a payment");
            if let Some(outcome) = self.step(&mut request, step).await? {
                return Ok(Looked { outcome, noted: request.noted });
            }
        }
        tracing::error!(key = %order.key, "a payment took {MAX_STEPS} steps; it goes on with the next request");
        Ok(Looked { outcome: Outcome::Unknown, noted: request.noted })
    }

    fn rules(&self, order: &Order) -> Rules {
        Rules {
            may_charge: self.may_charge(order),
            may_begin: [true, self.may_fall_back()],
            cancels: self.providers.each_ref().map(|provider| provider.cancels()),
            keys_last: self.providers.each_ref().map(|provider| provider.keys_last()),
            buyer_limit: self.buyer_limit,
        }
    }

    /// Does one step; the outcome, if it is the last one.
    async fn step(&self, request: &mut Request<'_>, step: Next) -> Result<Option<Outcome>, LedgerError> {
        match step {
            Next::Paid(index) => {
                let (provider, charge) = (self.providers[index].name().to_owned(), request.work.object(index));
                return Ok(Some(Outcome::Succeeded { provider, charge, used_fallback: index > 0 }));
            }
            Next::AwaitBuyer(index) => {
                return Ok(Some(Outcome::NeedsBuyer { provider: self.providers[index].name().to_owned() }));
            }
            Next::Wait => return Ok(Some(Outcome::Unknown)),
            Next::Exhausted => return Ok(Some(self.not_charged(request))),
            _ => {}
        }
        if let Some((index, attempt)) = request.work.before(step) {
            let was_begun = request.work.attempts[index].as_ref().is_some_and(|before| before.state == State::Begun);
            let expired = attempt.state == State::Expired;
            let reason = expired.then_some(if was_begun { NEVER_FOUND } else { BUYER_TOO_LATE });
            self.note(request, index, attempt, reason).await?;
        }
        let Some(index) = step.sent_to() else { return Ok(None) };
        let started = Instant::now();
        let reply = deadline::within(request.until, self.ask(request, step, index)).await;
        if index > 0 && matches!(step, Next::Create(..)) {
            self.resilience.metrics().fallback(self.providers[0].name(), "provider", started.elapsed());
        }
        self.learn(request, step, index, &reply).await?;
        Ok(None)
    }

    async fn ask(&self, request: &Request<'_>, step: Next, index: usize) -> Reply {
        let (provider, order) = (&self.providers[index], request.order);
        let (object, number) = (request.work.object(index), request.work.number(index));
        match step {
            Next::Create(..) => provider.create(order, number).await,
            Next::Confirm(..) | Next::ConfirmAgain(_) => provider.confirm(order, &object, number).await,
            Next::Cancel(_) => provider.cancel(&object).await,
            Next::Search(_) => provider.search(&order.key).await,
            Next::ChargeAgain(_) => provider.charge_again(order).await,
            _ => provider.read(&object).await,
        }
    }

    /// Writes down what an answer means.
    async fn learn(
        &self,
        request: &mut Request<'_>,
        step: Next,
        index: usize,
        reply: &Reply,
    ) -> Result<(), LedgerError> {
        if let Some(reason) = &reply.reason {
            let (key, name, answer) = (&request.order.key, self.providers[index].name(), &reply.answer);
            tracing::warn!(%key, provider = name, ?step, ?answer, %reason, "the provider did not do what it was asked for");
            let word = if reply.unavailable { "PROVIDER_UNAVAILABLE" } else { "PROCESSING_ERROR" };
            request.reasons[index] = Some(word);
        }
        if reply.answer == Answer::Refused {
            request.refusals[index].clone_from(&reply.reason);
        }
        let (attempt, progress) = request.work.after(step, &reply.answer, &request.rules);
        if let Some(attempt) = attempt {
            let reason = match (&attempt.state, &reply.answer) {
                (State::Expired, _) => Some(BUYER_TOO_LATE.to_owned()),
                (State::Refused, _) => request.refusals[index].take(),
                (_, Answer::NotReached | Answer::Unanswered) => reply.reason.clone(),
                _ => None,
            };
            self.note(request, index, attempt, reason.as_deref()).await?;
        }
        request.work.progress[index] = progress;
        Ok(())
    }

    async fn note(
        &self,
        request: &mut Request<'_>,
        index: usize,
        now: Attempt,
        reason: Option<&str>,
    ) -> Result<(), LedgerError> {
        let before = request.work.attempts[index].as_ref();
        self.ledger.note(request.claim, self.providers[index].name(), before, &now, reason).await?;
        request.work.attempts[index] = Some(now);
        request.noted = true;
        Ok(())
    }

    /// The answer when no provider has charged, and none will by itself.
    fn not_charged(&self, request: &Request<'_>) -> Outcome {
        // The last word only if nobody is left who could be asked later.
        match request.work.unpaid(request.rules.may_begin) {
            Unpaid::Declined => return Outcome::Declined,
            Unpaid::Closed => return Outcome::Closed,
            Unpaid::Open if request.work.purpose == Purpose::Look => return Outcome::Unknown,
            Unpaid::Open if !request.rules.may_charge => return Outcome::TurnedOff,
            Unpaid::Open => {}
        }
        let named = self.providers.iter().zip(request.reasons);
        Outcome::AllFailed { reasons: named.filter_map(|(one, why)| Some((one.name().to_owned(), why?))).collect() }
    }

    /// Whether money may be asked for at all. The same order gets the same answer, whichever process asks.
    fn may_charge(&self, order: &Order) -> bool {
        let attributes = [("currency", Attribute::Text(&order.currency))];
        let context = Context::new(&attributes).with_key(&order.key);
        self.resilience.flags().bool_for(EXTERNAL_PROVIDERS, true, &context)
    }

    /// Whether the policy names the second provider as a fallback of the first.
    fn may_fall_back(&self) -> bool {
        let [first, second] = &self.providers;
        let names_it = |fallback: &FallbackSettings| matches!(fallback, FallbackSettings::Provider { provider } if provider == second.name());
        let dependency = self.resilience.dependency(first.name());
        dependency.is_some_and(|dependency| dependency.settings().fallback.iter().any(names_it))
    }

    fn counted(&self, outcome: Outcome) -> Outcome {
        let (label, provider) = match &outcome {
            Outcome::Succeeded { provider, .. } => ("succeeded", provider.clone()),
            Outcome::Declined => ("declined", String::new()),
            Outcome::NeedsBuyer { provider } => ("needs_buyer", provider.clone()),
            Outcome::Closed => ("closed", String::new()),
            Outcome::Unknown => ("unknown", String::new()),
            Outcome::AllFailed { .. } => ("all_failed", String::new()),
            Outcome::UnderWay => ("under_way", String::new()),
            Outcome::KeyReused => ("key_reused", String::new()),
            Outcome::TurnedOff => ("turned_off", String::new()),
        };
        self.outcomes.get_or_create(&OutcomeLabels { outcome: label, provider }).inc();
        outcome
    }
}
