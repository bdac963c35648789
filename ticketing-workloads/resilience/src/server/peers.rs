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

/// Of so many places, one is kept for those who have few connections: who has so many times as many as are free, less one, gets
/// none of them. So two that take what they can get leave some.
const RESERVED: usize = 8;
/// Of so many connections that may wait, a peer has one at most once half of them do.
const WAITING: usize = 16;
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

/// Whom an address stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Client {
    peer: IpAddr,
    /// What its bounds are for. Outside, who has one network of 64 bits with IPv6 may have as many of them as 48 bits leave.
    network: IpAddr,
}

impl Clients {
    /// Whom an address stands for.
    fn client(self, address: IpAddr) -> Client {
        let one = |address: IpAddr| Client { peer: address, network: address };
        let IpAddr::V6(address) = address.to_canonical() else { return one(address.to_canonical()) };
        match (address.segments(), self) {
            // A client with IPv4 behind a translator (NAT64, RFC 6052).
            ([0x64, 0xff9b, 0, 0, 0, 0, high, low], _) => {
                one(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)).into())
            }
            (_, Self::Outside) => {
                let first = |bits: u32| Ipv6Addr::from_bits(address.to_bits() >> (128 - bits) << (128 - bits)).into();
                Client { peer: first(64), network: first(48) }
            }
            (_, Self::Inside) => one(address.into()),
        }
    }
}

/// The network that an address outside the cluster is counted for: with IPv6, 48 bits of it; with IPv4, the address itself.
pub fn network_of(address: IpAddr) -> IpAddr {
    Clients::Outside.client(address).network
}

/// The places of a port, and who has them.
pub(super) struct Places {
    clients: Clients,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    places: usize,
    free: usize,
    /// Free ones that are kept for those who have few.
    reserved: usize,
    most: usize,
    peers: HashMap<IpAddr, Count>,
    networks: HashMap<IpAddr, Count>,
    served: HashMap<u64, Served>,
    waiting: VecDeque<Waiting>,
    connections: u64,
    /// When no idle connection was found.
    none_idle_at: Option<Instant>,
}

/// Connections of a peer, or of a network.
#[derive(Debug, Default)]
struct Count {
    served: usize,
    waiting: usize,
    /// When none of its own was found idle.
    none_idle_at: Option<Instant>,
}

#[derive(Debug)]
struct Served {
    client: Client,
    requests: Arc<Requests>,
    /// It is to end, for another one.
    shed: CancellationToken,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    served: Served,
    granted: oneshot::Sender<()>,
}

impl State {
    /// Connections that are served: of its network, and of the client itself.
    fn served_of(&self, client: Client) -> (usize, usize) {
        let count = |counts: &HashMap<IpAddr, Count>, of: &IpAddr| counts.get(of).map_or(0, |count| count.served);
        (count(&self.networks, &client.network), count(&self.peers, &client.peer))
    }

    fn may_serve(&self, client: Client) -> bool {
        // Where all callers come through one proxy, there is nobody to keep places for.
        let share = if self.most >= self.places { self.places } else { self.most.min((RESERVED - 1) * self.free) };
        self.free > self.reserved || (self.free > 0 && self.served_of(client).0 < share)
    }

    /// Whether one more of its connections may wait. Those who have none at all are the last to be refused.
    fn may_wait(&self, client: Client) -> bool {
        let all = self.waiting.len();
        let is_crowded = all >= self.places / 2 && self.most < self.places;
        let most = if is_crowded { (self.places / WAITING).max(1) } else { self.most };
        let Some(network) = self.networks.get(&client.network) else { return all < self.places };
        let of_peer = self.peers.get(&client.peer).map_or(0, |peer| peer.waiting);
        // Who shares a network leaves half of it to the others there.
        let own = if client.peer == client.network { most } else { most.div_ceil(2) };
        network.waiting < most && of_peer < own && all < self.places - self.reserved
    }

    /// Changes both counts of a client.
    fn count(&mut self, client: Client, change: impl Fn(&mut Count)) {
        for (counts, of) in [(&mut self.peers, client.peer), (&mut self.networks, client.network)] {
            let count = counts.entry(of).or_default();
            change(count);
            if count.served == 0 && count.waiting == 0 {
                counts.remove(&of);
            }
        }
    }

    fn serve(&mut self, number: u64, served: Served) {
        self.free -= 1;
        self.count(served.client, |count| count.served += 1);
        self.served.insert(number, served);
    }

