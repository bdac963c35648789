//! Which connections are served when there are more than places for them.

use super::timed_stream::Requests;
use crate::sync::lock;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Of so many places, one is kept for peers that have few connections.
const RESERVED: usize = 8;
/// A connection that has had no request for so long is closed for one that waits.
const UNUSED: Duration = Duration::from_secs(1);
/// The same after a request. Longer than our own clients keep a connection, so that none of them sends a request meanwhile.
const IDLE: Duration = Duration::from_secs(5);
/// Time between two searches for such a connection that find none: many may wait.
const SEARCH: Duration = Duration::from_millis(20);

/// Where the clients of a port are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Outside the cluster: with IPv6, one client has a network of 2^64 addresses.
    Outside,
    /// Pods of the cluster, each of which has one address. They are told by `x-refused` that a refusal is no failure.
    Inside,
}

impl Clients {
    /// Whom an address stands for.
    fn peer(self, address: IpAddr) -> IpAddr {
        let IpAddr::V6(address) = address.to_canonical() else { return address.to_canonical() };
        match (address.segments(), self) {
            // A client with IPv4 behind a translator (NAT64, RFC 6052).
            ([0x64, 0xff9b, 0, 0, 0, 0, high, low], _) => {
                Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)).into()
            }
            (_, Self::Outside) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            (_, Self::Inside) => address.into(),
        }
    }
}

/// The places of a port, and who has them.
pub(super) struct Places {
    clients: Clients,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Free ones that are kept for peers with fewer connections than `most`.
    reserved: usize,
    most: usize,
    peers: HashMap<IpAddr, Peer>,
    served: HashMap<u64, Served>,
    waiting: VecDeque<Waiting>,
    connections: u64,
    /// When no idle connection was found.
    none_idle_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct Peer {
    served: usize,
    waiting: usize,
}

#[derive(Debug)]
struct Served {
    peer: IpAddr,
    requests: Arc<Requests>,
    /// It is to end, for another one.
    shed: CancellationToken,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    peer: IpAddr,
    served: Served,
    granted: oneshot::Sender<()>,
}

impl State {
    fn may_serve(&self, peer: IpAddr) -> bool {
        let has_few = self.peers.get(&peer).is_none_or(|peer| peer.served < self.most);
        self.free > self.reserved || (self.free > 0 && has_few)
    }

    fn serve(&mut self, number: u64, served: Served) {
        self.free -= 1;
        self.peers.entry(served.peer).or_default().served += 1;
        self.served.insert(number, served);
    }

    /// Takes out a connection, whether it was served or waited.
    fn remove(&mut self, number: u64, peer: IpAddr) {
        let of_peer = self.peers.entry(peer).or_default();
        if self.served.remove(&number).is_some() {
            of_peer.served -= 1;
            self.free += 1;
        } else if let Some(index) = self.waiting.iter().position(|waiting| waiting.number == number) {
            of_peer.waiting -= 1;
            self.waiting.remove(index);
        }
        if of_peer.served == 0 && of_peer.waiting == 0 {
            self.peers.remove(&peer);
        }
    }

    /// Gives free places to those that wait, the first ones first.
    fn grant(&mut self) {
        while self.free > 0
            && let Some(index) = self.waiting.iter().position(|waiting| self.may_serve(waiting.peer))
            && let Some(Waiting { number, peer, served, granted }) = self.waiting.remove(index)
        {
            if let Some(peer) = self.peers.get_mut(&peer) {
                peer.waiting -= 1;
            }
            self.serve(number, served);
            // If its receiver has gone, its guard gives the place back.
            let _ = granted.send(());
        }
    }

