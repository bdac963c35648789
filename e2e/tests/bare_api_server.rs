//! The bare API server that the controller tests stand on.

use e2e::{
    apiserver::TestApiServer,
    binaries::{Binaries, Tool},
    kubectl::Kubectl,
    progress::Progress,
};
use std::net::TcpStream;

#[tokio::test]
async fn several_run_side_by_side() {
    let (a, b) = tokio::join!(TestApiServer::start(), TestApiServer::start());
    assert_ne!(a.unwrap().url(), b.unwrap().url());
}

#[tokio::test]
async fn it_serves_knows_its_users_pauses_and_ends() {
    let server = TestApiServer::start().await.unwrap();
    let binary = Binaries::new(Progress::quiet()).path(Tool::Kubectl).await.unwrap();
    let kubectl = Kubectl::new(binary, Some(server.kubeconfig()));
    kubectl.run("create namespace a").await.unwrap();
    let token = format!("--token={}", server.user_token("operator").unwrap());
    let refused = kubectl.args(&["get", "pods", &token]).await.unwrap_err().to_string();
    assert!(refused.contains("\"operator\" cannot list"), "{refused}");
    assert!(std::fs::read_to_string(server.audit_log()).unwrap().contains("\"namespaces\""));

    assert!(server.pause());
    assert!(!kubectl.server_ready().await);
    assert!(server.resume());
    assert!(kubectl.server_ready().await);

    let address = server.url().trim_start_matches("https://").to_owned();
    drop(server);
    assert!(TcpStream::connect(address).is_err(), "it must be gone with its value");
}