    /// Takes out a connection, whether it was served or waited.
    fn remove(&mut self, number: u64, client: Client) {
        if self.served.remove(&number).is_some() {
            self.free += 1;
            self.count(client, |count| count.served -= 1);
        } else if let Some(index) = self.waiting.iter().position(|waiting| waiting.number == number) {
            self.waiting.remove(index);
            self.count(client, |count| count.waiting -= 1);
        }
    }

    /// Who gets the next free place: of those that may have one, those that have the fewest, and of them the first.
    fn next_to_serve(&self) -> Option<usize> {
        let waiting = self.waiting.iter().enumerate().filter(|(_, waiting)| self.may_serve(waiting.served.client));
        waiting.min_by_key(|(index, waiting)| (self.served_of(waiting.served.client), *index)).map(|(index, _)| index)
    }

    /// Gives free places to those that wait.
    fn grant(&mut self) {
        while self.free > 0
            && let Some(index) = self.next_to_serve()
            && let Some(Waiting { number, served, granted }) = self.waiting.remove(index)
        {
            let client = served.client;
            // It is served before it waits no more, so that its counts are never forgotten.
            self.serve(number, served);
            self.count(client, |count| count.waiting -= 1);
            // If its receiver has gone, its guard gives the place back.
            let _ = granted.send(());
        }
    }

    /// Ends the connection that has been without a request for longest; for a client whose network has many, one of its own.
    fn shed(&mut self, wanting: Client, now: Instant) {
        let own_only = self.served_of(wanting).0 >= self.most || (self.free > 0 && !self.may_serve(wanting));
        // That it has none of its own says nothing of the others'.
        let none_idle_at = if own_only {
            self.networks.get_mut(&wanting.network).map(|network| &mut network.none_idle_at)
        } else {
            Some(&mut self.none_idle_at)
        };
        let Some(none_idle_at) = none_idle_at else { return };
        if none_idle_at.is_some_and(|at| now.saturating_duration_since(at) < SEARCH) {
            return;
        }
        let idle = self.served.values().filter(|served| !served.shed.is_cancelled());
        let idle = idle.filter(|served| !own_only || served.client.network == wanting.network);
        let idle = idle.filter_map(|served| Some((served.requests.idle_since()?, served)));
        let longest = idle
            .filter(|(since, served)| {
                let least = if served.requests.have_begun() { IDLE } else { UNUSED };
                now.saturating_duration_since(*since) >= least
            })
            .min_by_key(|(since, _)| *since);
        match longest {
            Some((_, served)) => served.shed.cancel(),
            None => *none_idle_at = Some(now),
        }
    }
}

impl Places {
    /// So many places. While they are scarce, a network has no more than `most` of them; as many of its connections more may
    /// wait, and far fewer once many do.
    pub(super) fn new(places: usize, most: usize, clients: Clients) -> Arc<Self> {
        let state = State {
            places,
            free: places,
            reserved: places / RESERVED,
            most,
            peers: HashMap::new(),
            networks: HashMap::new(),
            served: HashMap::new(),
            waiting: VecDeque::new(),
            connections: 0,
            none_idle_at: None,
        };
        Arc::new(Self { clients, state: Mutex::new(state) })
    }

    /// A new connection from `address`; `None`: too many wait already, of its own or of all.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Connected> {
        let client = self.clients.client(address);
        let mut state = lock(&self.state);
        state.connections += 1;
        let number = state.connections;
        let (requests, shed) = (Arc::new(Requests::default()), CancellationToken::new());
        let served = Served { client, requests: Arc::clone(&requests), shed: shed.clone() };
        let waits = if state.may_serve(client) {
            state.serve(number, served);
            None
        } else if state.may_wait(client) {
            state.count(client, |count| count.waiting += 1);
            let (granted, waits) = oneshot::channel();
            state.waiting.push_back(Waiting { number, served, granted });
            Some(waits)
        } else {
            return None;
        };
        Some(Connected { places: Arc::clone(self), client, number, waits, requests, shed })
    }
}

