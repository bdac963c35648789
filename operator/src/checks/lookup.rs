//! What is read of the API server when a check is due: its Service, and the certificates to verify against. It is kept for a
//! moment, so that many checks of one Service are one question; nothing is watched.

use super::{
    PLACE_HELD,
    service::{NotAsked, ServiceFacts},
    tls,
};
use crate::{
    fleet::{
        facts::{Facts, RawMeta, Seen},
        index::ObjectKey,
    },
    kubernetes::clients::{ApiError, call},
    pods::fair_queue::{Class, FairQueue},
};
use contract::WorkloadId;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use serde::Deserialize;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tokio_rustls::rustls::ClientConfig;

/// How long what was found is kept.
const KEPT: Duration = Duration::from_secs(30);
/// How long it is kept that nothing was found: it may be about to be made.
const MISSED: Duration = Duration::from_secs(5);
/// Key of a ConfigMap with certificates.
const CA_KEY: &str = "ca.crt";

type Found<T> = Result<Arc<T>, NotAsked>;

/// What was read a moment ago.
struct Recent<T>(Mutex<HashMap<ObjectKey, (Instant, Found<T>)>>);

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Recent<T> {
    async fn get_or(&self, key: &ObjectKey, read: impl Future<Output = Found<T>>) -> Found<T> {
        let fresh = |(until, _): &&(Instant, Found<T>)| Instant::now() < *until;
        let known =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).filter(fresh).map(|(_, it)| it.clone());
        if let Some(known) = known {
            return known;
        }
        let found = read.await;
        let now = Instant::now();
        let until = now + if found.is_ok() { KEPT } else { MISSED };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // What nobody asks for any more is not kept.
        all.retain(|_, (until, _)| now < *until);
        all.insert(key.clone(), (until, found.clone()));
        found
    }
}

/// A namespace as a whole, as it takes its turn among the others.
pub fn whole(namespace: &str) -> WorkloadId {
    WorkloadId::deployment(namespace, "")
}

/// Where it is read, and who may read now: the checks of a namespace take turns with those of the others.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Connection to the API server.
    pub client: &'a Client,
    /// Gives out places for asks.
    pub places: &'a FairQueue,
}

impl Source<'_> {
    async fn get<F>(self, key: &ObjectKey) -> Result<Option<Seen<F>>, ApiError>
    where
        F: Facts + Clone,
    {
        let api: Api<Seen<F>> = Api::namespaced(self.client.clone(), &key.namespace);
        let _place = self.places.slot(&whole(&key.namespace), Class::Probe, false).await;
        let (found, ()) = futures::future::join(call(api.get_opt(&key.name)), tokio::time::sleep(PLACE_HELD)).await;
        found
    }
}

/// What is read for checks.
#[derive(Default)]
pub struct Lookups {
    services: Recent<ServiceFacts>,
    certificates: Recent<ClientConfig>,
}

impl Lookups {
    /// A Service.
    pub async fn service(&self, from: Source<'_>, key: &ObjectKey) -> Found<ServiceFacts> {
        let read = async {
            match from.get::<ServiceFacts>(key).await {
                Ok(Some(service)) => Ok(Arc::new(service.facts)),
                Ok(None) => Err(NotAsked::NoService(key.name.clone())),
                Err(error) => Err(NotAsked::Unreadable { service: key.name.clone(), why: error.to_string() }),
            }
        };
        self.services.get_or(key, read).await
    }

    /// How to verify against the certificates of a ConfigMap.
    pub async fn certificates(&self, from: Source<'_>, key: &ObjectKey) -> Found<ClientConfig> {
        let name = &key.name;
        let read = async {
            let why = match from.get::<Certificates>(key).await {
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

    #[tokio::test(start_paused = true)]
    async fn what_was_found_is_kept_longer_than_that_nothing_was() {
        let recent = Recent::<u32>::default();
        let key = |name: &str| ObjectKey { namespace: "n".to_owned(), name: name.to_owned() };
        let none = || NotAsked::NoService("a".to_owned());
        assert_eq!(recent.get_or(&key("a"), async { Err(none()) }).await, Err(none()));
        assert_eq!(recent.get_or(&key("a"), async { Ok(Arc::new(1)) }).await, Err(none()), "it was just asked for");
        tokio::time::advance(MISSED).await;
        assert_eq!(recent.get_or(&key("a"), async { Ok(Arc::new(2)) }).await, Ok(Arc::new(2)));
        tokio::time::advance(KEPT / 2).await;
        assert_eq!(recent.get_or(&key("a"), async { Ok(Arc::new(3)) }).await, Ok(Arc::new(2)));
        tokio::time::advance(KEPT / 2).await;
        assert_eq!(recent.get_or(&key("b"), async { Ok(Arc::new(4)) }).await, Ok(Arc::new(4)));
        assert_eq!(recent.0.lock().unwrap().len(), 1, "what is old is forgotten");
    }
}
