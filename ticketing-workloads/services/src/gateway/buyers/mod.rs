//! Who a buyer is, and how often he may ask. The services behind the gateway believe what is found here ([`crate::buyer`]).
//!
//! All of it comes before a body is read, and what is cheap comes first.

mod client_address;
mod cross_site;
mod issuer;
mod jwt;
mod key_file;
mod key_set;
mod limits;
pub mod local_token;
mod session;

use crate::answers::{problem, too_many, unavailable};
use crate::buyer::{BUYER, BUYER_NETWORK, BUYER_SESSION, Buyer};
use crate::host::StartError;
use crate::http_client::IDEMPOTENCY_KEY;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use client_address::TrustedProxies;
use futures::FutureExt;
use futures::future::BoxFuture;
use issuer::{Issuer, TokenError};
use jwt::{Algorithm, Expected, InvalidToken, Unverified};
use key_file::{KeyFile, Keys};
use limits::{Buckets, Limit, Who};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::server::network_of;
use resilience::{Check, Metrics, Priority, priority};
use session::{Use, keyed_hash};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Where an order begins: who has no session gets one with it. A waiting room belongs here, too.
const BEGINNINGS: [&str; 3] = ["/api/bookings", "/api/reservations", "/api/waiting-room"];
/// What everybody may look at.
const FOR_EVERYBODY: &str = "/api/events";
/// When to come back with a token that could not be verified.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// How the gateway knows buyers, and how often they may ask.
#[derive(Clone, Debug, clap::Args)]
pub struct BuyerSettings {
    /// Where the keys of the issuer of tokens are (JWKS): https, or http on this machine or in this cluster. Without it and
    /// TOKEN_HMAC_FILE all buyers have sessions only.
    #[arg(long, env = "TOKEN_JWKS_URL", default_value = "")]
    pub token_jwks_url: String,
    /// The issuer, as its tokens name it (`iss`).
    #[arg(long, env = "TOKEN_ISSUER", default_value = "")]
    pub token_issuer: String,
    /// Us, as its tokens name us (`aud`).
    #[arg(long, env = "TOKEN_AUDIENCE", default_value = "")]
    pub token_audience: String,
    /// File with certificates that are trusted for TOKEN_JWKS_URL besides the well-known authorities, in PEM.
    #[arg(long, env = "TOKEN_CA_FILE")]
    pub token_ca_file: Option<PathBuf>,
    /// File with the secrets of tokens that `ticketing token` makes, one a line. For the local stack: who has one can be any
    /// buyer that such a token can name.
    #[arg(long, env = "TOKEN_HMAC_FILE")]
    pub token_hmac_file: Option<PathBuf>,
    /// File with the keys that sign sessions of buyers without a token, one a line; the first one signs, all are taken. Without
    /// it each process has a key of its own, and sessions end with it.
    #[arg(long, env = "SESSION_KEY_FILE")]
    pub session_key_file: Option<PathBuf>,
    /// Whether browsers send the cookie of a session over HTTPS only. It is so, too, for who comes over HTTPS as a trusted proxy
    /// says (X-Forwarded-Proto).
    #[arg(long, env = "SECURE_COOKIES", default_value_t = false, action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub secure_cookies: bool,
    /// Proxies in front of the gateway, whose X-Forwarded-For is believed: how many, or their networks, such as 10.0.0.0/8,fd00::/8.
    #[arg(long, env = "TRUSTED_PROXIES", default_value = "")]
    pub trusted_proxies: TrustedProxies,
    /// Requests of one user with a token: per second, and how many at once. 0: any number, as with the next four.
    #[arg(long, env = "REQUESTS_PER_USER", default_value = "20:40")]
    pub requests_per_user: Limit,
    /// Requests of one session.
    #[arg(long, env = "REQUESTS_PER_SESSION", default_value = "5:10")]
    pub requests_per_session: Limit,
    /// Requests without a good token from one network, an address of IPv4 or 48 bits of IPv6. More where many buyers share an address.
    #[arg(long, env = "REQUESTS_PER_NETWORK", default_value = "50:100")]
    pub requests_per_network: Limit,
    /// New sessions of one network.
    #[arg(long, env = "NEW_SESSIONS_PER_NETWORK", default_value = "20:100")]
    pub new_sessions_per_network: Limit,
    /// Looks at events from one network.
    #[arg(long, env = "EVENT_REQUESTS_PER_NETWORK", default_value = "200:400")]
    pub event_requests_per_network: Limit,
}

