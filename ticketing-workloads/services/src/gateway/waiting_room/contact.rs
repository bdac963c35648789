//! The line to booking: one call at a time for the whole gateway, whatever the number of buyers who wait. Arrivals go together,
//! in their order.

use super::{Active, WaitingRoom};
use crate::http_client::{Bare, HttpCall, HttpError};
use crate::waiting_room::{MAX_ARRIVALS, PATH, Report, View};
use resilience::Attempt;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tower::ServiceExt;

/// Time between two calls while nobody arrives.
const TICK: Duration = Duration::from_millis(500);
/// Time between two calls while somebody does: arrivals are in order as far as they are further apart than this.
const BATCH: Duration = Duration::from_millis(100);
/// Time to answer a call.
const TIME: Duration = Duration::from_secs(2);
/// How long what booking said last stands when it does not answer.
const GRACE: Duration = Duration::from_secs(10);
/// How long a buyer waits for a number.
const DRAW_TIME: Duration = Duration::from_secs(5);
/// Buyers who wait for one at once. Each has a connection, of which there are fewer.
const MAX_DRAWING: usize = 8_192;

/// The outcome of a request for a number.
#[derive(Clone, Debug)]
pub enum Drawn {
    /// It is this one, and so the room stands.
    Number(u64, Arc<View>),
    /// Nobody waits now.
    Closed,
    /// Booking gave no answer.
    Unreachable,
}

/// What is known of the room.
#[derive(Clone, Debug)]
pub enum Known {
    /// Booking has not been asked yet.
    Nothing,
    /// Nobody waits.
    Closed,
    Open(Arc<View>),
    /// Booking has not answered for a while.
    Away,
}

#[derive(Clone, Default)]
struct Seen {
    /// When booking answered last, and what.
    last: Option<(Instant, Arc<View>)>,
    /// Why it did not, if it did not.
    error: Option<String>,
}

impl Seen {
    fn known(&self) -> Known {
        match (&self.last, &self.error) {
            (Some((at, view)), _) if at.elapsed() <= GRACE => {
                if view.is_open {
                    Known::Open(Arc::clone(view))
                } else {
                    Known::Closed
                }
            }
            (None, None) => Known::Nothing,
            _ => Known::Away,
        }
    }
}

/// A wish for a number, to be answered.
type Arrival = oneshot::Sender<Drawn>;

/// Why booking gave no numbers.
#[derive(Debug, thiserror::Error)]
enum ContactError {
    #[error("no answer within {} s", TIME.as_secs())]
    TimedOut,
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("invalid answer: {0}")]
    Invalid(String),
}

/// The gateway's end of the line.
pub struct Contact {
    arrivals: mpsc::Sender<Arrival>,
    seen: watch::Sender<Seen>,
    hurry: Notify,
}

/// What the task needs that calls booking.
pub struct Line {
    booking: Bare,
    arrivals: mpsc::Receiver<Arrival>,
}

impl Contact {
    pub fn new(booking: Bare) -> (Self, Line) {
        let (sender, arrivals) = mpsc::channel(MAX_DRAWING);
        let contact = Self { arrivals: sender, seen: watch::Sender::default(), hurry: Notify::new() };
        (contact, Line { booking, arrivals })
    }

    /// What is known of the room now.
    pub fn known(&self) -> Known {
        self.seen.borrow().known()
    }

    /// The same once booking was asked: a gateway that has just started knows nothing of those who wait.
    pub async fn known_for_sure(&self) -> Known {
        let mut seen = self.seen.subscribe();
        let asked = seen.wait_for(|seen| !matches!(seen.known(), Known::Nothing));
        match timeout(DRAW_TIME, asked).await {
            Ok(Ok(seen)) => seen.known(),
            _ => Known::Away,
        }
    }

    /// A number for somebody who has just arrived.
    pub async fn draw(&self) -> Drawn {
        let (sender, drawn) = oneshot::channel();
        let until = Instant::now() + DRAW_TIME;
        if self.arrivals.try_send(sender).is_err() {
            return Drawn::Unreachable;
        }
        match timeout_at(until, drawn).await {
            Ok(Ok(drawn)) => drawn,
            _ => Drawn::Unreachable,
        }
    }

    /// Booking is to be told at once how it stands here.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Why booking does not answer, if it does not, and for how long it has not.
    pub fn failure(&self) -> Option<(Option<Duration>, String)> {
        let seen = self.seen.borrow();
        let error = seen.error.clone()?;
        Some((seen.last.as_ref().map(|(at, _)| at.elapsed()), error))
    }
}

