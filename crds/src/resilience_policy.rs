//! `ResiliencePolicy`: how workloads call what they depend on, how their health is checked, and how they recover.

use crate::{
    bounded::{ByteSize, Duration, IntOrPercent},
    schema::{FLAG_KEY_PATTERN, NAME_PATTERN, OBJECT_NAME_PATTERN},
    status::ResiliencePolicyStatus,
};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Time of a call: 1 ms to 5 minutes.
pub type CallTime = Duration<1, 300_000>;
/// A wait that may be none: up to 5 minutes.
pub type Wait = Duration<0, 300_000>;
/// A break, interval or period: 100 ms to 1 hour.
pub type Period = Duration<100, 3_600_000>;
/// A span that may be none: up to 1 hour.
pub type Span = Duration<0, 3_600_000>;
/// Time of a recovery step: 1 second to 1 hour.
pub type StepTime = Duration<1_000, 3_600_000>;
/// Time of an admission: 1 minute to 1 hour.
pub type AdmissionTime = Duration<60_000, 3_600_000>;
/// A long span: 1 second to 7 days.
pub type LongPeriod = Duration<1_000, 604_800_000>;

/// A ResiliencePolicy says how the named workloads call what they depend on (timeouts, retries, circuit breakers, bulkheads, fallbacks), how their health is checked, and what is done, within which limits, when a check fails.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "resilience.ticketwave.io",
    version = "v1alpha1",
    kind = "ResiliencePolicy",
    doc = "A ResiliencePolicy says how workloads call what they depend on, how their health is checked, and how they recover.",
    plural = "resiliencepolicies",
    shortname = "rpol",
    category = "ticketwave",
    namespaced,
    status = "ResiliencePolicyStatus",
    derive = "PartialEq",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Programmed", type_ = "string", json_path = ".status.programmed", description = "Ready pods that run this policy, of all ready pods"),
    printcolumn(name = "Open", type_ = "string", json_path = ".status.open", description = "Circuits that are open, and in how many pods"),
    printcolumn(name = "Degraded", type_ = "boolean", json_path = ".status.degraded"),
    printcolumn(name = "Recovery", type_ = "string", json_path = ".status.recovery.summary", description = "What is being done, or why nothing is"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", priority = 1),
    validation = Rule::new("self.metadata.name.size() <= 63").message("a policy's name must have at most 63 characters"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.dependencies.all(d, !has(d.fallback) || d.fallback.all(f, !has(f.provider) || f.provider != d.name))")
        .message("a fallback's provider must be another dependency than the one that failed").field_path(".dependencies").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.recovery) || self.recovery.ladders.all(l, l.check in ['pod-ready', 'restarts', 'image', 'rollout'] || self.healthChecks.exists(c, c.name == l.check))")
        .message("every recovery.ladders[].check must name an entry of healthChecks, or be pod-ready, restarts, image or rollout").field_path(".recovery").reason(Reason::FieldValueInvalid),
)]
pub struct ResiliencePolicySpec {
    /// The workloads that this policy is for: Deployments of the policy's own namespace, 1 to 16. When two policies name one workload, the older one keeps it.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["group".into(), "kind".into(), "name".into()]))]
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Vec<TargetRef>,
    /// Enforce (the default) programs the workloads and recovers them. DryRun changes nothing outside this resource's status, which says what would be done; it holds no claim on its targets.
    #[serde(default)]
    pub mode: Mode,
    /// true freezes: what is live stays, nothing new is published and no recovery action is started, and the claim on the targets stays. Default: false.
    #[serde(default)]
    pub suspend: bool,
    /// One entry for each thing that the workload calls, at most 16. An entry says only what differs: what is absent in it, and what has no entry, is the workload's built-in value, and ADR-007's number where the workload has none.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[schemars(length(max = 16))]
    pub dependencies: Vec<Dependency>,
    /// Bulkheads, each a limit on calls at once, at most 16; dependencies that name the same one share it. An entry replaces the built-in bulkhead of its name as a whole.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[schemars(length(max = 16))]
    pub bulkheads: Vec<Bulkhead>,
    /// Health checks of the workload, at most 16. One without a probe of its own is reported by the pods.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[schemars(length(max = 16))]
    pub health_checks: Vec<HealthCheck>,
    /// What is done when a check fails, and within which limits. Without it nothing is ever done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
    /// When a pod, and the fleet of them, is degraded under load, and which flags change while it is. Absent: a pod as the workload has it built in, else never; the fleet never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degradation: Option<Degradation>,
    /// Where buyers wait while there are more of them than the workload can serve, for a workload that has a waiting room: of TicketWave's services, the gateway. Absent: nobody waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_room: Option<WaitingRoom>,
}

/// A workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct TargetRef {
    /// API group of the workload. Only apps is known.
    #[serde(default)]
    pub group: TargetGroup,
    /// Kind of the workload: Deployment (the default) or StatefulSet.
    #[serde(default)]
    pub kind: TargetKind,
    /// Name of the workload, at most 63 characters; it need not exist yet.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
}

/// API group of a workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetGroup {
    /// The group of Deployments and StatefulSets.
    #[default]
    #[serde(rename = "apps")]
    Apps,
}

