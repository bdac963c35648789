//! How the operator authenticates to a pod: signed requests, or the plain token for a pod of version 0.1.
//!
//! The token must not travel to find out which of the two a pod understands. So every pod is asked with a signature first;
//! a pod of version 0.1 refuses it and says nothing about signatures, and only then is it sent the token. What is never
//! done: to send the plain token to a pod that has accepted or advertised a signature before, or whose annotation
//! ([`contract::signing::SCHEME_ANNOTATION`], which comes from the API server and not from the network) says that it
//! understands them.

use contract::admin::TOKEN_HEADER;
use contract::revision::MAX_AHEAD_MS;
use contract::signing::{Advertised, ContentHash, MAX_CLOCK_SKEW_MS, Signed};

/// A pod, as the API server knows it.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// Its uid.
    pub uid: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Whether its annotation says that it understands signatures.
    pub signs: bool,
}

/// A request before it is authenticated.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Such as `PUT`.
    pub method: &'a str,
    /// The path with its query.
    pub path: &'a str,
    /// The hash of the body. Computed once for all pods that get the same bytes.
    pub content: ContentHash,
}

/// What the operator has learned about one pod; kept by the pod's uid. A default one has learned nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdminAuth {
    mode: Mode,
    /// Whether the pod has accepted or advertised a signature: from then on it is never sent the plain token.
    signs: bool,
    /// How far the pod's clock is ahead of ours, in milliseconds, as far as that matters.
    clock_offset_ms: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Mode {
    /// Signed for the pod's uid.
    #[default]
    Uid,
    /// Signed for this audience: the pod was not told its uid.
    Audience(Box<str>),
    /// The plain token: a pod of version 0.1.
    Plain,
}

impl AdminAuth {
    /// The headers that authenticate a request to `pod` at `now_ms`, with the workload's token.
    pub fn headers(&self, pod: Pod<'_>, request: Request<'_>, token: &str, now_ms: i64) -> Vec<(&'static str, String)> {
        let audience = match &self.mode {
            Mode::Plain => return vec![(TOKEN_HEADER, token.to_owned())],
            Mode::Uid => pod.uid,
            Mode::Audience(audience) => audience,
        };
        let Request { method, path, content } = request;
        let time_ms = now_ms.saturating_add(self.clock_offset_ms);
        Signed { method, path, time_ms, audience, content }.headers(token.as_bytes()).into()
    }

    /// Learns that the pod has accepted a request, whatever it answered to it.
    pub fn accepted(&mut self) {
        self.signs |= self.mode != Mode::Plain;
    }

    /// Learns from a refusal (401) what the pod wants; `advertised` is what its headers say. Whether the same request is
    /// worth another try at once: something has changed.
    pub fn refused(&mut self, pod: Pod<'_>, advertised: Option<&Advertised>, now_ms: i64) -> bool {
        let before = self.clone();
        match advertised {
            Some(advertised) if advertised.is_of(pod.uid, pod.name) => {
                self.signs = true;
                self.mode = if advertised.audience == pod.uid {
                    Mode::Uid
                } else {
                    Mode::Audience(advertised.audience.as_str().into())
                };
                self.learn_clock(advertised.time_ms, now_ms);
            }
            // It speaks for another pod, so it is not to be trusted in anything.
            Some(_) => {}
            None if self.signs || pod.signs => {}
            None => self.mode = Mode::Plain,
        }
        (&self.mode, self.clock_offset_ms) != (&before.mode, before.clock_offset_ms)
    }

