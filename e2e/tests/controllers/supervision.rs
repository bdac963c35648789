//! What goes wrong in one place stays there, and the process ends only when it should.

use crate::support::{
    FakePod, World,
    api_proxy::{ApiProxy, Call},
    eventually, flag_set,
    manifests::policy_with_request,
    operator::Operator,
    policy, recovery_policy, says,
    tcp_proxy::TcpProxy,
    within,
    world::{condition, policy_conditions, request_ms, steps_and_phases},
};
use axum::http::Method;
use crds::{Recovery, ResiliencePolicy};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use operator::{RunError, error::RECONCILE_DEADLINE, kubernetes::leader_election::LostLead};
use serde_json::json;
use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// The last moment but one minute that a time in a status can name.
const YEAR_9999: &str = "9999-12-30T21:59:00Z";

/// Waits until a policy warns of the record of the year 9999, and that is still there as it was written.
async fn until_the_record_is_kept(world: &World) {
    let kept = world
        .until_policy("booking", "the record is named", |policy| {
            policy_conditions(policy)
                .iter()
                .any(|one| one.type_ == "Accepted" && one.message.contains("cannot be understood"))
        })
        .await;
    let accepted = condition(&kept, "Accepted");
    let all = world.recoveries().await;
    let executed_at = |one: &Recovery| Some(one.status.as_ref()?.executed_at.as_ref()?.0);
    let record = all.iter().find(|one| executed_at(one) == Some(YEAR_9999.parse().unwrap())).unwrap();
    let name = record.name_any();
    assert!(accepted.message.contains(&format!("the Recovery {name} has a time")), "{}", accepted.message);
}

