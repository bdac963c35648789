//! What is read of the API server when a check is due: its Service, and the certificates to verify against. It is kept for a
//! moment, so that many checks of one Service are one question; nothing is watched.
//!
//! Names are up to tenants, and so is how many there are and how large the objects are. So a namespace reads one thing at a
//! time, all of them together only so much in a second, and of each object only so much.

use super::{
    service::{NotAsked, ServiceFacts},
    tls,
    turns::{Pace, Turns},
};
use crate::{
    fleet::{
        facts::{Facts, RawMeta, Seen},
        index::ObjectKey,
    },
    kubernetes::clients::{ApiError, call, root_cause},
};
use contract::WorkloadId;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Client, Resource,
    api::GetParams,
    client::Body,
    core::{Status, request::Request},
};
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::Semaphore, time::Instant};
use tokio_rustls::rustls::ClientConfig;

/// How long what was found is kept.
const KEPT: Duration = Duration::from_secs(30);
/// How long it is kept that nothing was found: it may be about to be made.
const MISSED: Duration = Duration::from_secs(5);
/// How long it is kept at most of a Service that was never there when it was looked for.
const LONGEST_MISSED: Duration = Duration::from_secs(60);
/// Most of a Service that is read, in bytes.
const MAX_SERVICE: usize = 768 * 1024;
/// Most of a ConfigMap with certificates that is read, in bytes.
const MAX_CONFIG_MAP: usize = 128 * 1024;
/// ConfigMaps that are read at once in this process.
const CONFIG_MAPS_AT_ONCE: usize = 2;
/// Time between two reads in this process: 50 in a second.
const PACE: Duration = Duration::from_millis(20);
/// Key of a ConfigMap with certificates.
const CA_KEY: &str = "ca.crt";

/// Between the reads of this process.
static READS: Pace = Pace::new(PACE);
/// For ConfigMaps.
static CONFIG_MAPS: Semaphore = Semaphore::const_new(CONFIG_MAPS_AT_ONCE);

type Found<T> = Result<Arc<T>, NotAsked>;

/// What was read a moment ago.
struct Recent<T> {
    known: Mutex<HashMap<ObjectKey, Known<T>>>,
    /// One reads for all that want the same.
    reads: Turns<ObjectKey>,
}

struct Known<T> {
    until: Instant,
    found: Found<T>,
    /// How often in a row it was not there.
    misses: u32,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { known: Mutex::default(), reads: Turns::new(1) }
    }
}

impl<T> Recent<T> {
    async fn get_or(&self, key: &ObjectKey, read: impl Future<Output = Found<T>>) -> Found<T> {
        if let Some(known) = self.known(key) {
            return known;
        }
        let _turn = self.reads.take(key).await;
        // Who had the turn before may have read it.
        if let Some(known) = self.known(key) {
            return known;
        }
        let found = read.await;
        self.keep(key, &found);
        found
    }

    fn known(&self, key: &ObjectKey) -> Option<Found<T>> {
        let all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(key).filter(|known| Instant::now() < known.until).map(|known| known.found.clone())
    }

    fn keep(&self, key: &ObjectKey, found: &Found<T>) {
        let now = Instant::now();
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // What nobody asks for any more is not kept.
        all.retain(|_, known| now < known.until + if known.misses == 0 { Duration::ZERO } else { LONGEST_MISSED });
        let before = all.get(key).map_or(0, |known| known.misses);
        let misses = if matches!(found, Err(NotAsked::NoService(_))) { before.saturating_add(1) } else { 0 };
        let until = now + if found.is_ok() { KEPT } else { missed(misses) };
        all.insert(key.clone(), Known { until, found: found.clone(), misses });
    }
}

/// How long it is kept that something could not be had: ever longer, if it is just not there.
fn missed(misses: u32) -> Duration {
    MISSED.saturating_mul(1 << misses.saturating_sub(1).min(4)).min(LONGEST_MISSED)
}

/// A namespace as a whole, as it takes its turn among the others.
pub fn whole(namespace: &str) -> WorkloadId {
    WorkloadId::deployment(namespace, "")
}

