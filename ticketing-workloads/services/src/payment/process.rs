//! From an order to a charge: one provider after the other, and never two for one order.

use super::ledger::{Claim, Known, Ledger, LedgerError, Order, Taken};
use super::providers::{Asked, ProviderClient};
use contract::FallbackSettings;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::{Attribute, Context, Resilience, deadline};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

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
    /// Every provider that could be asked has declined.
    Declined,
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

/// What there is to do for an order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    /// It is paid, by the provider of that number.
    Paid(usize, String),
    /// Whether the provider of that number has charged when it was last asked, that long ago and for that time, must be
    /// found out before anything else.
    LookUp(usize, Duration, i32),
    /// The provider of that number may be asked for money.
    Ask(usize),
    /// Every provider has answered definitely, or cannot be asked.
    Exhausted,
}

/// Decides by what is known of all providers, in the order in which they are asked; `None`: not asked, or not charged.
/// `failed` are those that were asked by this request and have not charged; `may_ask` are those that may be asked.
fn next(known: &[Option<Known>], failed: &[bool], may_ask: &[bool]) -> Next {
    let find = |wanted: &dyn Fn(usize, &Known) -> Option<Next>| {
        known.iter().enumerate().find_map(|(index, known)| wanted(index, known.as_ref()?))
    };
    let paid = find(&|index, known| match known {
        Known::Charged { charge } => Some(Next::Paid(index, charge.clone())),
        _ => None,
    });
    let open = find(&|index, known| match known {
        Known::Begun { age, asks } => Some(Next::LookUp(index, *age, *asks)),
        _ => None,
    });
    let ask = || {
        let free = |index: &usize| {
            may_ask[*index] && !failed[*index] && matches!(known[*index], None | Some(Known::NotCharged))
        };
        (0..known.len()).find(free).map(Next::Ask)
    };
    paid.or(open).or_else(ask).unwrap_or(Next::Exhausted)
}

/// A provider, asked for somebody who waits until then.
struct Bounded<'a> {
    provider: &'a dyn ProviderClient,
    until: Option<Instant>,
}

impl Bounded<'_> {
    fn name(&self) -> &str {
        self.provider.name()
    }

    async fn charge(&self, order: &Order) -> Asked {
        deadline::within(self.until, self.provider.charge(order)).await
    }

    async fn find(&self, key: &str) -> Result<Option<String>, String> {
        deadline::within(self.until, self.provider.find(key)).await
    }
}

pub struct Payments {
    resilience: Arc<Resilience>,
    ledger: Ledger,
    providers: [Arc<dyn ProviderClient>; 2],
    absent_after: Duration,
    outcomes: Family<OutcomeLabels, Counter>,
}