/// A connection, until it is dropped.
pub(super) struct Connected {
    places: Arc<Places>,
    client: Client,
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
            lock(&self.places.state).shed(self.client, Instant::now());
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
        state.remove(self.number, self.client);
        state.grant();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[rstest::rstest]
    #[case("192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.1")]
    #[case("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.1")]
    #[case::translated("64:ff9b::192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.1")]
    #[case("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::", "2001:db8:1::", "2001:db8:1:2:3:4:5:6")]
    #[case("::1", "::", "::", "::1")]
    fn outside_a_network_of_ipv6_is_one_client(
        #[case] address: &str,
        #[case] peer: &str,
        #[case] network: &str,
        #[case] inside: &str,
    ) {
        assert_eq!(Clients::Outside.client(ip(address)), Client { peer: ip(peer), network: ip(network) });
        assert_eq!(network_of(ip(address)), ip(network));
        assert_eq!(Clients::Inside.client(ip(address)), Client { peer: ip(inside), network: ip(inside) });
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
        assert!(state.peers.is_empty() && state.networks.is_empty() && state.served.is_empty() && state.free == 16);
    }

    /// The addresses of a hostile client try as often as they like.
    fn flood(places: &Arc<Places>, addresses: &[String]) -> Vec<Connected> {
        addresses.iter().flat_map(|address| (0..100).filter_map(move |_| places.enter(ip(address)))).collect()
    }

    /// Two networks had all places, and all that may wait for one.
    #[rstest::rstest]
    #[case::two_networks((1..=2).map(|nth| format!("2001:db8:{nth}::1")).collect())]
    #[case::many_of_one_customer((1..=100).map(|nth| format!("2001:db8:1:{nth}::1")).collect())]
    #[case::some_addresses((1..=3).map(|nth| format!("192.0.2.{nth}")).collect())]
    #[tokio::test(start_paused = true)]
    async fn a_few_hostile_clients_lock_nobody_out(#[case] hostile: Vec<String>) {
        let places = Places::new(64, 32, Clients::Outside);
        let mut held = flood(&places, &hostile);
        if hostile.len() == 2 {
            assert!(is_served(&mut places.enter(ip("2001:db8:ffff::1")).unwrap()), "a place is left");
        }
        let mut others: Vec<_> = (1..=9).map(|nth| places.enter(ip(&format!("198.51.100.{nth}"))).unwrap()).collect();
        let mut waits: Vec<_> = others.iter_mut().filter_map(|one| (!is_served(one)).then_some(one)).collect();
        assert!(!waits.is_empty());
        // Those that are served come first in `held`, and the first of those that end makes room for somebody who has none.
        for next in &mut waits {
            held.remove(0);
            assert!(is_served(next), "it comes before those who have many");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_have_none_are_the_last_who_may_not_wait() {
        let places = Places::new(64, 32, Clients::Outside);
        let hostile: Vec<_> = (1..=200).map(|nth| format!("192.0.2.{nth}")).collect();
        let _held = flood(&places, &hostile);
        assert!(places.enter(ip("192.0.2.1")).is_none());
        let state = lock(&places.state);
        assert!(state.waiting.iter().all(|waiting| state.networks[&waiting.served.client.network].waiting <= 32));
        let waiting: BTreeSet<_> = state.waiting.iter().map(|waiting| waiting.served.client.network).collect();
        assert!(waiting.len() >= 14, "only {waiting:?} wait");
    }

    /// One with many looked for an idle one of its own all the time, and nobody else did.
    #[tokio::test(start_paused = true)]
    async fn that_one_has_no_idle_connection_says_nothing_of_the_others() {
        let places = Places::new(16, 2, Clients::Outside);
        let mut many: Vec<_> = (0..15).map(|_| places.enter(ip("192.0.2.1")).unwrap()).collect();
        let others: Vec<_> = [2, 3].map(|last| places.enter(ip(&format!("192.0.2.{last}"))).unwrap()).into();
        others[0].requests.rest(Some(Instant::now()));
        tokio::time::advance(UNUSED).await;
        assert!(!is_served(&mut many[14]) && !others[0].shed.is_cancelled());
        let mut wants = places.enter(ip("192.0.2.4")).unwrap();
        assert!(!is_served(&mut wants) && others[0].shed.is_cancelled());
    }

    /// As the chart has it where all callers come through one proxy.
    #[tokio::test(start_paused = true)]
    async fn one_proxy_may_have_all_places() {
        let places = Places::new(16, 16, Clients::Outside);
        let mut all: Vec<_> = (0..24).map(|_| places.enter(ip("192.0.2.1")).unwrap()).collect();
        assert_eq!(all.iter_mut().filter_map(|one| is_served(one).then_some(())).count(), 16);
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
                prop_assert!(!state.waiting.iter().any(|waiting| state.may_serve(waiting.served.client)));
            }
        }
    }
}
