//! From an order to a charge: does what `decision.rs` says, and writes it down before it acts.

use super::decision::{Answer, Attempt, Facts, Next, PROVIDERS, Progress, Purpose, State, learn, next};
use super::ledger::{Claim, Ledger, LedgerError, Order, Taken};
use super::providers::{ProviderClient, Told};
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

/// A request that is worked on.
struct Work<'a> {
    claim: &'a Claim,
    order: &'a Order,
    purpose: Purpose,
    until: Option<Instant>,
    attempts: [Option<Attempt>; PROVIDERS],
    progress: [Progress; PROVIDERS],
    reasons: [Option<&'static str>; PROVIDERS],
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
        let (claim, closed) = match self.ledger.take(order, purpose == Purpose::Close).await? {
            Taken::Ours { claim, closed } => (claim, closed),
            Taken::UnderWay => return Ok(self.counted(Outcome::UnderWay)),
            Taken::KeyReused => return Ok(self.counted(Outcome::KeyReused)),
        };
        let purpose = if closed && purpose == Purpose::Pay { Purpose::Close } else { purpose };
        let outcome = self.work(&claim, order, purpose, until).await;
        self.ledger.release(&claim).await;
        Ok(self.counted(outcome?))
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
    ) -> Result<Outcome, LedgerError> {
        let attempts = self.ledger.attempts(&order.key, self.names()).await?;
        let may_charge = self.may_charge(order);
        let may_ask = [may_charge, may_charge && self.may_fall_back()];
        let mut work =
            Work { claim, order, purpose, until, attempts, progress: Default::default(), reasons: Default::default() };
        for _ in 0..MAX_STEPS {
            let step = next(&Facts {
                attempts: &work.attempts,
                progress: &work.progress,
                may_ask,
                cancels: self.providers.each_ref().map(|provider| provider.cancels()),
                purpose,
                buyer_limit: self.buyer_limit,
            });
            tracing::debug!(key = %order.key, ?step, "next step of a payment");
            if let Some(outcome) = self.step(&mut work, step).await? {
                return Ok(outcome);
            }
        }
        tracing::error!(key = %order.key, "a payment took {MAX_STEPS} steps; it goes on with the next request");
        Ok(Outcome::Unknown)
    }

    /// Does one step; the outcome, if it is the last one.
    async fn step(&self, work: &mut Work<'_>, step: Next) -> Result<Option<Outcome>, LedgerError> {
        let index = match step {
            Next::Paid(index) => {
                let object = work.attempts[index].as_ref().and_then(|one| one.state.object()).unwrap_or_default();
                let (provider, charge) = (self.providers[index].name().to_owned(), object.to_owned());
                return Ok(Some(Outcome::Succeeded { provider, charge, used_fallback: index > 0 }));
            }
            Next::AwaitBuyer(index) => {
                return Ok(Some(Outcome::NeedsBuyer { provider: self.providers[index].name().to_owned() }));
            }
            Next::Wait => return Ok(Some(Outcome::Unknown)),
            Next::Exhausted => return Ok(Some(self.not_charged(work))),
            Next::Expire(index) => {
                let number = work.number(index);
                self.note(work, index, number, State::Expired, Some("the buyer did not act in time")).await?;
                return Ok(None);
            }
            Next::Create(index, number) => {
                self.note(work, index, number, State::Creating, None).await?;
                index
            }
            Next::Confirm(index, number) => {
                let object = work.object(index);
                self.note(work, index, number, State::Confirming { object }, None).await?;
                index
            }
            Next::ConfirmAgain(index)
            | Next::Read(index)
            | Next::Cancel(index)
            | Next::Search(index)
            | Next::ChargeAgain(index) => index,
        };
        let started = Instant::now();
        let told = deadline::within(work.until, self.ask(work, step, index)).await;
        if index > 0 && matches!(step, Next::Create(..)) {
            self.resilience.metrics().fallback(self.providers[0].name(), "provider", started.elapsed());
        }
        self.learn(work, step, index, &told).await?;
        Ok(None)
    }

    async fn ask(&self, work: &Work<'_>, step: Next, index: usize) -> Told {
        let (provider, order) = (&self.providers[index], work.order);
        let (object, number) = (work.object(index), work.number(index));
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
    async fn learn(&self, work: &mut Work<'_>, step: Next, index: usize, told: &Told) -> Result<(), LedgerError> {
        let provider = &self.providers[index];
        if let Some(reason) = &told.reason {
            let (key, name, answer) = (&work.order.key, provider.name(), &told.answer);
            tracing::warn!(%key, provider = name, ?step, ?answer, %reason, "the provider did not do what it was asked for");
            let word = if told.unavailable { "PROVIDER_UNAVAILABLE" } else { "PROCESSING_ERROR" };
            work.reasons[index] = Some(word);
        }
        let Some(attempt) = &work.attempts[index] else { return Ok(()) };
        let (state, progress) = learn(step, &attempt.state, &told.answer, provider.cancels());
        if let Some(state) = state {
            let reason = match (&state, &told.answer) {
                (State::Expired, _) => Some("the buyer did not act in time"),
                (_, Answer::Refused | Answer::NotReached | Answer::Unanswered) => told.reason.as_deref(),
                _ => None,
            };
            self.note(work, index, attempt.number, state, reason).await?;
        }
        work.progress[index] = progress;
        Ok(())
    }

    async fn note(
        &self,
        work: &mut Work<'_>,
        index: usize,
        number: i32,
        state: State,
        reason: Option<&str>,
    ) -> Result<(), LedgerError> {
        let now = Attempt { number, state, age: Duration::ZERO };
        let before = work.attempts[index].as_ref();
        self.ledger.note(work.claim, self.providers[index].name(), before, &now, reason).await?;
        work.attempts[index] = Some(now);
        Ok(())
    }

    /// The answer when no provider has charged, and none will by itself.
    fn not_charged(&self, work: &Work<'_>) -> Outcome {
        // The last word only if nobody is left who could be asked later.
        let exists = [true, self.may_fall_back()];
        let is_over = |one: &Option<Attempt>| {
            one.as_ref().is_some_and(|one| matches!(one.state, State::Declined | State::Refused | State::Expired))
        };
        let expired = work.attempts.iter().flatten().any(|one| one.state == State::Expired);
        if expired || work.attempts.iter().zip(exists).all(|(one, exists)| !exists || is_over(one)) {
            return Outcome::Declined;
        }
        match work.purpose {
            Purpose::Close => return Outcome::Closed,
            Purpose::Look => return Outcome::Unknown,
            Purpose::Pay => {}
        }
        if !self.may_charge(work.order) {
            return Outcome::TurnedOff;
        }
        let named = self.providers.iter().zip(work.reasons);
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

impl Work<'_> {
    fn number(&self, index: usize) -> i32 {
        self.attempts[index].as_ref().map_or(1, |attempt| attempt.number)
    }

    fn object(&self, index: usize) -> String {
        let object = self.attempts[index].as_ref().and_then(|attempt| attempt.state.object());
        object.unwrap_or_default().to_owned()
    }
}
