//! One listener for all fake pods: each has a loopback address of its own, and the address that a connection was made to
//! says which pod is meant.

use super::fake_pod::{Behavior, FakePod, Push};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// The first address of 127.64.0.0/10.
const FIRST: u32 = 0x7f40_0000;
/// Addresses that there are.
const MOST: u32 = 1 << 22;
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4_096;
/// Largest request that is read.
const MAX_BODY: usize = 1 << 20;

/// Something that a pod was told, and when.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// Number of the pod.
    pub pod: usize,
    /// When the request was there.
    pub at: Instant,
    /// What it was.
    pub what: What,
}

/// What a pod was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A configuration that is new to it.
    NewConfig,
    /// To do something.
    Action,
}

/// What all pods were asked and told since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Health reports that the fleet was asked for.
    pub probes: u64,
    /// Requests to silent pods.
    pub unanswered: u64,
    /// Configurations that were pushed.
    pub pushes: u64,
    /// Those of them that the pod ran already.
    pub in_sync: u64,
    /// Actions.
    pub actions: u64,
}

impl Counts {
    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            probes: self.probes - before.probes,
            unanswered: self.unanswered - before.unanswered,
            pushes: self.pushes - before.pushes,
            in_sync: self.in_sync - before.in_sync,
            actions: self.actions - before.actions,
        }
    }
}

/// All pods, and the counters around them.
pub struct FakePods {
    pods: Vec<Mutex<FakePod>>,
    /// The first so many are the fleet; probes of the others are not counted.
    fleet: usize,
    probes: AtomicU64,
    unanswered: AtomicU64,
    pushes: AtomicU64,
    in_sync: AtomicU64,
    actions: AtomicU64,
    listener: Mutex<Option<mpsc::UnboundedSender<Told>>>,
}

impl FakePods {
    /// These pods, in the order of their addresses. Probes of the first `fleet` of them are counted.
    pub fn new(pods: Vec<FakePod>, fleet: usize) -> Arc<Self> {
        Arc::new(Self {
            pods: pods.into_iter().map(Mutex::new).collect(),
            fleet,
            probes: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            pushes: AtomicU64::new(0),
            in_sync: AtomicU64::new(0),
            actions: AtomicU64::new(0),
            listener: Mutex::new(None),
        })
    }

    /// One of them, if the number is not too high.
    pub fn pod(&self, number: usize) -> Option<MutexGuard<'_, FakePod>> {
        Some(self.pods.get(number)?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What they were asked and told so far.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            probes: read(&self.probes),
            unanswered: read(&self.unanswered),
            pushes: read(&self.pushes),
            in_sync: read(&self.in_sync),
            actions: read(&self.actions),
        }
    }

    /// What they are told from now on. Only the last one who asked gets it.
    pub fn listen_in(&self) -> mpsc::UnboundedReceiver<Told> {
        let (sender, receiver) = mpsc::unbounded_channel();
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        receiver
    }

    fn tell(&self, pod: usize, what: What) {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if listener.as_ref().is_some_and(|sender| sender.send(Told { pod, at: Instant::now(), what }).is_err()) {
            *listener = None;
        }
    }

    /// Listens on every address; connections are answered until the handle is aborted.
    pub fn serve(self: &Arc<Self>) -> std::io::Result<(u16, JoinHandle<()>)> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))?;
        let listener = socket.listen(BACKLOG)?;
        let port = listener.local_addr()?.port();
        Ok((port, tokio::spawn(Arc::clone(self).accept(listener))))
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        // Ends with the accepting, and the connections with it.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Mostly "too many open files": what is open may be closed in a moment.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            };
            // Who comes by another address means no pod.
            if let Some(number) = stream.local_addr().ok().and_then(number_of).filter(|n| *n < self.pods.len()) {
                connections.spawn(Arc::clone(&self).answer(stream, number));
            }
            while connections.try_join_next().is_some() {}
        }
    }

    async fn answer(self: Arc<Self>, stream: TcpStream, number: usize) {
        // Latency is measured: an answer must not wait for more to send.
        let _ = stream.set_nodelay(true);
        let service = service_fn(|request| self.respond(number, request));
        // A connection that breaks is the other side's affair, and counted there.
        let _ = http1::Builder::new().max_buf_size(8 * 1_024).serve_connection(TokioIo::new(stream), service).await;
    }

    async fn respond(&self, number: usize, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let silent = self.pod(number).is_some_and(|mut pod| {
            let silent = pod.behavior == Behavior::Silent;
            if silent {
                pod.asked();
            }
            silent
        });
        if silent {
            self.unanswered.fetch_add(1, Ordering::Relaxed);
            return std::future::pending().await;
        }
        let (head, body) = request.into_parts();
        let body = match Limited::new(body, MAX_BODY).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return Ok(answer(StatusCode::BAD_REQUEST, &json!(error.to_string()))),
        };
        let Some(mut pod) = self.pod(number) else { return Ok(answer(StatusCode::NOT_FOUND, &Value::Null)) };
        // By method, so that paths of other versions of the contract are served too.
        Ok(match head.method {
            Method::PUT => {
                let (push, said) = pod.push(&body);
                drop(pod);
                self.pushes.fetch_add(1, Ordering::Relaxed);
                match push {
                    Push::Applied => self.tell(number, What::NewConfig),
                    Push::InSync => drop(self.in_sync.fetch_add(1, Ordering::Relaxed)),
                    Push::Refused => {}
                }
                answer(if push == Push::Refused { StatusCode::CONFLICT } else { StatusCode::OK }, &said)
            }
            Method::POST => {
                self.actions.fetch_add(1, Ordering::Relaxed);
                self.tell(number, What::Action);
                answer(StatusCode::OK, &pod.act(&body))
            }
            Method::GET if head.uri.path().ends_with("/health") => {
                self.probes.fetch_add(u64::from(number < self.fleet), Ordering::Relaxed);
                answer(StatusCode::OK, &pod.report())
            }
            Method::GET if head.uri.path().ends_with("/applied") => answer(StatusCode::OK, &json!([pod.applied()])),
            Method::GET if head.uri.path().ends_with("/effective") => answer(StatusCode::OK, &pod.effective()),
            _ => answer(StatusCode::NOT_FOUND, &Value::Null),
        })
    }
}