impl Payments {
    /// Charges with `providers`, the first one first.
    pub fn new(
        resilience: Arc<Resilience>,
        ledger: Ledger,
        providers: [Arc<dyn ProviderClient>; 2],
        absent_after: Duration,
    ) -> Arc<Self> {
        let outcomes = Family::<OutcomeLabels, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("payments", "Requests to pay, by outcome and provider", outcomes.clone());
        });
        Arc::new(Self { resilience, ledger, providers, absent_after, outcomes })
    }

    /// Sees to it that the order is paid once, or says why it is not paid. Providers are asked for somebody who waits until
    /// `until`; what they said is written down in any case.
    pub async fn pay(&self, order: &Order, until: Option<Instant>) -> Result<Outcome, LedgerError> {
        let claim = match self.ledger.take(order).await? {
            Taken::Ours(claim) => claim,
            Taken::UnderWay => return Ok(self.counted(Outcome::UnderWay)),
            Taken::KeyReused => return Ok(self.counted(Outcome::KeyReused)),
        };
        let outcome = self.ask_all(&claim, order, until).await;
        self.ledger.release(&claim).await;
        Ok(self.counted(outcome?))
    }

    async fn ask_all(&self, claim: &Claim, order: &Order, until: Option<Instant>) -> Result<Outcome, LedgerError> {
        let mut written = self.ledger.known(&order.key).await?;
        let mut known = self.providers.each_ref().map(|provider| written.remove(provider.name()));
        let may_charge = self.may_charge(order);
        let may_ask = [may_charge, may_charge && self.may_fall_back()];
        let mut reasons: [Option<&'static str>; 2] = [None, None];
        loop {
            let (index, asks, found) = match next(&known, &reasons.map(|reason| reason.is_some()), &may_ask) {
                Next::Paid(index, charge) => {
                    let provider = self.providers[index].name().to_owned();
                    return Ok(Outcome::Succeeded { provider, charge, used_fallback: index > 0 });
                }
                Next::LookUp(index, age, asks) => {
                    // The caller may have died, or had no answer.
                    // The age is that of the first attempt; the last one may have left as late as this.
                    let absent_is_never = age >= self.absent_after + self.providers[index].request_timeout();
                    (index, asks, self.look_up(&self.bounded(index, until), order, absent_is_never).await)
                }
                Next::Ask(index) => {
                    let provider = self.bounded(index, until);
                    let asks = self.ledger.begin(claim, provider.name()).await?;
                    let started = Instant::now();
                    let (found, reason) = self.ask(&provider, order).await;
                    reasons[index] = reason;
                    if index > 0 {
                        self.resilience.metrics().fallback(self.providers[0].name(), "provider", started.elapsed());
                    }
                    (index, asks, found)
                }
                Next::Exhausted => return Ok(self.not_charged(order, &known, reasons)),
            };
            // Not known: it stays as it is written, and nobody else is asked.
            let Some(found) = found else { return Ok(Outcome::Unknown) };
            self.ledger.settle(claim, self.providers[index].name(), asks, &found).await?;
            known[index] = Some(found);
        }
    }

    fn bounded(&self, index: usize, until: Option<Instant>) -> Bounded<'_> {
        Bounded { provider: self.providers[index].as_ref(), until }
    }

    /// Asks a provider for money. The answer is what is known then, and why it has not charged.
    async fn ask(&self, provider: &Bounded<'_>, order: &Order) -> (Option<Known>, Option<&'static str>) {
        match provider.charge(order).await {
            Asked::Charged { charge } => (Some(Known::Charged { charge }), None),
            Asked::Declined => (Some(Known::Declined), None),
            Asked::Failed { in_doubt, unavailable, reason } => {
                let name = provider.name();
                tracing::warn!(key = %order.key, provider = name, in_doubt, %reason, "charge failed or its outcome is unknown");
                let word = if unavailable { "PROVIDER_UNAVAILABLE" } else { "PROCESSING_ERROR" };
                let known = if in_doubt { self.look_up(provider, order, false).await } else { Some(Known::NotCharged) };
                (known, Some(word))
            }
        }
    }

    /// Looks the charge up at the provider; `None`: its outcome stays unknown. That it is not there says something only if
    /// `absent_is_never`: once no request can arrive any more, and what has arrived can be found.
    async fn look_up(&self, provider: &Bounded<'_>, order: &Order, absent_is_never: bool) -> Option<Known> {
        match provider.find(&order.key).await {
            Ok(Some(charge)) => Some(Known::Charged { charge }),
            Ok(None) => absent_is_never.then_some(Known::NotCharged),
            Err(reason) => {
                let name = provider.name();
                tracing::warn!(key = %order.key, provider = name, %reason, "charge outcome unknown");
                None
            }
        }
    }

    /// The answer when no provider has charged.
    fn not_charged(&self, order: &Order, known: &[Option<Known>; 2], reasons: [Option<&'static str>; 2]) -> Outcome {
        // The last word only if nobody is left who could be asked later.
        let exists = [true, self.may_fall_back()];
        if known.iter().zip(exists).all(|(known, exists)| !exists || *known == Some(Known::Declined)) {
            return Outcome::Declined;
        }
        if !self.may_charge(order) {
            return Outcome::TurnedOff;
        }
        let named = self.providers.iter().zip(reasons);
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

#[cfg(test)]
mod tests {
    use super::*;

    const BEGUN: Option<Known> = Some(Known::Begun { age: Duration::ZERO, asks: 3 });

    fn charged() -> Known {
        Known::Charged { charge: "c".into() }
    }

    fn look_up(index: usize) -> Next {
        Next::LookUp(index, Duration::ZERO, 3)
    }

    #[rstest::rstest]
    #[case::new([None, None], [false, false], Next::Ask(0))]
    #[case::first_has_not([Some(Known::NotCharged), None], [true, false], Next::Ask(1))]
    #[case::first_declined([Some(Known::Declined), None], [false, false], Next::Ask(1))]
    #[case::asked_again_later([Some(Known::NotCharged), Some(Known::NotCharged)], [false, false], Next::Ask(0))]
    #[case::first_is_open([BEGUN, None], [false, false], look_up(0))]
    #[case::second_is_open([Some(Known::NotCharged), BEGUN], [false, false], look_up(1))]
    #[case::second_has_charged([Some(Known::NotCharged), Some(charged())], [false, false], Next::Paid(1, "c".into()))]
    #[case::second_has_charged_and_first_is_open([BEGUN, Some(charged())], [false, false], Next::Paid(1, "c".into()))]
    #[case::both_failed([Some(Known::NotCharged), Some(Known::NotCharged)], [true, true], Next::Exhausted)]
    #[case::both_declined([Some(Known::Declined), Some(Known::Declined)], [false, false], Next::Exhausted)]
    fn what_is_known_of_all_comes_before_asking_one(
        #[case] known: [Option<Known>; 2],
        #[case] failed: [bool; 2],
        #[case] expected: Next,
    ) {
        assert_eq!(next(&known, &failed, &[true, true]), expected);
    }

    /// Exhaustive: no provider is asked while another has charged or may have.
    #[test]
    fn no_provider_is_asked_while_another_may_have_charged() {
        let states = [None, BEGUN, Some(charged()), Some(Known::NotCharged), Some(Known::Declined)];
        let both = [false, true];
        for first in &states {
            for second in &states {
                for failed in both.iter().flat_map(|a| both.map(|b| [*a, b])) {
                    for may_ask in both.iter().flat_map(|a| both.map(|b| [*a, b])) {
                        let known = [first.clone(), second.clone()];
                        let spent = known.iter().any(|one| *one == BEGUN || *one == Some(charged()));
                        let next = next(&known, &failed, &may_ask);
                        assert!(!(spent && matches!(next, Next::Ask(_) | Next::Exhausted)), "{known:?} {next:?}");
                        if let Next::Ask(index) = next {
                            assert!(may_ask[index] && !failed[index] && known[index] != Some(Known::Declined));
                        }
                    }
                }
            }
        }
    }
}
