//! Watches: they keep the fleet index up to date, and say what each change affects.

use super::{
    clients::{Clients, spelled_watch},
    filling::Filling,
    guard::Guard,
    meta::{FIELD_MANAGER, INTENT_LABEL},
};
use crate::feature_flag::overriders::with_overriders_only;
use crate::fleet::{
    facts::{ConfigMapFacts, DeploymentFacts, JobFacts, PodFacts, ReplicaSetFacts, Seen, StatefulSetFacts},
    index::{Affected, FleetIndex, ObjectKey, Policy},
};
use crate::recovery::index::LedgerIndex;
use contract::WorkloadId;
use crds::{FeatureFlag, Recovery};
use futures::{Stream, StreamExt, stream::BoxStream};
use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::ConfigMap};
use kube::{
    Api, Resource, ResourceExt,
    core::{NamespaceResourceScope, PartialObjectMeta},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use std::{collections::HashMap, fmt::Debug, hash::Hash, sync::Arc};
use tracing::warn;

/// How long the API server keeps a watch open, in seconds. Its client gives up 5 s later: so a connection that died
/// silently is noticed within a minute.
const WATCH_SECONDS: u32 = 50;
/// Objects in one answer to a list, where the server cannot stream lists: they are in memory together for a moment, and
/// each may be large.
const PAGE: u32 = 50;
/// What a watch says.
pub enum News {
    /// Something changed, and this is what has to be looked at.
    Changed(Vec<Affected>),
    /// Every watch has been filled for the first time.
    Filled,
}

/// How one kind gets into the index and out of it.
struct Upkeep<I, T, K> {
    /// What tells its objects apart; nothing for one that is not kept.
    key: fn(&T) -> Option<K>,
    put: fn(&I, T) -> Vec<Affected>,
    remove: fn(&I, &K) -> Vec<Affected>,
}

fn config(clients: &Clients) -> watcher::Config {
    let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
    if clients.streams_lists { config.streaming_lists() } else { config }
}

/// Starts the watch of the ledger. The stream ends only with the process.
pub fn ledger(
    clients: &Clients,
    namespace: Option<&str>,
    index: &Arc<LedgerIndex>,
    filling: &Filling,
) -> impl Stream<Item = News> + Send + use<> {
    let keep = Keeper { index: Arc::clone(index), filling: filling.clone() };
    keep.up_to_date(
        watcher(api::<Guard<Recovery>>(clients, namespace), config(clients)),
        Upkeep {
            key: |recovery| Some((ObjectKey::of(recovery), recovery.uid())),
            put: |index: &LedgerIndex, recovery| index.put(&recovery),
            remove: |index, (key, uid)| index.remove(key, uid.as_deref()),
        },
    )
}

/// Starts the watches of a namespace, or of all. The stream ends only with the process.
pub fn start(
    clients: &Clients,
    namespace: Option<&str>,
    index: &Arc<FleetIndex>,
    filling: &Filling,
) -> impl Stream<Item = News> + Send + use<> {
    let config = || config(clients);
    let keep = Keeper { index: Arc::clone(index), filling: filling.clone() };
    let ours = || config().labels(&format!("app.kubernetes.io/managed-by={FIELD_MANAGER}"));
    futures::stream::select_all([
        keep.up_to_date(
            watcher(api::<Seen<DeploymentFacts>>(clients, namespace), config()),
            Upkeep {
                key: |seen| Some((seen.facts.0.id.clone(), Arc::clone(&seen.facts.0.uid))),
                put: |index, seen| index.put_workload(seen.facts.0),
                remove: |index, (id, uid)| index.remove_workload(id, uid),
            },
        ),
        keep.up_to_date(
            watcher(api::<Seen<StatefulSetFacts>>(clients, namespace), config()),
            Upkeep {
                key: |seen| Some((seen.facts.0.id.clone(), Arc::clone(&seen.facts.0.uid))),
                put: |index, seen| index.put_workload(seen.facts.0),
                remove: |index, (id, uid)| index.remove_workload(id, uid),
            },
        ),
        keep.up_to_date(
            watcher(api::<PartialObjectMeta<ReplicaSet>>(clients, namespace), config()),
            Upkeep {
                key: |set: &PartialObjectMeta<ReplicaSet>| set.metadata.uid.clone(),
                put: |index, set| index.put_replica_set(ReplicaSetFacts::of(&set)),
                remove: |index, uid| index.remove_replica_set(uid),
            },
        ),
        keep.up_to_date(
            watcher(api::<Seen<PodFacts>>(clients, namespace), config()),
            Upkeep {
                key: |seen| Some(Arc::clone(&seen.facts.uid)),
                put: |index, seen| index.put_pod(seen.facts),
                remove: |index, uid| index.remove_pod(uid),
            },
        ),
        keep.up_to_date(
            watcher(api::<PartialObjectMeta<ConfigMap>>(clients, namespace), ours()),
            Upkeep {
                key: |map: &PartialObjectMeta<ConfigMap>| ConfigMapFacts::of(map).map(|facts| facts.owner.0),
                put: |index, map| ConfigMapFacts::of(&map).map(|facts| index.put_config_map(facts)).unwrap_or_default(),
                remove: |index: &FleetIndex, id: &WorkloadId| index.remove_config_map(id),
            },
        ),
        keep.up_to_date(
            watcher(api::<Seen<JobFacts>>(clients, namespace), config().labels(INTENT_LABEL)),
            Upkeep {
                key: |seen| Some(ObjectKey::of(seen)),
                put: |index, seen| index.put_job(&seen.metadata.namespace.clone().unwrap_or_default(), seen.facts),
                remove: |index, key| index.remove_job(key),
            },
        ),
        keep.up_to_date(
            watcher(api::<Policy>(clients, namespace), config()),
            Upkeep {
                key: |policy| Some(ObjectKey::of(policy)),
                put: |index, policy| index.put_policy(without_managed_fields(policy)),
                remove: |index, key| index.remove_policy(key),
            },
        ),
        keep.up_to_date(
            watcher(api::<Guard<FeatureFlag>>(clients, namespace), config()),
            Upkeep {
                key: |set| Some(ObjectKey::of(set)),
                put: |index, set| index.put_flag_set(without_annotations(with_overriders_only(set)).into()),
                remove: |index, key| index.remove_flag_set(key),
            },
        ),
    ])
}

/// An object without what is large in it and says nothing to the operator.
fn without_managed_fields<K: Resource>(mut object: K) -> K {
    object.meta_mut().managed_fields = None;
    without_annotations(object)
}

/// Where `kubectl apply` keeps a copy of the whole object.
fn without_annotations<K: Resource>(mut object: K) -> K {
    object.meta_mut().annotations = None;
    object
}

fn api<K>(clients: &Clients, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(clients.watch.clone(), namespace),
        None => Api::all(clients.watch.clone()),
    }
}

