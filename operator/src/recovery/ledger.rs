//! The ledger of one policy: reading it together, and writing to it. A new record is made only if none has its name, and one
//! that has changed only if it is still as it was read; what this process has written, it knows at once.

use super::{
    events,
    index::{MOST_WAITING, withdrawn},
    object::{Entry, MIGRATED_ANNOTATION, Told, manifest, name_of},
};
use crate::{
    context::Context,
    crash_point::CrashPoint,
    error::ReconcileError,
    fleet::index::ObjectKey,
    kubernetes::{
        clients::call,
        meta::{FIELD_MANAGER, object_reference},
    },
    pods::prober::now_in_milliseconds,
    status::{
        target::{Target, workload_of},
        write::write_status,
    },
    workload,
};
use contract::WorkloadId;
use crds::{Recovery, ResiliencePolicy, resilience_policy::Mode};
use engine::recovery::{Change, Decision, History, Outcome, Record};
use jiff::Timestamp;
use kube::{Api, ResourceExt, api::PostParams, core::PartialObjectMeta};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tracing::warn;

/// The Recoveries that one policy decides by.
pub struct Ledger {
    /// What they say.
    pub history: History,
    /// The object of each record, by the intent's id.
    entries: BTreeMap<String, Arc<Entry>>,
    /// What a person made and nobody has looked at yet.
    unresolved: Vec<Arc<Entry>>,
}

impl Ledger {
    /// Reads together what is known of a policy's workloads.
    pub fn gather(ctx: &Context, policy: &ResiliencePolicy, held: &[&Target], now: Timestamp) -> Self {
        let namespace = policy.namespace().unwrap_or_default();
        let mut ledger = Self { history: History::default(), entries: BTreeMap::new(), unresolved: Vec::new() };
        let (mut records, mut aside) = (Vec::new(), Vec::new());
        for target in held {
            let id = workload_of(&namespace, &target.key);
            let mine = Mine::of(ctx, policy, &id);
            let mut all: Vec<_> = ctx.ledger.of(&id).into_iter().filter(|entry| mine.has(entry)).collect();
            all.sort_by_key(|entry| entry.record.started_at);
            let mut waiting = 0;
            for entry in all {
                let is_over = entry.record.finished_at.is_some();
                if entry.is_being_deleted && !is_over {
                    records.push(withdrawn(&entry.record, Duration::ZERO, now));
                    continue;
                }
                if entry.told == Told::NothingOfMigrated {
                    // Its status is about to be written.
                    continue;
                }
                if entry.record.by_hand && !is_over {
                    waiting += 1;
                    if waiting > MOST_WAITING {
                        // The recovery controller refuses it.
                        continue;
                    }
                }
                if entry.unresolved && entry.record.finished_at.is_none() {
                    ledger.unresolved.push(entry);
                    continue;
                }
                if entry.told == Told::ByNewerVersion { &mut aside } else { &mut records }.push(entry.record.clone());
                ledger.entries.insert(entry.record.id.clone(), entry);
            }
            let withdrawn = ctx.ledger.withdrawn_of(&id, now).into_iter();
            // An intent that was begun again is not withdrawn any more.
            let withdrawn = withdrawn.filter(|(entry, record)| {
                mine.has(entry) && !entry.unresolved && !ledger.entries.contains_key(&record.id)
            });
            records.extend(withdrawn.map(|(_, record)| record));
        }
        let mut seen = BTreeSet::new();
        records.retain(|record| seen.insert(record.id.clone()));
        ledger.history = records.into_iter().collect();
        ledger.history.aside = aside;
        ledger.history.set_impossible_aside(now);
        ledger
    }

    /// Names of what people made, by the id of each.
    pub fn names_by_hand(&self) -> BTreeMap<String, String> {
        let by_hand = self.entries.iter().filter(|(_, entry)| entry.record.by_hand);
        by_hand.map(|(id, entry)| (id.clone(), entry.key().name)).collect()
    }

    /// Finds the pods that people have named, and says so; whether there was anything to say.
    pub async fn resolve(&self, ctx: &Context, now: Timestamp) -> Result<bool, ReconcileError> {
        for entry in &self.unresolved {
            let mut record = entry.record.clone();
            let Some(pod) = record.subject.pod.as_mut() else { continue };
            let pods = ctx.index.pods_of(&entry.workload);
            let is_meant = |uid: &str| entry.wanted_uid.as_deref().is_none_or(|wanted| wanted == uid);
            if let Some(known) = pods.iter().find(|known| *known.name == *pod.name && is_meant(&known.uid)) {
                pod.uid = known.uid.to_string();
            } else {
                record.message = Some(format!("{} has no pod {}", entry.workload, pod.name));
                (record.outcome, record.finished_at) = (Outcome::Failed, Some(now));
            }
            let made = update(ctx, entry, &record).await?;
            if record.finished_at.is_some() {
                ctx.shared.events.publish(&object_reference::<Recovery>(&made.meta), &events::finished(&record));
            }
        }
        Ok(!self.unresolved.is_empty())
    }

