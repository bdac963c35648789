//! Where a service is: the addresses behind its name, as DNS has them now, and how each of them does.
//!
//! With the name of a headless Service those are its ready pods; with that of another Service it is one address, behind which
//! the cluster chooses a pod for each connection.

use super::ejection::{Change, Chosen, Ejection};
use futures::future::BoxFuture;
use resilience::Dependency;
use resilience::failure::Verdict;
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// From this age on, what DNS said is asked for again while it is used.
const REFRESH: Duration = Duration::from_secs(3);
/// From this age on it is waited for: nobody has called for a while, and the pods may be others.
const STALE: Duration = Duration::from_secs(30);
/// Least time between two questions because an endpoint took no connection.
const AGAIN: Duration = Duration::from_millis(500);
/// How long after the question such a call goes on with what was known.
const STALE_WAIT: Duration = Duration::from_secs(1);
/// How long what DNS said stands while it names nobody. Its servers may be away; but addresses are given to other pods in time.
const MAX_AGE: Duration = Duration::from_secs(300);
/// Time for DNS to answer.
const DNS_TIMEOUT: Duration = Duration::from_secs(5);

/// Finds the addresses of a name.
pub type Resolve = Arc<dyn Fn(String, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// As the system does it.
pub fn dns() -> Resolve {
    Arc::new(|host, port| Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) }))
}

/// The endpoints of one service.
pub struct Endpoints {
    host: String,
    port: u16,
    /// The host is an address itself.
    is_address: bool,
    resolve: Resolve,
    dependency: Option<&'static Dependency>,
    ejection: Mutex<Ejection>,
    resolving: AtomicBool,
    resolved: watch::Sender<Resolved>,
}

/// What DNS has said so far.
#[derive(Clone, Debug, Default)]
struct Resolved {
    /// When it last named an address.
    named_at: Option<Instant>,
    /// When it was last asked, unless it is to be asked again at once.
    asked_at: Option<Instant>,
    /// When the last question began.
    question_at: Option<Instant>,
    /// Why its last answer names none.
    error: Option<String>,
    /// Whether it has not answered the last question.
    has_hung: bool,
    answers: u64,
}

impl Resolved {
    fn is_known(&self, now: Instant) -> bool {
        self.named_at.is_some_and(|at| now.saturating_duration_since(at) < MAX_AGE)
    }

    /// How long to wait for an answer now, where there is a need for one. Not at all for DNS that did not answer the last time.
    fn wait(&self, now: Instant) -> Duration {
        let waited = self.question_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        if self.has_hung { Duration::ZERO } else { STALE_WAIT.saturating_sub(waited) }
    }
}

impl Endpoints {
    pub fn new(host: &str, port: u16, resolve: Resolve, dependency: Option<&'static Dependency>) -> Arc<Self> {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let address = host.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, port));
        let mut ejection = Ejection::default();
        ejection.set(&address.into_iter().collect(), Instant::now());
        Arc::new(Self {
            host,
            is_address: address.is_some(),
            port,
            resolve,
            dependency,
            ejection: Mutex::new(ejection),
            resolving: AtomicBool::new(false),
            resolved: watch::Sender::default(),
        })
    }

    fn ejection(&self) -> MutexGuard<'_, Ejection> {
        // No code here panics between two writes that belong together.
        self.ejection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of them took no connection: DNS is asked before the next call, if it was not just now.
    pub fn may_have_changed(&self) {
        self.resolved.send_if_modified(|resolved| {
            if resolved.asked_at.is_some_and(|at| at.elapsed() >= AGAIN) {
                resolved.asked_at = None;
            }
            false
        });
    }

    /// Whether it is one of them.
    pub fn contains(&self, address: SocketAddr) -> bool {
        self.ejection().contains(address)
    }

    /// Whom to ask, in turn, but none of `tried`. `Ok(None)`: there is nobody else. It has failed if it is given up after
    /// `until`.
    pub async fn choose(
        self: &Arc<Self>,
        tried: &[SocketAddr],
        until: Option<Instant>,
    ) -> Result<Option<Asked>, String> {
        self.bring_up_to_date().await?;
        let chosen = self.ejection().choose(tried, Instant::now());
        Ok(chosen.map(|chosen| Asked { endpoints: Arc::clone(self), chosen, until, finished: false }))
    }

