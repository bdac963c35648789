//! The waiting room, as buyers see it: while it is open, who begins an order gets a place, and orders when it is his turn.
//!
//! Places are in the hands of their holders: the gateway keeps none, and a look at one costs no call. What is common to all
//! gateways is asked of booking twice a second ([`contact`]). Without booking, orders pass on as if there were no waiting room.
//! Finishing a sale never waits, and looking does not.

mod carried;
mod contact;
mod orders;
mod page;
mod place;
mod standing;
mod uses;

use super::buyers::{NewKey, OverHttps};
use super::{BOOKING, bookings, defaults};
use crate::answers::{body_unreadable, refused};
use crate::host::{CAPACITY, StartError};
use crate::http_client::{self, IDEMPOTENCY_KEY};
use crate::waiting_room::View;
use arc_swap::ArcSwap;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use carried::{COOKIE, PLACE, holders, places};
use contact::{Contact, Drawn, Known};
use contract::{CheckStatus, WaitingRoomSettings};
use futures::future::BoxFuture;
use orders::{Measured, Outcome};
use place::{KeyError, Keys, Place};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use resilience::server::read_body;
use resilience::{Check, CheckOutcome, Resilience};
use serde_json::json;
use standing::Standing;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use uses::Uses;

/// What is waited with.
const STARTS: [&str; 2] = ["/api/bookings", "/api/reservations"];
/// Time between two looks at the file with the keys.
const KEYS_EVERY: Duration = Duration::from_secs(10);

/// Settings of the waiting room.
#[derive(Clone, Debug, clap::Args)]
pub struct RoomSettings {
    /// File with the secret that places of the waiting room are signed with, 32 characters or more, the same for all gateways. Of
    /// several lines the first one signs and all hold. Read again every 10 s. Without one nobody waits, whatever the policy says.
    #[arg(long, env = "WAITING_ROOM_KEY_FILE")]
    pub waiting_room_key_file: Option<PathBuf>,
    /// Where the page of the waiting room goes on to when it is the buyer's turn: a path of this site, or an https address.
    #[arg(long, env = "SHOP_URL", default_value = "/")]
    pub shop_url: String,
}

