//! The issuer of tokens: its keys, fetched now and then and kept while it is away.

use super::jwt::{self, Claims, Expected, InvalidToken, Unverified};
use super::key_set::{KeySet, KeySetError};
use crate::host::StartError;
use crate::http_client::{HttpCall, HttpError};
use crate::payment::https::{Credentials, Https};
use arc_swap::ArcSwapOption;
use axum::body::Bytes;
use axum::http::{StatusCode, Uri};
use contract::CheckStatus;
use futures::FutureExt;
use futures::future::BoxFuture;
use resilience::{Check, CheckOutcome};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Keys are fetched again when they are so old.
const REFRESH: Duration = Duration::from_secs(5 * 60);
/// Keys are used for so long while the issuer is away.
const USED_FOR: Duration = Duration::from_secs(24 * 3_600);
/// Least time between two fetches, whatever tokens name: anybody can name keys that there are not.
const LEAST_PAUSE: Duration = Duration::from_secs(30);
/// The same while there are no keys at all; doubled up to that with each failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Time for a fetch.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request waits for a fetch that it needs.
const WAIT: Duration = Duration::from_secs(3);
/// Largest set of keys, in bytes.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;

/// Why a token cannot be verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(transparent)]
    Invalid(#[from] InvalidToken),
    #[error("tokens cannot be verified now: their issuer's keys are not to be had")]
    Unavailable,
}

/// Why there are no new keys.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("no answer within {} s", FETCH_TIMEOUT.as_secs())]
    Timeout,
    #[error("status {0}")]
    Status(StatusCode),
    #[error("it has more than {MAX_DOCUMENT_BYTES} bytes")]
    TooLarge,
    #[error(transparent)]
    Keys(#[from] KeySetError),
}

/// The fetches so far.
#[derive(Clone, Copy, Debug, Default)]
struct Fetches {
    /// When the last one ended.
    last: Option<Instant>,
    /// Those that have failed since the last one that did not.
    failed: u32,
}

impl Fetches {
    /// Whether a token that names an unknown key is a reason for another one.
    fn may_follow(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.saturating_duration_since(last) >= LEAST_PAUSE)
    }

    /// When the next one is due anyway; `usable`: whether there are keys.
    fn pause(&self, usable: bool) -> Duration {
        match self.failed {
            0 => REFRESH,
            _ if usable => LEAST_PAUSE,
            failed => FIRST_PAUSE.saturating_mul(1 << (failed - 1).min(5)).min(LEAST_PAUSE),
        }
    }
}

/// Keys, and when they were fetched.
struct Kept {
    keys: KeySet,
    since: Instant,
}

impl Kept {
    fn are_usable(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) <= USED_FOR
    }
}

/// How keys are fetched.
type Source = Box<dyn Fn() -> BoxFuture<'static, Result<Bytes, FetchError>> + Send + Sync>;

/// An issuer whose tokens are taken.
pub struct Issuer {
    source: Source,
    expected: Expected,
    kept: ArcSwapOption<Kept>,
    fetches: watch::Sender<Fetches>,
    wanted: Notify,
}

impl Issuer {
    /// The issuer whose keys are at `url`. `ca_file`: trusted besides the well-known authorities, in PEM.
    pub fn new(url: &str, ca_file: Option<&Path>, expected: Expected) -> Result<Self, StartError> {
        let wrong = |why: &str| StartError::Setting(format!("TOKEN_JWKS_URL {url}: {why}"));
        let uri: Uri = url.parse().map_err(|_| wrong("it is no URL"))?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(wrong("it has to be like https://id.example/.well-known/jwks.json"));
        };
        if scheme != "https" && !(scheme == "http" && is_near(authority.host())) {
            return Err(wrong(
                "only what comes over https is believed, or from this machine or cluster (*.svc) over http",
            ));
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let https = Arc::new(Https::new(&format!("{scheme}://{authority}"), ca_file, Credentials::None, None)?);
        let source = move || document(Arc::clone(&https), HttpCall::get(path.clone())).boxed();
        Ok(Self::from(Box::new(source), expected))
    }