    /// Writes what has changed of the records that are there.
    pub async fn update(&mut self, ctx: &Context, after: &History) -> Result<(), ReconcileError> {
        let changes = after.changes_since(&self.history);
        let ends = |change: &Change<'_>| matches!(change, Change::Update(record) if record.finished_at.is_some());
        if changes.iter().any(ends) {
            ctx.shared.crash(CrashPoint::BeforeStatus);
        }
        for change in changes {
            // What a person deleted has no object any more.
            let Change::Update(record) = change else { continue };
            let Some(entry) = self.entries.get(&record.id).filter(|_| !record.withdrawn).cloned() else { continue };
            let written = update(ctx, &entry, record).await?;
            self.entries.insert(record.id.clone(), written);
        }
        let is_known = |record: &Record| self.history.all().any(|known| known.id == record.id);
        self.history = History {
            in_flight: after.in_flight.iter().filter(|record| is_known(record)).cloned().collect(),
            recent: after.recent.clone(),
            aside: after.aside.clone(),
        };
        Ok(())
    }

    /// Writes what is new. The answer is what cannot be written, with the reason.
    pub async fn begin(
        &mut self,
        ctx: &Context,
        policy: &ResiliencePolicy,
        begun: &[Record],
    ) -> Result<Vec<(String, ReconcileError)>, ReconcileError> {
        if begun.is_empty() {
            return Ok(Vec::new());
        }
        ctx.shared.crash(CrashPoint::BeforeIntent);
        let mut unwritable = Vec::new();
        for record in begun {
            match create(ctx, policy, record).await {
                Ok(made) => {
                    self.history.in_flight.push(record.clone());
                    self.entries.insert(record.id.clone(), made);
                }
                Err(error) if error.is_conflict() || matches!(error, ReconcileError::NotLeading) => return Err(error),
                // What cannot be written must not keep the rest from being written.
                Err(error) => unwritable.push((record.id.clone(), error)),
            }
        }
        ctx.shared.crash(CrashPoint::AfterIntent);
        Ok(unwritable)
    }

    /// Takes out of a decision what another reconcile began and a person has deleted since, though no watch may show that yet.
    pub async fn drop_deleted(&self, ctx: &Context, decision: &mut Decision, begun: &[Record]) {
        let earlier = |record: &&Record| !begun.iter().any(|new| new.id == record.id);
        let mut gone = Vec::new();
        for record in decision.execute.iter().filter(earlier) {
            let Some(entry) = self.entries.get(&record.id) else { continue };
            let ObjectKey { namespace, name } = entry.key();
            let api: Api<Recovery> = Api::namespaced(ctx.shared.clients.act.clone(), &namespace);
            let there = call(api.get_metadata_opt(&name)).await;
            let is_same = |there: &PartialObjectMeta<Recovery>| {
                there.metadata.uid == entry.meta.uid && there.metadata.deletion_timestamp.is_none()
            };
            // Whether it is there is not known: it is asked for again.
            if !matches!(&there, Ok(Some(there)) if is_same(there)) {
                gone.push(record.id.clone());
            }
            if matches!(&there, Ok(None)) {
                ctx.ledger.remove(&entry.key(), entry.meta.uid.as_deref());
            }
        }
        decision.execute.retain(|record| !gone.contains(&record.id));
    }

    /// The object of a record, for Events.
    pub fn entry(&self, id: &str) -> Option<&Arc<Entry>> {
        self.entries.get(id)
    }
}

/// Which records of a workload a policy decides by.
struct Mine<'a> {
    policy: &'a str,
    enforces: bool,
    /// No policy has the workload.
    unheld: bool,
}

impl<'a> Mine<'a> {
    fn of(ctx: &Context, policy: &'a ResiliencePolicy, id: &WorkloadId) -> Self {
        let enforces = policy.spec.mode != Mode::DryRun;
        let unheld = !enforces && workload::reconcile::holder(ctx, id).is_none();
        Self { policy: policy.metadata.name.as_deref().unwrap_or_default(), enforces, unheld }
    }

    /// The policy that has the workload decides by all that was done to it, whichever policy that was for. A rehearsal decides
    /// by what it rehearsed itself, and brings to an end what it began before it became one.
    fn has(&self, entry: &Entry) -> bool {
        let own = entry.policy.as_deref() == Some(self.policy);
        if entry.record.dry_run { own } else { self.enforces || (own && self.unheld) }
    }
}

/// Makes the object of an intent. One that is there already is read instead, and the caller decides again.
async fn create(ctx: &Context, policy: &ResiliencePolicy, record: &Record) -> Result<Arc<Entry>, ReconcileError> {
    create_as(ctx, policy, record, false).await
}