/// Edits a policy, and waits until a pod runs that.
async fn edit_goes_live(world: &World, name: &str, pod: &FakePod, seconds: u64) {
    world.apply(&policy_with_request(name, name, &format!("{seconds}s"))).await;
    pod.until_it_runs("the edit", |running| request_ms(running) == Some(seconds * 1_000)).await;
    world.until_policy_says(name, "Programmed", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_the_year_9999_is_kept_and_stops_nothing() {
    let world = World::new().await;
    let (booking, payment) = (world.workload("booking", 1).await, world.workload("payment", 1).await);
    let operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.apply(&policy("payment", "payment")).await;
    for name in ["booking", "payment"] {
        world.until_policy_says(name, "Ready", "True", "Programmed").await;
    }
    let record = json!({
        "id": "9999abcdef", "target": "booking", "pod": "gone", "podUid": "gone", "check": "database",
        "action": "ResetConnections", "step": 1, "steps": 1, "outcome": "Succeeded",
        "failedAt": "2026-01-02T03:04:05.000000Z", "startedAt": "2026-01-02T03:04:06.000000Z", "actedAt": YEAR_9999,
    });
    let status = json!({ "status": { "recovery": { "inFlight": [], "recent": [record] } } });
    let policies = world.api::<ResiliencePolicy>();
    policies.patch_status("booking", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    until_the_record_is_kept(&world).await;
    edit_goes_live(&world, "payment", &payment.pods[0], 6).await;

    operator.assert_alive().await;
    operator.stop().await;
    let operator = world.operator().await;
    edit_goes_live(&world, "payment", &payment.pods[0], 7).await;
    until_the_record_is_kept(&world).await;
    // Nor is the policy's own recovery held up.
    booking.pods[0].script().failing = true;
    booking.pods[0].until_asked(1).await;
    world
        .until_recoveries("a recovery is over beside it", |all| {
            steps_and_phases(all) == [("1/1", "Succeeded"), ("1/1", "Succeeded")]
        })
        .await;
    operator.assert_alive().await;
}

/// Waits until the operator tries one object again after a wait that has grown, and sees that it tried only a few times
/// until then. A change of the object, or of what it names, is a reason to try at once.
async fn until_it_backs_off(operator: &Operator, kind: &str) {
    let panics = format!("resilience_operator_reconciliations_total{{kind=\"{kind}\",result=\"panic\"}}");
    let last = Mutex::new((operator.metric(&panics).await, Instant::now()));
    eventually("it is tried again after 2 s or more", async || {
        let now = operator.metric(&panics).await;
        let mut last = last.lock().unwrap();
        let (count, since) = *last;
        if now > count && count > 0 && since.elapsed() >= Duration::from_secs(2) {
            assert!(now <= 12, "{now} tries");
            return Ok(());
        }
        if now > count {
            *last = (now, Instant::now());
        }
        Err(format!("{now} tries, the last {:?} ago", since.elapsed()))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_over_which_the_operator_panics_does_not_stop_nine_others() {
    let world = World::new().await;
    let names: Vec<_> = (0..10).map(|number| format!("service-{number}")).collect();
    let mut workloads = Vec::new();
    for name in &names {
        workloads.push(world.workload(name, 1).await);
    }
    let operator = Operator::start(&world, &["--fault", "panic=cursed"]).await;
    world.apply(&policy("cursed", &names[0])).await;
    for name in &names[1..] {
        world.apply(&policy(name, name)).await;
    }
    let cursed = eventually("the policy says that the operator failed", async || {
        let policy = world.policy("cursed").await;
        let known = says(policy_conditions(&policy), "Ready", "False", "InternalError");
        if known { Ok(policy) } else { Err(serde_json::to_string(&policy.status).unwrap()) }
    })
    .await;
    let ready = condition(&cursed, "Ready");
    assert!(ready.message.contains("provoked by a test"), "it says how: {}", ready.message);
    let seen = cursed.status.as_ref().unwrap().observed_generation;
    assert_eq!((ready.observed_generation, seen), (cursed.metadata.generation, cursed.metadata.generation));
    for name in &names[1..] {
        world.until_policy_says(name, "Ready", "True", "Programmed").await;
    }
    until_it_backs_off(&operator, "policy").await;
    for (name, workload) in names.iter().zip(&workloads).skip(1) {
        edit_goes_live(&world, name, &workload.pods[0], 6).await;
    }
    operator.assert_alive().await;

    // Another version of the operator may do better: then nothing of it stays.
    operator.stop().await;
    let _operator = world.operator().await;
    world.until_policy_says("cursed", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_over_which_the_operator_panics_does_not_stop_another() {
    let world = World::new().await;
    let (cursed, payment) = (world.workload("cursed", 1).await, world.workload("payment", 1).await);
    let operator = Operator::start(&world, &["--fault", "panic=cursed"]).await;
    world.apply(&policy("booking", "cursed")).await;
    let told = world.until_policy_says("booking", "Programmed", "False", "InternalError").await;
    let message = &condition(&told, "Programmed").message;
    assert!(message.starts_with("cursed: ") && message.contains("provoked by a test"), "{message}");
    world.until_policy_says("booking", "Ready", "False", "InternalError").await;
    until_it_backs_off(&operator, "workload").await;
    edit_goes_live(&world, "payment", &payment.pods[0], 6).await;
    assert!(cursed.pods[0].script().pushes.is_empty(), "nothing was published for it");
    operator.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_set_over_which_the_operator_panics_does_not_stop_another() {
    let world = World::new().await;
    let _workload = world.workload("booking", 1).await;
    let operator = Operator::start(&world, &["--fault", "panic=cursed"]).await;
    world.apply(&flag_set("cursed", "booking")).await;
    world.apply(&flag_set("flags", "booking")).await;
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    eventually("the set says that the operator failed", async || {
        let set = world.api::<crds::FeatureFlag>().get("cursed").await.unwrap();
        let status = set.status.unwrap_or_default();
        let known = says(&status.conditions, "Ready", "False", "InternalError");
        if known { Ok(()) } else { Err(serde_json::to_string(&status).unwrap()) }
    })
    .await;
    until_it_backs_off(&operator, "flag").await;
    operator.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_over_which_the_operator_hangs_is_given_up_and_does_not_stop_another() {
    let world = World::new().await;
    let (_booking, payment) = (world.workload("booking", 1).await, world.workload("payment", 1).await);
    let operator = Operator::start(&world, &["--fault", "hang=cursed"]).await;
    world.apply(&policy("cursed", "booking")).await;
    edit_goes_live(&world, "payment", &payment.pods[0], 6).await;
    let timeouts = "resilience_operator_reconciliations_total{kind=\"policy\",result=\"timeout\"}";
    within(RECONCILE_DEADLINE + Duration::from_secs(15), "it is counted as an error", async || {
        let count = operator.metric(timeouts).await;
        if count == 0 { Err(count.to_string()) } else { Ok(()) }
    })
    .await;
    operator.assert_alive().await;
    edit_goes_live(&world, "payment", &payment.pods[0], 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_does_none_of_its_work_fails_the_liveness_probe_after_a_minute() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let operator = Operator::start(&world, &["--fault", "stall=policy controller"]).await;
    world.apply(&policy("booking", "booking")).await;
    workload.pods[0].until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    // What is reported of the pod is work for the controller that stands still.
    workload.pods[0].script().failing = true;
    operator.assert_alive().await;
    let since = Instant::now();
    let words = within(Duration::from_secs(90), "/livez fails", async || {
        operator.why_not_alive().await.ok_or_else(String::new)
    })
    .await;
    assert!(words.starts_with("the policy controller has work and has done none of it for 6"), "{words}");
    assert!(since.elapsed() > Duration::from_secs(50), "{:?}", since.elapsed());
    assert!(!operator.has_ended(), "the kubelet ends it");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_cannot_serve_its_probes_ends_although_the_api_server_is_not_ready() {
    let world = World::new().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let proxy = ApiProxy::start(&world).await;
    proxy.hold(Some(|_| true));
    let config = proxy.operator_config(&world).await;
    let ended = Operator::start_through(&world, config, &["--listen", &address]).ended().await.unwrap_err().to_string();
    assert!(ended.starts_with(&format!("cannot listen on {address}: ")) && ended.contains("--listen"), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_long_lived_task_ends_the_process_with_its_name() {
    for task in ["watch", "workload controller", "policy controller", "flag controller", "prober"] {
        let world = World::new().await;
        let operator = Operator::start(&world, &["--fault", &format!("end={task}")]).await;
        let ended = operator.ended().await.unwrap_err().to_string();
        assert_eq!(ended, format!("the {task} ended by itself: the process ends, to start anew"));
    }
}

/// The Lease of the world's operator.
async fn lease(world: &World) -> Option<Lease> {
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), &world.home);
    leases.get_opt("resilience-operator").await.unwrap()
}

async fn until_leads(world: &World, replica: &str) {
    eventually(&format!("{replica} leads"), async || {
        let holder = lease(world).await.and_then(|lease| lease.spec?.holder_identity);
        if holder.as_deref() == Some(replica) { Ok(()) } else { Err(format!("{holder:?}")) }
    })
    .await;
}

/// Waits until `first` has renewed the lease at more than so many seconds after a moment, and has had it all the time.
async fn until_renewed(world: &World, operator: &Operator, since: Timestamp, seconds: i64) {
    within(Duration::from_secs(30), "the lease is renewed for longer than it lasts", async || {
        let spec = lease(world).await.unwrap().spec.unwrap();
        let renewed = spec.renew_time.clone().unwrap().0.duration_since(since);
        assert!(!operator.has_ended(), "it ended, the lease is {spec:?}");
        assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("first"), Some(1)), "{spec:?}");
        if renewed.as_secs() > seconds { Ok(()) } else { Err(format!("{renewed:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_lease_connection_dies_silently_goes_on_over_another() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let proxy = ApiProxy::start(&world).await;
    let config = proxy.operator_config(&world).await;
    let operator = Operator::start_through(&world, config, &["--identity", "first", "--lease-duration", "6s"]);
    until_leads(&world, "first").await;
    edit_goes_live(&world, "booking", &workload.pods[0], 6).await;
    let others: fn(&Call) -> bool = |call| !call.is_of_lease();
    assert!(proxy.peers(Call::is_of_lease).is_disjoint(&proxy.peers(others)), "the lease has a connection of its own");

    let cut = Timestamp::now();
    let calls = proxy.darken(Call::is_of_lease);
    // Longer than a lease lasts, and than its holder may act without a renewal.
    until_renewed(&world, &operator, cut, 8).await;
    let before = proxy.calls()[..calls].iter().filter(|call| call.is_of_lease()).map(|call| call.peer).collect();
    assert!(!proxy.peers(Call::is_of_lease).is_subset(&before), "over a fresh connection");
    edit_goes_live(&world, "booking", &workload.pods[0], 7).await;
    operator.assert_alive().await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_goes_on_although_answers_to_renewals_are_lost() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let proxy = ApiProxy::start(&world).await;
    let config = proxy.operator_config(&world).await;
    let operator = Operator::start_through(&world, config, &["--identity", "first", "--lease-duration", "6s"]);
    until_leads(&world, "first").await;
    // The write lands and nobody hears of it; then the question is not answered either.
    proxy.lose_answers(1, |call| call.is_of_lease() && call.method == Method::PUT);
    eventually(
        "the first answer is lost",
        async || if proxy.answers_to_lose() == 0 { Ok(()) } else { Err(String::new()) },
    )
    .await;
    until_renewed(&world, &operator, Timestamp::now(), 8).await;
    proxy.lose_answers(1, |call| call.is_of_lease() && call.method == Method::GET);
    eventually("the other is lost", async || if proxy.answers_to_lose() == 0 { Ok(()) } else { Err(String::new()) })
        .await;
    until_renewed(&world, &operator, Timestamp::now(), 8).await;
    edit_goes_live(&world, "booking", &workload.pods[0], 6).await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_stops_before_another_leads_and_ends() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let proxy = TcpProxy::start(&world).await;
    let config = proxy.operator_config(&world).await;
    let first = Operator::start_through(&world, config, &["--identity", "first", "--lease-duration", "6s"]);
    until_leads(&world, "first").await;
    edit_goes_live(&world, "booking", &workload.pods[0], 6).await;
    let _second = Operator::start(&world, &["--identity", "second", "--lease-duration", "6s"]).await;

    proxy.darken_all();
    let renewed_at = lease(&world).await.unwrap().spec.unwrap().renew_time.unwrap().0;
    let ended = first.ended().await.unwrap_err();
    // It may end later than it stops to act: what is under way when the lead is lost has ten seconds.
    let RunError::Lost(LostLead::NotRenewed(acted_for)) = ended else { panic!("{ended}") };
    assert!(acted_for < Duration::from_secs(6), "{acted_for:?} since it began to renew, longer than the lease");
    until_leads(&world, "second").await;
    let taken_at = lease(&world).await.unwrap().spec.unwrap().acquire_time.unwrap().0;
    assert!(taken_at.duration_since(renewed_at).as_secs() >= 6, "{renewed_at}, {taken_at}");
    edit_goes_live(&world, "booking", &workload.pods[0], 7).await;
    workload.assert_revisions_grow();
}
