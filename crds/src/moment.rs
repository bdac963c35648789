//! Moments in specs.

use jiff::Timestamp;
use jiff::fmt::temporal::Pieces;
use serde::{Deserialize, Serialize};

/// The last year that has moments.
const LAST_YEAR: i16 = 9999;

/// A moment as RFC 3339 writes it, kept as it was written: one that cannot be read is a mistake in its own field, and hides nothing
/// else of the object.
///
/// ```
/// let end: crds::Moment = serde_json::from_str(r#""9999-12-31T23:59:59Z""#)?;
/// assert_eq!(end.at(), Ok(jiff::Timestamp::MAX));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(String);

/// Why a text is no moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no moment; write one such as 2026-12-24T18:00:00Z or 2026-12-24T19:00:00+01:00")]
pub struct NoMoment(String);

impl Moment {
    /// When it is. The last two days of the year 9999, which people write for "never", are the last moment that there is.
    pub fn at(&self) -> Result<Timestamp, NoMoment> {
        let text = self.0.as_str();
        let is_never = || {
            Pieces::parse(text).is_ok_and(|pieces| {
                pieces.date().year() == LAST_YEAR && pieces.time().is_some() && pieces.to_numeric_offset().is_some()
            })
        };
        match text.parse() {
            Ok(at) => Ok(at),
            Err(_) if is_never() => Ok(Timestamp::MAX),
            Err(_) => Err(NoMoment(text.chars().take(64).collect())),
        }
    }
}

impl From<Timestamp> for Moment {
    fn from(at: Timestamp) -> Self {
        Self(at.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("2026-12-24T18:00:00Z", Some(1_798_135_200))]
    #[case("2026-12-24T19:00:00+01:00", Some(1_798_135_200))]
    #[case("2026-12-24t18:00:00.123456z", Some(1_798_135_200))]
    #[case("2016-12-31T23:59:60Z", Some(1_483_228_799))]
    #[case("9999-12-31T23:59:59Z", Some(253_402_207_200))]
    #[case("9999-12-31T23:59:59.999999999-12:00", Some(253_402_207_200))]
    #[case("0000-01-01T00:00:00Z", Some(-62_167_219_200))]
    #[case("9999-12-31T23:59:59", None)]
    #[case("9999-12-31", None)]
    #[case("10000-01-01T00:00:00Z", None)]
    #[case("2026-02-30T00:00:00Z", None)]
    #[case("tomorrow", None)]
    #[case("", None)]
    fn moments(#[case] text: &str, #[case] expected: Option<i64>) {
        assert_eq!(Moment(text.to_owned()).at().ok().map(Timestamp::as_second), expected);
    }

    #[test]
    fn a_message_does_not_grow_with_the_text() {
        assert!(Moment("x".repeat(10_000)).at().unwrap_err().to_string().len() < 250);
    }
}