/// Kind of a workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetKind {
    /// A Deployment.
    #[default]
    Deployment,
    /// A StatefulSet.
    StatefulSet,
}

/// Whether a policy acts.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It does.
    #[default]
    Enforce,
    /// It only says what it would do.
    DryRun,
}

/// How one thing is called. Every member but the name may be absent: then the workload's built-in value holds, and the given number of ADR-007 where the workload has none. Built-in values that would contradict what is said here are fitted to it.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    // Waits never shrink from one to the next, so this holds whatever is not said.
    validation = Rule::new(
        "!has(self.timeout) || !has(self.timeout.request) || !has(self.retry) || !has(self.retry.numRetries) || !has(self.retry.backOff) || !has(self.retry.backOff.baseInterval) \
         || self.retry.numRetries == 0 || self.retry.numRetries * duration(self.retry.backOff.baseInterval).getMilliseconds() < duration(self.timeout.request).getMilliseconds()")
        // `format` and not `+`: the estimated cost of the text of a number is without bounds otherwise.
        .message(Message::Expression(
            "'%d retries wait at least %dms together, and timeout.request is %s, so the last retry could never start: use fewer retries, a shorter baseInterval, or a request longer than %dms'.format([\
             self.retry.numRetries, self.retry.numRetries * duration(self.retry.backOff.baseInterval).getMilliseconds(), self.timeout.request, \
             self.retry.numRetries * duration(self.retry.backOff.baseInterval).getMilliseconds()])".into()))
        .field_path(".retry").reason(Reason::FieldValueInvalid),
    // The waits of the first `numRetries` retries: base * factor^i, each at most maxInterval, all in milliseconds.
    validation = Rule::new(
        "!has(self.timeout) || !has(self.timeout.request) || !has(self.retry) || !has(self.retry.numRetries) || !has(self.retry.backOff) || !has(self.retry.backOff.baseInterval) \
         || !has(self.retry.backOff.factor) || !has(self.retry.backOff.maxInterval) || self.retry.numRetries == 0 || \
         [double(self.retry.backOff.factor)].all(f, [[1.0, f, f*f, f*f*f, f*f*f*f, f*f*f*f*f, f*f*f*f*f*f, f*f*f*f*f*f*f, f*f*f*f*f*f*f*f, f*f*f*f*f*f*f*f*f]].all(p, \
         [[double(duration(self.retry.backOff.baseInterval).getMilliseconds()), double(duration(self.retry.backOff.maxInterval).getMilliseconds())]].all(w, \
         [0,1,2,3,4,5,6,7,8,9].filter(i, i < self.retry.numRetries).map(i, p[i]*w[0] < w[1] ? p[i]*w[0] : w[1]).sum() < double(duration(self.timeout.request).getMilliseconds()))))")
        .message(Message::Expression(
            "[double(self.retry.backOff.factor)].map(f, [1.0, f, f*f, f*f*f, f*f*f*f, f*f*f*f*f, f*f*f*f*f*f, f*f*f*f*f*f*f, f*f*f*f*f*f*f*f, f*f*f*f*f*f*f*f*f]).map(p, \
             [0,1,2,3,4,5,6,7,8,9].filter(i, i < self.retry.numRetries).map(i, p[i]*double(duration(self.retry.backOff.baseInterval).getMilliseconds()) < double(duration(self.retry.backOff.maxInterval).getMilliseconds()) \
             ? p[i]*double(duration(self.retry.backOff.baseInterval).getMilliseconds()) : double(duration(self.retry.backOff.maxInterval).getMilliseconds())).sum()).map(sum, \
             'the waits between %d retries are %dms together, and timeout.request is %s, so the last retry could never start: use fewer retries, shorter waits, or a request longer than %dms'.format([\
             self.retry.numRetries, int(sum), self.timeout.request, int(sum)]))[0]".into()))
        .field_path(".retry").reason(Reason::FieldValueInvalid),
)]
pub struct Dependency {
    /// Name of the dependency, as the workload knows it, at most 63 characters.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
    /// Deadlines of a call. Absent: built in, else 15s in all and 10s for each try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Timeout>,
    /// Retries within the deadline. Absent: built in, else 3 retries after 2s, 4s and 8s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// The circuit breaker. Absent: built in, else it opens after 5 failures in a row, for 30s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// The bulkhead that calls pass through: one of bulkheads, or one that the workload has built in. Absent: built in, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulkhead_ref: Option<BulkheadRef>,
    /// What to answer with when the call fails: tried in this order, at most 4. The list replaces the built-in one as a whole; an empty one switches it off. Absent: built in, else nothing, so that the caller sees the failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(max = 4))]
    pub fallback: Option<Vec<Fallback>>,
}