    /// Ends the connection that has been without a request for longest; for a peer with many connections, one of its own.
    fn shed(&mut self, wanting: IpAddr, now: Instant) {
        if self.none_idle_at.is_some_and(|at| now.saturating_duration_since(at) < SEARCH) {
            return;
        }
        let own_only = self.peers.get(&wanting).is_some_and(|peer| peer.served >= self.most);
        let idle = self.served.values().filter(|served| !served.shed.is_cancelled());
        let idle = idle.filter(|served| !own_only || served.peer == wanting);
        let idle = idle.filter_map(|served| Some((served.requests.idle_since()?, served)));
        let longest = idle
            .filter(|(since, served)| {
                let least = if served.requests.have_begun() { IDLE } else { UNUSED };
                now.saturating_duration_since(*since) >= least
            })
            .min_by_key(|(since, _)| *since);
        match longest {
            Some((_, served)) => served.shed.cancel(),
            None => self.none_idle_at = Some(now),
        }
    }
}

impl Places {
    /// So many places. While they are scarce, a peer has no more than `most` of them; it may have as many connections more that
    /// wait.
    pub(super) fn new(places: usize, most: usize, clients: Clients) -> Arc<Self> {
        let state = State {
            free: places,
            reserved: places / RESERVED,
            most,
            peers: HashMap::new(),
            served: HashMap::new(),
            waiting: VecDeque::new(),
            connections: 0,
            none_idle_at: None,
        };
        Arc::new(Self { clients, state: Mutex::new(state) })
    }

    /// A new connection from `address`; `None`: too many of its peer wait already.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Connected> {
        let peer = self.clients.peer(address);
        let mut state = lock(&self.state);
        state.connections += 1;
        let number = state.connections;
        let (requests, shed) = (Arc::new(Requests::default()), CancellationToken::new());
        let served = Served { peer, requests: Arc::clone(&requests), shed: shed.clone() };
        let waits = if state.may_serve(peer) {
            state.serve(number, served);
            None
        } else {
            let most = state.most;
            let of_peer = state.peers.entry(peer).or_default();
            if of_peer.waiting >= most {
                return None;
            }
            of_peer.waiting += 1;
            let (granted, waits) = oneshot::channel();
            state.waiting.push_back(Waiting { number, peer, served, granted });
            Some(waits)
        };
        Some(Connected { places: Arc::clone(self), peer, number, waits, requests, shed })
    }
}

/// A connection, until it is dropped.
pub(super) struct Connected {
    places: Arc<Places>,
    peer: IpAddr,
    number: u64,
    waits: Option<oneshot::Receiver<()>>,
    pub(super) requests: Arc<Requests>,
    /// Cancelled when it is to end for another one.
    pub(super) shed: CancellationToken,
}