fn answer(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

/// The address of pod `number`; `None`: there are not so many.
pub fn address_of(number: usize) -> Option<Ipv4Addr> {
    // The very first address is left out: it looks like the name of the network.
    let offset = u32::try_from(number).ok()?.checked_add(1)?;
    (offset < MOST).then(|| Ipv4Addr::from(FIRST + offset))
}

fn number_of(address: SocketAddr) -> Option<usize> {
    let IpAddr::V4(ip) = address.ip().to_canonical() else { return None };
    let offset = u32::from(ip).checked_sub(FIRST)?;
    if offset < MOST { usize::try_from(offset).ok()?.checked_sub(1) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::HealthReport;
    use std::time::Duration;

    #[test]
    fn an_address_names_its_pod() {
        for number in [0, 1, 254, 255, 256, 10_599, 4_194_302] {
            let address = address_of(number).unwrap();
            assert_eq!(address.octets()[0], 127);
            assert!((64..128).contains(&address.octets()[1]), "{address}");
            assert_eq!(number_of(SocketAddr::from((address, 9_901))), Some(number));
        }
        assert_eq!(address_of(4_194_303), None);
        for stranger in [[127, 0, 0, 1], [127, 64, 0, 0], [127, 128, 0, 0], [10, 0, 0, 1]] {
            assert_eq!(number_of(SocketAddr::from((stranger, 1))), None);
        }
    }

    #[tokio::test]
    async fn each_pod_answers_at_its_own_address() {
        let pods = ["a", "b"].map(|name| FakePod::new(name.into(), Behavior::Healthy));
        let pods = FakePods::new(pods.into(), 1);
        let (port, task) = pods.serve().unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        for (number, name) in ["a", "b"].into_iter().enumerate() {
            let url = format!("http://{}:{port}/health", address_of(number).unwrap());
            let report: HealthReport = client.get(url).send().await.unwrap().json().await.unwrap();
            assert_eq!(report.pod, name);
        }
        let mut told = pods.listen_in();
        let url = format!("http://{}:{port}", address_of(1).unwrap());
        for _ in 0..2 {
            let document = json!({ "revision": 5, "contentHash": "aa" });
            client.put(format!("{url}/admin/v1/config")).json(&document).send().await.unwrap();
        }
        client.post(format!("{url}/admin/v1/actions")).json(&json!({ "intentId": "i" })).send().await.unwrap();
        let told: Vec<_> =
            [told.recv().await, told.recv().await].map(|told| told.map(|told| (told.pod, told.what))).into();
        assert_eq!(told, [Some((1, What::NewConfig)), Some((1, What::Action))]);
        assert_eq!(pods.counts(), Counts { probes: 1, unanswered: 0, pushes: 2, in_sync: 1, actions: 1 });
        task.abort();
    }

    #[tokio::test]
    async fn a_silent_pod_accepts_and_never_answers() {
        let pods = FakePods::new(vec![FakePod::new("a".into(), Behavior::Silent)], 1);
        let (port, task) = pods.serve().unwrap();
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_millis(200)).build().unwrap();
        let error = client.get(format!("http://{}:{port}/health", address_of(0).unwrap())).send().await.unwrap_err();
        assert!(error.is_timeout(), "{error}");
        assert_eq!(pods.counts().unanswered, 1);
        task.abort();
    }
}