/// See [`create`]; `migrated`: another version did this, and a status follows.
async fn create_as(
    ctx: &Context,
    policy: &ResiliencePolicy,
    record: &Record,
    migrated: bool,
) -> Result<Arc<Entry>, ReconcileError> {
    if !ctx.shared.fence.holds() {
        return Err(ReconcileError::NotLeading);
    }
    let namespace = policy.namespace().unwrap_or_default();
    let id = workload_of(&namespace, &record.subject.target);
    let workload = ctx.index.workload(&id).ok_or_else(|| ReconcileError::WorkloadGone(id.clone()))?;
    let mut object = manifest(record, &namespace, &policy.name_any(), &workload.uid);
    if migrated {
        object["metadata"]["annotations"] = json!({ MIGRATED_ANNOTATION: "0.1" });
    }
    let object: Recovery = serde_json::from_value(object).map_err(ReconcileError::NotWritable)?;
    let api: Api<Recovery> = Api::namespaced(ctx.shared.clients.act.clone(), &namespace);
    let how = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let name = object.name_any();
    match call(api.create(&how, &object)).await {
        Ok(made) => Ok(keep(ctx, Entry::of(&made))),
        Err(error) if error.is_already_there() => {
            let there = call(api.get(&name)).await.map_err(ReconcileError::api("reading the Recovery"))?;
            let entry = Entry::of(&there);
            let same = entry.record.slot == record.slot && entry.policy.is_some();
            keep(ctx, entry);
            if !same {
                return Err(ReconcileError::NameTaken(ObjectKey { namespace, name }));
            }
            Err(ReconcileError::api("creating the Recovery")(error))
        }
        Err(error) => Err(ReconcileError::api("creating the Recovery")(error)),
    }
}

/// Writes the status of an object, if it is still as it was read.
async fn update(ctx: &Context, entry: &Entry, record: &Record) -> Result<Arc<Entry>, ReconcileError> {
    let written = write_status::<Recovery>(ctx, &entry.meta, &entry.status(record)).await;
    if let Err(error) = &written
        && error.is_conflict()
    {
        // Somebody else changed or deleted it: the watch may show that only later.
        reread(ctx, entry).await;
    }
    let mut after = entry.clone();
    (after.meta.resource_version, after.record) = (written?, record.clone());
    if entry.told == Told::Nothing && record.by_hand {
        ctx.shared.events.publish(&object_reference::<Recovery>(&entry.meta), &events::started(record));
    }
    after.unresolved = record.subject.pod.as_ref().is_some_and(|pod| pod.uid.is_empty());
    after.told = Told::Status;
    Ok(keep(ctx, after))
}

async fn reread(ctx: &Context, entry: &Entry) {
    let ObjectKey { namespace, name } = entry.key();
    let api: Api<Recovery> = Api::namespaced(ctx.shared.clients.act.clone(), &namespace);
    match call(api.get_opt(&name)).await {
        Ok(Some(there)) if there.uid() == entry.meta.uid => drop(ctx.ledger.put_entry(Entry::of(&there))),
        Ok(_) => drop(ctx.ledger.remove(&entry.key(), entry.meta.uid.as_deref())),
        Err(_) => {}
    }
}

/// Knows at once what was written.
fn keep(ctx: &Context, entry: Entry) -> Arc<Entry> {
    ctx.ledger.put_entry(entry.clone());
    Arc::new(entry)
}

/// Says of a record that it is over, where no policy decides about it.
pub async fn end(ctx: &Context, entry: &Entry, outcome: Outcome, why: &str) -> Result<(), ReconcileError> {
    let message = Some(why.to_owned());
    let finished_at = (!matches!(outcome, Outcome::Waiting)).then(now_in_milliseconds);
    let record = Record { outcome, finished_at, message, ..entry.record.clone() };
    if record != entry.record {
        update(ctx, entry, &record).await?;
        if record.finished_at.is_some() {
            ctx.shared.events.publish(&object_reference::<Recovery>(&entry.meta), &events::finished(&record));
        }
    }
    Ok(())
}

/// Makes what is not there yet, and gives it a status if nobody has. For what another version wrote down.
pub async fn adopt(ctx: &Context, policy: &ResiliencePolicy, record: &Record) -> Result<(), ReconcileError> {
    let namespace = policy.namespace().unwrap_or_default();
    let mut record = record.clone();
    record.message = record.message.or_else(|| Some("taken over from version 0.1".to_owned()));
    let record = &record;
    let made = match create_as(ctx, policy, record, true).await {
        Ok(made) => made,
        Err(ReconcileError::WorkloadGone(_)) => return Ok(()),
        // Anybody who may edit a status can have written anything into it.
        Err(ReconcileError::Api { source, .. }) if source.code() == Some(422) => {
            warn!(%source, "what the status says of an action cannot be a Recovery; it is dropped");
            return Ok(());
        }
        Err(error) => {
            let known = ctx.ledger.get(&ObjectKey { namespace, name: name_of(record) });
            known.filter(|known| known.record.slot == record.slot).ok_or(error)?
        }
    };
    if matches!(made.told, Told::Nothing | Told::NothingOfMigrated) {
        update(ctx, &made, record).await?;
    }
    Ok(())
}