impl RoomSettings {
    /// Whether places can be signed: without that, nobody waits.
    pub fn has_key(&self) -> bool {
        self.waiting_room_key_file.is_some()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// By what the waiting room runs, while it does.
pub struct Active {
    settings: WaitingRoomSettings,
    keys: Arc<Keys>,
}

/// What is read from the file with the keys, and when.
struct KeyFile {
    path: Option<PathBuf>,
    read_at: Mutex<Instant>,
    keys: ArcSwap<Result<Arc<Keys>, KeyError>>,
}

#[derive(Default)]
struct Figures {
    open: Gauge,
    waiting: Gauge,
    rate: Gauge<f64, AtomicU64>,
    admitted: Counter,
    orders: Family<OutcomeLabel, Counter>,
    /// The last number that `admitted` counts; before the first look, [`UNKNOWN`].
    counted: AtomicU64,
}

/// A number that is never drawn.
const UNKNOWN: u64 = u64::MAX;

pub struct WaitingRoom {
    resilience: Arc<Resilience>,
    keys: KeyFile,
    contact: Contact,
    orders: Measured,
    uses: Uses,
    figures: Figures,
    page: page::Page,
}

/// What is to be done with an order.
enum Entry {
    /// It is passed on, on this place if it is on one; `is_new`: its holder does not know it yet.
    Pass {
        place: Option<Place>,
        is_new: bool,
    },
    Wait {
        place: Place,
        view: Arc<View>,
    },
    /// There is no number to be had now.
    Busy,
}

/// Whether a request begins an order.
fn begins_order(request: &Request) -> bool {
    request.method() == Method::POST && STARTS.contains(&request.uri().path())
}

/// Whether the page may go on there.
fn validate_shop_url(url: &str) -> Result<(), StartError> {
    let is_path = url.starts_with('/') && !url.starts_with("//") && !url.starts_with("/\\");
    let is_plain = url.chars().all(|one| one.is_ascii_graphic());
    if is_plain && (is_path || url.starts_with("https://")) {
        return Ok(());
    }
    let message = format!("SHOP_URL is {url:?}: it must be a path of this site, such as /, or begin with https://");
    Err(StartError::Setting(message))
}

impl WaitingRoom {
    /// A waiting room whose numbers are with `booking`, and the task that asks it.
    pub fn new(
        settings: RoomSettings,
        booking: &str,
        resilience: &Arc<Resilience>,
    ) -> Result<(Arc<Self>, BoxFuture<'static, ()>), StartError> {
        let RoomSettings { waiting_room_key_file, shop_url } = settings;
        validate_shop_url(&shop_url)?;
        let figures = Figures { counted: AtomicU64::new(UNKNOWN), ..Figures::default() };
        resilience.metrics().register(|registry| {
            registry.register("waiting_room_open", "Whether buyers wait before they order", figures.open.clone());
            registry.register("waiting_room_waiting", "Buyers who wait", figures.waiting.clone());
            registry.register("waiting_room_rate", "Buyers who are let in each second", figures.rate.clone());
            registry.register("waiting_room_admitted", "Buyers who were let in", figures.admitted.clone());
            let help = "Orders that came while the waiting room was open, by what was done with them";
            registry.register("waiting_room_orders", help, figures.orders.clone());
        });
        let (contact, line) = Contact::new(http_client::bare(booking));
        let keys = Keys::read(waiting_room_key_file.as_deref()).map(Arc::new);
        let keys = KeyFile {
            path: waiting_room_key_file,
            read_at: Mutex::new(Instant::now()),
            keys: ArcSwap::from_pointee(keys),
        };
        let room = Arc::new(Self {
            resilience: Arc::clone(resilience),
            keys,
            contact,
            orders: Measured::default(),
            uses: Uses::default(),
            figures,
            page: page::Page::new(&shop_url),
        });
        let task = Arc::clone(&room).keep_contact(line);
        Ok((room, Box::pin(task)))
    }

    /// Puts the waiting room before what begins orders, and shows places.
    pub fn before(self: &Arc<Self>, orders: Router) -> Router {
        let own = Router::new()
            .route("/api/waiting-room", get(show_place))
            .route("/waiting-room", get(show_page))
            .with_state(Arc::clone(self));
        orders.layer(middleware::from_fn_with_state(Arc::clone(self), guard)).merge(own)
    }

    /// `waiting-room`: whether it does what the policy says.
    pub fn check(self: &Arc<Self>) -> Check {
        let own = Arc::clone(self);
        Check::new("waiting-room", &["service", BOOKING], move |_| {
            let outcome = own.outcome();
            async move { outcome }
        })
        .dependency(BOOKING)
    }

    fn outcome(&self) -> CheckOutcome {
        if self.resilience.policy().waiting_room.is_none() {
            return CheckOutcome::new(CheckStatus::Healthy, "off: the policy has no waitingRoom");
        }
        if let Err(error) = self.keys.keys.load().as_ref() {
            let message = format!("nobody waits, although the policy has a waitingRoom: {error}");
            return CheckOutcome::new(CheckStatus::Degraded, message);
        }
        if let Some((silent, error)) = self.contact.failure() {
            let since = silent.map_or_else(String::new, |silent| format!(" for {} s", silent.as_secs()));
            let meanwhile = match self.contact.known() {
                Known::Away | Known::Nothing => "orders pass on, and nobody waits",
                Known::Open(_) | Known::Closed => "what it said last stands for 10 s",
            };
            let message = format!("booking has given no numbers{since}: {error}; {meanwhile}");
            return CheckOutcome::new(CheckStatus::Degraded, message);
        }
        match self.contact.known() {
            Known::Open(view) => {
                let (waiting, rate) = (view.waiting(), view.rate);
                let message = format!("open: {waiting} wait, {rate:.0} are let in each second");
                CheckOutcome::new(CheckStatus::Healthy, message).with("waiting", json!(waiting))
            }
            Known::Closed => CheckOutcome::new(CheckStatus::Healthy, "closed: nobody has to wait"),
            Known::Nothing | Known::Away => CheckOutcome::new(CheckStatus::Unknown, "booking was not asked yet"),
        }
    }

    /// `None`: there is no waiting room.
    fn active(&self) -> Option<Active> {
        let settings = self.resilience.policy().waiting_room.clone()?;
        let keys = Arc::clone(self.keys.keys.load().as_ref().as_ref().ok()?);
        Some(Active { settings, keys })
    }

    /// A file that cannot be read any more changes nothing.
    fn refresh_keys(&self) {
        let mut read_at = self.keys.read_at.lock().unwrap_or_else(PoisonError::into_inner);
        if read_at.elapsed() < KEYS_EVERY {
            return;
        }
        *read_at = Instant::now();
        drop(read_at);
        match Keys::read(self.keys.path.as_deref()) {
            Err(error) if self.keys.keys.load().is_ok() => {
                tracing::warn!(%error, "failed to read the waiting room's key; the last one stays in effect");
            }
            keys => self.keys.keys.store(Arc::new(keys.map(Arc::new))),
        }
    }

    /// Orders under way in percent of those that may be.
    fn load_percent(&self) -> u32 {
        let bulkhead = self.resilience.dependency(BOOKING).and_then(|booking| booking.settings().bulkhead.clone());
        let policy = self.resilience.policy();
        let own = defaults().bulkheads;
        let bulkhead = bulkhead.and_then(|name| policy.bulkheads.get(&name).or_else(|| own.get(&name)));
        self.orders.load_percent(bulkhead.map_or(CAPACITY, |bulkhead| bulkhead.max_concurrent))
    }

    /// Keeps the figures up to date.
    fn show(&self, view: Option<&View>) {
        let Figures { open, waiting, rate, admitted, counted, .. } = &self.figures;
        let open_view = view.filter(|view| view.is_open);
        open.set(open_view.is_some().into());
        waiting.set(open_view.map_or(0, |view| i64::try_from(view.waiting()).unwrap_or(i64::MAX)));
        rate.set(open_view.map_or(0.0, |view| view.rate));
        if let Some(view) = view {
            let before = counted.swap(view.admitted, Ordering::Relaxed);
            // What was let in before this process began is not counted.
            admitted.inc_by(view.admitted.saturating_sub(before));
        }
    }

    fn count(&self, outcome: &'static str) {
        self.figures.orders.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// The place that the buyer has, if it is a genuine one of his.
    fn place_of(headers: &HeaderMap, keys: &Keys) -> Option<Place> {
        let holders = holders(headers);
        places(headers).find_map(|text| keys.verify(text, &holders))
    }

    async fn enter(&self, active: &Active, headers: &HeaderMap) -> Entry {
        let known = match self.contact.known() {
            Known::Nothing => self.contact.known_for_sure().await,
            known => known,
        };
        let Known::Open(view) = known else { return Entry::Pass { place: None, is_new: false } };
        let place = Self::place_of(headers, &active.keys).filter(|place| place.epoch == view.epoch);
        if let Some(place) = place {
            match Standing::of(Some(place), &view) {
                Standing::Waiting { .. } => return Entry::Wait { place, view },
                Standing::Admitted if self.uses.take(place.number, view.lapsed) => {
                    return Entry::Pass { place: Some(place), is_new: false };
                }
                _ => {}
            }
        }
        if place.is_none() && places(headers).next().is_some() {
            self.count("not_genuine");
        }
        match self.contact.draw().await {
            Drawn::Number(number, view) => {
                let place = Place { epoch: view.epoch, number };
                if Standing::of(Some(place), &view) == Standing::Admitted && self.uses.take(number, view.lapsed) {
                    Entry::Pass { place: Some(place), is_new: true }
                } else {
                    Entry::Wait { place, view }
                }
            }
            Drawn::Unreachable if matches!(self.contact.known(), Known::Open(_)) => Entry::Busy,
            // Without numbers orders pass on as if there were no waiting room.
            Drawn::Closed | Drawn::Unreachable => Entry::Pass { place: None, is_new: false },
        }
    }

    /// Passes an order on, and notes what comes of it.
    async fn pass_on(
        &self,
        place: Option<Place>,
        order: impl Future<Output = Response>,
        settings: &WaitingRoomSettings,
    ) -> Response {
        let response = {
            let _under_way = self.orders.begin();
            if self.load_percent() >= settings.enter_load_percent {
                self.contact.hurry();
            }
            order.await
        };
        let (outcome, response) = orders::outcome(response).await;
        self.orders.count(outcome);
        if outcome == Outcome::Refused {
            self.contact.hurry();
        }
        if let Some(place) = place.filter(|_| outcome != Outcome::Completed) {
            self.uses.give_back(place.number);
        }
        response
    }
}

/// Gives the place to its holder.
fn hand_over(response: &mut Response, text: &str, is_https: bool) {
    let headers = response.headers_mut();
    let secure = if is_https { "; Secure" } else { "" };
    let cookie = format!("{COOKIE}={text}; Path=/; Max-Age=86400; HttpOnly; SameSite=Lax{secure}");
    if let (Ok(place), Ok(cookie)) = (HeaderValue::from_str(text), HeaderValue::from_str(&cookie)) {
        headers.insert(PLACE, place);
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn with_retry_after(mut response: Response, seconds: u64) -> Response {
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn guard(State(room): State<Arc<WaitingRoom>>, request: Request, next: Next) -> Response {
    if !begins_order(&request) {
        return next.run(request).await;
    }
    let Some(active) = room.active() else { return next.run(request).await };
    // Who is slow to send an order is no load, and takes no number.
    let (parts, body) = request.into_parts();
    let body = match read_body(body, bookings::MAX_BODY_BYTES, bookings::BODY_TIMEOUT).await {
        Ok(body) => body,
        Err(error) => return body_unreadable(error),
    };
    // Who has no cookies either is the same buyer with the key that his order would get.
    let key = parts.extensions.get().map(|NewKey(key)| *key);
    let key = key.filter(|_| !parts.headers.contains_key(IDEMPOTENCY_KEY) && bookings::needs_a_key(&body));
    let request = Request::from_parts(parts, Body::from(body));
    let holder = holders(request.headers()).into_iter().next().unwrap_or_default();
    let is_https = request.extensions().get().is_some_and(|OverHttps(only)| *only);
    match room.enter(&active, request.headers()).await {
        Entry::Pass { place, is_new } => {
            if place.is_some() {
                room.count("admitted");
            }
            let mut response = room.pass_on(place, next.run(request), &active.settings).await;
            // So that he may try again if it failed.
            if let Some(text) = place.filter(|_| is_new).and_then(|place| active.keys.sign(place, &holder)) {
                hand_over(&mut response, &text, is_https);
            }
            response
        }
        Entry::Wait { place, view } => {
            room.count("waits");
            let standing = Standing::of(Some(place), &view);
            let seconds = standing.retry_after(rand::random());
            let mut answer = standing.to_json(seconds);
            answer["success"] = json!(false);
            answer["errorCode"] = json!("WAITING_ROOM");
            let text = active.keys.sign(place, &holder);
            answer["place"] = json!(text);
            let response = (StatusCode::ACCEPTED, Json(answer)).into_response();
            let mut response = with_retry_after(response, seconds);
            if let Some(text) = text {
                hand_over(&mut response, &text, is_https);
            }
            let key = key.and_then(|key| HeaderValue::from_str(&key.to_string()).ok());
            response.headers_mut().extend(key.map(|key| (IDEMPOTENCY_KEY, key)));
            response
        }
        Entry::Busy => {
            room.count("busy");
            let message = "The waiting room cannot be reached. Please try again.";
            refused("WAITING_ROOM_UNAVAILABLE", message, Duration::from_secs(2))
        }
    }
}

impl WaitingRoom {
    /// How the buyer stands, without a call.
    fn standing(&self, headers: &HeaderMap) -> Standing {
        match (self.active(), self.contact.known()) {
            (Some(active), Known::Open(view)) => Standing::of(Self::place_of(headers, &active.keys), &view),
            _ => Standing::NotNeeded,
        }
    }
}

async fn show_place(State(room): State<Arc<WaitingRoom>>, headers: HeaderMap) -> Response {
    let standing = room.standing(&headers);
    let seconds = standing.retry_after(rand::random());
    with_retry_after(Json(standing.to_json(seconds)).into_response(), seconds)
}

async fn show_page(State(room): State<Arc<WaitingRoom>>, headers: HeaderMap) -> Response {
    let standing = room.standing(&headers);
    let seconds = standing.retry_after(rand::random());
    room.page.show(&standing, seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("/", true)]
    #[case("/shop?a=b", true)]
    #[case("https://shop.example/", true)]
    #[case("//evil.example", false)]
    #[case("/\\evil.example", false)]
    #[case("http://shop.example", false)]
    #[case("javascript:alert(1)", false)]
    #[case("", false)]
    #[case("/a b", false)]
    fn the_page_goes_on_only_to_places_that_make_sense(#[case] url: &str, #[case] is_valid: bool) {
        assert_eq!(validate_shop_url(url).is_ok(), is_valid);
    }
}
