//! How many connections one client may have.

use crate::sync::lock;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The clients that have connections, by address. No larger than the number of connections.
pub(super) struct Peers {
    most: usize,
    peers: Mutex<HashMap<IpAddr, Peer>>,
}

struct Peer {
    places: Arc<Semaphore>,
    /// Connections, with those that wait for a place.
    connections: usize,
}

impl Peers {
    /// Each may have `most` connections that are served, and as many that wait for it.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, peers: Mutex::default() })
    }

    /// A new connection from `address`; `None`: its client has too many.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Connected> {
        let address = client(address);
        let mut peers = lock(&self.peers);
        let peer = peers
            .entry(address)
            .or_insert_with(|| Peer { places: Arc::new(Semaphore::new(self.most)), connections: 0 });
        if peer.connections >= self.most.saturating_mul(2) {
            return None;
        }
        peer.connections += 1;
        Some(Connected { peers: Arc::clone(self), address, places: Arc::clone(&peer.places) })
    }
}

/// Whom an address stands for. A client with IPv6 has a whole network of 2^64 addresses.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// A connection, until it is dropped.
pub(super) struct Connected {
    peers: Arc<Peers>,
    address: IpAddr,
    places: Arc<Semaphore>,
}

impl Connected {
    /// Waits until its client has a place for it.
    pub(super) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).acquire_owned().await.ok()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut peers = lock(&self.peers.peers);
        if let Some(peer) = peers.get_mut(&self.address) {
            peer.connections -= 1;
            if peer.connections == 0 {
                peers.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[rstest::rstest]
    #[case("192.0.2.1", "192.0.2.1")]
    #[case("::ffff:192.0.2.1", "192.0.2.1")]
    #[case("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::")]
    #[case("::1", "::")]
    fn a_network_of_ipv6_is_one_client(#[case] address: &str, #[case] expected: &str) {
        assert_eq!(client(ip(address)), ip(expected));
    }

    #[test]
    fn one_waits_above_its_bound_and_is_refused_above_twice_that() {
        let peers = Peers::new(2);
        let mut served = Vec::new();
        for _ in 0..2 {
            let connected = peers.enter(ip("192.0.2.1")).unwrap();
            let place = connected.place().now_or_never().flatten().unwrap();
            served.push((connected, place));
        }
        let waiting: Vec<_> = (0..2).map(|_| peers.enter(ip("192.0.2.1")).unwrap()).collect();
        assert!(waiting[0].place().now_or_never().is_none());
        assert!(peers.enter(ip("192.0.2.1")).is_none());
        assert!(peers.enter(ip("192.0.2.2")).unwrap().place().now_or_never().is_some(), "others are not in its way");
        served.pop();
        assert!(waiting[0].place().now_or_never().is_some());
        drop((served, waiting));
        assert!(lock(&peers.peers).is_empty(), "who has gone is forgotten");
    }
}