impl Connected {
    /// Waits until there is a place for it; others that ask for nothing make room.
    pub(super) async fn place(&mut self) {
        let Some(waits) = &mut self.waits else { return };
        loop {
            lock(&self.places.state).shed(self.peer, Instant::now());
            if tokio::time::timeout(UNUSED / 4, &mut *waits).await.is_ok() {
                self.waits = None;
                return;
            }
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = lock(&self.places.state);
        state.remove(self.number, self.peer);
        state.grant();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[rstest::rstest]
    #[case("192.0.2.1", "192.0.2.1", "192.0.2.1")]
    #[case("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1")]
    #[case::translated("64:ff9b::192.0.2.1", "192.0.2.1", "192.0.2.1")]
    #[case("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::", "2001:db8:1:2:3:4:5:6")]
    #[case("::1", "::", "::1")]
    fn outside_a_network_of_ipv6_is_one_client(#[case] address: &str, #[case] outside: &str, #[case] inside: &str) {
        assert_eq!(Clients::Outside.peer(ip(address)), ip(outside));
        assert_eq!(Clients::Inside.peer(ip(address)), ip(inside));
    }

    fn is_served(connected: &mut Connected) -> bool {
        connected.place().now_or_never().is_some()
    }

    /// Behind one proxy, or one address for all callers, half of the port stood empty.
    #[tokio::test(start_paused = true)]
    async fn one_is_bounded_only_when_places_are_scarce() {
        let places = Places::new(16, 4, Clients::Outside);
        let mut one: Vec<_> = (0..18).map(|_| places.enter(ip("192.0.2.1")).unwrap()).collect();
        assert_eq!(
            one.iter_mut().filter_map(|one| is_served(one).then_some(())).count(),
            14,
            "two are kept for others"
        );
        assert!(places.enter(ip("192.0.2.1")).is_none(), "four wait");
        let mut others: Vec<_> = (2..5).map(|last| places.enter(ip(&format!("192.0.2.{last}"))).unwrap()).collect();
        assert_eq!(others.iter_mut().map(is_served).collect::<Vec<_>>(), [true, true, false]);
        one.remove(0);
        assert!(is_served(&mut others[2]), "those of whom there are few come first");
        assert!(!one.iter_mut().skip(13).any(is_served));
        drop(others);
        assert_eq!(one.iter_mut().filter_map(|one| is_served(one).then_some(())).count(), 14);
        drop(one);
        let state = lock(&places.state);
        assert!(state.peers.is_empty() && state.served.is_empty() && state.free == 16, "who has gone is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_that_is_idle_for_longest_makes_room() {
        let places = Places::new(2, 2, Clients::Outside);
        let mut served = Vec::new();
        for last in [1, 2] {
            let one = places.enter(ip(&format!("192.0.2.{last}"))).unwrap();
            one.requests.rest(Some(Instant::now()));
            tokio::time::advance(Duration::from_millis(700)).await;
            served.push(one);
        }
        let mut third = places.enter(ip("192.0.2.3")).unwrap();
        assert!(!is_served(&mut third));
        assert_eq!(served.iter().map(|one| one.shed.is_cancelled()).collect::<Vec<_>>(), [true, false]);
        assert!(tokio::time::timeout(UNUSED, third.place()).await.is_err());
        assert!(served[1].shed.is_cancelled(), "it has been idle for long enough by now");
        served.remove(0);
        assert!(is_served(&mut third));
    }

    /// A request on its way to a connection that is closed is lost.
    #[tokio::test(start_paused = true)]
    async fn one_that_has_been_used_is_kept_for_longer_than_our_clients_keep_it() {
        let places = Places::new(1, 1, Clients::Inside);
        let served = places.enter(ip("192.0.2.1")).unwrap();
        drop(served.requests.begin());
        served.requests.rest(Some(Instant::now()));
        let mut waits = places.enter(ip("192.0.2.2")).unwrap();
        assert!(tokio::time::timeout(IDLE.mul_f64(0.9), waits.place()).await.is_err());
        assert!(!served.shed.is_cancelled());
        assert!(tokio::time::timeout(IDLE.mul_f64(0.2), waits.place()).await.is_err());
        assert!(served.shed.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn one_with_many_makes_room_for_itself_only_of_its_own() {
        let places = Places::new(16, 2, Clients::Outside);
        let other = places.enter(ip("192.0.2.2")).unwrap();
        other.requests.rest(Some(Instant::now()));
        let mut own: Vec<_> = (0..13).map(|_| places.enter(ip("192.0.2.1")).unwrap()).collect();
        tokio::time::advance(UNUSED * 2).await;
        own[5].requests.rest(Some(Instant::now() - UNUSED));
        let mut waits = places.enter(ip("192.0.2.1")).unwrap();
        assert!(!is_served(&mut waits) && !other.shed.is_cancelled());
        assert!(own[5].shed.is_cancelled());
        own.clear();
    }

    proptest! {
        /// Whatever happens, no place is lost, and nobody waits who could be served.
        #[test]
        fn places_add_up(steps in proptest::collection::vec((0u8..6, any::<bool>(), 0usize..40), 1..200)) {
            let places = Places::new(10, 3, Clients::Inside);
            let mut connections = Vec::new();
            for (last, enters, index) in steps {
                if enters {
                    connections.extend(places.enter(Ipv4Addr::new(10, 0, 0, last).into()));
                } else if !connections.is_empty() {
                    connections.swap_remove(index % connections.len());
                }
                let state = lock(&places.state);
                prop_assert_eq!(state.served.len() + state.waiting.len(), connections.len());
                prop_assert_eq!(state.served.len() + state.free, 10);
                prop_assert!(!state.waiting.iter().any(|waiting| state.may_serve(waiting.peer)));
            }
        }
    }
}
