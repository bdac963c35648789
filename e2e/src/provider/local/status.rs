//! `status`: what a person wants to know.

use super::record::Record;
use super::{LocalCluster, LocalError};
use crate::kubectl::{condition, items};
use serde_json::Value;
use std::fmt::Write;

impl LocalCluster {
    pub(super) async fn describe(&self) -> Result<String, LocalError> {
        let Some(record) = Record::read(&self.dir)? else {
            return Ok(format!("cluster {}: not up\n", self.name));
        };
        let kubectl = self.kubectl().await?;
        let mut text = String::new();
        let answers = kubectl.server_ready().await;
        let state = match (record.ready, answers) {
            (true, true) => "up",
            (true, false) => "the API server does not answer",
            (false, _) => "`up` did not finish: run it again, or `down`",
        };
        let _ = writeln!(text, "cluster {}: {state}", self.name);
        for started in record.processes.iter().filter(|p| !p.process.alive()) {
            let _ = writeln!(text, "  {} has ended", started.component);
        }
        if answers {
            describe_nodes(&mut text, &record, &kubectl.get("nodes").await?);
            describe_pods(&mut text, &kubectl.get("pods --all-namespaces").await?);
        }
        let _ = writeln!(text, "kubeconfig  {}", self.kubeconfig_file().display());
        let _ = writeln!(text, "logs        {}", self.dir.join("log").display());
        let _ = writeln!(text, "audit log   {}", self.dir.join("log/audit.log").display());
        let _ = writeln!(text, "kubectl     {}", kubectl.program().display());
        Ok(text)
    }
}

fn describe_nodes(text: &mut String, record: &Record, nodes: &Value) {
    for node in items(nodes) {
        let info = &node["status"]["nodeInfo"];
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        let ready = if condition(node, "Ready") == Some("True") { "Ready" } else { "NotReady" };
        let cut = record.cut.iter().any(|n| super::plan::node_name(*n) == name);
        let _ = writeln!(
            text,
            "  {name:<8} {ready:<9} {} {}{}",
            info["kubeletVersion"].as_str().unwrap_or_default(),
            info["containerRuntimeVersion"].as_str().unwrap_or_default(),
            if cut { " (cut off)" } else { "" },
        );
    }
}

fn describe_pods(text: &mut String, pods: &Value) {
    let finished = |pod: &Value| pod["status"]["phase"] == "Succeeded";
    let unready: Vec<&Value> =
        items(pods).iter().filter(|p| condition(p, "Ready") != Some("True") && !finished(p)).collect();
    if unready.is_empty() {
        let _ = writeln!(text, "  all {} pods are ready", items(pods).len());
    }
    for pod in unready {
        let meta = &pod["metadata"];
        let waiting = pod["status"]["containerStatuses"]
            .as_array()
            .and_then(|c| c.iter().find_map(|c| c["state"]["waiting"]["reason"].as_str()));
        let phase = pod["status"]["phase"].as_str().unwrap_or_default();
        let _ = writeln!(
            text,
            "  pod {}/{} is not ready: {}",
            meta["namespace"].as_str().unwrap_or_default(),
            meta["name"].as_str().unwrap_or_default(),
            waiting.unwrap_or(phase),
        );
    }
}