/// Deadlines of a call.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.perTry) || !has(self.request) || duration(self.perTry) <= duration(self.request)")
        .message(Message::Expression("'must not be longer than request (' + self.request + '): perTry is ' + self.perTry".into()))
        .field_path(".perTry").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.connect) || !has(self.perTry) || duration(self.connect) <= duration(self.perTry)")
        .message(Message::Expression("'must not be longer than perTry (' + self.perTry + '): connect is ' + self.connect".into()))
        .field_path(".connect").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.connect) || !has(self.request) || duration(self.connect) <= duration(self.request)")
        .message(Message::Expression("'must not be longer than request (' + self.request + '): connect is ' + self.connect".into()))
        .field_path(".connect").reason(Reason::FieldValueInvalid),
)]
pub struct Timeout {
    /// Total time of a call with all its tries and waits, 1ms to 5m. Absent: built in, else 15s; at least perTry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<CallTime>,
    /// Time of one try, 1ms to 5m, at most request. Absent: built in, else 10s; a request that is shorter than the built-in one shortens it in proportion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_try: Option<CallTime>,
    /// Time to open a connection, 1ms to 5m, at most perTry. Absent: built in, else bounded by perTry alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<CallTime>,
}

/// Retries of a call.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Retry {
    /// Tries after the first one, 0 to 10; 0 switches retries off. Absent: built in, else 3; no more than can start within request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10))]
    pub num_retries: Option<i32>,
    /// Waits between the tries. Absent: built in, else 2s, doubled each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_off: Option<BackOff>,
    /// Failures that are worth another try. Absent: built in, else Timeout, ConnectFailure, 5xx. Answers that mean "no" (such as too few tickets left) are never retried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[schemars(length(max = 8))]
    pub retry_on: Option<Vec<RetryOn>>,
    /// HTTP status codes that are retried besides what retryOn names, 400 to 599, at most 16. Absent: built in, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[schemars(length(max = 16), inner(range(min = 400, max = 599)))]
    pub http_status_codes: Option<Vec<i32>>,
    /// HTTP methods that may be sent twice; any other is retried only with an idempotency key. Absent: built in, else GET, HEAD, OPTIONS, PUT, DELETE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[schemars(length(max = 8))]
    pub methods: Option<Vec<Method>>,
    /// Bound on retries as a share of the traffic. Absent: built in, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudget>,
}

/// Waits between tries.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.baseInterval) || !has(self.maxInterval) || duration(self.baseInterval) <= duration(self.maxInterval)")
        .message(Message::Expression("'must not be longer than maxInterval (' + self.maxInterval + '): baseInterval is ' + self.baseInterval".into()))
        .field_path(".baseInterval").reason(Reason::FieldValueInvalid),
)]
pub struct BackOff {
    /// Wait before the first retry, 0s to 5m. Absent: built in, else 2s; a request that is shorter than the built-in one shortens it in proportion, and all waits together fit into request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_interval: Option<Wait>,
    /// Each wait is this many times the one before, 1 to 10. Absent: built in, else 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 10.0))]
    pub factor: Option<f64>,
    /// Longest wait, 0s to 5m. Absent: built in, else 30s; it is shortened and lengthened with baseInterval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_interval: Option<Wait>,
    /// A wait is shortened by a random share of up to this many percent, so that callers do not come back in step, 0 to 100. Absent: built in, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub jitter_percent: Option<i32>,
}

/// Failures that a retry may cure.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryOn {
    /// No answer within perTry.
    Timeout,
    /// No connection, or it broke before an answer.
    ConnectFailure,
    /// HTTP status 500 and above.
    #[serde(rename = "5xx")]
    ServerError,
    /// HTTP 429, HTTP 503 with Retry-After, or an answer of a TicketWave service that says it refuses because of its load
    /// (the header x-refused).
    RateLimited,
    /// A database deadlock or serialization failure.
    Deadlock,
    /// Somebody else changed the row first.
    VersionConflict,
}

/// HTTP methods.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "they are what HTTP says")]
pub enum Method {
    Get,
    Head,
    Options,
    Put,
    Delete,
    Post,
    Patch,
}

/// Bound on retries as a share of the traffic.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RetryBudget {
    /// Retries per hundred calls, 0 to 100. Absent: built in, else 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// The time over which calls are counted, 1s to 1h. Absent: built in, else 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<StepTime>,
    /// Retries that are always allowed in each interval, 0 to 1000. Absent: built in, else 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub min_retries: Option<i32>,
}

/// A circuit breaker. It opens after consecutiveFailures, or on failureRatioPercent: one of the two.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.consecutiveFailures) && has(self.failureRatioPercent))")
        .message("consecutiveFailures and failureRatioPercent exclude each other: keep one of them")
        .field_path(".consecutiveFailures").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.consecutiveFailures) || !(has(self.minimumThroughput) || has(self.samplingDuration))")
        .message("minimumThroughput and samplingDuration belong to failureRatioPercent, not to consecutiveFailures")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.maxBreakDuration) || !has(self.breakDuration) || duration(self.breakDuration) <= duration(self.maxBreakDuration)")
        .message(Message::Expression("'must not be shorter than breakDuration (' + self.breakDuration + '): maxBreakDuration is ' + self.maxBreakDuration".into()))
        .field_path(".maxBreakDuration").reason(Reason::FieldValueInvalid),
)]
pub struct CircuitBreaker {
    /// Failures in a row that open the circuit, 1 to 1000. Absent, and failureRatioPercent too: built in, else 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub consecutive_failures: Option<i32>,
    /// Share of failed calls, in percent, that opens the circuit, 1 to 100. Absent: built in, unless consecutiveFailures is set; else not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub failure_ratio_percent: Option<i32>,
    /// Calls within samplingDuration below which failureRatioPercent does not count, 2 to 100000. Absent: built in, else 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 100_000))]
    pub minimum_throughput: Option<i32>,
    /// Window over which failureRatioPercent is taken, 100ms to 1h. Absent: built in, else 30s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_duration: Option<Period>,
    /// How long the circuit stays open before trial calls are let through, 100ms to 1h. Absent: built in, else 30s; at most maxBreakDuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub break_duration: Option<Period>,
    /// Each failed trial doubles the break, up to this, 100ms to 1h. Absent: built in, else the break does not grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_break_duration: Option<Period>,
    /// Trial calls at once while half-open, 1 to 100; as many successes in a row close the circuit. Absent: built in, else 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub half_open_max_requests: Option<i32>,
    /// Slow calls count too. Absent: built in, else they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_call: Option<SlowCall>,
    /// Open holds the circuit open, Closed holds it closed, Auto lets the breaker decide. Absent: built in, else Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manual_state: Option<ManualState>,
}

