//! Checks that the operator asks itself, over HTTP and TCP: what it does when they fail, and whom it never asks.

use crate::support::{
    World, eventually,
    fake_pod::{FakePod, SITE},
    operator::Operator,
    policy, within,
    workload::Workload,
    world::{condition, steps_and_phases},
};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// The pods of tests are on the loopback, where no release of the operator asks anybody.
async fn operator(world: &World) -> Operator {
    Operator::start(world, &["--ask-loopback"]).await
}

/// A Service of this name that selects the pods of a workload.
fn service(name: &str, workload: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "spec": { "selector": { "app": workload }, "ports": [{ "name": "web", "port": 80, "targetPort": "http" }] },
    })
}

/// A check over HTTP that is asked every second, and two failures of which count.
fn http_check(scope: &str, service: &str) -> Value {
    json!({
        "name": "site", "scope": scope, "interval": "1s", "unhealthyThreshold": 2,
        "http": { "service": service, "port": 80, "path": SITE },
    })
}

/// A policy for `booking` with this check, and a ladder of one step for it with gates that are out of the way.
fn recovering(check: &Value, step: &Value) -> Value {
    let mut policy = policy("booking", "booking");
    policy["spec"]["healthChecks"] = json!([check]);
    policy["spec"]["recovery"] = json!({
        "ladders": [{ "check": check["name"], "steps": [step] }],
        "limits": { "cooldown": "0s", "budget": { "actions": 20, "interval": "10m" } },
        "healthyDelay": "1s", "startupGrace": "0s",
    });
    policy
}

fn all_answer_with(workload: &Workload, status: u16) {
    workload.pods.iter().for_each(|pod| pod.script().site_status = status);
}

fn asked(workload: &Workload) -> Vec<usize> {
    workload.pods.iter().map(|pod| pod.script().site_requests).collect()
}

/// Waits until every pod was asked so often.
async fn until_asked(workload: &Workload, times: usize) {
    eventually(&format!("all are asked {times} times"), async || {
        let asked = asked(workload);
        if asked.iter().all(|asked| *asked >= times) { Ok(()) } else { Err(format!("{asked:?}")) }
    })
    .await;
}

