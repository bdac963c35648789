//! While sales are being finished, no more is begun and looked at than leaves them quick: a probe of booking shows whether it does,
//! and the bulkhead for booking lets in as many as the [`AdaptiveLimit`] says.
//!
//! The probe is a request of the gateway's own, always the same. Nobody outside can make it quick or slow by what they ask for, but
//! by keeping booking busy; and a provider of payments that is slow does not slow it. It asks for a booking that there is not: through
//! booking, its connections and its database, as important as what it stands for.
//!
//! Where there is no answer nobody is held back: what is away is the circuit's business.

use crate::http_client::{Bare, HttpCall, HttpError};
use axum::http::StatusCode;
use resilience::bulkhead::AdaptiveLimit;
use resilience::{Attempt, Dependency, Failure, FailureKind, Priority, priority};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;
use uuid::Uuid;

/// Time between two probes, while anything is asked of booking.
const TICK: Duration = Duration::from_millis(25);
/// The same while nothing is, once it is known what it takes then; and while booking does not answer.
const QUIET_TICK: Duration = Duration::from_secs(1);
/// Time to answer a probe. One that takes longer counts as one that took so long.
const TIME: Duration = Duration::from_millis(250);
/// After a sale was finished, others are to be expected for so long.
const FINISHING: Duration = Duration::from_secs(30);
/// Without any request for so long, it is quiet.
const QUIET: Duration = Duration::from_secs(30);
/// Without an answer for so long, nobody is held back.
const FORGOTTEN: Duration = Duration::from_secs(3);