/// When a call counts as slow.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SlowCall {
    /// A call that takes this long or longer is slow, 1ms to 5m.
    pub duration: CallTime,
    /// Share of slow calls, in percent, that opens the circuit, 1 to 100. Absent: built in, else 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub percent: Option<i32>,
}

/// Open holds the circuit open, Closed holds it closed, Auto lets the breaker decide. Absent: built in, else Auto.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManualState {
    /// It decides by itself.
    Auto,
    /// Held open.
    Open,
    /// Held closed.
    Closed,
}

/// Reference to a bulkhead of the same policy or of the workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct BulkheadRef {
    /// Its name.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
}

/// What to answer with when a call fails.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.type == 'Provider') == has(self.provider)").message("provider must be set for type Provider, and for no other").field_path(".provider").reason(Reason::FieldValueInvalid),
    validation = Rule::new("(self.type == 'Static') == has(self.response)").message("response must be set for type Static, and for no other").field_path(".response").reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.type == 'Cache' || !has(self.cache)").message("cache may be set for type Cache only").field_path(".cache").reason(Reason::FieldValueInvalid),
)]
pub struct Fallback {
    /// Cache: the last good answer. Provider: another dependency that does the same, only when the first is known not to have acted. Queue: taken now, settled later. Static: a fixed answer.
    #[serde(rename = "type")]
    pub type_: FallbackType,
    /// For Cache: how old an answer may be. Absent: as the workload's own Cache fallback has it, else 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheFallback>,
    /// For Provider: name of the other dependency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub provider: Option<String>,
    /// For Static: the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<StaticResponse>,
}

/// Kinds of fallback.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "described on Fallback::type_, which is what people see")]
pub enum FallbackType {
    Cache,
    Provider,
    Queue,
    Static,
}

/// How old a cached answer may be.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CacheFallback {
    /// How long an answer is fresh, 100ms to 1h. Absent: as the workload's own Cache fallback has it, else 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Period>,
    /// How long past ttl it may still be given, 0s to 1h. Absent: as the workload's own Cache fallback has it, else 0s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_stale: Option<Span>,
}

/// A fixed answer.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct StaticResponse {
    /// HTTP status, 200 to 599. Absent: as the workload's own Static fallback has it, else 503.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 200, max = 599))]
    pub status_code: Option<i32>,
    /// Body, sent as it is, at most 4096 characters. Absent: as the workload's own Static fallback has it, else empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub body: Option<String>,
}

/// A limit on the calls that are under way at once.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Bulkhead {
    /// Name of the bulkhead, at most 63 characters.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
    /// Calls at once in each pod, 1 to 10000. Default: 10.
    #[serde(default = "defaults::max_concurrent")]
    #[schemars(range(min = 1, max = 10_000))]
    pub max_concurrent: i32,
    /// Calls that may wait for a slot, 0 to 100000. Default: 100.
    #[serde(default = "defaults::max_queued")]
    #[schemars(range(min = 0, max = 100_000))]
    pub max_queued: i32,
    /// Longest wait for a slot, 0s to 5m; it counts against the caller's request timeout. Default: 1s.
    #[serde(default = "defaults::max_wait")]
    pub max_wait: Wait,
}

