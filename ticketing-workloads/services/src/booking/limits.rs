//! How much one buyer may take, so that nobody takes it all.
//!
//! What is counted and how is the function `buyer_limit` of the database (step 12), within the statement that takes the seats.

use super::asker::Asker;
use super::seats::Purpose;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Orders of one buyer that a pod works on at once: they wait for each other, and must not keep others waiting.
const AT_ONCE: usize = 4;
/// When to come back where nothing says when a limit is not reached any more. No longer than that is anybody sent away.
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// Limits of buyers. A request that comes from inside the cluster has none.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Limits {
    /// Seats of one event that somebody with a login may have, reserved and booked together; 0: any number. What the event itself
    /// says (`events.seats_per_buyer`) stands above it.
    #[arg(long, env = "SEATS_PER_BUYER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub seats_per_buyer: u32,
    /// The same for a session without a login, which never gets more than somebody with one. Sessions cost nothing, so it is less.
    #[arg(long, env = "SEATS_PER_SESSION", default_value_t = 4, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub seats_per_session: u32,
    /// Seats of one event that all sessions of one network may have together; 0: any number.
    #[arg(long, env = "SEATS_PER_NETWORK", default_value_t = 200, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub seats_per_network: u32,
    /// Seats that one buyer may hold in reservations of all events; 0: any number.
    #[arg(long, env = "HELD_SEATS_PER_BUYER", default_value_t = 20, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub held_seats_per_buyer: u32,
    /// Reservations of one event that a buyer may make in six hours without buying them; 0: any number.
    #[arg(long, env = "HOLDS_PER_BUYER", default_value_t = 6, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub holds_per_buyer: u32,
    /// The same for all sessions of one network together.
    #[arg(long, env = "HOLDS_PER_NETWORK", default_value_t = 500, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub holds_per_network: u32,
    /// Payments of one buyer that may be declined in an hour, those under way included; 0: any number.
    #[arg(long, env = "DECLINES_PER_BUYER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub declines_per_buyer: u32,
    /// Payments that may be declined in an hour of all sessions of one network together; 0: any number.
    #[arg(long, env = "DECLINES_PER_NETWORK", default_value_t = 50, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub declines_per_network: u32,
}

/// Limits in the order in which the database has them; absent ones are not looked at.
pub type Values = [Option<i32>; 7];

fn value(limit: u32) -> Option<i32> {
    i32::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// The smaller one of those that there are.
fn least(one: Option<i32>, other: Option<i32>) -> Option<i32> {
    one.into_iter().chain(other).min()
}

impl Limits {
    /// What holds for an order; `of_event`: what the event itself says of a buyer's seats; `costs`: it is to be paid for at once.
    pub fn of_order(&self, asker: &Asker, purpose: Purpose, of_event: Option<i32>, costs: bool) -> Values {
        if asker.owner().is_none() {
            return Values::default();
        }
        let of_buyer = of_event.or(value(self.seats_per_buyer));
        let seats = if asker.has_login() { of_buyer } else { least(of_buyer, value(self.seats_per_session)) };
        let is_held = matches!(purpose, Purpose::Held { .. });
        let of_network = |limit| asker.network().and_then(|_| value(limit));
        let [.., declines, of_network_declines] = self.of_payment(asker);
        [
            seats,
            of_network(self.seats_per_network),
            value(self.held_seats_per_buyer).filter(|_| is_held),
            value(self.holds_per_buyer).filter(|_| is_held),
            of_network(self.holds_per_network).filter(|_| is_held),
            declines.filter(|_| costs),
            of_network_declines.filter(|_| costs),
        ]
    }

    /// What holds where something is paid for that is reserved already.
    pub fn of_payment(&self, asker: &Asker) -> Values {
        if asker.owner().is_none() {
            return Values::default();
        }
        let of_network = asker.network().and_then(|_| value(self.declines_per_network));
        // With a login, the seats of a session become his.
        let seats = value(self.seats_per_buyer).filter(|_| asker.has_login());
        [seats, None, None, None, None, value(self.declines_per_buyer), of_network]
    }
}

/// A limit that an order has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    Seats { has_login: bool },
    NetworkSeats,
    HeldSeats,
    Holds,
    NetworkHolds,
    Declines,
    NetworkDeclines,
}