impl WaitingRoom {
    /// Keeps the line to booking, for as long as it is polled.
    pub(super) async fn keep_contact(self: Arc<Self>, mut line: Line) {
        // The next call, and the soonest that it may be.
        let (mut next, mut soonest) = (Instant::now(), Instant::now());
        loop {
            let mut arrivals: Vec<Arrival> = Vec::new();
            let hurried = async {
                self.contact.hurry.notified().await;
                sleep_until(soonest).await;
            };
            tokio::select! {
                () = sleep_until(next) => {}
                () = hurried => {}
                Some(first) = line.arrivals.recv() => {
                    arrivals.push(first);
                    sleep_until(soonest).await;
                }
            }
            while arrivals.len() < MAX_ARRIVALS as usize
                && let Ok(next) = line.arrivals.try_recv()
            {
                arrivals.push(next);
            }
            // A caller that has gone meanwhile needs none.
            arrivals.retain(|arrival| !arrival.is_closed());
            (next, soonest) = (Instant::now() + TICK, Instant::now() + BATCH);
            self.refresh_keys();
            let Some(active) = self.active() else {
                self.contact.seen.send_replace(Seen::default());
                self.show(None);
                for arrival in arrivals {
                    let _ = arrival.send(Drawn::Closed);
                }
                continue;
            };
            match self.report(&line.booking, &active, arrivals.len()).await {
                Ok(view) => self.take_note(&Arc::new(view), arrivals),
                Err(error) => {
                    self.note_failure(&error);
                    for arrival in arrivals {
                        let _ = arrival.send(Drawn::Unreachable);
                    }
                }
            }
        }
    }

    async fn report(&self, booking: &Bare, active: &Active, arrivals: usize) -> Result<View, ContactError> {
        let report = Report {
            settings: active.settings.clone(),
            arrivals: u32::try_from(arrivals).unwrap_or(MAX_ARRIVALS),
            load_percent: self.load_percent(),
            orders: self.orders.take(),
        };
        let call = HttpCall::post(PATH, &json!(report));
        // Past the circuit: whether buyers wait must not depend on how their orders fare.
        let asked = booking.clone().oneshot(Attempt::first(call, Some(Instant::now() + TIME)));
        let answer = timeout(TIME, asked).await.map_err(|_| ContactError::TimedOut)??;
        let view: View =
            serde_json::from_slice(&answer.body).map_err(|error| ContactError::Invalid(error.to_string()))?;
        if answer.status.is_success() {
            Ok(view)
        } else {
            Err(ContactError::Invalid(format!("status {}: is booking older than the gateway?", answer.status)))
        }
    }

    fn take_note(&self, view: &Arc<View>, arrivals: Vec<Arrival>) {
        self.show(Some(view.as_ref()));
        let seen = Seen { last: Some((Instant::now(), Arc::clone(view))), error: None };
        let before = self.contact.seen.send_replace(seen);
        let was_open = before.last.is_some_and(|(_, view)| view.is_open);
        if was_open != view.is_open {
            tracing::warn!(is_open = view.is_open, waiting = view.waiting(), "the waiting room changed");
        }
        for (number, arrival) in (view.first..).zip(arrivals) {
            let drawn = if view.first == 0 { Drawn::Closed } else { Drawn::Number(number, Arc::clone(view)) };
            let _ = arrival.send(drawn);
        }
    }

    fn note_failure(&self, error: &ContactError) {
        self.contact.seen.send_modify(|seen| {
            if seen.error.is_none() {
                tracing::warn!(%error, "booking gives no numbers of the waiting room");
            }
            seen.error = Some(error.to_string());
        });
        if matches!(self.contact.known(), Known::Away) {
            self.show(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_booking_said_stands_for_a_while_and_then_nobody_waits() {
        let (contact, _line) = Contact::new(crate::http_client::bare("http://booking:8080"));
        assert!(matches!(contact.known(), Known::Nothing));
        let view = Arc::new(View { is_open: true, ..View::default() });
        contact.seen.send_replace(Seen { last: Some((Instant::now(), view)), error: None });
        assert!(matches!(contact.known(), Known::Open(_)));
        contact.seen.send_modify(|seen| seen.error = Some("gone".to_owned()));
        tokio::time::advance(GRACE).await;
        assert!(matches!(contact.known(), Known::Open(_)));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(matches!(contact.known(), Known::Away));
        let (silent, error) = contact.failure().unwrap();
        assert_eq!((silent.unwrap() > GRACE, error.as_str()), (true, "gone"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_that_has_just_started_asks_before_it_lets_anybody_in() {
        let (contact, _line) = Contact::new(crate::http_client::bare("http://booking:8080"));
        let contact = Arc::new(contact);
        let asking = tokio::spawn({
            let contact = Arc::clone(&contact);
            async move { contact.known_for_sure().await }
        });
        tokio::task::yield_now().await;
        assert!(!asking.is_finished());
        contact.seen.send_modify(|seen| seen.error = Some("refused".to_owned()));
        assert!(matches!(asking.await.unwrap(), Known::Away), "nobody answers: orders pass on");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_number_without_end_and_not_too_many_at_once() {
        let (contact, line) = Contact::new(crate::http_client::bare("http://booking:8080"));
        let began = Instant::now();
        assert!(matches!(contact.draw().await, Drawn::Unreachable));
        assert_eq!(began.elapsed(), DRAW_TIME);
        while contact.arrivals.try_send(oneshot::channel().0).is_ok() {}
        let began = Instant::now();
        assert!(matches!(contact.draw().await, Drawn::Unreachable));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(line.arrivals.len(), MAX_DRAWING);
    }
}