/// Whether the API server answered, and be it with a refusal: one that cannot be reached is waited for as long as it takes.
fn is_answer(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(source) | WatchStartFailed(source) | WatchFailed(source) => {
            matches!(source, kube::Error::Api(_))
        }
        WatchError(_) => true,
        watcher::Error::NoResourceVersion => false,
    }
}

struct Keeper<I> {
    index: Arc<I>,
    filling: Filling,
}

impl<I: Send + Sync + 'static> Keeper<I> {
    /// Keeps the index up to date from one watch. Errors of the watch are logged, and it goes on.
    fn up_to_date<T, K>(
        &self,
        watch: impl Stream<Item = watcher::Result<Event<T>>> + Send + 'static,
        Upkeep { key, put, remove }: Upkeep<I, T, K>,
    ) -> BoxStream<'static, News>
    where
        T: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        K: Hash + Eq + Clone + Send + 'static,
    {
        let kind = T::plural(&()).into_owned();
        let (index, filling) = (Arc::clone(&self.index), self.filling.clone());
        filling.expect(&kind);
        let mut known = Known { keys: HashMap::new(), round: 0, listing: false, filled: false };
        let news = move |event: watcher::Result<Event<T>>| match event {
            Ok(Event::Init) => {
                known.round += 1;
                known.listing = false;
                None
            }
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                if !known.listing {
                    known.listing = true;
                    filling.listing(&kind);
                }
                if let Some(known_by) = key(&object) {
                    known.keys.insert(known_by, known.round);
                }
                Some(News::Changed(put(&index, object)))
            }
            Ok(Event::Delete(object)) => {
                let known_by = key(&object)?;
                known.keys.remove(&known_by);
                Some(News::Changed(remove(&index, &known_by)))
            }
            Ok(Event::InitDone) => {
                // What the new list does not have went away while nobody watched.
                let gone = known.end_of_list();
                let affected = gone.iter().flat_map(|key| remove(&index, key)).collect();
                if !known.filled {
                    known.filled = true;
                    if filling.filled(&kind) {
                        return Some(News::Filled);
                    }
                }
                Some(News::Changed(affected))
            }
            Err(error) => {
                let why = spelled_watch(&error);
                warn!(kind, error = why, "a watch failed; it is started again");
                filling.failed(&kind, &why, is_answer(&error));
                None
            }
        };
        let mut news = news;
        watch.default_backoff().filter_map(move |event| std::future::ready(news(event))).boxed()
    }
}

/// The objects that a watch has shown, each with the list in which it was last seen.
struct Known<K> {
    keys: HashMap<K, u32>,
    round: u32,
    /// The first object of the list under way has come.
    listing: bool,
    filled: bool,
}

impl<K: Hash + Eq + Clone> Known<K> {
    /// The objects that the list that just ended does not have.
    fn end_of_list(&mut self) -> Vec<K> {
        let round = self.round;
        let (kept, gone) = std::mem::take(&mut self.keys).into_iter().partition(|(_, seen)| *seen == round);
        self.keys = kept;
        let gone: HashMap<K, u32> = gone;
        gone.into_keys().collect()
    }
}