/// Why an object could not be read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("it has more than {} KiB", .0 / 1024)]
    TooLarge(usize),
    #[error("{0}")]
    Api(#[from] ApiError),
    #[error("the answer of the API server broke off: {0}")]
    Broken(String),
    #[error("it is not valid: {0}")]
    Invalid(#[from] serde_json::Error),
}

/// What is read for checks.
pub struct Lookups {
    services: Recent<ServiceFacts>,
    certificates: Recent<ClientConfig>,
    /// Each namespace reads one thing at a time, so that they take turns.
    namespaces: Turns<String>,
}

impl Default for Lookups {
    fn default() -> Self {
        Self { services: Recent::default(), certificates: Recent::default(), namespaces: Turns::new(1) }
    }
}

impl Lookups {
    /// A Service.
    pub async fn service(&self, client: &Client, key: &ObjectKey) -> Found<ServiceFacts> {
        let read = async {
            let _turn = self.namespaces.take(&key.namespace).await;
            READS.wait().await;
            match get::<ServiceFacts>(client, key, MAX_SERVICE).await {
                Ok(Some(service)) => Ok(Arc::new(service.facts)),
                Ok(None) => Err(NotAsked::NoService(key.name.clone())),
                Err(error) => Err(NotAsked::Unreadable { service: key.name.clone(), why: error.to_string() }),
            }
        };
        self.services.get_or(key, read).await
    }

    /// How to verify against the certificates of a ConfigMap.
    pub async fn certificates(&self, client: &Client, key: &ObjectKey) -> Found<ClientConfig> {
        let name = &key.name;
        let read = async {
            let _turn = self.namespaces.take(&key.namespace).await;
            READS.wait().await;
            let _permit = CONFIG_MAPS.acquire().await;
            let why = match get::<Certificates>(client, key, MAX_CONFIG_MAP).await {
                Ok(Some(Seen { facts: Certificates(Some(pem)), .. })) => match tls::verified(&pem) {
                    Ok(config) => return Ok(config),
                    Err(error) => format!("{CA_KEY} of ConfigMap {name} cannot be used: {error}"),
                },
                Ok(Some(_)) => format!("the ConfigMap {name} has no key {CA_KEY}"),
                Ok(None) => format!("there is no ConfigMap {name}"),
                Err(error) => format!("the ConfigMap {name} cannot be read: {error}"),
            };
            Err(NotAsked::NoCa(why))
        };
        self.certificates.get_or(key, read).await
    }
}

/// Reads an object, if it has at most so many bytes.
async fn get<F: Facts>(client: &Client, key: &ObjectKey, most: usize) -> Result<Option<Seen<F>>, ReadError> {
    let path = F::Kind::url_path(&(), Some(&key.namespace));
    let request = Request::new(path).get(&key.name, &GetParams::default());
    let request = request.map_err(|error| ApiError::Kube(kube::Error::BuildRequest(error)))?;
    let asked = call(async { Ok(read_answer(client.send(request.map(Body::from)).await?, most).await) });
    asked.await?
}

/// The object that an answer has; none, if there is none.
async fn read_answer<T, B>(answer: Response<B>, most: usize) -> Result<Option<T>, ReadError>
where
    T: DeserializeOwned,
    B: http_body::Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let status = answer.status();
    let body = match Limited::new(answer.into_body(), most).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => return Err(ReadError::TooLarge(most)),
        Err(error) => return Err(ReadError::Broken(root_cause(error.as_ref()))),
    };
    if status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    if !status.is_success() {
        let told = serde_json::from_slice::<Status>(&body).map(Status::boxed);
        return match told {
            Ok(told) => Err(ApiError::Kube(kube::Error::Api(told)).into()),
            Err(_) => Err(ReadError::Broken(status.to_string())),
        };
    }
    Ok(Some(serde_json::from_slice(&body)?))
}

/// The certificates in a ConfigMap.
#[derive(Clone)]
struct Certificates(Option<String>);

/// The parts of a ConfigMap that are read.
#[derive(Deserialize)]
struct RawCertificates {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    data: RawData,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawData {
    #[serde(rename = "ca.crt")]
    ca: Option<String>,
}

impl Facts for Certificates {
    type Kind = ConfigMap;
    type Raw = RawCertificates;

