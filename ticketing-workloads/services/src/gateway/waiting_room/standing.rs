//! How a buyer stands in the queue, and how he is told.

use super::place::Place;
use crate::waiting_room::View;
use serde_json::json;

/// Longest `Retry-After`, in seconds.
const MAX_RETRY_AFTER: u64 = 30;

/// How a buyer stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    /// Nobody waits.
    NotNeeded,
    /// He has no place here.
    NoPlace,
    /// His turn is over.
    Lapsed,
    Admitted,
    Waiting {
        ahead: u64,
        seconds: u64,
    },
}

impl Standing {
    /// By what is known of his place.
    pub fn of(place: Option<Place>, view: &View) -> Self {
        match place.filter(|place| place.epoch == view.epoch).map(|place| place.number) {
            None => Self::NoPlace,
            Some(number) if number <= view.lapsed => Self::Lapsed,
            Some(number) if number <= view.admitted => Self::Admitted,
            Some(number) => Self::Waiting { ahead: view.ahead_of(number), seconds: view.seconds_until(number) },
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::NotNeeded => "NotNeeded",
            Self::NoPlace => "NoPlace",
            Self::Lapsed => "Lapsed",
            Self::Admitted => "Admitted",
            Self::Waiting { .. } => "Waiting",
        }
    }

    pub fn message(&self) -> String {
        match self {
            Self::NotNeeded => "Nobody has to wait. You can order now.".to_owned(),
            Self::NoPlace => "You have no place in the queue yet. You get one when you order.".to_owned(),
            Self::Lapsed => "Your turn is over. You get a new place when you order.".to_owned(),
            Self::Admitted => "It is your turn. You can order now.".to_owned(),
            Self::Waiting { ahead: 0, .. } => "You are next.".to_owned(),
            Self::Waiting { ahead: 1, .. } => "One buyer is ahead of you.".to_owned(),
            Self::Waiting { ahead, .. } => format!("{ahead} buyers are ahead of you."),
        }
    }

    /// When to look again. `chance`, from 0 to 1, spreads those who wait.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most 30 seconds"
    )]
    pub fn retry_after(&self, chance: f64) -> u64 {
        let Self::Waiting { seconds, .. } = self else { return 1 };
        // Four looks on the way: who is let in comes soon, and who is far back seldom asks.
        let longest = seconds.div_ceil(4).clamp(1, MAX_RETRY_AFTER) as f64;
        (longest * (1.0 - 0.2 * chance)).round().max(1.0) as u64
    }

    pub fn to_json(&self, retry_after: u64) -> serde_json::Value {
        let mut answer = json!({
            "status": self.name(), "message": self.message(), "admitted": matches!(self, Self::NotNeeded | Self::Admitted),
        });
        if let Self::Waiting { ahead, seconds } = self {
            answer["position"] = json!(ahead + 1);
            answer["ahead"] = json!(ahead);
            answer["estimateSeconds"] = json!(seconds);
            answer["retryAfterSeconds"] = json!(retry_after);
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn view() -> View {
        View { is_open: true, drawn: 200, admitted: 50, lapsed: 10, rate: 5.0, ..View::default() }
    }

    #[rstest::rstest]
    #[case::lapsed(10, Standing::Lapsed)]
    #[case::just_not_lapsed(11, Standing::Admitted)]
    #[case::admitted(50, Standing::Admitted)]
    #[case::next(51, Standing::Waiting { ahead: 0, seconds: 1 })]
    #[case::last(200, Standing::Waiting { ahead: 149, seconds: 30 })]
    // Drawn at another gateway since this one asked last.
    #[case::not_heard_of_yet(210, Standing::Waiting { ahead: 159, seconds: 32 })]
    fn a_place_is_let_in_between_two_numbers(#[case] number: u64, #[case] expected: Standing) {
        let place = |epoch| Some(Place { epoch, number });
        assert_eq!(Standing::of(place(Uuid::nil()), &view()), expected);
        assert_eq!(Standing::of(place(Uuid::from_u128(1)), &view()), Standing::NoPlace, "of another database");
    }

    #[test]
    fn who_is_near_looks_often_who_is_far_seldom_and_not_all_at_once() {
        let after = |seconds, chance| Standing::Waiting { ahead: 0, seconds }.retry_after(chance);
        assert_eq!([1, 4, 5, 40, 120, 100_000].map(|seconds| after(seconds, 0.0)), [1, 1, 2, 10, 30, 30]);
        assert_eq!([1, 40, 100_000].map(|seconds| after(seconds, 1.0)), [1, 8, 24]);
    }
}