/// Which limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    User,
    Session,
    Network,
    NewSession,
    Events,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Session => "session",
            Self::Network => "network",
            Self::NewSession => "new_session",
            Self::Events => "events",
        }
    }
}

/// What is counted for each kind.
struct Limits {
    user: Buckets,
    session: Buckets,
    network: Buckets,
    new_session: Buckets,
    events: Buckets,
}

impl Limits {
    fn of(&self, kind: Kind) -> &Buckets {
        match kind {
            Kind::User => &self.user,
            Kind::Session => &self.session,
            Kind::Network => &self.network,
            Kind::NewSession => &self.new_session,
            Kind::Events => &self.events,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// The idempotency key of an order that has none: its session follows from it, too, so that who sends the order again with
/// this key, and without the cookie, is the same buyer.
#[derive(Clone, Copy)]
pub struct NewKey(pub Uuid);

/// Whether a browser is to send cookies over HTTPS only.
#[derive(Clone, Copy)]
pub struct OverHttps(pub bool);

/// Knows buyers.
pub struct Buyers {
    issuer: Option<Arc<Issuer>>,
    secrets: Option<KeyFile>,
    session_keys: KeyFile,
    secure: bool,
    proxies: TrustedProxies,
    limits: Limits,
    refused: Family<KindLabel, Counter>,
    tokens: Family<OutcomeLabel, Counter>,
    sessions: Counter,
    has_warned: AtomicBool,
}

/// What it takes to know buyers.
pub struct Parts {
    pub buyers: Arc<Buyers>,
    /// What goes on beside the requests.
    pub tasks: Vec<BoxFuture<'static, ()>>,
    pub checks: Vec<Check>,
}

impl Buyers {
    /// By these settings.
    pub fn parts(settings: &BuyerSettings, metrics: &Metrics) -> Result<Parts, StartError> {
        let mut tasks = Vec::new();
        let mut keys_in = |path: &Path, name: &str| {
            let wrong = |error: key_file::KeyFileError| StartError::Setting(format!("{name}: {error}"));
            let keys = KeyFile::open(path).map_err(wrong)?;
            tasks.push(keys.clone().watch(path.to_owned()).boxed());
            Ok::<_, StartError>(keys)
        };
        let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let secrets = given(&settings.token_hmac_file).map(|path| keys_in(&path, "TOKEN_HMAC_FILE")).transpose()?;
        let session_keys = if let Some(path) = given(&settings.session_key_file) {
            keys_in(&path, "SESSION_KEY_FILE")?
        } else {
            tracing::warn!("there is no SESSION_KEY_FILE: sessions end with this pod, and hold in no other");
            KeyFile::fixed(Keys::one(rand::random::<[u8; key_file::MIN_KEY_BYTES]>().to_vec()))
        };
        let issuer = issuer(settings, given(&settings.token_ca_file).as_deref())?;
        let mut checks = Vec::new();
        if let Some(issuer) = &issuer {
            tasks.push(Arc::clone(issuer).keep_keys().boxed());
            checks.push(issuer.check());
        }
        let buyers = Self {
            issuer,
            secrets,
            session_keys,
            secure: settings.secure_cookies,
            proxies: settings.trusted_proxies.clone(),
            limits: Limits {
                user: Buckets::new(settings.requests_per_user),
                session: Buckets::new(settings.requests_per_session),
                network: Buckets::new(settings.requests_per_network),
                new_session: Buckets::new(settings.new_sessions_per_network),
                events: Buckets::new(settings.event_requests_per_network),
            },
            refused: Family::default(),
            tokens: Family::default(),
            sessions: Counter::default(),
            has_warned: AtomicBool::new(false),
        };
        metrics.register(|registry| {
            let help = "Requests refused because somebody asks too often, by whose limit it was";
            registry.register("gateway_requests_refused", help, buyers.refused.clone());
            registry.register("gateway_tokens", "Tokens of buyers, by what was found", buyers.tokens.clone());
            registry.register("gateway_sessions", "New sessions of buyers without a token", buyers.sessions.clone());
        });
        Ok(Parts { buyers: Arc::new(buyers), tasks, checks })
    }

    /// One more request of that kind. `Err`: too many.
    fn take(&self, kind: Kind, who: Who) -> Result<(), Box<Response>> {
        self.limits.of(kind).take(who, Instant::now()).map_err(|wait| {
            self.refused.get_or_create(&KindLabel { kind: kind.name() }).inc();
            Box::new(too_many("TOO_MANY_REQUESTS", "Too many requests. Please slow down.", wait))
        })
    }

    /// Says once, and before a limit is reached, that many buyers may be taken for one network.
    fn warn_of_proxies(&self, headers: &HeaderMap) {
        let may_be_many = self.proxies == TrustedProxies::None && headers.contains_key("x-forwarded-for");
        if may_be_many && !self.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "a request came through a proxy that is not trusted: if all do, all buyers without a login are taken for one \
                 network, with its limits. Set TRUSTED_PROXIES"
            );
        }
    }

    /// Whose token it is.
    async fn user_of(&self, token: Result<&str, InvalidToken>) -> Result<Buyer, TokenError> {
        let result = match token {
            Ok(token) => self.verify(token).await,
            Err(error) => Err(error.into()),
        };
        let outcome = match result {
            Ok(_) => "valid",
            Err(TokenError::Invalid(_)) => "invalid",
            Err(TokenError::Unavailable) => "unavailable",
        };
        self.tokens.get_or_create(&OutcomeLabel { outcome }).inc();
        result
    }

    async fn verify(&self, token: &str) -> Result<Buyer, TokenError> {
        let token = Unverified::read(token)?;
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let claims = match (token.algorithm, &self.secrets, &self.issuer) {
            (Algorithm::Hs256, Some(secrets), _) => local_token::verify(&token, &secrets.now(), seconds)?,
            (Algorithm::Hs256, None, _) | (_, _, None) => return Err(InvalidToken::Algorithm.into()),
            (_, _, Some(issuer)) => issuer.verify(&token, seconds).await?,
        };
        Ok(Buyer::user(&claims.iss, &claims.sub))
    }

    /// Who asks, and whether that is too often. `Err`: the answer, if it goes no further.
    async fn who(&self, asked: &Asked<'_>) -> Result<Known, Box<Response>> {
        let keys = self.session_keys.now();
        let network = network(keys.first(), asked.client);
        let session = session::of(asked.headers, &keys);
        // Where no tokens are taken, whatever a proxy or a client puts there means nothing.
        let takes_tokens = self.issuer.is_some() || self.secrets.is_some();
        let Some(token) = bearer(asked.headers).filter(|_| takes_tokens) else {
            return self.without_a_token(asked, session, network, &keys);
        };
        match self.user_of(token).await {
            Ok(buyer) => {
                self.take(Kind::User, of_text(&buyer.to_string()))?;
                // He may have sent the same order before he logged in, and lost the answer with the cookie.
                let first = || {
                    let key = asked.key_of_the_head().filter(|_| asked.begins_an_order)?;
                    Some(session::of_first_order(key, &keys))
                };
                Ok(Known {
                    buyer,
                    before: session.or_else(first).map(Buyer::Session),
                    network: None,
                    keep: None,
                    is_new: false,
                    has_nothing: false,
                })
            }
            Err(error) => {
                self.take(Kind::Network, network.who)?;
                Err(Box::new(token_refused(error)))
            }
        }
    }

    fn without_a_token(
        &self,
        asked: &Asked<'_>,
        session: Option<Uuid>,
        network: HashedNetwork,
        keys: &Keys,
    ) -> Result<Known, Box<Response>> {
        // The narrow limit first: who reaches it takes nothing from those who share his network.
        if let Some(id) = session {
            self.take(Kind::Session, *id.as_bytes())?;
        }
        self.take(Kind::Network, network.who)?;
        let keeps = asked.begins_an_order;
        if session.is_none() && keeps {
            self.take(Kind::NewSession, network.who)?;
            self.sessions.inc();
        }
        let new = || match asked.idempotency_key().filter(|_| keeps) {
            Some(key) => session::of_first_order(key, keys),
            // Nobody's, unless it is kept.
            None => Uuid::new_v4(),
        };
        let id = session.unwrap_or_else(new);
        // Signed anew, for another 30 days and by the key that signs now.
        let keep = keeps.then(|| session::set_cookie(id, keys, asked.secure)).flatten();
        let is_new = session.is_none() && keeps;
        let has_nothing = session.is_none() && !keeps;
        Ok(Known { buyer: Buyer::Session(id), before: None, network: Some(network.text), keep, is_new, has_nothing })
    }
}

fn issuer(settings: &BuyerSettings, ca_file: Option<&Path>) -> Result<Option<Arc<Issuer>>, StartError> {
    let BuyerSettings { token_jwks_url: url, token_issuer, token_audience, .. } = settings;
    if url.is_empty() {
        return Ok(None);
    }
    if token_issuer.is_empty() || token_audience.is_empty() {
        let message =
            "TOKEN_JWKS_URL needs TOKEN_ISSUER and TOKEN_AUDIENCE: tokens for others would be taken without them";
        return Err(StartError::Setting(message.to_owned()));
    }
    let expected = Expected { issuer: token_issuer.clone(), audience: Some(token_audience.clone()) };
    Ok(Some(Arc::new(Issuer::new(url, ca_file, expected)?)))
}

/// What is looked at of a request.
struct Asked<'a> {
    headers: &'a HeaderMap,
    new_key: Option<Uuid>,
    client: IpAddr,
    begins_an_order: bool,
    secure: bool,
}

