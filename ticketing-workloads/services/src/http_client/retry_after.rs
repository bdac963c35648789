//! `Retry-After` (RFC 9110 §10.2.3): a number of seconds, or a date.

use axum::http::{HeaderMap, header};
use std::time::{Duration, SystemTime};

/// Longest wait that is believed.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);

/// How long an answer with these headers, which arrived at `now`, asks to wait. A date is compared with the answer's own
/// `Date`, so that a clock that is wrong here or there changes nothing; without one, with `now`. A date that has passed is
/// no wait; what is neither a number nor a date says nothing.
pub fn of(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number that is too large for a computer is only a long time.
        return Some(text.parse().map_or(LONGEST, Duration::from_secs).min(LONGEST));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    let sent = headers.get(header::DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    Some(until.duration_since(sent.unwrap_or(now)).unwrap_or_default().min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(retry_after: &str, date: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::from_iter([(header::RETRY_AFTER, retry_after.parse().unwrap())]);
        headers.extend(date.map(|date| (header::DATE, date.parse().unwrap())));
        headers
    }

    const NOW: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

    #[rstest::rstest]
    #[case::seconds("120", None, Some(120))]
    #[case::none("0", None, Some(0))]
    #[case::spaces(" 7 ", None, Some(7))]
    #[case::too_long("999999999", None, Some(86_400))]
    #[case::beyond_numbers("99999999999999999999999", None, Some(86_400))]
    #[case::date("Sun, 06 Nov 1994 08:49:42 GMT", None, Some(5))]
    #[case::date_of_rfc_850("Sunday, 06-Nov-94 08:49:42 GMT", None, Some(5))]
    #[case::date_of_asctime("Sun Nov  6 08:49:42 1994", None, Some(5))]
    #[case::by_the_senders_clock("Sun, 06 Nov 1994 09:49:42 GMT", Some("Sun, 06 Nov 1994 09:49:37 GMT"), Some(5))]
    #[case::a_senders_clock_that_is_none("Sun, 06 Nov 1994 08:49:42 GMT", Some("noon"), Some(5))]
    #[case::passed("Sun, 06 Nov 1994 08:00:00 GMT", None, Some(0))]
    #[case::far("Fri, 06 Nov 2099 08:49:42 GMT", None, Some(86_400))]
    #[case::words("soon", None, None)]
    #[case::negative("-1", None, None)]
    #[case::a_fraction("1.5", None, None)]
    #[case::empty("", None, None)]
    fn read(#[case] value: &str, #[case] date: Option<&str>, #[case] seconds: Option<u64>) {
        let now = httpdate::parse_http_date(NOW).unwrap();
        assert_eq!(of(&headers(value, date), now), seconds.map(Duration::from_secs));
    }

    proptest! {
        #[test]
        fn never_more_than_a_day_whatever_is_sent(value in "[ -~]{0,40}", date in "[ -~]{0,40}", now in 0u64..5_000_000_000) {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
            prop_assert!(of(&headers(&value, Some(&date)), now).unwrap_or_default() <= LONGEST);
        }

        #[test]
        fn a_date_is_as_good_as_the_seconds_until_it(now in 0u64..4_000_000_000, wait in 0u64..86_400) {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
            let date = httpdate::fmt_http_date(now + Duration::from_secs(wait));
            prop_assert_eq!(of(&headers(&date, None), now), of(&headers(&wait.to_string(), None), now));
        }
    }
}
