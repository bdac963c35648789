//! The waiting room: while more buyers come than booking can serve, each gets a number, and numbers are let in as fast as
//! booking copes. Gateways keep buyers waiting; booking keeps the numbers, in its database, for all of them.
//!
//! [`decision`] is what happens next, as a function of what is written down; here is what gateways and booking say to each
//! other about it.

pub mod decision;

use contract::WaitingRoomSettings;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Where booking is told of arrivals. The gateway passes nothing on to this path.
pub const PATH: &str = "/internal/waiting-room";
/// Most arrivals in one report.
pub const MAX_ARRIVALS: u32 = 10_000;

/// What a gateway tells booking, about twice a second and for each batch of arrivals.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// By what the room runs.
    pub settings: WaitingRoomSettings,
    /// Buyers who ask for a number.
    pub arrivals: u32,
    /// How busy the gateway is with orders now, in percent of what it may pass on at once; more than 100 where some queue.
    pub load_percent: u32,
    /// What came of orders since the last report.
    pub orders: Orders,
}

/// Orders, by what came of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Orders {
    /// Booking dealt with them, whatever its answer was.
    pub completed: u32,
    /// Booking, or the gateway's bulkhead, had no room for them.
    pub refused: u32,
    /// They failed.
    pub failed: u32,
}

/// What booking answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct View {
    /// Which row of numbers this is.
    pub epoch: Uuid,
    /// Whether everybody new gets a number.
    pub is_open: bool,
    /// The number of the first arrival; those after it have the next ones. 0: none was drawn, because the room is closed.
    pub first: u64,
    /// The last number that was drawn.
    pub drawn: u64,
    /// The last number that was let in.
    pub admitted: u64,
    /// The last number whose admission is over.
    pub lapsed: u64,
    /// Numbers that are let in each second.
    pub rate: f64,
}

impl View {
    /// How many wait.
    pub fn waiting(&self) -> u64 {
        self.drawn.saturating_sub(self.admitted)
    }

    /// How many of them are let in before `number`.
    pub fn ahead_of(&self, number: u64) -> u64 {
        number.saturating_sub(self.admitted).saturating_sub(1)
    }

    /// In how many seconds it is the turn of `number`, at the rate of now.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate; `as` saturates"
    )]
    pub fn seconds_until(&self, number: u64) -> u64 {
        let positions = number.saturating_sub(self.admitted);
        (positions as f64 / self.rate.max(0.1)).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_one_waits_for_nobody_and_the_last_one_for_all_others() {
        let view = View { drawn: 30, admitted: 10, rate: 4.0, ..View::default() };
        assert_eq!(view.waiting(), 20);
        assert_eq!([10, 11, 12, 30].map(|number| view.ahead_of(number)), [0, 0, 1, 19]);
        assert_eq!([10, 11, 14, 15, 30].map(|number| view.seconds_until(number)), [0, 1, 1, 2, 5]);
        let still = View { drawn: 5, rate: 0.0, ..View::default() };
        assert_eq!(still.seconds_until(5), 50, "an estimate all the same");
    }
}
