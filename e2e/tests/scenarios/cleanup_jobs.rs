//! What is told of a cleanup Job: which of its containers failed and how its log ends, and that it is done when its main
//! container is.

use crate::{SOON, services_faults::recover_quickly, testbed};
use crds::Recovery;
use e2e::{
    sabotage::{leak_reservations, leaked_seats},
    testbed::{TICKETING, Testbed, TestbedError, phase, until},
};
use k8s_openapi::api::{batch::v1::CronJob, core::v1::Event};
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

const NAME: &str = "booking-cleanup";

#[tokio::test]
async fn a_cleanup_job_tells_of_the_container_that_failed_and_is_done_when_its_main_one_is() {
    let (testbed, _turn) = testbed().await;
    let cron_jobs: Api<CronJob> = Api::namespaced(testbed.client.clone(), TICKETING);
    let shipped = serde_json::to_value(cron_jobs.get(NAME).await.unwrap().spec).unwrap();
    let told = tell(&testbed, &shipped).await;
    // Also after a failure it is left as it was found.
    edit(&testbed, &containers(&shipped)).await.unwrap();
    told.unwrap();
}

async fn tell(testbed: &Testbed, shipped: &Value) -> Result<(), TestbedError> {
    let shell = shell(testbed).await?;
    let script = "echo 'no table: seats, password=hunter2-and-more'; echo 'last words'; exit 3";
    // The one beside it would go on for longer than the step may take.
    let beside = shell("proxy", "sleep 100");
    edit(testbed, &json!([shell("migrate", script), beside])).await?;
    recover_quickly(testbed).await;
    leak_reservations(testbed, 3).await?;
    let failed = over(testbed, 1).await?;
    let message = failed.status.as_ref().unwrap().message.clone().unwrap_or_default();
    assert_eq!(phase(&failed), "Failed", "{failed:?}");
    for words in ["container migrate exited with 3", "last words", "password=***"] {
        assert!(message.contains(words), "no {words:?} in {message:?}");
    }
    assert!(!message.contains("hunter2"), "{message}");
    // What a log says is for those who may read Recoveries.
    let events: Api<Event> = Api::namespaced(testbed.client.clone(), TICKETING);
    let events = events.list(&ListParams::default()).await?;
    let policy = serde_json::to_string(&testbed.policies().get("booking").await?.status).unwrap();
    let noted = events.items.iter().filter_map(|event| event.message.as_deref()).chain([policy.as_str()]);
    assert!(noted.into_iter().all(|text| !text.contains("last words")), "the log is in an Event or in the policy");

    // The main container puts the books right, and the Job goes on.
    let mut lasting = containers(shipped);
    lasting.as_array_mut().unwrap().push(beside);
    edit(testbed, &lasting).await?;
    testbed.delete_resources().await?;
    recover_quickly(testbed).await;
    if leaked_seats(testbed).await? == 0 {
        leak_reservations(testbed, 3).await?;
    }
    let done = over(testbed, 1).await?;
    assert_eq!(phase(&done), "Succeeded", "{done:?}");
    until(SOON, "every seat is free or sold", || async {
        let leaked = leaked_seats(testbed).await?;
        Ok(if leaked == 0 { Ok(()) } else { Err(format!("{leaked} are neither")) })
    })
    .await
}

/// Waits until so many actions are over; the answer is the last one.
async fn over(testbed: &Testbed, actions: usize) -> Result<Recovery, TestbedError> {
    until(SOON * 2, "the Job's action at its end", || async {
        let all = testbed.recoveries().await?;
        let over = all.iter().filter(|one| ["Succeeded", "Failed", "Cancelled"].contains(&phase(one))).count();
        let seen = || format!("{:?}", all.iter().map(phase).collect::<Vec<_>>());
        Ok(if over >= actions { Ok(all[0].clone()) } else { Err(seen()) })
    })
    .await
}

fn containers(spec: &Value) -> Value {
    spec["jobTemplate"]["spec"]["template"]["spec"]["containers"].clone()
}

async fn edit(testbed: &Testbed, containers: &Value) -> Result<(), TestbedError> {
    let cron_jobs: Api<CronJob> = Api::namespaced(testbed.client.clone(), TICKETING);
    let template = json!({ "spec": { "template": { "spec": { "containers": containers } } } });
    let patch = Patch::Merge(json!({ "spec": { "jobTemplate": template } }));
    Ok(cron_jobs.patch(NAME, &PatchParams::default(), &patch).await.map(drop)?)
}

/// Makes containers that run a script. The image is the database's: it has a shell, and every node has it.
async fn shell(testbed: &Testbed) -> Result<impl Fn(&str, &str) -> Value, TestbedError> {
    let postgres = testbed.kubectl.get(&format!("statefulset postgres -n {TICKETING}")).await?;
    let from = postgres["spec"]["template"]["spec"]["containers"][0].clone();
    Ok(move |name: &str, script: &str| {
        json!({
            "name": name, "image": from["image"], "imagePullPolicy": from["imagePullPolicy"],
            "command": ["sh", "-c", script], "securityContext": from["securityContext"],
        })
    })
}
