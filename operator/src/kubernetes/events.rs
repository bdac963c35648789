//! Kubernetes Events: what `kubectl describe` shows of an incident.
//!
//! They are published on changes only, best effort: a lost Event never holds up or fails anything else. Too many of one
//! object within a minute are dropped, so that a flapping check cannot flood the API server.

use super::{
    clients::{Clients, call},
    meta::cut,
};
use crds::EventReason;
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event as ApiEvent},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::api::{Api, PostParams};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tracing::debug;

/// Most Events of one object within [`WINDOW`].
const MAX_PER_WINDOW: u32 = 30;
const WINDOW: Duration = Duration::from_secs(60);
/// Longest note that the API server takes.
const MAX_NOTE: usize = 1024;

/// Whether an Event is good or bad news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Normal,
    /// Somebody may want to look.
    Warning,
}

/// Something that a person wants to hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Good or bad.
    pub severity: Severity,
    /// One CamelCase word.
    pub reason: EventReason,
    /// What the operator did about it.
    pub action: &'static str,
    /// What happened, for people.
    pub note: String,
}

impl Event {
    /// Good news.
    pub fn normal(reason: EventReason, action: &'static str, note: String) -> Self {
        Self { severity: Severity::Normal, reason, action, note }
    }

    /// Bad news.
    pub fn warning(reason: EventReason, action: &'static str, note: String) -> Self {
        Self { severity: Severity::Warning, reason, action, note }
    }
}

/// Publishes Events.
#[derive(Clone)]
pub struct Events {
    clients: Clients,
    instance: String,
    sent: Arc<Mutex<HashMap<String, (Instant, u32)>>>,
    serial: Arc<AtomicU64>,
}

impl Events {
    /// Publishes as replica `instance`.
    pub fn new(clients: Clients, instance: String) -> Self {
        Self { clients, instance, sent: Arc::default(), serial: Arc::default() }
    }

    /// The replica that publishes.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Publishes in the background.
    pub fn publish(&self, regarding: &ObjectReference, event: &Event) {
        if !self.within_limits(regarding.uid.as_deref().unwrap_or_default()) {
            return;
        }
        let namespace = regarding.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let now = jiff::Timestamp::now();
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let name = regarding.name.as_deref().unwrap_or("unknown");
        let mut event = ApiEvent {
            action: Some(event.action.to_owned()),
            event_time: Some(MicroTime(now)),
            note: Some(cut(&event.note, MAX_NOTE).to_owned()),
            reason: Some(event.reason.as_str().to_owned()),
            regarding: Some(regarding.clone()),
            reporting_controller: Some("resilience.ticketwave.io/operator".to_owned()),
            reporting_instance: Some(cut(&self.instance, 128).to_owned()),
            type_: Some(if event.severity == Severity::Normal { "Normal" } else { "Warning" }.to_owned()),
            ..ApiEvent::default()
        };
        event.metadata.name = Some(format!("{name}.{:x}{serial:04x}", now.as_millisecond()));
        event.metadata.namespace = Some(namespace.clone());
        let api: Api<ApiEvent> = Api::namespaced(self.clients.act.clone(), &namespace);
        tokio::spawn(async move {
            if let Err(error) = call(api.create(&PostParams::default(), &event)).await {
                debug!(%error, "an Event was lost");
            }
        });
    }

    fn within_limits(&self, uid: &str) -> bool {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        sent.retain(|_, (since, _)| now.duration_since(*since) < WINDOW);
        let (_, count) = sent.entry(uid.to_owned()).or_insert((now, 0));
        *count += 1;
        *count <= MAX_PER_WINDOW
    }
}