/// A health check of the workload. At most one of http, tcp and memory. With http or tcp the operator asks; else the pods report it, or, if its name is pod-ready, restarts, image or rollout, Kubernetes itself says it.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.http) ? 1 : 0) + (has(self.tcp) ? 1 : 0) + (has(self.memory) ? 1 : 0) <= 1")
        .message("at most one of http, tcp and memory may be set").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!(self.name in ['pod-ready', 'restarts', 'image', 'rollout']) || !(has(self.http) || has(self.tcp) || has(self.memory))")
        .message("pod-ready, restarts, image and rollout are Kubernetes' own signals and take no probe; give this check another name").field_path(".name").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.kubernetes) || self.name in ['pod-ready', 'restarts', 'image', 'rollout']")
        .message("kubernetes may be set for the checks pod-ready, restarts, image and rollout only").field_path(".kubernetes").reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.name != 'restarts' || !has(self.kubernetes) || !has(self.kubernetes.__for__)")
        .message("restarts begins anew with each crash, so it takes no time; leave for out").field_path(".kubernetes").reason(Reason::FieldValueInvalid),
    validation = Rule::new("duration(self.timeout) <= duration(self.interval)")
        .message(Message::Expression("'must not be longer than interval (' + self.interval + ')'".into()))
        .field_path(".timeout").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!(has(self.http) || has(self.tcp)) || duration(self.timeout) <= duration('30s')")
        .message("must not be longer than 30s for an http or tcp check").field_path(".timeout").reason(Reason::FieldValueInvalid),
)]
pub struct HealthCheck {
    /// Name of the check, at most 63 characters; for a reported check, the name that the pods report it under. Four names are signals that Kubernetes gives of any workload: pod-ready (the pod is not Ready), restarts (a container crashes again and again, or was OOMKilled), image (an image cannot be pulled), rollout (the Deployment's progress deadline is exceeded). A ladder may name these without an entry here.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
    /// Pod: each pod has its own answer and recovers by itself. Workload: one fact that all pods see, recovered once. Default: Pod.
    #[serde(default)]
    pub scope: CheckScope,
    /// The operator asks the ready pods behind a Service of the policy's namespace over HTTP. Scope Workload: unhealthy when more than half of them fail. Scope Pod: those that belong to the policy's workloads, each for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpProbe>,
    /// The operator opens a TCP connection to the ready pods behind a Service of the policy's namespace; counted as for http.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpProbe>,
    /// Compare the pod's memory with a limit; over it the check is Degraded, not Unhealthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryProbe>,
    /// For pod-ready, restarts, image and rollout: how the signal is evaluated. Intervals and thresholds mean nothing for these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<KubernetesSignal>,
    /// Time between two runs, 1s to 1h. Default: 5s.
    #[serde(default = "defaults::interval")]
    pub interval: StepTime,
    /// Time of one run, 1ms to 5m, at most interval, and for http and tcp at most 30s. Default: 1s.
    #[serde(default = "defaults::check_timeout")]
    pub timeout: CallTime,
    /// Failed runs in a row that make the check unhealthy, 1 to 100. Default: 3.
    #[serde(default = "defaults::unhealthy_threshold")]
    #[schemars(range(min = 1, max = 100))]
    pub unhealthy_threshold: i32,
    /// Good runs in a row that make it healthy again, 1 to 100. Default: 1.
    #[serde(default = "defaults::healthy_threshold")]
    #[schemars(range(min = 1, max = 100))]
    pub healthy_threshold: i32,
}

/// Whether a check is about each pod or about the workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckScope {
    /// About each pod.
    #[default]
    Pod,
    /// About the workload.
    Workload,
}

/// An HTTP probe: GET, no redirect is followed, and the Host header is tls.serverName or SERVICE.NAMESPACE.svc.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.tls) || self.scheme == 'HTTPS'")
        .message("must be HTTPS where tls is set").field_path(".scheme").reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.scheme != 'HTTPS' || (has(self.tls) && (has(self.tls.caConfigMapRef) || self.tls.insecureSkipVerify))")
        .message("HTTPS needs tls.caConfigMapRef, a ConfigMap whose ca.crt the certificate is verified against, or tls.insecureSkipVerify: true")
        .field_path(".tls").reason(Reason::FieldValueInvalid),
)]
pub struct HttpProbe {
    /// Name of the Service, in the policy's namespace. It must have a selector.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub service: String,
    /// Port of the Service, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// Path, starting with a slash, at most 1024 printable ASCII characters without spaces. Default: /.
    #[serde(default = "defaults::path")]
    #[schemars(length(min = 1, max = 1024), regex(pattern = "^/[!-~]*$"))]
    pub path: String,
    /// HTTP or HTTPS. Default: HTTP.
    #[serde(default)]
    pub scheme: ProbeScheme,
    /// Status codes of a healthy answer, as ranges, at most 16. Absent: 200 to 399; a redirect is a healthy answer and is not followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(min = 1, max = 16))]
    pub expected_statuses: Option<Vec<StatusRange>>,
    /// How the certificate is verified, for scheme HTTPS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ProbeTls>,
}

/// How an HTTP probe speaks.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProbeScheme {
    /// In plain text.
    #[default]
    #[serde(rename = "HTTP")]
    Http,
    /// Over TLS.
    #[serde(rename = "HTTPS")]
    Https,
}

/// Status codes from start to end, both included.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[x_kube(
    validation = Rule::new("!has(self.end) || self.start <= self.end")
        .message("must not be below start").field_path(".end").reason(Reason::FieldValueInvalid),
)]
pub struct StatusRange {
    /// First status code, 200 to 599.
    #[schemars(range(min = 200, max = 599))]
    pub start: i32,
    /// Last status code, 200 to 599. Absent: start is the only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 200, max = 599))]
    pub end: Option<i32>,
}

/// How the certificate of an HTTPS probe is verified.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.caConfigMapRef) && self.insecureSkipVerify)")
        .message("must not be true beside caConfigMapRef").field_path(".insecureSkipVerify").reason(Reason::FieldValueInvalid),
)]
pub struct ProbeTls {
    /// ConfigMap of the policy's namespace whose key ca.crt has the certificates, as PEM and at most 64 KiB, that the server's is verified against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<CaConfigMapRef>,
    /// Name that the certificate must be for, at most 253 characters. Absent: SERVICE.NAMESPACE.svc.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME_PATTERN))]
    pub server_name: Option<String>,
    /// true takes any certificate: anybody who gets into the way can answer for the pod. Accepted warns of it. Default: false.
    #[serde(default)]
    pub insecure_skip_verify: bool,
}

