//! Who may talk to the API server: one token and one kubeconfig each.

use super::node::Node;
use super::plan::{Plan, node_name};
use super::{LocalCluster, LocalError};
use crate::audit::AUDIT_POLICY;
use crate::pki::Pki;
use crate::{kubeconfig, token};
use std::fmt::Write;

impl LocalCluster {
    /// A token and a kubeconfig for everybody who talks to the API server.
    pub(super) fn write_identities(&self, pki: &Pki, plan: Plan, nodes: u32) -> Result<(), LocalError> {
        let pki_dir = self.dir.join("pki");
        let mut users = vec![
            ("ticketwave-admin".to_owned(), "system:masters".to_owned(), self.kubeconfig_file()),
            ("system:kube-controller-manager".into(), String::new(), pki_dir.join("controller-manager.kubeconfig")),
            ("system:kube-scheduler".into(), String::new(), pki_dir.join("scheduler.kubeconfig")),
            ("system:kube-proxy".into(), String::new(), pki_dir.join("kube-proxy.kubeconfig")),
        ];
        for number in 1..=nodes {
            let node = Node::new(number, &self.dir, plan);
            std::fs::create_dir_all(&node.dir).map_err(LocalError::file(&node.dir))?;
            users.push((format!("system:node:{}", node_name(number)), "system:nodes".into(), node.kubelet_config()));
        }
        let mut tokens = String::new();
        for (number, (user, groups, file)) in users.iter().enumerate() {
            let token = token::random().map_err(LocalError::file("/dev/urandom"))?;
            let _ = writeln!(tokens, "{token},{user},{number},\"{groups}\"");
            let context = if number == 0 { format!("ticketwave-{}", self.name) } else { user.clone() };
            kubeconfig::write(file, &context, &plan.server(), &pki.ca(), &token).map_err(LocalError::file(file))?;
        }
        let policy = self.dir.join("audit-policy.json");
        std::fs::write(&policy, AUDIT_POLICY).map_err(LocalError::file(&policy))?;
        let file = pki_dir.join("tokens.csv");
        kubeconfig::write_private(&file, tokens.as_bytes()).map_err(LocalError::file(&file))
    }
}