impl Reached {
    /// By its place among the values, from 1.
    fn at(place: i32, asker: &Asker) -> Option<Self> {
        Some(match place {
            1 => Self::Seats { has_login: asker.has_login() },
            2 => Self::NetworkSeats,
            3 => Self::HeldSeats,
            4 => Self::Holds,
            5 => Self::NetworkHolds,
            6 => Self::Declines,
            7 => Self::NetworkDeclines,
            _ => return None,
        })
    }

    /// The setting.
    pub fn name(self) -> &'static str {
        match self {
            Self::Seats { has_login: true } => "SEATS_PER_BUYER",
            Self::Seats { has_login: false } => "SEATS_PER_SESSION",
            Self::NetworkSeats => "SEATS_PER_NETWORK",
            Self::HeldSeats => "HELD_SEATS_PER_BUYER",
            Self::Holds => "HOLDS_PER_BUYER",
            Self::NetworkHolds => "HOLDS_PER_NETWORK",
            Self::Declines => "DECLINES_PER_BUYER",
            Self::NetworkDeclines => "DECLINES_PER_NETWORK",
        }
    }

    /// The code of the answer, and the outcome of the metric.
    pub fn codes(self) -> (&'static str, &'static str) {
        match self {
            Self::Seats { .. } | Self::NetworkSeats | Self::HeldSeats => ("TOO_MANY_SEATS", "too_many_seats"),
            Self::Holds | Self::NetworkHolds => ("TOO_MANY_RESERVATIONS", "too_many_reservations"),
            Self::Declines | Self::NetworkDeclines => ("TOO_MANY_DECLINED_PAYMENTS", "too_many_declined_payments"),
        }
    }

    fn message(self, allowed: i32) -> String {
        match self {
            Self::Seats { .. } => {
                format!(
                    "With these, you would have more than {allowed} seats of this event, reserved and booked together"
                )
            }
            Self::NetworkSeats => format!(
                "With these, buyers without a login in your network would have more than {allowed} seats of this event. \
                 Please log in, or come back later"
            ),
            Self::HeldSeats => {
                format!("With these, you would hold more than {allowed} seats. Buy or give back what you have reserved")
            }
            Self::Holds => {
                format!("You have reserved seats of this event {allowed} times without buying them. Come back later")
            }
            Self::NetworkHolds => format!(
                "Buyers without a login in your network have reserved seats of this event {allowed} times without buying \
                 them. Please log in, or come back later"
            ),
            Self::Declines => format!("{allowed} of your payments were declined or are under way. Come back later"),
            Self::NetworkDeclines => format!(
                "{allowed} payments of buyers without a login in your network were declined. Please log in, or come back \
                 later"
            ),
        }
    }
}

/// A buyer may not take more now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .reached.message(*.allowed))]
pub struct Limited {
    pub reached: Reached,
    /// What the limit is.
    pub allowed: i32,
    /// When to come back.
    pub wait: Duration,
}

impl Limited {
    /// What the database says: the limit by its place, and when it may not be reached any more. `None`: no limit.
    pub fn read(place: i32, seconds: Option<f64>, values: &Values, asker: &Asker) -> Option<Self> {
        let reached = Reached::at(place, asker)?;
        let index = usize::try_from(place).ok()?.checked_sub(1)?;
        let allowed = values.get(index).copied().flatten().unwrap_or_default();
        let wait = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(1.0)).ok());
        Some(Self { reached, allowed, wait: wait.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT) })
    }
}

/// The buyers whose orders this pod works on. There are no more of them than orders under way.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<HashMap<String, usize>>);

impl UnderWay {
    /// A place for an order, unless the buyer has enough under way. Requests from inside are not counted.
    pub fn enter(&self, asker: &Asker) -> Option<Place<'_>> {
        let Some(owner) = asker.owner() else { return Some(Place { all: self, owner: None }) };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(owner.to_owned()).or_default();
        if *count >= AT_ONCE {
            return None;
        }
        *count += 1;
        Some(Place { all: self, owner: Some(owner.to_owned()) })
    }
}