/// Reference to a ConfigMap of the policy's namespace.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct CaConfigMapRef {
    /// Its name, at most 253 characters.
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME_PATTERN))]
    pub name: String,
}

/// A TCP probe.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct TcpProbe {
    /// Name of the Service, in the policy's namespace. It must have a selector.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub service: String,
    /// Port of the Service, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
}

/// A memory limit: the lesser of the two counts.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct MemoryProbe {
    /// Memory from which the check is Degraded, such as 1Gi. Default: 1Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<ByteSize>,
    /// Percent of the container's memory limit from which the check is Degraded, 1 to 100. Default: 80.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub max_percent_of_limit: Option<i32>,
    /// How long the check may be Degraded before it is Unhealthy, so that its recovery begins, 0s to 1h. Default: 60s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded_for: Option<Span>,
}

/// How a signal of Kubernetes is evaluated.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
pub struct KubernetesSignal {
    /// How long the signal may be bad before the check is Unhealthy, 0s to 1h; not for restarts. Absent: 60s for pod-ready, and 0s for image and rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r#for: Option<Span>,
}

/// What is done when a check fails.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Recovery {
    /// One ladder for each check that is recovered, at most 16.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["check".into()]))]
    #[schemars(length(max = 16))]
    pub ladders: Vec<Ladder>,
    /// How much may be done at once and in a row.
    #[serde(default)]
    pub limits: RecoveryLimits,
    /// A check must stay healthy this long before an action counts as a success, 0s to 1h. Default: 10s.
    #[serde(default = "defaults::healthy_delay")]
    pub healthy_delay: Span,
    /// Why no recovery is to begin for now, in free text; at most 16 requests. As long as there is one, nothing is begun, and what is under way goes on. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)))]
    pub pause_requests: Vec<String>,
    /// No pod is taken away before it is this old, 0s to 1h, and nothing is done to one that was never ready. Default: 60s.
    #[serde(default = "defaults::startup_grace")]
    pub startup_grace: Span,
}

impl Default for Recovery {
    fn default() -> Self {
        Self {
            ladders: Vec::new(),
            limits: RecoveryLimits::default(),
            healthy_delay: defaults::healthy_delay(),
            pause_requests: Vec::new(),
            startup_grace: defaults::startup_grace(),
        }
    }
}

/// The steps for one check, mildest first; each is verified before the next is tried.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    /// Name of the check.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub check: String,
    /// The steps, 1 to 6.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(min = 1, max = 6))]
    pub steps: Vec<Step>,
}

/// One step of a ladder.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.action == 'RunCleanupJob') == has(self.cronJobRef)")
        .message("cronJobRef must be set for action RunCleanupJob, and for no other").field_path(".cronJobRef").reason(Reason::FieldValueInvalid),
)]
pub struct Step {
    /// TrimMemory and ResetConnections are done by the pod itself. RunCleanupJob runs a Job from a CronJob. RestartPod evicts the pod, so that disruption budgets hold. RolloutRestart restarts the whole workload. Rollback undoes the current rollout if the failure began with it.
    pub action: StepAction,
    /// For RunCleanupJob: the CronJob of the policy's namespace to run; it may be suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron_job_ref: Option<CronJobRef>,
    /// How long the step may take until the check is healthy again, 1s to 1h; then the next step is tried. Default: 60s.
    #[serde(default = "defaults::step_timeout")]
    pub timeout: StepTime,
}

crate::words! {
    /// What a step does.
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[expect(missing_docs, reason = "described on Step::action, which is what people see")]
    pub enum StepAction {
        TrimMemory,
        ResetConnections,
        RunCleanupJob,
        RestartPod,
        RolloutRestart,
        Rollback,
    }
}

/// Reference to a CronJob of the policy's namespace.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct CronJobRef {
    /// Its name.
    #[schemars(length(min = 1, max = 52), regex(pattern = OBJECT_NAME_PATTERN))]
    pub name: String,
}

/// How much may be done at once and in a row.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryLimits {
    /// Pods that may be under recovery at once, 1 to 100. Default: 1.
    #[serde(default = "defaults::max_in_flight")]
    #[schemars(range(min = 1, max = 100))]
    pub max_in_flight: i32,
    /// No pod is restarted while more than this many, or this share, of the pods are unhealthy or under recovery. Default: 50%.
    #[serde(default = "defaults::max_unhealthy")]
    pub max_unhealthy: IntOrPercent,
    /// Least time between the end of one ladder and the start of the next for the same check of the same pod, 0s to 1h; the steps of one ladder follow each other without it. Default: 60s.
    #[serde(default = "defaults::cooldown")]
    pub cooldown: Span,
    /// Most actions of this policy over a time. Default: 5 in 10m.
    #[serde(default)]
    pub budget: ActionBudget,
}

