//! Where a request comes from, past the proxies that are trusted to say so.

use axum::http::{HeaderMap, HeaderName};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Who may say for whom a request is made (`X-Forwarded-For`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TrustedProxies {
    /// Nobody: what a request says is what its sender likes.
    #[default]
    None,
    /// So many proxies, one behind the other, through which all requests come.
    Count(u8),
    /// Proxies with addresses of these networks.
    Networks(Vec<Network>),
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(address)) => {
                let differs = own.to_bits() ^ address.to_bits();
                differs.checked_shr(32 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(address)) => {
                let differs = own.to_bits() ^ address.to_bits();
                differs.checked_shr(128 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

/// A setting of trusted proxies that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} names no proxies: write how many there are, such as 1, or their networks, such as 10.0.0.0/8,fd00::/8")]
pub struct UnknownProxies(String);

impl FromStr for Network {
    type Err = UnknownProxies;

    fn from_str(text: &str) -> Result<Self, UnknownProxies> {
        let wrong = || UnknownProxies(text.to_owned());
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits <= most { Ok(Self { address, bits }) } else { Err(wrong()) }
    }
}

impl FromStr for TrustedProxies {
    type Err = UnknownProxies;

    fn from_str(text: &str) -> Result<Self, UnknownProxies> {
        let text = text.trim();
        match text.parse() {
            _ if text.is_empty() => Ok(Self::None),
            Ok(0) => Ok(Self::None),
            Ok(count) => Ok(Self::Count(count)),
            Err(_) => text.split(',').map(|one| one.trim().parse()).collect::<Result<_, _>>().map(Self::Networks),
        }
    }
}

impl TrustedProxies {
    fn trusts(&self, address: IpAddr) -> bool {
        match self {
            Self::None => false,
            Self::Count(_) => true,
            Self::Networks(networks) => networks.iter().any(|network| network.contains(address)),
        }
    }

    /// Who made the request that `peer` has sent. Each proxy adds whom it got it from to the end; what stands before that was
    /// there already, and may be invented.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let lines = headers.get_all(FORWARDED_FOR).iter().filter_map(|line| line.to_str().ok());
        let entries: Vec<&str> = lines.flat_map(|line| line.split(',')).collect();
        let mut from_the_right = entries.iter().rev().map(|entry| address_of(entry));
        match self {
            Self::None => peer,
            // With fewer entries it has not come through all of them.
            Self::Count(count) => from_the_right.nth(usize::from(*count) - 1).flatten().unwrap_or(peer),
            Self::Networks(_) => {
                let mut client = peer;
                while self.trusts(client)
                    && let Some(Some(address)) = from_the_right.next()
                {
                    client = address;
                }
                client
            }
        }
    }

    /// Whether a proxy that is trusted got the request over HTTPS.
    pub fn came_over_https(&self, peer: IpAddr, headers: &HeaderMap) -> bool {
        let last = headers.get_all(FORWARDED_PROTO).iter().next_back().and_then(|line| line.to_str().ok());
        let last = last.and_then(|line| line.rsplit(',').next());
        self.trusts(peer) && last.is_some_and(|scheme| scheme.trim().eq_ignore_ascii_case("https"))
    }
}

/// An entry may have a port.
fn address_of(entry: &str) -> Option<IpAddr> {
    let entry = entry.trim().trim_matches('"');
    let bare = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(entry);
    let address = bare.parse().ok().or_else(|| entry.parse::<SocketAddr>().ok().map(|address| address.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(name: &HeaderName, lines: &[&str]) -> HeaderMap {
        lines.iter().map(|line| (name.clone(), HeaderValue::from_str(line).unwrap())).collect()
    }

    #[rstest::rstest]
    #[case::nobody_is_trusted("", "10.0.0.1", &["192.0.2.1"], "10.0.0.1")]
    #[case::nobody_by_count("0", "10.0.0.1", &["192.0.2.1"], "10.0.0.1")]
    #[case::one_proxy("1", "10.0.0.1", &["198.51.100.9, 192.0.2.1"], "192.0.2.1")]
    #[case::two_proxies("2", "10.0.0.1", &["198.51.100.9, 192.0.2.1", "10.0.0.2"], "192.0.2.1")]
    #[case::past_the_proxies("2", "192.0.2.7", &["198.51.100.9"], "192.0.2.7")]
    #[case::without_a_word("1", "10.0.0.1", &[], "10.0.0.1")]
    #[case::with_a_port("1", "10.0.0.1", &["192.0.2.1:4711"], "192.0.2.1")]
    #[case::with_a_port("1", "10.0.0.1", &["[2001:db8::1]:4711"], "2001:db8::1")]
    #[case::in_brackets("1", "10.0.0.1", &["\"[2001:db8::1]\""], "2001:db8::1")]
    #[case::nonsense("1", "10.0.0.1", &["192.0.2.1, unknown"], "10.0.0.1")]
    #[case::by_network("10.0.0.0/8", "10.0.0.1", &["198.51.100.9, 192.0.2.1, 10.1.2.3"], "192.0.2.1")]
    #[case::mapped("10.0.0.0/8", "::ffff:10.0.0.1", &["192.0.2.1"], "192.0.2.1")]
    #[case::by_two_networks("10.0.0.1, fd00::/8", "fd00::1", &["192.0.2.1, 10.0.0.1"], "192.0.2.1")]
    #[case::another_peer("10.0.0.0/8", "192.0.2.7", &["198.51.100.9"], "192.0.2.7")]
    #[case::only_proxies("10.0.0.0/8", "10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3")]
    #[case::nonsense_in_between("10.0.0.0/8", "10.0.0.1", &["198.51.100.9, x, 10.0.0.2"], "10.0.0.2")]
    #[case::all("0.0.0.0/0", "10.0.0.1", &["192.0.2.1"], "192.0.2.1")]
    fn only_what_trusted_proxies_say_is_believed(
        #[case] proxies: &str,
        #[case] peer: &str,
        #[case] lines: &[&str],
        #[case] client: &str,
    ) {
        let proxies: TrustedProxies = proxies.parse().unwrap();
        let found = proxies.client(peer.parse().unwrap(), &headers(&FORWARDED_FOR, lines));
        assert_eq!(found, client.parse::<IpAddr>().unwrap());
    }

    #[rstest::rstest]
    #[case("", &["https"], false)]
    #[case("1", &["https"], true)]
    #[case("1", &["https, http"], false)]
    #[case("1", &["http", "HTTPS"], true)]
    #[case("10.0.0.0/8", &["https"], true)]
    #[case("10.1.0.0/16", &["https"], false)]
    #[case("1", &[], false)]
    fn https_is_what_the_nearest_trusted_proxy_says(
        #[case] proxies: &str,
        #[case] lines: &[&str],
        #[case] expected: bool,
    ) {
        let proxies: TrustedProxies = proxies.parse().unwrap();
        let headers = headers(&FORWARDED_PROTO, lines);
        assert_eq!(proxies.came_over_https("10.0.0.1".parse().unwrap(), &headers), expected);
    }

    #[test]
    fn a_setting_that_cannot_be_read_says_what_to_write() {
        for text in ["-1", "256", "10.0.0.0/33", "fd00::/129", "10.0.0.0/x", "proxy", "10.0.0.1,,10.0.0.2"] {
            let error = text.parse::<TrustedProxies>().unwrap_err().to_string();
            assert!(error.contains("such as 1, or their networks"), "{error}");
        }
    }
}