    fn from(source: Source, expected: Expected) -> Self {
        let (kept, fetches) = (ArcSwapOption::empty(), watch::Sender::default());
        Self { source, expected, kept, fetches, wanted: Notify::new() }
    }

    /// Fetches keys, whenever they are due or wanted.
    pub async fn keep_keys(self: Arc<Self>) {
        loop {
            let result = self.fetch().await;
            let now = Instant::now();
            let failed = match &result {
                Ok(_) => 0,
                Err(_) => self.fetches.borrow().failed.saturating_add(1),
            };
            match result {
                Ok(keys) => self.kept.store(Some(Arc::new(Kept { keys, since: now }))),
                Err(error) if failed == 1 => {
                    tracing::warn!(%error, "the keys of the issuer of tokens cannot be fetched; those that were fetched before are used for a day");
                }
                Err(error) => tracing::debug!(%error, failed, "the keys of the issuer of tokens cannot be fetched"),
            }
            let fetches = Fetches { last: Some(now), failed };
            self.fetches.send_replace(fetches);
            let due = now + fetches.pause(self.usable(now).is_some());
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(due) => break,
                    // Several may have wanted the one that has just been made.
                    () = self.wanted.notified() => {
                        if fetches.may_follow(Instant::now()) {
                            break;
                        }
                    }
                }
            }
        }
    }

    async fn fetch(&self) -> Result<KeySet, FetchError> {
        let document = tokio::time::timeout(FETCH_TIMEOUT, (self.source)()).await;
        Ok(KeySet::read(&document.map_err(|_| FetchError::Timeout)??)?)
    }

    fn usable(&self, now: Instant) -> Option<Arc<Kept>> {
        self.kept.load_full().filter(|kept| kept.are_usable(now))
    }

    /// What a token says, if it is good, `seconds` after 1970.
    pub async fn verify(&self, token: &Unverified<'_>, seconds: f64) -> Result<Claims, TokenError> {
        match self.try_to_verify(token) {
            // Its key may be new, or nothing has been fetched yet.
            Err(TokenError::Unavailable | TokenError::Invalid(InvalidToken::UnknownKey))
                if self.fetched_anew().await =>
            {
                self.try_to_verify(token)
            }
            result => result,
        }
        .and_then(|claims| {
            jwt::check(&claims, &self.expected, seconds)?;
            Ok(claims)
        })
    }

    fn try_to_verify(&self, token: &Unverified<'_>) -> Result<Claims, TokenError> {
        let kept = self.usable(Instant::now()).ok_or(TokenError::Unavailable)?;
        match kept.keys.of(token) {
            Ok(key) => Ok(token.verified_by(key)?),
            // It may be good: nobody can say so.
            Err(InvalidToken::UnknownKey) if self.fetches.borrow().failed > 0 => Err(TokenError::Unavailable),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether there has been a fetch since the call, which waits for one that may be made.
    async fn fetched_anew(&self) -> bool {
        let mut fetches = self.fetches.subscribe();
        let so_far = *fetches.borrow_and_update();
        if !so_far.may_follow(Instant::now()) {
            return false;
        }
        if so_far.last.is_some() {
            self.wanted.notify_one();
        }
        tokio::time::timeout(WAIT, fetches.changed()).await.is_ok_and(|changed| changed.is_ok())
    }

    /// `token-issuer`: whether there are keys, and whether they can be fetched.
    pub fn check(self: &Arc<Self>) -> Check {
        let issuer = Arc::clone(self);
        Check::new("token-issuer", &["service"], move |_| {
            let outcome = issuer.health(Instant::now());
            async move { outcome }
        })
    }

    fn health(&self, now: Instant) -> CheckOutcome {
        let failed = self.fetches.borrow().failed;
        match self.usable(now) {
            None => {
                CheckOutcome::new(CheckStatus::Unhealthy, "there are no keys of the issuer: no token can be verified")
            }
            Some(kept) if failed > 0 => {
                let age = now.saturating_duration_since(kept.since).as_secs();
                let message =
                    format!("the issuer's keys cannot be fetched; those of {age} s ago are used, for a day at most");
                CheckOutcome::new(CheckStatus::Degraded, message)
            }
            Some(_) => CheckOutcome::new(CheckStatus::Healthy, "the issuer's keys are there"),
        }
    }
}

async fn document(https: Arc<Https>, call: HttpCall) -> Result<Bytes, FetchError> {
    let answer = https.ask(call).await.map_err(HttpError::from)?;
    if answer.status != StatusCode::OK {
        return Err(FetchError::Status(answer.status));
    }
    if answer.body.len() > MAX_DOCUMENT_BYTES { Err(FetchError::TooLarge) } else { Ok(answer.body) }
}

/// Whether a host is this machine, or a Service of the cluster.
fn is_near(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    if let Ok(address) = host.parse::<std::net::IpAddr>() {
        return address.is_loopback();
    }
    let name = host.strip_suffix(".cluster.local").unwrap_or(host);
    !name.contains('.') || name.rsplit('.').next() == Some("svc")
}

#[cfg(test)]
mod tests {
    use super::super::jwt_tests::Signer;
    use super::*;
    use serde_json::{Value, json};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::SystemTime;

    /// What an issuer publishes now; `None`: it is away.
    #[derive(Default)]
    struct Published {
        keys: Mutex<Option<Value>>,
        fetches: AtomicUsize,
    }

    impl Published {
        fn set(&self, keys: Option<&[Value]>) {
            *self.keys.lock().unwrap() = keys.map(|keys| json!({"keys": keys}));
        }

        fn fetches(&self) -> usize {
            self.fetches.load(Ordering::SeqCst)
        }
    }

    fn issuer() -> (Arc<Published>, Arc<Issuer>) {
        let published = Arc::<Published>::default();
        let answers = Arc::clone(&published);
        let source = move || {
            answers.fetches.fetch_add(1, Ordering::SeqCst);
            let keys = answers.keys.lock().unwrap().clone();
            let away = || FetchError::Http(HttpError::NotSent("away".to_owned()));
            async move { keys.map(|keys| keys.to_string().into()).ok_or_else(away) }.boxed()
        };
        let expected = Expected { issuer: "https://id.example".to_owned(), audience: Some("tickets".to_owned()) };
        let issuer = Arc::new(Issuer::from(Box::new(source), expected));
        tokio::spawn(Arc::clone(&issuer).keep_keys());
        (published, issuer)
    }

    /// A token of the signer's key that is called so.
    fn token(signer: &Signer, kid: &str) -> String {
        let claims = json!({"iss": "https://id.example", "aud": "tickets", "sub": "ann", "exp": 4e9});
        signer.token(&json!({"alg": "EdDSA", "kid": kid}), &claims, "ed")
    }

    fn keys(signer: &Signer, kid: &str) -> Vec<Value> {
        let mut key = signer.keys()[2].clone();
        key["kid"] = json!(kid);
        vec![key]
    }

    async fn verify(issuer: &Issuer, token: &str) -> Result<String, TokenError> {
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        issuer.verify(&Unverified::read(token).unwrap(), seconds).await.map(|claims| claims.sub)
    }

    const UNKNOWN: Result<String, TokenError> = Err(TokenError::Invalid(InvalidToken::UnknownKey));
    const AWAY: Result<String, TokenError> = Err(TokenError::Unavailable);

    #[tokio::test(start_paused = true)]
    async fn a_new_key_is_fetched_when_a_token_names_it_but_not_for_each_that_does() {
        let (published, issuer) = issuer();
        let (old, new) = (Signer::new(), Signer::new());
        published.set(Some(&keys(&old, "old")));
        assert_eq!(verify(&issuer, &token(&old, "old")).await, Ok("ann".to_owned()), "it waits for the first fetch");
        published.set(Some(&[keys(&old, "old"), keys(&new, "new")].concat()));
        for _ in 0..100 {
            assert_eq!(verify(&issuer, &token(&new, "new")).await, UNKNOWN, "soon after a fetch there is no other one");
        }
        assert_eq!(published.fetches(), 1);
        tokio::time::advance(LEAST_PAUSE).await;
        // Many at once are one fetch.
        let (new_key, invented) = (token(&new, "new"), token(&new, "invented"));
        let several = futures::future::join_all((0..50).map(|_| verify(&issuer, &new_key))).await;
        assert!(several.iter().all(|one| *one == Ok("ann".to_owned())), "{several:?}");
        assert_eq!(verify(&issuer, &invented).await, UNKNOWN);
        assert_eq!(published.fetches(), 2);
        // What was taken back is not good any more once that is known.
        published.set(Some(&keys(&new, "new")));
        tokio::time::sleep(REFRESH + Duration::from_secs(1)).await;
        assert_eq!(verify(&issuer, &token(&old, "old")).await, UNKNOWN);
        assert_eq!(verify(&issuer, &new_key).await, Ok("ann".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_used_for_a_day_while_the_issuer_is_away() {
        let (published, issuer) = issuer();
        let signer = Signer::new();
        let good = token(&signer, "ed");
        assert_eq!(verify(&issuer, &good).await, AWAY);
        assert_eq!(issuer.health(Instant::now()).status(), CheckStatus::Unhealthy);
        published.set(Some(&signer.keys()));
        tokio::time::sleep(LEAST_PAUSE).await;
        assert_eq!(verify(&issuer, &good).await, Ok("ann".to_owned()));
        assert_eq!(issuer.health(Instant::now()).status(), CheckStatus::Healthy);
        let begin = Instant::now();
        published.set(None);
        tokio::time::sleep(USED_FOR.saturating_sub(REFRESH)).await;
        assert_eq!(verify(&issuer, &good).await, Ok("ann".to_owned()));
        assert_eq!(issuer.health(Instant::now()).status(), CheckStatus::Degraded);
        assert_eq!(verify(&issuer, &token(&signer, "new")).await, AWAY, "nobody can say that there is no such key");
        let asked = published.fetches();
        assert!(asked > 2_000 && asked < 3_000, "every 30 s, {asked} times");
        tokio::time::sleep_until(begin + USED_FOR + Duration::from_secs(1)).await;
        assert_eq!(verify(&issuer, &good).await, AWAY);
        published.set(Some(&signer.keys()));
        tokio::time::sleep(LEAST_PAUSE * 2).await;
        assert_eq!(verify(&issuer, &good).await, Ok("ann".to_owned()));
        // What is no set of keys does not take the place of one.
        published.set(Some(&[]));
        tokio::time::sleep(REFRESH * 2).await;
        assert_eq!(verify(&issuer, &good).await, Ok("ann".to_owned()));
    }

    #[test]
    fn without_keys_the_issuer_is_asked_soon_and_then_less_often() {
        let pause = |failed, usable| Fetches { last: None, failed }.pause(usable).as_secs();
        assert_eq!([1, 2, 3, 4, 5, 6, 7, u32::MAX].map(|failed| pause(failed, false)), [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!((pause(0, true), pause(1, true)), (300, 30));
    }

    #[rstest::rstest]
    #[case("https://id.example/keys", true)]
    #[case("http://localhost:8080/keys", true)]
    #[case("http://[::1]:8080/keys", true)]
    #[case("http://127.0.0.1/keys", true)]
    #[case("http://keycloak/keys", true)]
    #[case("http://keycloak.auth.svc:8080/keys", true)]
    #[case("http://id.example/keys", false)]
    #[case("http://10.0.0.1/keys", false)]
    #[case("http://evil.example/.svc", false)]
    #[case("ftp://localhost/keys", false)]
    #[case("/keys", false)]
    #[case("localhost:8080", false)]
    #[tokio::test]
    async fn keys_come_over_https_or_from_near(#[case] url: &str, #[case] expected: bool) {
        let expects = Expected { issuer: "a".to_owned(), audience: None };
        assert_eq!(Issuer::new(url, None, expects).is_ok(), expected, "{url}");
    }
}
