//! The workload: what it calls, what it runs by, how busy it is.

use crate::bulkhead::Bulkhead;
use crate::degradation::{Degradation, Load};
use crate::{Dependency, Flags, Metrics, lock};
use arc_swap::ArcSwap;
use contract::{PolicySettings, RuntimeConfig, WorkloadId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Time between two readings of the load.
const LOAD_INTERVAL: Duration = Duration::from_millis(500);

/// Everything that the operator configures in one workload.
pub struct Resilience {
    id: WorkloadId,
    dependencies: BTreeMap<String, Arc<Dependency>>,
    bulkheads: Mutex<BTreeMap<String, Arc<Bulkhead>>>,
    policy: ArcSwap<PolicySettings>,
    flags: Flags,
    load: Load,
    degradation: Degradation,
    metrics: Arc<Metrics>,
    changes: watch::Sender<u64>,
}

/// Declares a workload.
pub struct Builder {
    id: WorkloadId,
    metrics: Arc<Metrics>,
    dependencies: BTreeMap<String, Arc<Dependency>>,
}

impl Builder {
    /// Declares a thing that the workload calls.
    #[must_use]
    pub fn dependency(mut self, name: &str) -> Self {
        let dependency = Dependency::new(name, Arc::clone(&self.metrics));
        self.dependencies.insert(name.to_owned(), Arc::new(dependency));
        self
    }

    /// The workload, running on built-in defaults.
    pub fn build(self) -> Arc<Resilience> {
        Arc::new(Resilience {
            id: self.id,
            dependencies: self.dependencies,
            bulkheads: Mutex::default(),
            policy: ArcSwap::default(),
            flags: Flags::default(),
            load: Load::default(),
            degradation: Degradation::default(),
            metrics: self.metrics,
            changes: watch::Sender::new(0),
        })
    }
}

impl Resilience {
    /// Starts a declaration.
    pub fn builder(id: WorkloadId) -> Builder {
        let metrics = Arc::new(Metrics::new(&id.name));
        Builder { id, metrics, dependencies: BTreeMap::new() }
    }

    /// Which workload this is.
    pub fn id(&self) -> &WorkloadId {
        &self.id
    }

    /// The dependency of that name, if it was declared.
    pub fn dependency(&self, name: &str) -> Option<Arc<Dependency>> {
        self.dependencies.get(name).cloned()
    }

    /// All dependencies, by name.
    pub fn dependencies(&self) -> impl Iterator<Item = &Arc<Dependency>> {
        self.dependencies.values()
    }

    /// The feature flags.
    pub fn flags(&self) -> &Flags {
        &self.flags
    }

    /// How busy the workload is.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// Whether it runs in degraded mode.
    pub fn is_degraded(&self) -> bool {
        self.degradation.is_active()
    }

    /// Its metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The policy in force.
    pub fn policy(&self) -> Arc<PolicySettings> {
        self.policy.load_full()
    }

    /// Wakes up after every change of the configuration.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Puts `config` in force, in place. The answer names the dependencies that the workload does not have.
    pub(crate) fn apply(&self, config: &RuntimeConfig) -> Vec<String> {
        let policy = &config.policy.settings;
        let bulkheads = self.apply_bulkheads(policy);
        for (name, dependency) in &self.dependencies {
            let settings = policy.dependencies.get(name).cloned().unwrap_or_default();
            let bulkhead = settings.bulkhead.as_ref().and_then(|name| {
                let found = bulkheads.get(name).cloned();
                if found.is_none() {
                    tracing::warn!(dependency = %dependency.name(), bulkhead = %name, "the policy names no such bulkhead; calls pass without one");
                }
                found
            });
            dependency.configure(settings, bulkhead);
        }
        self.flags.configure(config.flags.settings.clone());
        self.policy.store(Arc::new(policy.clone()));
        self.observe_load();
        self.changes.send_modify(|version| *version += 1);
        policy.dependencies.keys().filter(|name| !self.dependencies.contains_key(*name)).cloned().collect()
    }

    /// Bulkheads that stay keep their calls; new ones start empty.
    fn apply_bulkheads(&self, policy: &PolicySettings) -> BTreeMap<String, Arc<Bulkhead>> {
        let mut bulkheads = lock(&self.bulkheads);
        bulkheads.retain(|name, _| policy.bulkheads.contains_key(name));
        for (name, settings) in &policy.bulkheads {
            bulkheads
                .entry(name.clone())
                .and_modify(|bulkhead| bulkhead.configure(settings.clone()))
                .or_insert_with(|| Bulkhead::new(settings.clone()));
        }
        bulkheads.clone()
    }

    /// Reads the load, and enters or leaves degraded mode.
    fn observe_load(&self) {
        let policy = self.policy.load();
        let settings = policy.degradation.as_ref();
        let before = self.degradation.is_active();
        let load = self.load.report();
        let degraded = self.degradation.observe(settings, load.percent);
        let variants = settings.filter(|_| degraded).map(|settings| settings.flag_overrides.clone());
        self.flags.set_degraded(variants.unwrap_or_default());
        self.metrics.degraded(degraded);
        if degraded != before {
            tracing::warn!(degraded, load_percent = load.percent, "degraded mode changed");
        }
    }

    /// Watches the load for as long as it is polled.
    pub async fn watch_load(&self) {
        let mut ticks = tokio::time::interval(LOAD_INTERVAL);
        loop {
            ticks.tick().await;
            self.observe_load();
        }
    }
}