/// Waits until the condition Healthy says this.
async fn until_told(world: &World, policy: &str, words: &str) {
    world
        .until_policy(policy, words, |policy| {
            policy.status.is_some() && condition(policy, "Healthy").message.contains(words)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn most_endpoints_of_a_service_fail_and_a_cleanup_job_is_run() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    world.apply(&service("front", "booking")).await;
    let container = json!({ "name": "cleanup", "image": "none" });
    let cron_job = json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "booking-cleanup" },
        "spec": { "schedule": "@yearly", "suspend": true, "jobTemplate": { "spec": {
            "template": { "spec": { "restartPolicy": "Never", "containers": [container] } } } } },
    });
    world.apply(&cron_job).await;
    let operator = operator(&world).await;
    let step = json!({ "action": "RunCleanupJob", "cronJobRef": { "name": "booking-cleanup" }, "timeout": "60s" });
    let mut policy = recovering(&http_check("Workload", "front"), &step);
    // It only recovers, so its workload need not have our library.
    policy["spec"].as_object_mut().unwrap().remove("dependencies");
    world.apply(&policy).await;
    until_asked(&workload, 3).await;
    let jobs = async || world.api::<Job>().list(&ListParams::default()).await.unwrap().items;
    workload.pods[0].script().site_status = 503;
    let before = asked(&workload)[0];
    until_asked(&workload, before + 4).await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;
    assert!(jobs().await.is_empty(), "one of three is not most");

    all_answer_with(&workload, 503);
    let unhealthy = world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
    let finding = &unhealthy.status.as_ref().unwrap().checks[0];
    assert_eq!((finding.name.as_str(), finding.target.as_str(), finding.pods.len()), ("site", "booking", 0));
    assert!(finding.message.contains("3 of 3 endpoints fail") && finding.message.contains("HTTP 503"), "{finding:?}");
    eventually("the Job is made", async || if jobs().await.len() == 1 { Ok(()) } else { Err(String::new()) }).await;
    world.until_recoveries("it is executed", |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
    world.until_events("booking", &["CheckUnhealthy", "RecoveryStarted"]).await;

    assert!(workload.pods.iter().all(|pod| pod.script().requests == 0), "nothing else is asked of them");
    all_answer_with(&workload, 302);
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;
    for (result, least) in [("ok", 9), ("status", 6)] {
        let line = format!(r#"resilience_operator_check_asks_total{{probe="http",result="{result}"}}"#);
        let count = operator.metric(&line).await;
        assert!(count >= least, "{line}: {count}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_answers_for_itself_and_the_one_that_fails_is_restarted() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    let other = world.workload("payment", 1).await;
    let mut both = service("front", "booking");
    both["spec"]["selector"] = json!({ "tier": "front" });
    world.apply(&both).await;
    for pod in workload.pods.iter().chain(&other.pods) {
        world.edit::<Pod>(&pod.name, json!({ "metadata": { "labels": { "tier": "front" } } })).await;
    }
    let _operator = operator(&world).await;
    let step = json!({ "action": "RestartPod", "timeout": "60s" });
    world.apply(&recovering(&http_check("Pod", "front"), &step)).await;
    until_asked(&workload, 2).await;
    workload.pods[1].script().site_status = 500;
    within(Duration::from_secs(60), "it is evicted", async || {
        match world.api::<Pod>().get_opt(&workload.pods[1].name).await.unwrap() {
            None => Ok(()),
            Some(_) => Err(serde_json::to_string(&world.policy("booking").await.status).unwrap()),
        }
    })
    .await;
    let successor = workload.new_pod(&world, true).await;
    world.edit::<Pod>(&successor.name, json!({ "metadata": { "labels": { "tier": "front" } } })).await;
    world.until_recoveries("the restart succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    assert!(successor.script().site_requests > 0);
    assert_eq!(asked(&other), [0], "it belongs to no workload of the policy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_goes_on_with_what_the_last_one_began() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    world.apply(&service("front", "booking")).await;
    let start = async |identity| {
        Operator::start(&world, &["--ask-loopback", "--identity", identity, "--lease-duration", "3s"]).await
    };
    let first = start("first").await;
    let step = json!({ "action": "ResetConnections", "timeout": "40s" });
    world.apply(&recovering(&http_check("Pod", "front"), &step)).await;
    until_asked(&workload, 1).await;
    all_answer_with(&workload, 503);
    workload.pods[0].until_asked(1).await;
    first.crash().await;

    let _second = start("second").await;
    let before = asked(&workload)[0];
    until_asked(&workload, before + 4).await;
    world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
    world.until_recoveries("it is the same failure", |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
    all_answer_with(&workload, 200);
    world.until_recoveries("and ends it", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    assert_eq!(workload.pods[0].script().effects.len(), 1, "it was done once");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_read_from_a_config_map_and_left_unverified_only_with_a_warning() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    world.apply(&service("front", "booking")).await;
    let operator = operator(&world).await;
    let check = |tls: Value| {
        let mut policy = policy("booking", "booking");
        policy["spec"]["healthChecks"] = json!([{
            "name": "site", "scope": "Workload", "interval": "1s", "unhealthyThreshold": 1,
            "http": { "service": "front", "port": 80, "scheme": "HTTPS", "tls": tls },
        }]);
        policy
    };
    world.apply(&check(json!({ "caConfigMapRef": { "name": "ca" } }))).await;
    until_told(&world, "booking", "site: the certificates to verify against are missing: there is no ConfigMap ca")
        .await;
    let map =
        |data: Value| json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "ca" }, "data": data });
    world.apply(&map(json!({ "other": "x" }))).await;
    until_told(&world, "booking", "the ConfigMap ca has no key ca.crt").await;
    world.apply(&map(json!({ "ca.crt": "secret words" }))).await;
    until_told(&world, "booking", "ca.crt of ConfigMap ca cannot be used: it has no certificate that can be read")
        .await;
    let large = json!({ "ca.crt": "secret words", "other": "x".repeat(200 * 1024) });
    world.apply(&map(large)).await;
    until_told(&world, "booking", "the ConfigMap ca cannot be read: it has more than 128 KiB").await;
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
    world.apply(&map(json!({ "ca.crt": authority.pem() }))).await;
    // They speak plain HTTP.
    let unhealthy = world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
    assert!(condition(&unhealthy, "Healthy").message.contains("no TLS with"), "{unhealthy:?}");
    assert!(!condition(&unhealthy, "Accepted").message.contains("insecure"), "{unhealthy:?}");
    assert_eq!(asked(&workload), [0]);
    let line = r#"resilience_operator_check_asks_total{probe="http",result="tls"}"#;
    assert!(operator.metric(line).await > 0);

    world.apply(&check(json!({ "insecureSkipVerify": true }))).await;
    world
        .until_policy("booking", "it warns", |policy| {
            let accepted = &condition(policy, "Accepted").message;
            accepted.contains("warning: site: insecureSkipVerify: the certificate of Service front is not verified")
        })
        .await;
}

/// Something that listens beside the cluster's pods, and how often it was called.
async fn bystander() -> (IpAddr, u16, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    // No packet is sent: this tells by which address this machine would send one. An EndpointSlice takes none of the loopback.
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    if probe.connect("192.0.2.1:9").is_err() {
        // Without a network nobody can stand by; an ask would be counted by the operator as one that failed.
        return ("192.0.2.1".parse().unwrap(), 9, calls);
    }
    let ip = probe.local_addr().unwrap().ip();
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Arc::clone(&calls);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            seen.fetch_add(1, Ordering::Relaxed);
        }
    });
    (ip, port, calls)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_pods_of_the_own_namespace_that_a_selector_finds_are_asked() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let (ip, port, calls) = bystander().await;
    let slice = |service: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "name": format!("{service}-by-hand"), "labels": { "kubernetes.io/service-name": service } },
            "endpoints": [{ "addresses": [ip], "conditions": { "ready": true } }],
            "ports": [{ "name": "web", "port": port }],
        })
    };
    let mut by_hand = service("by-hand", "booking");
    by_hand["spec"].as_object_mut().unwrap().remove("selector");
    let mut external = service("external", "booking");
    external["spec"] = json!({ "type": "ExternalName", "externalName": ip.to_string(), "ports": [{ "port": 80 }] });
    // One that has pods, and an endpoint beside them that somebody made by hand.
    let mixed = service("mixed", "booking");
    for manifest in [&by_hand, &external, &mixed, &slice("by-hand"), &slice("mixed")] {
        world.apply(manifest).await;
    }
    let elsewhere = World::on(Arc::clone(&world.cluster)).await;
    let others = elsewhere.workload("booking", 1).await;
    elsewhere.apply(&service("elsewhere", "booking")).await;

    let operator = operator(&world).await;
    let check = |name: &str, port: u16| {
        json!({ "name": name, "scope": "Workload", "interval": "1s", "unhealthyThreshold": 1,
            "http": { "service": name, "port": port, "path": SITE } })
    };
    let mut booking = policy("booking", "booking");
    booking["spec"]["healthChecks"] = json!([
        check("by-hand", 80),
        check("external", 80),
        check("elsewhere", 80),
        check("mixed", 80),
        check("none", 80)
    ]);
    world.apply(&booking).await;
    until_asked(&workload, 3).await;
    for words in [
        "by-hand: the Service by-hand has no selector; endpoints that were made by hand are not asked",
        "external: the Service external is of type ExternalName",
        "elsewhere: there is no Service elsewhere",
        "none: there is no Service none",
    ] {
        until_told(&world, "booking", words).await;
    }
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;
    let line = |result: &str| format!(r#"resilience_operator_check_asks_total{{probe="http",result="{result}"}}"#);
    let by_pods: usize = asked(&workload).iter().sum();
    let by_operator = usize::try_from(operator.metric(&line("ok")).await).unwrap();
    assert!(by_operator <= by_pods + 2 && by_operator >= 6, "{by_operator} asks, {by_pods} of them by the pods");
    for result in ["status", "timeout", "unreachable", "tls", "invalid"] {
        assert_eq!(operator.metric(&line(result)).await, 0, "{result}");
    }
    assert_eq!((calls.load(Ordering::Relaxed), asked(&others)), (0, vec![0]));
    world.until_events("booking", &["Programmed"]).await;
    assert!(!world.events_about("booking").await.iter().any(|reason| reason == "CheckUnhealthy"));

    // Nor could it: it may read a Service that it knows by name, and nothing that has endpoints.
    let own = Client::try_from(world.operator_config().await).unwrap();
    let services: Api<Service> = Api::namespaced(own.clone(), &world.namespace);
    services.get("mixed").await.unwrap();
    let slices: Api<EndpointSlice> = Api::namespaced(own, &world.namespace);
    let refused = [services.list(&ListParams::default()).await.err(), slices.get("mixed-by-hand").await.err()];
    for error in refused {
        assert!(matches!(&error, Some(kube::Error::Api(status)) if status.code == 403), "{error:?}");
    }

    // A Service that is made later is found, though one that was never there is looked for ever more rarely.
    world.apply(&service("none", "booking")).await;
    within(Duration::from_secs(90), "it is asked", async || {
        let message = condition(&world.policy("booking").await, "Healthy").message.clone();
        if message.contains("Service none") { Err(message) } else { Ok(()) }
    })
    .await;
}