impl Asked<'_> {
    /// A key that nobody can guess; without one in the head the one that the order gets if it has none at all.
    fn idempotency_key(&self) -> Option<Uuid> {
        if self.headers.contains_key(IDEMPOTENCY_KEY) { self.key_of_the_head() } else { self.new_key }
    }

    /// The key in the head, if nobody can guess it.
    fn key_of_the_head(&self) -> Option<Uuid> {
        unguessable(self.headers.get(IDEMPOTENCY_KEY)?.to_str().ok()?)
    }
}

/// A key with enough chance in it: a UUID of version 4 or 7.
fn unguessable(key: &str) -> Option<Uuid> {
    Uuid::try_parse(key.trim()).ok().filter(|key| matches!(key.get_version_num(), 4 | 7))
}

/// With an order of somebody who has no session yet: its key may be in its body, which is read later.
#[derive(Clone)]
pub struct FirstOrder {
    keys: Arc<Keys>,
    secure: bool,
}

impl FirstOrder {
    /// Who orders with this key, and the cookie for him; `None`: the key can be guessed, and he is somebody new each time.
    pub fn by(&self, key: &str) -> Option<(HeaderValue, HeaderValue)> {
        let id = session::of_first_order(unguessable(key)?, &self.keys);
        Some((Buyer::Session(id).to_header()?, session::set_cookie(id, &self.keys, self.secure)?))
    }
}