    fn pick(raw: RawCertificates) -> (RawMeta, Self) {
        (raw.metadata, Self(raw.data.ca))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures::{future::join_all, stream};
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame;
    use serde_json::{Value, json};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn key(name: &str) -> ObjectKey {
        ObjectKey { namespace: "n".to_owned(), name: name.to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_is_kept_longer_than_that_nothing_was() {
        let recent = Recent::<u32>::default();
        let none = || NotAsked::NoService("a".to_owned());
        assert_eq!(recent.get_or(&key("a"), async { Err(none()) }).await, Err(none()));
        assert_eq!(recent.get_or(&key("a"), async { Ok(Arc::new(1)) }).await, Err(none()), "it was just asked for");
        tokio::time::advance(MISSED).await;
        assert_eq!(recent.get_or(&key("a"), async { Ok(Arc::new(2)) }).await, Ok(Arc::new(2)));
        tokio::time::advance(KEPT / 2).await;
        assert_eq!(recent.get_or(&key("a"), async { Ok(Arc::new(3)) }).await, Ok(Arc::new(2)));
        tokio::time::advance(KEPT / 2).await;
        assert_eq!(recent.get_or(&key("b"), async { Ok(Arc::new(4)) }).await, Ok(Arc::new(4)));
        assert_eq!(recent.known.lock().unwrap().len(), 1, "what is old is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_there_is_looked_for_ever_more_rarely() {
        let (recent, reads, began) = (Recent::<u32>::default(), Mutex::new(Vec::new()), Instant::now());
        let ask = async || {
            let read = async {
                reads.lock().unwrap().push(began.elapsed().as_secs());
                Err(NotAsked::NoService("a".to_owned()))
            };
            let _ = recent.get_or(&key("a"), read).await;
        };
        for _ in 0..200 {
            ask().await;
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(*reads.lock().unwrap(), [0, 5, 15, 35, 75, 135, 195]);
        // What is unreadable for another reason is not.
        assert_eq!((missed(0), missed(1), missed(99)), (MISSED, MISSED, LONGEST_MISSED));
        tokio::time::advance(LONGEST_MISSED * 3).await;
        let _ = recent.get_or(&key("b"), async { Ok(Arc::new(1)) }).await;
        assert_eq!(recent.known.lock().unwrap().len(), 1, "nobody looks for it any more");
    }

    #[tokio::test(start_paused = true)]
    async fn one_reads_for_all_that_want_the_same() {
        let (recent, reads) = (Recent::<u32>::default(), AtomicUsize::new(0));
        let ask = |_| async {
            let read = async {
                reads.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(Arc::new(1))
            };
            recent.get_or(&key("a"), read).await
        };
        // The first one gives up in the middle; another one reads then.
        assert!(tokio::time::timeout(Duration::from_millis(500), ask(0)).await.is_err());
        let all = join_all((0..100).map(ask)).await;
        assert!(all.iter().all(|found| *found == Ok(Arc::new(1))));
        assert_eq!(reads.load(Ordering::Relaxed), 2);
    }

    async fn answered(code: u16, body: &Value) -> Result<Option<Seen<Certificates>>, ReadError> {
        let answer = Response::builder().status(code).body(Full::<Bytes>::from(body.to_string())).unwrap();
        read_answer(answer, MAX_CONFIG_MAP).await
    }

    #[tokio::test]
    async fn an_answer_is_an_object_or_says_why_not() {
        let found = answered(200, &json!({ "metadata": {}, "data": { "ca.crt": "x" } })).await.unwrap().unwrap();
        assert_eq!(found.facts.0.as_deref(), Some("x"));
        assert!(answered(404, &json!({})).await.unwrap().is_none());
        let refused = json!({ "status": "Failure", "code": 403, "reason": "Forbidden", "message": "you may not" });
        assert_eq!(answered(403, &refused).await.unwrap_err().to_string(), "you may not");
        assert!(answered(200, &json!([1])).await.is_err());
    }

    #[tokio::test]
    async fn an_object_that_is_too_large_is_not_read_to_its_end() {
        let given = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&given);
        let endless = stream::iter(std::iter::repeat_with(move || {
            count.fetch_add(1024, Ordering::Relaxed);
            Ok::<_, std::io::Error>(Frame::data(Bytes::from_static(&[b'x'; 1024])))
        }));
        let answer = Response::new(StreamBody::new(endless));
        let error = read_answer::<Seen<Certificates>, _>(answer, MAX_CONFIG_MAP).await.unwrap_err();
        assert_eq!(error.to_string(), "it has more than 128 KiB");
        assert!(given.load(Ordering::Relaxed) <= MAX_CONFIG_MAP + 4096);
    }
}