    async fn bring_up_to_date(self: &Arc<Self>) -> Result<(), String> {
        if self.is_address {
            return Ok(());
        }
        let mut news = self.resolved.subscribe();
        let (known, age, seen) = {
            let resolved = news.borrow_and_update();
            (resolved.is_known(Instant::now()), resolved.asked_at.map(|at| at.elapsed()), resolved.answers)
        };
        if known && age.is_some_and(|age| age < REFRESH) {
            return Ok(());
        }
        if !self.resolving.swap(true, Ordering::AcqRel) {
            self.resolved.send_modify(|resolved| {
                resolved.asked_at = Some(Instant::now());
                resolved.question_at = resolved.asked_at;
            });
            let endpoints = Arc::clone(self);
            // Not in this call, which may be given up: others wait for the answer, too.
            tokio::spawn(async move {
                let asked = (endpoints.resolve)(endpoints.host.clone(), endpoints.port);
                let answer = timeout(DNS_TIMEOUT, asked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                endpoints.resolving.store(false, Ordering::Release);
                endpoints.take(answer);
            });
        }
        let answered = news.wait_for(|resolved| resolved.answers != seen);
        if !known {
            let resolved = answered.await.map_err(|error| error.to_string())?;
            if let (false, Some(error)) = (resolved.is_known(Instant::now()), &resolved.error) {
                return Err(format!("no address of {}: {error}", self.host));
            }
        } else if age.is_none_or(|age| age >= STALE) {
            let wait = self.resolved.borrow().wait(Instant::now());
            let _ = timeout(wait, answered).await;
        }
        Ok(())
    }

    /// An answer of DNS. What it said before stands while it names nobody: its servers may be away, too.
    fn take(&self, answer: io::Result<Vec<SocketAddr>>) {
        let now = Instant::now();
        let answer =
            answer.and_then(
                |addresses| {
                    if addresses.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(addresses) }
                },
            );
        let has_hung = answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        let error = match answer {
            Ok(addresses) => {
                let addresses = addresses.into_iter().collect::<BTreeSet<_>>();
                let ejected = {
                    let mut ejection = self.ejection();
                    ejection.set(&addresses, now);
                    ejection.ejected()
                };
                self.report_ejected(ejected);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        self.resolved.send_modify(|resolved| {
            resolved.named_at = if error.is_none() { Some(now) } else { resolved.named_at };
            resolved.error = error;
            resolved.has_hung = has_hung;
            resolved.answers += 1;
        });
    }

    fn report_ejected(&self, ejected: usize) {
        if let Some(dependency) = self.dependency {
            dependency.endpoints_ejected(ejected);
        }
    }

    /// Whether a failure is isolated then ([`Ejection::is_isolated_failure`]).
    fn record(&self, chosen: &Chosen, verdict: Verdict, refused: Option<Refused>, no_answer: bool) -> bool {
        let (change, ejected, is_isolated) = {
            let mut ejection = self.ejection();
            if let Some(Refused { wait }) = refused {
                ejection.refused(chosen, wait, Instant::now());
            }
            let change = ejection.record(chosen, verdict, Instant::now());
            (change, ejection.ejected(), ejection.is_isolated_failure(chosen, no_answer))
        };
        let service = self.dependency.map_or(&*self.host, |dependency| dependency.name());
        match change {
            None => return is_isolated,
            Some(Change::Ejected { length }) => {
                tracing::warn!(%service, endpoint = %chosen.address, seconds = length.as_secs(), "endpoint ejected: it fails");
                if let Some(dependency) = self.dependency {
                    dependency.endpoint_ejected();
                }
            }
            Some(Change::Readmitted) => tracing::info!(%service, endpoint = %chosen.address, "endpoint admitted again"),
        }
        self.report_ejected(ejected);
        is_isolated
    }
}

/// An endpoint has refused a call because of its load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// How long it asks to wait.
    pub wait: Option<Duration>,
}

/// An endpoint that is being asked. If it is dropped before it is finished, its caller did not wait for the end.
pub struct Asked {
    endpoints: Arc<Endpoints>,
    chosen: Chosen,
    until: Option<Instant>,
    finished: bool,
}

impl Asked {
    pub fn address(&self) -> SocketAddr {
        self.chosen.address
    }

    /// What came of it. Whether a failure says nothing of the other endpoints.
    pub fn finish(mut self, verdict: Verdict, refused: Option<Refused>) -> bool {
        self.finished = true;
        self.endpoints.record(&self.chosen, verdict, refused, false)
    }

    /// Nothing came of it in time. As for [`Asked::finish`].
    pub fn give_up(mut self) -> bool {
        self.finished = true;
        self.endpoints.record(&self.chosen, Verdict::Failure, None, true)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if !self.finished {
            let hung = self.until.is_some_and(|until| Instant::now() >= until);
            self.endpoints.record(&self.chosen, if hung { Verdict::Failure } else { Verdict::Neutral }, None, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 8_080))
    }