/// What is asked of booking, as far as it matters here.
#[derive(Default)]
pub struct Traffic {
    /// Anything, since the last look.
    any: Flag,
    /// A sale was finished since then.
    finished: Flag,
    begun: Notify,
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Flag {
    /// Whether it was not up yet.
    fn raise(&self) -> bool {
        // Mostly it is.
        !self.0.load(Ordering::Relaxed) && !self.0.swap(true, Ordering::AcqRel)
    }

    fn lower(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

impl Traffic {
    /// A request has come.
    pub fn see(&self) {
        if self.any.raise() {
            self.begun.notify_one();
        }
    }

    /// One of this priority was answered. Anybody can ask for the end of a sale; where there was none it does not count.
    pub fn see_answer(&self, priority: Priority, status: StatusCode) {
        if priority == Priority::Finish && status.is_success() {
            self.finished.raise();
        }
    }
}

/// Keeps the limit, for as long as it is polled. It is known at each time, and holds while sales are being finished.
pub async fn keep_limit(traffic: Arc<Traffic>, booking: Bare, dependency: &'static Dependency) {
    let mut limit = AdaptiveLimit::new(Instant::now());
    let (mut seen, mut answered, mut finished) = (None::<Instant>, Instant::now(), None::<Instant>);
    let mut is_away = false;
    let within = |since: Option<Instant>, time| since.is_some_and(|since| since.elapsed() < time);
    loop {
        if is_away {
            // However much is asked of it: it has enough to do with coming back.
            sleep(QUIET_TICK).await;
        } else if within(seen, QUIET) || !limit.is_known() {
            sleep(TICK).await;
        } else {
            // Who comes first ends the quiet.
            let _ = timeout(QUIET_TICK, traffic.begun.notified()).await;
        }
        if traffic.any.lower() {
            seen = Some(Instant::now());
        }
        if traffic.finished.lower() {
            finished = Some(Instant::now());
        }
        let most = dependency.max_concurrent().unwrap_or(u32::MAX);
        let holds = within(finished, FINISHING);
        let probed = probe(&booking).await;
        is_away = probed.is_none();
        match probed {
            Some(took) => {
                answered = Instant::now();
                limit.take(answered, took, dependency.less_important(), most, holds);
            }
            None if answered.elapsed() >= FORGOTTEN => limit.lift(),
            None => {}
        }
        dependency.hold_back(holds.then(|| limit.limit(most)));
    }
}

/// How long booking takes for it; `None`: it does not do it.
async fn probe(booking: &Bare) -> Option<Duration> {
    let begin = Instant::now();
    let call = HttpCall::get(format!("/api/bookings/{}", Uuid::nil()));
    let asked = booking.clone().oneshot(Attempt::first(call, Some(begin + TIME)));
    match timeout(TIME, priority::within(Priority::Finish, asked)).await {
        Ok(Ok(answer)) if answer.status == StatusCode::NOT_FOUND => Some(begin.elapsed()),
        Ok(Err(error)) if has_too_much(&error) => Some(TIME),
        Ok(_) => None,
        Err(_) => Some(TIME),
    }
}

/// Whether booking has refused it because there is too much to do.
fn has_too_much(error: &HttpError) -> bool {
    matches!(error.kind(), FailureKind::RateLimited | FailureKind::Overloaded(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http_client;
    use axum::Router;
    use axum::http::HeaderMap;
    use axum::response::IntoResponse;
    use axum::routing::get;
    use contract::{BulkheadSettings, DependencySettings, PolicySettings, TimeoutSettings, WorkloadId};
    use resilience::Resilience;
    use std::sync::atomic::{AtomicU64, AtomicUsize};

    const BOOKING: &str = "booking";
    /// Instead of milliseconds: it fails; it has too much to do.
    const BROKEN: u64 = u64::MAX;
    const OVERLOADED: u64 = BROKEN - 1;
    const ALL: u32 = 15;
    const LEAST: u32 = 1;

    /// Booking that takes so many milliseconds for a probe, and has no end of an order.
    struct Booking {
        millis: Arc<AtomicU64>,
        probes: Arc<AtomicUsize>,
        resilience: Arc<Resilience>,
        dependency: &'static Dependency,
        url: String,
    }

    impl Booking {
        async fn start() -> Self {
            let (millis, probes) = (Arc::<AtomicU64>::default(), Arc::<AtomicUsize>::default());
            let (delay, count) = (Arc::clone(&millis), Arc::clone(&probes));
            let router = Router::new()
                .route(
                    "/api/bookings/00000000-0000-0000-0000-000000000000",
                    get(async move |headers: HeaderMap| {
                        assert_eq!(headers["x-priority"], "finish");
                        count.fetch_add(1, Ordering::Relaxed);
                        match delay.load(Ordering::Relaxed) {
                            BROKEN => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
                            OVERLOADED => crate::answers::refused("FULL", "full", Duration::from_secs(1)),
                            millis => {
                                sleep(Duration::from_millis(millis)).await;
                                StatusCode::NOT_FOUND.into_response()
                            }
                        }
                    }),
                )
                .route("/order", get(std::future::pending::<StatusCode>));
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
            let room = BulkheadSettings { max_concurrent: 20, max_queued: 100, max_wait_ms: 60_000 };
            let timeout = TimeoutSettings { request_ms: 60_000, per_try_ms: 60_000, connect_ms: None };
            let settings =
                DependencySettings { bulkhead: Some(BOOKING.to_owned()), timeout, ..DependencySettings::default() };
            let defaults = PolicySettings {
                dependencies: [(BOOKING.to_owned(), settings)].into(),
                bulkheads: [(BOOKING.to_owned(), room)].into(),
                ..Default::default()
            };
            let id = WorkloadId::deployment("ticketing", "gateway");
            let resilience = Resilience::builder(id).dependency(BOOKING).defaults(defaults).build();
            let dependency = resilience.dependency(BOOKING).unwrap();
            dependency.keep_slots();
            Self { millis, probes, resilience, dependency, url }
        }

        /// The limit is kept, and known. Then as many orders are under way as may be.
        async fn crowd(&self, priority: Priority) -> Arc<Traffic> {
            let traffic = Arc::<Traffic>::default();
            tokio::spawn(keep_limit(Arc::clone(&traffic), http_client::bare(&self.url), self.dependency));
            self.probed(30, &traffic, priority).await;
            let service = http_client::service(&self.url, self.dependency);
            for _ in 0..30 {
                let service = service.clone();
                tokio::spawn(priority::within(Priority::Start, async move {
                    http_client::ask(&service, HttpCall::get("/order")).await.is_ok()
                }));
            }
            until("orders are under way", || self.dependency.less_important() == ALL).await;
            self.takes(0, &traffic, ALL).await;
            traffic
        }

        /// It takes so long now, until the limit is this.
        async fn takes(&self, millis: u64, traffic: &Traffic, limit: u32) {
            self.millis.store(millis, Ordering::Relaxed);
            until("the limit follows", || {
                traffic.see();
                self.limit() == limit
            })
            .await;
        }

        /// Waits for so many probes, with requests of this priority all the time.
        async fn probed(&self, times: usize, traffic: &Traffic, priority: Priority) {
            let before = self.probes.load(Ordering::Relaxed);
            until("it is probed", || {
                traffic.see();
                traffic.see_answer(priority, StatusCode::OK);
                self.probes.load(Ordering::Relaxed) >= before + times
            })
            .await;
        }

        /// Orders that may be under way.
        fn limit(&self) -> u32 {
            let page = self.resilience.metrics().encode();
            let line = "bulkhead_limit{bulkhead=\"booking\",priority=\"start\"} ";
            page.lines().find_map(|all| all.split_once(line)).unwrap().1.parse().unwrap()
        }
    }

    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(Instant::now() < end, "{what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn orders_are_held_back_while_they_slow_those_who_finish() {
        let booking = Booking::start().await;
        let traffic = booking.crowd(Priority::Finish).await;
        booking.takes(60, &traffic, LEAST).await;
        booking.takes(0, &traffic, ALL).await;
    }

    #[tokio::test]
    async fn nobody_is_held_back_while_nobody_finishes_and_all_are_at_once_when_somebody_does() {
        let booking = Booking::start().await;
        let traffic = booking.crowd(Priority::Start).await;
        booking.millis.store(60, Ordering::Relaxed);
        booking.probed(70, &traffic, Priority::Start).await;
        assert_eq!(booking.limit(), ALL);
        // Whatever somebody asks for that is not his.
        traffic.see_answer(Priority::Finish, StatusCode::NOT_FOUND);
        booking.probed(2, &traffic, Priority::Start).await;
        assert_eq!(booking.limit(), ALL);
        booking.probed(2, &traffic, Priority::Finish).await;
        assert_eq!(booking.limit(), LEAST);
    }

    /// What is wrong with it then is not that it has too much to do.
    #[tokio::test]
    async fn nobody_is_held_back_where_booking_fails() {
        let booking = Booking::start().await;
        let traffic = booking.crowd(Priority::Finish).await;
        booking.takes(60, &traffic, LEAST).await;
        booking.takes(BROKEN, &traffic, ALL).await;
        let begin = Instant::now();
        booking.probed(3, &traffic, Priority::Finish).await;
        assert!(begin.elapsed() > QUIET_TICK, "it is not asked all the time");
    }

    #[tokio::test]
    async fn orders_are_held_back_where_booking_has_too_much_to_do() {
        let booking = Booking::start().await;
        let traffic = booking.crowd(Priority::Finish).await;
        booking.takes(OVERLOADED, &traffic, LEAST).await;
        // Longer than an answer may be away.
        booking.probed(150, &traffic, Priority::Start).await;
        assert_eq!(booking.limit(), LEAST);
    }
}