/// Gives pods other addresses.
async fn move_to(world: &World, pods: &[FakePod], address: impl Fn(usize) -> String) {
    for (place, pod) in pods.iter().enumerate() {
        let address = address(place);
        let status = json!({ "status": { "podIP": address, "podIPs": [{ "ip": address }] } });
        let how = PatchParams::default();
        world.api::<Pod>().patch_status(&pod.name, &how, &Patch::Merge(&status)).await.unwrap();
    }
}

/// The address of a pod, and the port that its Service leads to.
async fn site(world: &World, pod: &FakePod) -> SocketAddr {
    let pod = world.api::<Pod>().get(&pod.name).await.unwrap();
    let ip = pod.status.and_then(|status| status.pod_ip).unwrap();
    let ports = pod.spec.unwrap().containers.into_iter().flat_map(|container| container.ports.unwrap_or_default());
    let port = ports.into_iter().find(|port| port.name.as_deref() == Some("http")).unwrap().container_port;
    SocketAddr::new(ip.parse().unwrap(), u16::try_from(port).unwrap())
}

/// Nobody says anything there, as where packets are lost: its queue of connections is full.
async fn hole(at: SocketAddr) -> (TcpListener, TcpStream) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(at).unwrap();
    (socket.listen(0).unwrap(), TcpStream::connect(at).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_cut_off_takes_no_silence_for_a_failure() {
    let world = World::new().await;
    let (booking, payment) = (world.workload("booking", 2).await, world.workload("payment", 2).await);
    world.apply(&service("front", "booking")).await;
    world.apply(&service("pay", "payment")).await;
    let _operator = operator(&world).await;
    let mut manifest = policy("booking", "booking");
    let [mut front, mut pay] = ["front", "pay"].map(|service| http_check("Workload", service));
    pay["name"] = json!("pay");
    for check in [&mut front, &mut pay] {
        // Before both have fallen silent, some failures count.
        check["unhealthyThreshold"] = json!(8);
    }
    manifest["spec"]["healthChecks"] = json!([front, pay]);
    world.apply(&manifest).await;
    until_asked(&booking, 2).await;
    until_asked(&payment, 2).await;
    let (mut before, mut holes) = (Vec::new(), Vec::new());
    for (place, pod) in booking.pods.iter().chain(&payment.pods).enumerate() {
        let at = site(&world, pod).await;
        before.push(at.ip().to_string());
        holes.push(hole(format!("127.84.0.{}:{}", place + 1, at.port()).parse().unwrap()).await);
    }
    move_to(&world, &booking.pods, |place| format!("127.84.0.{}", place + 1)).await;
    move_to(&world, &payment.pods, |place| format!("127.84.0.{}", place + 3)).await;
    until_told(&world, "booking", "the operator itself is cut off").await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let policy = world.policy("booking").await;
        assert_ne!(condition(&policy, "Healthy").reason, "CheckUnhealthy", "{policy:?}");
    }
    move_to(&world, &payment.pods, |place| before[place + 2].clone()).await;
    let unhealthy = world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
    let failing: Vec<_> = unhealthy.status.iter().flat_map(|status| &status.checks).map(|one| &one.name).collect();
    assert_eq!(failing, ["site"], "now it is known that the others are gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_asked_on_the_loopback_nor_by_a_policy_that_is_gone() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    world.apply(&service("front", "booking")).await;
    let manifest = {
        let mut policy = policy("booking", "booking");
        policy["spec"]["healthChecks"] = json!([http_check("Workload", "front")]);
        policy
    };
    let usual = world.operator().await;
    world.apply(&manifest).await;
    let words = "site: none of the 1 pods of Service front can be asked: their addresses are not those of pods";
    until_told(&world, "booking", words).await;
    assert_eq!(asked(&workload), [0]);
    usual.stop().await;

    let _operator = operator(&world).await;
    until_asked(&workload, 2).await;
    world.delete(&manifest).await;
    // What was under way at that moment may still have been asked.
    within(Duration::from_secs(20), "it is asked no more", async || {
        let before = asked(&workload);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        let now = asked(&workload);
        if now == before { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
}