    /// DNS that answers with these, and with the last of them for ever.
    fn answers(answers: &[Option<&[u8]>]) -> Resolve {
        let answers: Mutex<VecDeque<Option<Vec<u8>>>> =
            Mutex::new(answers.iter().map(|one| one.map(<[u8]>::to_vec)).collect());
        Arc::new(move |_, _| {
            let mut answers = answers.lock().unwrap();
            let answer = if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0].clone() };
            let addresses = answer.map(|all| all.into_iter().map(address).collect());
            Box::pin(async { addresses.ok_or_else(|| io::Error::other("no such name")) })
        })
    }

    async fn asked(endpoints: &Arc<Endpoints>, calls: usize) -> BTreeSet<SocketAddr> {
        let mut all = BTreeSet::new();
        for _ in 0..calls {
            all.insert(endpoints.choose(&[], None).await.unwrap().unwrap().address());
        }
        all
    }

    #[tokio::test(start_paused = true)]
    async fn new_endpoints_are_asked_within_seconds_and_old_ones_no_more() {
        let endpoints = Endpoints::new("catalog", 8_080, answers(&[Some(&[1, 2]), Some(&[2, 3, 4])]), None);
        assert_eq!(asked(&endpoints, 10).await, [1, 2].map(address).into());
        tokio::time::advance(REFRESH).await;
        asked(&endpoints, 1).await;
        tokio::task::yield_now().await;
        assert_eq!(asked(&endpoints, 10).await, [2, 3, 4].map(address).into());
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_silence_the_first_call_knows_already() {
        let endpoints = Endpoints::new("catalog", 8_080, answers(&[Some(&[1]), Some(&[2])]), None);
        assert_eq!(asked(&endpoints, 1).await, [address(1)].into());
        tokio::time::advance(STALE).await;
        assert_eq!(asked(&endpoints, 1).await, [address(2)].into());
    }

    /// With one pod, that is the time for which nobody is sold anything after it has gone.
    #[tokio::test(start_paused = true)]
    async fn who_takes_no_connection_is_looked_up_again_before_the_next_call() {
        let endpoints = Endpoints::new("booking", 8_080, answers(&[Some(&[1]), Some(&[2])]), None);
        assert_eq!(asked(&endpoints, 1).await, [address(1)].into());
        tokio::time::advance(AGAIN.mul_f64(0.9)).await;
        endpoints.may_have_changed();
        assert_eq!(asked(&endpoints, 1).await, [address(1)].into(), "DNS is not flooded");
        tokio::time::advance(AGAIN.mul_f64(0.1)).await;
        endpoints.may_have_changed();
        assert_eq!(asked(&endpoints, 1).await, [address(2)].into());
    }

    #[tokio::test(start_paused = true)]
    async fn without_dns_those_that_were_known_are_asked() {
        let endpoints = Endpoints::new("catalog", 8_080, answers(&[Some(&[1]), None, None, Some(&[2])]), None);
        asked(&endpoints, 1).await;
        for _ in 0..2 {
            tokio::time::advance(STALE).await;
            assert_eq!(asked(&endpoints, 1).await, [address(1)].into());
        }
        tokio::time::advance(STALE).await;
        assert_eq!(asked(&endpoints, 1).await, [address(2)].into(), "DNS is back");
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_never_known_is_said() {
        let endpoints = Endpoints::new("catalog", 8_080, answers(&[None, Some(&[]), Some(&[1])]), None);
        for _ in 0..2 {
            let error = endpoints.choose(&[], None).await.err().unwrap();
            assert!(error.starts_with("no address of catalog: "), "{error}");
        }
        assert_eq!(asked(&endpoints, 1).await, [address(1)].into());
    }

    /// Addresses are given to other pods in time, of whatever service.
    #[tokio::test(start_paused = true)]
    async fn what_was_known_is_not_asked_for_ever() {
        let endpoints = Endpoints::new("catalog", 8_080, answers(&[Some(&[1]), None]), None);
        asked(&endpoints, 1).await;
        tokio::time::advance(MAX_AGE.mul_f64(0.9)).await;
        assert_eq!(asked(&endpoints, 1).await, [address(1)].into());
        tokio::time::advance(MAX_AGE.mul_f64(0.1)).await;
        let error = endpoints.choose(&[], None).await.err().unwrap();
        assert!(error.starts_with("no address of catalog: "), "{error}");
    }

    /// With one pod that restarts while DNS is away, each call waited.
    #[tokio::test(start_paused = true)]
    async fn dns_that_hangs_holds_up_no_series_of_calls_whose_endpoint_takes_no_connection() {
        let known = AtomicBool::new(false);
        let resolve: Resolve = Arc::new(move |_, _| {
            let first = !known.swap(true, Ordering::SeqCst);
            Box::pin(async move { if first { Ok(vec![address(1)]) } else { std::future::pending().await } })
        });
        let endpoints = Endpoints::new("catalog", 8_080, resolve, None);
        asked(&endpoints, 1).await;
        let mut waited = Duration::ZERO;
        for _ in 0..40 {
            tokio::time::advance(AGAIN).await;
            endpoints.may_have_changed();
            let started = Instant::now();
            asked(&endpoints, 1).await;
            waited += started.elapsed();
        }
        assert!(waited <= STALE_WAIT, "40 calls within 20 s waited for {waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn dns_that_hangs_holds_up_nobody_who_knows_somebody() {
        let known = AtomicBool::new(false);
        let resolve: Resolve = Arc::new(move |_, _| {
            let first = !known.swap(true, Ordering::SeqCst);
            Box::pin(async move { if first { Ok(vec![address(1)]) } else { std::future::pending().await } })
        });
        let endpoints = Endpoints::new("catalog", 8_080, resolve, None);
        asked(&endpoints, 1).await;
        tokio::time::advance(STALE).await;
        let started = Instant::now();
        asked(&endpoints, 10).await;
        assert_eq!(started.elapsed(), STALE_WAIT, "the first of them waited a little");
    }
}