impl Default for RecoveryLimits {
    fn default() -> Self {
        Self {
            max_in_flight: defaults::max_in_flight(),
            max_unhealthy: defaults::max_unhealthy(),
            cooldown: defaults::cooldown(),
            budget: ActionBudget::default(),
        }
    }
}

/// Most actions over a time.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct ActionBudget {
    /// That many, 0 to 20. 0 allows none. Default: 5.
    #[serde(default = "defaults::budget_actions")]
    #[schemars(range(min = 0, max = 20))]
    pub actions: i32,
    /// Over this time, 1s to 7 days (168h). Default: 10m.
    #[serde(default = "defaults::budget_interval")]
    pub interval: LongPeriod,
}

impl Default for ActionBudget {
    fn default() -> Self {
        Self { actions: defaults::budget_actions(), interval: defaults::budget_interval() }
    }
}

/// When pods, and the fleet of them, are degraded, with hysteresis, and which flags change while they are. A pod decides for itself at once; the operator decides for all of them, by quorum.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.exit.loadPercent < self.enter.loadPercent")
        .message("exit.loadPercent must be below enter.loadPercent, or the mode would flap").field_path(".exit").reason(Reason::FieldValueInvalid),
    validation = Rule::new("size(self.stages) == 0 || size(self.flagOverrides) == 0")
        .message("excludes stages: give each flag to a stage").field_path(".flagOverrides").reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.stages.map(s, s.loadPercent).isSorted()")
        .message("stages must be in the order of their loadPercent, the lowest first").field_path(".stages").reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.stages.all(s, s.loadPercent > self.enter.loadPercent - self.exit.loadPercent)")
        .message("every stages[].loadPercent must be above enter.loadPercent minus exit.loadPercent, or the stage would never end").field_path(".stages").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.forcedStage) || self.stages.exists(s, s.name == self.forcedStage)")
        .message("must name an entry of stages").field_path(".forcedStage").reason(Reason::FieldValueInvalid),
)]
pub struct Degradation {
    /// Who decides. Auto (the default): the load. Forced: a person; all stages are in force, or those up to forcedStage. Disabled: a person; neither the fleet nor a pod is ever degraded.
    #[serde(default)]
    pub mode: DegradationMode,
    /// With mode Forced: the last stage that is in force. Absent: all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub forced_stage: Option<String>,
    /// What degrades a pod, and the fleet once a quorum of its pods is there. Default: 80 percent for 10s.
    #[serde(default = "defaults::enter")]
    pub enter: EnterThreshold,
    /// Load below which it is normal again. With stages, each ends as far below its own loadPercent as this is below that of enter. Default: 60 percent for 60s.
    #[serde(default = "defaults::exit")]
    pub exit: LoadThreshold,
    /// How many pods, or which share of them, it takes to degrade the fleet: of those pods of a workload that are ready and heard; 0 means 1. Default: 50%.
    #[serde(default = "defaults::quorum")]
    pub quorum: IntOrPercent,
    /// How long the fleet stays in a stage at least, 0s to 1h. Default: 60s.
    #[serde(default = "defaults::min_duration")]
    pub min_duration: Span,
    /// Stages, 1 to 8, in the order of their loadPercent. They are entered and left one by one, and each keeps what those before it say of other flags. Absent: one stage, named degraded, with the load of enter and the flags of flagOverrides.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    #[schemars(length(max = 8))]
    pub stages: Vec<DegradationStage>,
    /// Flags that take another variant while degraded, at most 64: in a degraded pod, and while the fleet is degraded in every workload of the namespace that a flag set gives them to. Without stages only.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["key".into()]))]
    #[schemars(length(max = 64))]
    pub flag_overrides: Vec<FlagVariant>,
}

/// Who decides whether a fleet is degraded.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DegradationMode {
    /// The load does.
    #[default]
    Auto,
    /// A person does: it is.
    Forced,
    /// A person does: it is not.
    Disabled,
}

/// One stage of degraded mode.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DegradationStage {
    /// Name of the stage, 1 to 63 characters.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
    /// Load from which it is entered, in percent, 1 to 100; each stage has more than the one before it.
    #[schemars(range(min = 1, max = 100))]
    pub load_percent: i32,
    /// Flags that take another variant in this stage and those after it, at most 64 in all stages together.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["key".into()]))]
    #[schemars(length(max = 64))]
    pub flag_overrides: Vec<FlagVariant>,
}

/// What degrades.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct EnterThreshold {
    /// Share of a pod's capacity in use, in percent, 1 to 100: the most of requests, bulkheads and the time that calls wait for those. With stages, each has its own. Default: 80.
    #[serde(default = "defaults::enter_load")]
    #[schemars(range(min = 1, max = 100))]
    pub load_percent: i32,
    /// How long it must last, 0s to 1h. Default: 10s.
    #[serde(default = "defaults::load_for")]
    pub r#for: Span,
    /// Dependencies whose circuit, open in a quorum of pods for as long, degrades the fleet too, whatever the load: it enters the first stage, and stays there. At most 16. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[schemars(length(max = 16), inner(length(min = 1, max = 63), regex(pattern = NAME_PATTERN)))]
    pub circuits: Vec<String>,
}

