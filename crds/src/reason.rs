//! Reasons of conditions and of Events. Each reason of a condition has a page in `docs/runbooks`.

crate::words! {
    /// Why a condition is as it is.
    pub enum Reason {
        /// The resource is valid, and has its targets.
        Accepted,
        /// A field is invalid, or the object cannot be read.
        InvalidPolicy,
        /// A field is invalid, or the object cannot be read.
        InvalidFlagSet,
        /// No workload of that kind and name exists.
        TargetNotFound,
        /// Another policy has the workload, or another release of the operator manages it.
        Conflicted,
        /// Nothing is published or executed; what would be is said.
        DryRun,
        /// A person stopped changes and recovery.
        Suspended,
        /// The configuration is being written and brought to the pods.
        Publishing,
        /// All ready pods run it and understood all of it.
        Programmed,
        /// The policy only checks and recovers, so nothing is published.
        RecoveryOnly,
        /// Some ready pods do not run it, or not all of it.
        PartiallyProgrammed,
        /// It is published; there is no ready pod to run it.
        NoPods,
        /// No workload is named, so there is nothing to publish.
        NoTargets,
        /// It is more than one document can carry.
        ConfigTooLarge,
        /// A ConfigMap of that name belongs to somebody else.
        ConfigMapNotOurs,
        /// The API server did not take the ConfigMap.
        PublishFailed,
        /// The operator's own code failed over this resource.
        InternalError,
        /// There is nothing left to do.
        Settled,
        /// Nothing waits for a person.
        NotStalled,
        /// No check fails.
        AllChecksPass,
        /// A check fails.
        CheckUnhealthy,
        /// No pod runs in degraded mode.
        NotDegraded,
        /// Some pod runs in degraded mode.
        Degraded,
        /// The fleet does, by quorum or because a person forces it.
        FleetDegraded,
        /// Recovery may act.
        Allowed,
        /// No recovery steps are configured.
        NoLadders,
        /// People want no recovery to begin for now.
        Paused,
        /// Nothing is to be done to the pod.
        Excluded,
        /// So much was done in the namespace that it must have one cause.
        StormActive,
        /// The operator's view of the cluster is too old to act on.
        ObserverStale,
        /// The workload is being rolled out.
        RolloutInProgress,
        /// The pod was never ready, or is too young to be taken away.
        StartingUp,
        /// The dependency behind the check fails for most pods.
        DependencyIsTheCause,
        /// The last recovery of this check ended a moment ago.
        Cooldown,
        /// All pods look broken.
        AllPodsUnhealthy,
        /// More pods are unhealthy than may be for one of them to be restarted.
        TooManyUnhealthy,
        /// The policy's actions are used up.
        BudgetExhausted,
        /// As many actions as are allowed at once are under way.
        OneStepAtATime,
        /// There is no rollout that may be undone.
        RollbackRefused,
        /// This version cannot execute the action.
        ActionNotSupported,
        /// Some step is left to be tried, or none is needed.
        NotExhausted,
        /// Every step was tried and did not help.
        RecoveryExhausted,
        /// No flag is overridden.
        NoOverride,
        /// Some flag is overridden by a person.
        Overridden,
        /// A flag is overridden in a set that no workload has it from.
        OverrideNotInForce,
        /// No code is known to read another type than a flag has.
        NoTypeMismatch,
        /// Code reads another type than a flag has, and uses its own default.
        TypeMismatch,
        /// The flag set is past its end.
        Expired,
        /// The flag set is not past its end.
        NotExpired,
    }
}

impl Reason {
    /// Name of its page in `docs/runbooks`, without the ending: `budget-exhausted`.
    pub fn runbook(self) -> String {
        let mut name = String::new();
        for letter in self.as_str().chars() {
            if letter.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }
}

crate::words! {
    /// Reasons of Events.
    pub enum EventReason {
        /// A policy is invalid or cannot be read; the last valid configuration stays in effect.
        InvalidPolicy,
        /// A flag set is invalid or cannot be read; the last valid configuration stays in effect.
        InvalidFlagSet,
        /// No workload of that kind and name exists.
        TargetNotFound,
        /// Another policy has the workload, or another release of the operator manages it.
        Conflicted,
        /// A configuration is live in all ready pods.
        Programmed,
        /// A ConfigMap of that name belongs to somebody else.
        ConfigMapNotOurs,
        /// It is more than one document can carry.
        ConfigTooLarge,
        /// A circuit opened in some pod.
        CircuitOpened,
        /// A circuit is closed in all pods.
        CircuitClosed,
        /// A fleet entered a stage of degraded mode.
        FleetDegraded,
        /// A fleet left a stage of degraded mode.
        FleetRecovered,
        /// A check of a pod fails.
        CheckUnhealthy,
        /// A recovery action was decided.
        RecoveryStarted,
        /// A recovery action was refused for now.
        RecoveryRefused,
        /// The check was healthy for the healthy delay after an action.
        RecoverySucceeded,
        /// An action did not help in time, or could not be executed.
        RecoveryFailed,
        /// The need for an action, or its subject, went away.
        RecoveryCancelled,
        /// An action is needed and held back.
        RecoveryWithheld,
        /// Every step was tried and did not help.
        RecoveryExhausted,
    }
}
