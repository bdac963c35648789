//! Names and addresses of a cluster, all derived from its slot.
//!
//! A slot is the second number of its addresses: `10.SLOT.0.0/16`. Nodes have `10.SLOT.0.11` and up, this machine
//! `10.SLOT.0.1`, pods of node i `10.SLOT.(64+i).0/24`, Services `10.SLOT.128.0/20`.

use serde::{Deserialize, Serialize};

/// The first and the last slot.
pub const SLOTS: std::ops::RangeInclusive<u8> = 224..=247;
/// As many nodes as the address plan has been tried with.
pub const MAX_NODES: u32 = 3;

/// The address plan of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which `10.x` it uses.
    pub slot: u8,
}

impl Plan {
    /// Everything the cluster uses.
    pub fn network(self) -> String {
        format!("10.{}.0.0/16", self.slot)
    }
    /// This machine's address on the nodes' network.
    pub fn host(self) -> String {
        format!("10.{}.0.1", self.slot)
    }
    /// The address of a node, from 1.
    pub fn node(self, node: u32) -> String {
        format!("10.{}.0.{}", self.slot, 10 + node)
    }
    /// The pods of a node.
    pub fn pods_of(self, node: u32) -> String {
        format!("10.{}.{}.0/24", self.slot, 64 + node)
    }
    /// The pods of all nodes.
    pub fn pods(self) -> String {
        format!("10.{}.64.0/18", self.slot)
    }
    /// Cluster addresses of Services.
    pub fn services(self) -> String {
        format!("10.{}.128.0/20", self.slot)
    }
    /// The Service `kubernetes`.
    pub fn kubernetes_service(self) -> String {
        format!("10.{}.128.1", self.slot)
    }
    /// The Service of the DNS server.
    pub fn dns_service(self) -> String {
        format!("10.{}.128.10", self.slot)
    }
    /// Where this machine reaches the API server.
    pub fn server(self) -> String {
        format!("https://{}:6443", self.node(1))
    }
    /// This machine's network interface to the cluster.
    pub fn interface(self) -> String {
        format!("tw{}", self.slot)
    }
    /// The cgroup above everything that the cluster runs.
    pub fn cgroup(self) -> String {
        format!("ticketwave-{}", self.slot)
    }
}

/// The name of a node, from 1.
pub fn node_name(node: u32) -> String {
    format!("node-{node}")
}

/// Whether an IPv4 network such as `10.224.0.0/16`, `10.0.0.0/8` or `10.224.3.1` has addresses of this slot. A default route has not.
pub fn overlaps(slot: u8, network: &str) -> bool {
    let (address, length) = network.split_once('/').unwrap_or((network, "32"));
    let (Ok(address), Ok(length)) = (address.parse::<std::net::Ipv4Addr>(), length.parse::<u32>()) else {
        return false;
    };
    if length == 0 {
        return false;
    }
    let mask = |bits: u32| u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    let common = mask(length.min(16));
    let ours = u32::from(std::net::Ipv4Addr::new(10, slot, 0, 0));
    u32::from(address) & common == ours & common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_that_overlap_a_slot() {
        assert!(overlaps(224, "10.224.3.0/24"));
        assert!(overlaps(224, "10.0.0.0/8"));
        assert!(overlaps(224, "10.224.0.1"));
        assert!(!overlaps(225, "10.224.0.0/16"));
        assert!(!overlaps(224, "0.0.0.0/0"));
        assert!(!overlaps(224, "default"));
    }

    #[test]
    fn the_parts_of_a_plan_do_not_overlap() {
        let plan = Plan { slot: 230 };
        assert_eq!(plan.node(3), "10.230.0.13");
        assert_eq!(plan.pods_of(2), "10.230.66.0/24");
        assert_eq!(plan.services(), "10.230.128.0/20");
    }
}
