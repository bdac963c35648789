//! What opens a stream of changes for a client that can send no header, as the `EventSource` of a browser: a text in the address that
//! the operator has signed. It opens nothing but the stream of one scope, which tells that something has changed and not what.

use super::access::Digest;
use contract::canonical::hex;
use hmac::{Hmac, Mac};
use jiff::Timestamp;
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Who calls: a hash of its token under the operator's key, the same in each replica. Nothing of the token can be learnt from it.
pub type Client = [u8; CLIENT_BYTES];

const CLIENT_BYTES: usize = 16;
const SEAL_BYTES: usize = 16;
const EPOCH_BYTES: usize = 8;
const TICKET_BYTES: usize = EPOCH_BYTES + CLIENT_BYTES + SEAL_BYTES;
/// A ticket for an account is another one after this time, in seconds; it is valid for as long again.
const EPOCH: i64 = 600;
/// Stands for the ticket of a static token, which is valid as long as the token.
const STATIC: i64 = 0;

/// Makes and reads tickets.
pub struct Tickets(Digest);

/// What a ticket says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Whom it was given.
    pub client: Client,
    /// When it ends; none: with the static token of the client.
    pub until: Option<Timestamp>,
}

/// Why a ticket opens nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ticket in the address is not valid, or has expired: ask for all flags again")]
pub struct InvalidTicket;

impl Tickets {
    /// Under this key, which all replicas have.
    pub const fn new(key: Digest) -> Self {
        Self(key)
    }

    fn seal<const BYTES: usize>(&self, parts: &[&[u8]]) -> [u8; BYTES] {
        let mut sealed = [0; BYTES];
        // HMAC takes keys of any length; the error type is there for ciphers that do not.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return sealed };
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        for (to, from) in sealed.iter_mut().zip(mac.finalize().into_bytes()) {
            *to = from;
        }
        sealed
    }

    /// Who has the token with this hash.
    pub fn client(&self, token: &Digest) -> Client {
        self.seal(&[b"client", token])
    }

    /// A ticket for the scope with this base path. It stays the same for a while, so that an answer that holds it does, too.
    pub fn issue(&self, client: &Client, is_static: bool, base: &str, now: Timestamp) -> String {
        let epoch = if is_static { STATIC } else { epoch(client, now) };
        let seal: [u8; SEAL_BYTES] = self.base_seal(client, epoch, base);
        hex(&[&epoch.to_be_bytes()[..], client, &seal].concat())
    }

    /// What a ticket says, if it is for the scope with this base path.
    pub fn read(&self, ticket: &str, base: &str, now: Timestamp) -> Result<Ticket, InvalidTicket> {
        let bytes = unhex(ticket).ok_or(InvalidTicket)?;
        let (epoch, rest) = bytes.split_first_chunk::<EPOCH_BYTES>().ok_or(InvalidTicket)?;
        let (client, seal) = rest.split_first_chunk::<CLIENT_BYTES>().ok_or(InvalidTicket)?;
        let epoch = i64::from_be_bytes(*epoch);
        let expected: [u8; SEAL_BYTES] = self.base_seal(client, epoch, base);
        if !bool::from(expected.ct_eq(seal)) {
            return Err(InvalidTicket);
        }
        let until = if epoch == STATIC { None } else { Some(end(client, epoch).ok_or(InvalidTicket)?) };
        if until.is_some_and(|until| now >= until) {
            return Err(InvalidTicket);
        }
        Ok(Ticket { client: *client, until })
    }

    fn base_seal(&self, client: &Client, epoch: i64, base: &str) -> [u8; SEAL_BYTES] {
        self.seal(&[b"stream", &epoch.to_be_bytes(), client, base.as_bytes()])
    }
}

/// Epochs begin for each client at another time, so that not all of them ask for new tickets at once.
fn offset(client: &Client) -> i64 {
    let [first, second, ..] = *client;
    i64::from(u16::from_be_bytes([first, second])) % EPOCH
}

fn epoch(client: &Client, now: Timestamp) -> i64 {
    (now.as_second() + offset(client)).div_euclid(EPOCH)
}

/// Of the epoch after that of the ticket.
fn end(client: &Client, epoch: i64) -> Option<Timestamp> {
    let second = epoch.checked_add(2)?.checked_mul(EPOCH)?.checked_sub(offset(client))?;
    Timestamp::from_second(second).ok()
}

fn unhex(text: &str) -> Option<[u8; TICKET_BYTES]> {
    let text = text.as_bytes();
    if text.len() != 2 * TICKET_BYTES {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = [0; TICKET_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKETS: Tickets = Tickets([7; 32]);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    const BASES: [&str; 3] = ["/namespaces/n", "/namespaces/m", "/namespaces/n/workloads/w"];

    #[test]
    fn a_ticket_opens_its_own_scope_and_is_of_this_operator() {
        let client = TICKETS.client(&[1; 32]);
        let [scope, others @ ..] = BASES;
        for is_static in [true, false] {
            let ticket = TICKETS.issue(&client, is_static, scope, at(0));
            assert_eq!(TICKETS.read(&ticket, scope, at(0)).map(|ticket| ticket.client), Ok(client));
            for other in others {
                assert_eq!(TICKETS.read(&ticket, other, at(0)), Err(InvalidTicket));
            }
            assert_eq!(Tickets([8; 32]).read(&ticket, scope, at(0)), Err(InvalidTicket));
            for nth in 0..ticket.len() {
                let mut forged = ticket.clone().into_bytes();
                forged[nth] = if forged[nth] == b'0' { b'1' } else { b'0' };
                let forged = String::from_utf8(forged).unwrap();
                assert_eq!(TICKETS.read(&forged, scope, at(0)), Err(InvalidTicket), "character {nth}");
            }
        }
    }

    #[rstest::rstest]
    #[case("")]
    #[case("zz")]
    #[case(&"é".repeat(TICKET_BYTES))]
    #[case(&"f".repeat(2 * TICKET_BYTES))]
    #[case(&"0".repeat(2 * TICKET_BYTES))]
    fn what_is_no_ticket_opens_nothing(#[case] text: &str) {
        assert_eq!(TICKETS.read(text, BASES[0], at(0)), Err(InvalidTicket));
    }

    #[test]
    fn a_ticket_of_an_account_stays_the_same_for_a_while_and_ends_and_a_static_one_does_neither() {
        let (client, scope) = (TICKETS.client(&[1; 32]), BASES[0]);
        let issued = |is_static, second| TICKETS.issue(&client, is_static, scope, at(second));
        let first = issued(false, 0);
        let change = (1..=EPOCH).find(|second| issued(false, *second) != first).unwrap();
        assert_eq!(issued(false, change - 1), first);
        let second = issued(false, change);
        assert_eq!(issued(false, change + EPOCH - 1), second);
        assert!(TICKETS.read(&second, scope, at(change + 2 * EPOCH - 1)).is_ok());
        assert_eq!(TICKETS.read(&second, scope, at(change + 2 * EPOCH)), Err(InvalidTicket));
        assert_eq!(TICKETS.read(&second, scope, at(0)).unwrap().until, Some(at(change + 2 * EPOCH)));
        let fixed = issued(true, 0);
        assert_eq!(issued(true, 1_000_000), fixed);
        assert_eq!(TICKETS.read(&fixed, scope, at(1_000_000)).unwrap().until, None);
    }

    #[test]
    fn clients_do_not_change_all_at_once() {
        let offsets: std::collections::BTreeSet<_> = (0..50).map(|nth| offset(&TICKETS.client(&[nth; 32]))).collect();
        assert!(offsets.len() > 40, "{offsets:?}");
    }
}