    /// A pod whose clock is off is signed for by its own clock: revisions allow for an hour, so signatures do, too. Further off,
    /// it could take no configuration either; and no answer makes us sign for a distant future.
    fn learn_clock(&mut self, time_ms: Option<i64>, now_ms: i64) {
        let Some(offset) = time_ms.map(|time| time.saturating_sub(now_ms)) else { return };
        let drift = offset.saturating_sub(self.clock_offset_ms).unsigned_abs();
        // Half of what is allowed, so that a little more drift does not make every request fail once.
        if drift > MAX_CLOCK_SKEW_MS.unsigned_abs() / 2 && offset.unsigned_abs() <= MAX_AHEAD_MS.unsigned_abs() {
            self.clock_offset_ms = offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::signing::{CONTENT_HASH_HEADER, Presented, SIGNATURE_HEADER, TIME_HEADER};

    const NOW: i64 = 1_800_000_000_000;
    const TOKEN: &str = "token";
    const POD: Pod<'_> = Pod { uid: "uid-1", name: "booking-1", signs: false };
    const BY_NAME: &str = "booking-1/00ff";

    /// How a pod answers.
    #[derive(Clone, Copy)]
    struct FakePod {
        /// `None`: of version 0.1.
        audience: Option<&'static str>,
        now_ms: i64,
    }

    impl FakePod {
        const V0_1: Self = Self { audience: None, now_ms: NOW };

        fn new(audience: &'static str) -> Self {
            Self { audience: Some(audience), now_ms: NOW }
        }

        fn accepts(self, headers: &[(&'static str, String)]) -> bool {
            let find = |name| headers.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value.as_str());
            let Some(audience) = self.audience else { return find(TOKEN_HEADER) == TOKEN };
            let presented = Presented {
                method: "GET",
                path: "/health",
                signature: find(SIGNATURE_HEADER),
                time: find(TIME_HEADER),
                content: find(CONTENT_HASH_HEADER),
            };
            presented.verify(audience, [TOKEN.as_bytes()], self.now_ms).is_ok()
        }

        fn advertises(self) -> Option<Advertised> {
            self.audience.map(|audience| Advertised { audience: audience.into(), time_ms: Some(self.now_ms) })
        }
    }

    /// Sends a request, and again for as long as it is worth it; the answer is how often, and whether it was accepted.
    fn ask(auth: &mut AdminAuth, pod: Pod<'_>, fake: FakePod) -> (u32, bool) {
        let request = Request { method: "GET", path: "/health", content: ContentHash::of(b"") };
        for tries in 1..10 {
            if fake.accepts(&auth.headers(pod, request, TOKEN, NOW)) {
                auth.accepted();
                return (tries, true);
            }
            if !auth.refused(pod, fake.advertises().as_ref(), NOW) {
                return (tries, false);
            }
        }
        panic!("it goes on for ever");
    }

    fn ahead(ms: i64) -> FakePod {
        FakePod { audience: Some("uid-1"), now_ms: NOW + ms }
    }

    #[rstest::rstest]
    #[case::knows_its_uid(FakePod::new("uid-1"), (1, true))]
    #[case::does_not_know_its_uid(FakePod::new(BY_NAME), (2, true))]
    #[case::of_version_0_1(FakePod::V0_1, (2, true))]
    #[case::wants_to_be_another_pod(FakePod::new("uid-2"), (1, false))]
    #[case::wants_another_name(FakePod::new("booking-2/00ff"), (1, false))]
    #[case::clock_a_minute_off(ahead(MAX_CLOCK_SKEW_MS), (1, true))]
    #[case::clock_half_an_hour_ahead(ahead(1_800_000), (2, true))]
    #[case::clock_half_an_hour_behind(ahead(-1_800_000), (2, true))]
    #[case::clock_a_year_ahead(ahead(365 * 86_400_000), (1, false))]
    #[case::clock_beyond_all_measure(FakePod { audience: Some("uid-1"), now_ms: i64::MIN }, (1, false))]
    fn finds_out_how_to_ask(#[case] fake: FakePod, #[case] expected: (u32, bool)) {
        let mut auth = AdminAuth::default();
        assert_eq!(ask(&mut auth, POD, fake), expected);
        if expected.1 {
            assert_eq!(ask(&mut auth, POD, fake), (1, true), "and remembers it");
        }
    }

    /// Whatever an answer says, a pod that signs is not sent the token.
    #[rstest::rstest]
    #[case::accepted_a_signature(POD, Some(FakePod::new("uid-1")))]
    #[case::advertised_signatures(POD, Some(FakePod::new(BY_NAME)))]
    #[case::annotated(Pod { signs: true, ..POD }, None)]
    fn the_token_does_not_leak_by_a_downgrade(#[case] pod: Pod<'_>, #[case] before: Option<FakePod>) {
        let mut auth = AdminAuth::default();
        if let Some(before) = before {
            assert!(ask(&mut auth, pod, before).1);
        }
        assert_eq!(ask(&mut auth, pod, FakePod::V0_1), (1, false));
        let request = Request { method: "GET", path: "/health", content: ContentHash::of(b"") };
        assert!(
            auth.headers(pod, request, TOKEN, NOW).iter().all(|(name, value)| *name != TOKEN_HEADER && value != TOKEN)
        );
    }

    /// The container of a pod without a uid was started anew, with another instance.
    #[test]
    fn a_new_process_is_signed_for_anew() {
        let mut auth = AdminAuth::default();
        assert_eq!(ask(&mut auth, POD, FakePod::new(BY_NAME)), (2, true));
        assert_eq!(ask(&mut auth, POD, FakePod::new("booking-1/beef")), (2, true));
    }

    /// The pod's image was replaced in place, as a container restart with a moving tag does.
    #[test]
    fn a_pod_that_learns_to_sign_is_signed_for() {
        let mut auth = AdminAuth::default();
        assert_eq!(ask(&mut auth, POD, FakePod::V0_1), (2, true));
        assert_eq!(ask(&mut auth, POD, FakePod::new("uid-1")), (2, true), "it no longer accepts the plain token");
        assert_eq!(ask(&mut auth, POD, FakePod::V0_1), (1, false));
    }
}