/// A load, and how long it must last.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct LoadThreshold {
    /// Share of the pod's capacity in use, in percent, 1 to 100.
    #[schemars(range(min = 1, max = 100))]
    pub load_percent: i32,
    /// How long it must last, 0s to 1h. Default: 10s.
    #[serde(default = "defaults::load_for")]
    pub r#for: Span,
}

/// A flag and the variant that it takes.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct FlagVariant {
    /// Key of the flag.
    #[schemars(length(min = 1, max = 128), regex(pattern = FLAG_KEY_PATTERN))]
    pub key: String,
    /// Name of the variant.
    #[schemars(length(min = 1, max = 128), regex(pattern = FLAG_KEY_PATTERN))]
    pub variant: String,
}

/// When buyers wait, in order of their arrival, and how many are let in.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.exitLoadPercent < self.enterLoadPercent")
        .message("exitLoadPercent must be below enterLoadPercent, or the waiting room would open and close all the time").field_path(".exitLoadPercent").reason(Reason::FieldValueInvalid),
)]
pub struct WaitingRoom {
    /// Share of a pod's places for orders that is in use, in percent, 1 to 100, from which everybody who begins an order gets a place in the queue. Default: 80.
    #[serde(default = "defaults::room_enter")]
    #[schemars(range(min = 1, max = 100))]
    pub enter_load_percent: i32,
    /// The room closes when nobody waits and no more than this share is in use, in percent, 0 to 99. Default: 50.
    #[serde(default = "defaults::room_exit")]
    #[schemars(range(min = 0, max = 99))]
    pub exit_load_percent: i32,
    /// How long that must last, 0s to 1h. Default: 30s.
    #[serde(default = "defaults::room_exit_for")]
    pub exit_for: Span,
    /// Bounds of the number of buyers that are let in each second, by all pods together. Between them it follows what is measured.
    #[serde(default)]
    pub admit_per_second: AdmitPerSecond,
    /// For how long somebody who was let in may begin orders, 1m to 1h, and up to twice as long. Default: 10m.
    #[serde(default = "defaults::admission_ttl")]
    pub admission_ttl: AdmissionTime,
}

/// Bounds of the number of buyers that are let in each second.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[x_kube(
    validation = Rule::new("self.min <= self.max")
        .message(Message::Expression("'must not be more than max (%d): min is %d'.format([self.max, self.min])".into()))
        .field_path(".min").reason(Reason::FieldValueInvalid),
)]
pub struct AdmitPerSecond {
    /// So many are let in however bad it gets, 1 to 10000. Default: 5.
    #[serde(default = "defaults::admit_min")]
    #[schemars(range(min = 1, max = 10_000))]
    pub min: i32,
    /// No more are let in however well it goes, 1 to 100000. Places of buyers who have gone count, so it may be more than can be sold. Default: 500.
    #[serde(default = "defaults::admit_max")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max: i32,
}

impl Default for AdmitPerSecond {
    fn default() -> Self {
        Self { min: defaults::admit_min(), max: defaults::admit_max() }
    }
}

/// The defaults of the schema, in one place: health checks, bulkheads, degraded mode, the waiting room and the limits of recovery. A
/// dependency has none here: what holds where a policy says nothing of it is a matter of the workload and, where that has
/// nothing built in, of [`contract::DependencySettings`].
mod defaults {
    use super::{
        AdmissionTime, CallTime, Duration, EnterThreshold, IntOrPercent, LoadThreshold, LongPeriod, Span, StepTime,
        Wait,
    };

    macro_rules! value {
        ($($name:ident: $type:ty = $value:expr;)*) => { $(pub(super) fn $name() -> $type { $value })* };
    }

    value! {
        max_concurrent: i32 = 10;
        max_queued: i32 = 100;
        max_wait: Wait = Duration::from_millis(1_000);
        interval: StepTime = Duration::from_millis(5_000);
        check_timeout: CallTime = Duration::from_millis(1_000);
        unhealthy_threshold: i32 = 3;
        healthy_threshold: i32 = 1;
        path: String = "/".to_owned();
        healthy_delay: Span = Duration::from_millis(10_000);
        startup_grace: Span = Duration::from_millis(60_000);
        step_timeout: StepTime = Duration::from_millis(60_000);
        max_in_flight: i32 = 1;
        max_unhealthy: IntOrPercent = IntOrPercent::Percent(50);
        cooldown: Span = Duration::from_millis(60_000);
        budget_actions: i32 = 5;
        budget_interval: LongPeriod = Duration::from_millis(600_000);
        room_enter: i32 = 80;
        room_exit: i32 = 50;
        room_exit_for: Span = Duration::from_millis(30_000);
        admit_min: i32 = 5;
        admit_max: i32 = 500;
        admission_ttl: AdmissionTime = Duration::from_millis(600_000);
        load_for: Span = Duration::from_millis(10_000);
        enter_load: i32 = 80;
        quorum: IntOrPercent = IntOrPercent::Percent(50);
        min_duration: Span = Duration::from_millis(60_000);
        enter: EnterThreshold = EnterThreshold { load_percent: enter_load(), r#for: load_for(), circuits: Vec::new() };
        exit: LoadThreshold = LoadThreshold { load_percent: 60, r#for: Duration::from_millis(60_000) };
    }
}
