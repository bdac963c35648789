//! The workload: what it calls, what it runs by, how busy it is.

use crate::bulkhead::Bulkheads;
use crate::control::degradation::{Degradation, Load, with_bulkheads};
use crate::control::spare_memory::SpareMemory;
use crate::dependency::Dependency;
use crate::feature_flags::Flags;
use crate::metrics::Metrics;
use arc_swap::ArcSwap;
use contract::{
    BuiltIns, DegradationSettings, EffectiveReport, HealthCheckSettings, LoadReport, PolicySettings, RuntimeConfig,
    WorkloadId,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Time between two readings of the load.
const LOAD_INTERVAL: Duration = Duration::from_millis(500);

/// Everything that the operator configures in one workload.
pub struct Resilience {
    id: WorkloadId,
    dependencies: BTreeMap<String, &'static Dependency>,
    bulkheads: &'static Bulkheads,
    /// Built-in settings, but for dependencies and bulkheads.
    defaults: PolicySettings,
    built_ins: BuiltIns,
    policy: ArcSwap<PolicySettings>,
    flags: Flags,
    load: Load,
    degradation: Degradation,
    metrics: Arc<Metrics>,
    spare_memory: SpareMemory,
    changes: watch::Sender<u64>,
}

/// Declares what a workload calls and its built-in settings.
pub struct Builder {
    id: WorkloadId,
    metrics: Arc<Metrics>,
    dependencies: BTreeMap<String, &'static Dependency>,
    bulkheads: &'static Bulkheads,
    defaults: PolicySettings,
    waiting_room: bool,
}

impl Builder {
    /// What holds where the policy says nothing: for every value of a dependency that it does not say, for bulkheads and
    /// checks that it does not name, for the degraded mode if it has none, and while there is no policy.
    #[must_use]
    pub fn defaults(mut self, defaults: PolicySettings) -> Self {
        self.defaults = defaults;
        self
    }

    /// Declares whether it has a waiting room that a policy can open.
    #[must_use]
    pub fn waiting_room(mut self, is_there: bool) -> Self {
        self.waiting_room = is_there;
        self
    }

    /// Declares a thing that the workload calls.
    #[must_use]
    pub fn dependency(mut self, name: &str) -> Self {
        let dependency = Dependency::new(name, self.bulkheads, &self.metrics);
        self.dependencies.insert(name.to_owned(), dependency);
        self
    }

    /// The workload, running on built-in defaults.
    pub fn build(mut self) -> Arc<Resilience> {
        let mut own = std::mem::take(&mut self.defaults.dependencies);
        let built_ins = BuiltIns {
            dependencies: self.dependencies.keys().map(|name| (name.clone(), own.remove(name))).collect(),
            bulkheads: std::mem::take(&mut self.defaults.bulkheads),
            waiting_room: self.waiting_room,
        };
        let resilience = Arc::new(Resilience {
            id: self.id,
            dependencies: self.dependencies,
            bulkheads: self.bulkheads,
            defaults: self.defaults,
            built_ins,
            policy: ArcSwap::default(),
            flags: Flags::default(),
            load: Load::default(),
            degradation: Degradation::default(),
            metrics: self.metrics,
            spare_memory: SpareMemory::default(),
            changes: watch::Sender::new(0),
        });
        resilience.configure(&PolicySettings::default());
        resilience
    }
}

impl Resilience {
    /// Starts to declare the workload `id`.
    pub fn builder(id: WorkloadId) -> Builder {
        let metrics = Arc::new(Metrics::new(&id.name));
        let bulkheads = Bulkheads::new();
        metrics.watch_bulkheads(bulkheads);
        Builder {
            id,
            metrics,
            dependencies: BTreeMap::new(),
            bulkheads,
            defaults: PolicySettings::default(),
            waiting_room: false,
        }
    }

    /// The workload that this process belongs to.
    pub fn id(&self) -> &WorkloadId {
        &self.id
    }

    /// The dependency of that name, if it was declared.
    pub fn dependency(&self, name: &str) -> Option<&'static Dependency> {
        self.dependencies.get(name).copied()
    }

    /// All dependencies, by name.
    pub fn dependencies(&self) -> impl Iterator<Item = &'static Dependency> {
        self.dependencies.values().copied()
    }

    /// The feature flags.
    pub fn flags(&self) -> &Flags {
        &self.flags
    }

    /// How busy the workload is.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// How busy the workload is, with its bulkheads.
    pub fn load_report(&self) -> LoadReport {
        with_bulkheads(self.load.report(), &self.bulkheads.usage())
    }

    /// Whether it runs in degraded mode.
    pub fn is_degraded(&self) -> bool {
        self.degradation.is_active()
    }

    /// The metrics that the workload serves.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// What the workload gives back when memory is short.
    pub fn spare_memory(&self) -> &SpareMemory {
        &self.spare_memory
    }

    /// The settings of the policy in force; empty while there is none.
    pub fn policy(&self) -> Arc<PolicySettings> {
        self.policy.load_full()
    }

    /// The settings of a check.
    pub(crate) fn check_settings(&self, name: &str) -> HealthCheckSettings {
        let policy = self.policy.load();
        let settings = policy.health_checks.get(name).or_else(|| self.defaults.health_checks.get(name));
        settings.cloned().unwrap_or_default()
    }

    /// Wakes up after every change of the configuration.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Puts `config` in force, in place. The answer names the dependencies that the workload does not have.
    pub(crate) fn apply(&self, config: &RuntimeConfig) -> Vec<String> {
        let policy = &config.policy.settings;
        self.configure(policy);
        self.flags.configure(config.flags.settings.clone());
        self.policy.store(Arc::new(policy.clone()));
        self.observe_load();
        self.changes.send_modify(|version| *version += 1);
        let named = policy.named_dependencies().into_iter();
        named.filter(|name| !self.dependencies.contains_key(*name)).map(str::to_owned).collect()
    }

    /// What the workload runs by under the policy in force, and where each value comes from. `content_hash` is that of the
    /// document in force.
    pub(crate) fn effective(&self, content_hash: String) -> EffectiveReport {
        EffectiveReport::new(content_hash, &self.policy.load(), &self.built_ins, self.defaults.degradation.as_ref())
    }

    fn configure(&self, policy: &PolicySettings) {
        let bulkheads = self.built_ins.bulkheads.iter().chain(&policy.bulkheads);
        let bulkheads = bulkheads.map(|(name, settings)| (name.clone(), settings.clone())).collect();
        let bulkheads = self.bulkheads.assign(&bulkheads);
        for (name, resolved) in self.built_ins.resolve(policy) {
            let Some(dependency) = self.dependencies.get(&name) else { continue };
            let settings = resolved.settings;
            let said = policy.dependency_policies.get(&name).and_then(|said| said.bulkhead.as_ref());
            if let Some(bulkhead) = said.filter(|said| settings.bulkhead.as_ref() != Some(said)) {
                tracing::warn!(dependency = %name, %bulkhead, instead = ?settings.bulkhead, "unknown bulkhead; the built-in one stays");
            }
            // A bulkhead beyond the most that there may be has no place.
            let bulkhead = settings.bulkhead.as_ref().and_then(|name| bulkheads.get(name).copied());
            dependency.configure(settings, bulkhead.unwrap_or(Bulkheads::NONE));
        }
    }

    /// Reads the load, and enters or leaves degraded mode.
    fn observe_load(&self) {
        let policy = self.policy.load();
        let settings = policy.degradation.as_ref().or(self.defaults.degradation.as_ref());
        let load = self.load_report();
        let stages = settings.map(DegradationSettings::all_stages).unwrap_or_default();
        let before = self.degradation.is_active();
        let level = self.degradation.observe(settings, &stages, load.counts());
        let stage = level.checked_sub(1).and_then(|last| stages.get(last));
        let variants = DegradationSettings::overrides(&stages, level);
        self.flags.set_degraded(variants, stage.map_or(0, |stage| stage.load_percent));
        self.metrics.degraded(level > 0);
        if (level > 0) != before {
            let (stage, load_percent) = (stage.map(|stage| stage.name.as_str()), load.counts());
            tracing::warn!(degraded = level > 0, stage, load_percent, cause = %load.cause, "degraded mode changed");
        }
    }

    /// Watches the load for as long as it is polled.
    pub async fn watch_load(&self) {
        let mut ticks = tokio::time::interval(LOAD_INTERVAL);
        loop {
            ticks.tick().await;
            self.observe_load();
            self.dependencies().for_each(Dependency::update_budget);
        }
    }
}