/// An order that is under way, until this is dropped.
#[derive(Debug)]
pub struct Place<'a> {
    all: &'a UnderWay,
    owner: Option<String>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let Some(owner) = self.owner.take() else { return };
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                all.remove(&owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buyer::{BUYER, BUYER_NETWORK, Buyer};
    use axum::http::{HeaderMap, HeaderValue};
    use clap::Parser;
    use uuid::Uuid;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        limits: Limits,
    }

    fn limits(arguments: &[&str]) -> Limits {
        Cli::parse_from(std::iter::once(&"booking").chain(arguments)).limits
    }

    fn asker(buyer: &Buyer) -> Asker {
        let network = (BUYER_NETWORK, HeaderValue::from_static("n"));
        Asker::of(&HeaderMap::from_iter([(BUYER, buyer.to_header().unwrap()), network])).unwrap()
    }

    fn user() -> Asker {
        asker(&Buyer::user("https://id.example", "ann"))
    }

    fn session() -> Asker {
        asker(&Buyer::Session(Uuid::from_u128(7)))
    }

    const HELD: Purpose = Purpose::Held { keep: Duration::from_secs(1) };

    #[test]
    fn what_holds_for_whom() {
        let limits = limits(&["--seats-per-buyer=8", "--seats-per-session=3", "--holds-per-network=0"]);
        assert_eq!(limits.of_order(&Asker::default(), HELD, Some(1), true), Values::default());
        let of_user = limits.of_order(&user(), HELD, None, false);
        assert_eq!(of_user, [Some(8), None, Some(20), Some(6), None, None, None]);
        let of_session = limits.of_order(&session(), HELD, None, false);
        assert_eq!(of_session, [Some(3), Some(200), Some(20), Some(6), None, None, None]);
        let paid = limits.of_order(&session(), Purpose::Free, None, true);
        assert_eq!(paid, [Some(3), Some(200), None, None, None, Some(10), Some(50)]);
        assert_eq!(limits.of_payment(&user()), [Some(8), None, None, None, None, Some(10), None]);
        assert_eq!(limits.of_payment(&session())[0], None);
    }

    /// Anybody may have any number of sessions.
    #[test]
    fn without_a_login_there_are_fewer_seats() {
        let limits = limits(&[]);
        let seats = |asker| limits.of_order(&asker, Purpose::Free, None, false)[0];
        assert_eq!((seats(user()), seats(session())), (Some(10), Some(4)));
    }

    #[rstest::rstest]
    #[case::fewer(Some(2), Some(2), Some(2))]
    #[case::more(Some(50), Some(50), Some(3))]
    #[case::says_nothing(None, Some(8), Some(3))]
    fn an_event_may_say_how_many_seats_a_buyer_gets(
        #[case] event: Option<i32>,
        #[case] with_login: Option<i32>,
        #[case] without: Option<i32>,
    ) {
        let limits = limits(&["--seats-per-buyer=8", "--seats-per-session=3"]);
        let seats = |asker| limits.of_order(&asker, Purpose::Free, event, false)[0];
        assert_eq!((seats(user()), seats(session())), (with_login, without));
    }

    #[test]
    fn nobody_is_sent_away_for_longer_than_an_hour_or_for_no_time() {
        let (values, asker) = (limits(&[]).of_order(&session(), HELD, None, true), session());
        let wait = |seconds| Limited::read(1, seconds, &values, &asker).unwrap().wait;
        assert_eq!(wait(None), Duration::from_secs(3_600));
        assert_eq!(wait(Some(20_000.0)), Duration::from_secs(3_600));
        assert_eq!(wait(Some(-3.0)), Duration::from_secs(1));
        assert_eq!(wait(Some(f64::NAN)), Duration::from_secs(1));
        assert_eq!(wait(Some(117.5)), Duration::from_millis(117_500));
        let reached = Limited::read(2, None, &values, &asker).unwrap();
        assert_eq!((reached.reached.name(), reached.allowed), ("SEATS_PER_NETWORK", 200));
        assert_eq!(Limited::read(0, None, &values, &asker), None);
        assert_eq!(Limited::read(8, None, &values, &asker), None);
    }

    #[test]
    fn a_buyer_has_few_orders_under_way_and_leaves_nothing_behind() {
        let under_way = UnderWay::default();
        let mut places: Vec<_> = (0..AT_ONCE).map(|_| under_way.enter(&user()).unwrap()).collect();
        assert!(under_way.enter(&user()).is_none());
        assert!(under_way.enter(&session()).is_some(), "others are not affected");
        places.pop();
        assert!(under_way.enter(&user()).is_some());
        drop(places);
        assert!(under_way.0.lock().unwrap().is_empty());
        let inside: Vec<_> = (0..100).map(|_| under_way.enter(&Asker::default()).unwrap()).collect();
        assert_eq!(inside.len(), 100);
    }
}