/// Who asks.
struct Known {
    buyer: Buyer,
    /// The session that somebody with a token had before.
    before: Option<Buyer>,
    /// Where somebody without one comes from.
    network: Option<String>,
    /// The cookie of the session.
    keep: Option<HeaderValue>,
    /// Whether it is a session that begins.
    is_new: bool,
    /// Whether it is nobody who has ordered anything.
    has_nothing: bool,
}

impl Known {
    /// Tells the services behind the gateway. Nobody else can have said any of it: the edge removes it.
    fn tell(&self, headers: &mut HeaderMap) {
        for name in [BUYER, BUYER_SESSION, BUYER_NETWORK] {
            headers.remove(name);
        }
        headers.extend(self.buyer.to_header().map(|value| (BUYER, value)));
        let before = self.before.as_ref().and_then(Buyer::to_header);
        headers.extend(before.map(|value| (BUYER_SESSION, value)));
        let network = self.network.as_ref().and_then(|network| HeaderValue::from_str(network).ok());
        headers.extend(network.map(|value| (BUYER_NETWORK, value)));
    }
}

/// A network, by a hash that nobody without our key can turn back into an address.
struct HashedNetwork {
    text: String,
    who: Who,
}

fn network(key: &[u8], client: IpAddr) -> HashedNetwork {
    let bytes = match network_of(client) {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let who = first_half(keyed_hash(key, Use::Network, &bytes));
    HashedNetwork { text: URL_SAFE_NO_PAD.encode(who), who }
}

fn of_text(text: &str) -> Who {
    use sha2::{Digest, Sha256};
    first_half(Sha256::digest(text).into())
}

fn first_half(hash: [u8; 32]) -> Who {
    let mut half = Who::default();
    half.copy_from_slice(&hash[..16]);
    half
}

/// The token of a request; `None`: it has none.
fn bearer(headers: &HeaderMap) -> Option<Result<&str, InvalidToken>> {
    let mut lines = headers.get_all(header::AUTHORIZATION).iter();
    let line = lines.next()?;
    if lines.next().is_some() {
        return Some(Err(InvalidToken::Malformed));
    }
    let Ok(text) = line.to_str() else { return Some(Err(InvalidToken::Malformed)) };
    let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
    scheme.eq_ignore_ascii_case("bearer").then_some(Ok(token.trim()))
}

fn token_refused(error: TokenError) -> Response {
    match error {
        TokenError::Invalid(error) => {
            let mut response = problem(StatusCode::UNAUTHORIZED, "INVALID_TOKEN", &error.to_string());
            let challenge = HeaderValue::from_static(r#"Bearer error="invalid_token""#);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            response
        }
        TokenError::Unavailable => unavailable("TOKENS_UNAVAILABLE", &error.to_string(), RETRY_AFTER),
    }
}

/// Finds out who asks, refuses who asks too often, and tells the services behind the gateway who it is.
pub async fn identify(State(buyers): State<Arc<Buyers>>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(address)| address.ip());
    buyers.warn_of_proxies(headers);
    // Without an address, which only a test does, all are one.
    let peer = peer.unwrap_or(Ipv6Addr::UNSPECIFIED.into());
    let client = buyers.proxies.client(peer, headers);
    let (method, path) = (request.method(), request.uri().path());
    let changes = ![Method::GET, Method::HEAD, Method::OPTIONS].contains(method);
    if changes && cross_site::is_cross_site(headers) {
        return problem(StatusCode::FORBIDDEN, "CROSS_SITE", "a page of another site cannot order here");
    }
    if path == FOR_EVERYBODY {
        let network = network(buyers.session_keys.now().first(), client);
        if let Err(refusal) = buyers.take(Kind::Events, network.who) {
            return *refusal;
        }
        return next.run(request).await;
    }
    let secure = buyers.secure || buyers.proxies.came_over_https(peer, headers);
    let begins_an_order = method == Method::POST && begins_an_order(path);
    let new_key = begins_an_order.then(Uuid::new_v4);
    let known = match buyers.who(&Asked { headers, new_key, client, begins_an_order, secure }).await {
        Ok(known) => known,
        Err(refusal) => return *refusal,
    };
    known.tell(request.headers_mut());
    request.extensions_mut().insert(OverHttps(secure));
    new_key.and_then(|key| request.extensions_mut().insert(NewKey(key)));
    if known.is_new {
        request.extensions_mut().insert(FirstOrder { keys: buyers.session_keys.now(), secure });
    }
    let answer = next.run(request);
    let mut response = if known.has_nothing && priority::current() == Some(Priority::Finish) {
        // There is nothing that he could finish, so he does not go before those who can.
        priority::within(Priority::Look, answer).await
    } else {
        answer.await
    };
    let headers = response.headers_mut();
    let is_ours = |cookie: &HeaderValue| cookie.as_bytes().starts_with(session::COOKIE.as_bytes());
    if !headers.get_all(header::SET_COOKIE).iter().any(is_ours) {
        headers.extend(known.keep.map(|cookie| (header::SET_COOKIE, cookie)));
    }
    // It is for this buyer only.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn begins_an_order(path: &str) -> bool {
    let waits = || path.starts_with(BEGINNINGS[2]) && path.as_bytes().get(BEGINNINGS[2].len()) == Some(&b'/');
    BEGINNINGS.contains(&path) || waits()
}

#[cfg(test)]
mod jwt_tests;
