//! Keys of tickets (Ed25519): one that signs, and any number of public ones that are accepted, so that a key can be replaced
//! while tickets of the one before are about.

use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write;

/// Largest file of keys, in bytes.
pub const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Before the seed in PKCS#8, version 1, as openssl and Helm write it.
const PKCS8: &[u8; 16] = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
/// Before the key in a SubjectPublicKeyInfo.
const SPKI: &[u8; 12] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

/// Why there is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("no Ed25519 key in PKCS#8 (-----BEGIN PRIVATE KEY-----): make one with `ticketing ticket-key new FILE`")]
    NotAPrivateKey,
    #[error(
        "no public keys (-----BEGIN PUBLIC KEY-----): `ticketing ticket-key public FILE` prints that of a private key"
    )]
    NoPublicKeys,
    #[error("public key {0} in the file is not an Ed25519 key")]
    NotAPublicKey(usize),
    #[error(
        "it has a private key, which belongs to nobody but the service that signs: `ticketing ticket-key public FILE` prints the public one"
    )]
    Private,
    #[error("the system has no random numbers")]
    NoRandomNumbers,
}

/// Names a key: the beginning of its hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 8]);

impl KeyId {
    /// As codes have it.
    pub fn bytes(self) -> [u8; 8] {
        self.0
    }
}

impl From<[u8; 8]> for KeyId {
    fn from(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// A key that anybody may have, to see whether tickets are genuine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    id: KeyId,
    bytes: [u8; 32],
}

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        let mut id = [0; 8];
        id.iter_mut().zip(Sha256::digest(bytes)).for_each(|(own, byte)| *own = byte);
        Self { id: KeyId(id), bytes }
    }
}

impl PublicKey {
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The key itself.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// As the file of an entrance has it.
    pub fn to_pem(&self) -> String {
        pem("PUBLIC KEY", &[&SPKI[..], &self.bytes].concat())
    }

    pub fn has_signed(&self, text: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.bytes).verify(text, signature).is_ok()
    }
}

/// Keys that are accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublicKeys(BTreeMap<KeyId, PublicKey>);

impl FromIterator<PublicKey> for PublicKeys {
    fn from_iter<I: IntoIterator<Item = PublicKey>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| (key.id, key)).collect())
    }
}

impl PublicKeys {
    /// All keys of a file in PEM, one after the other.
    pub fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        if PrivatePkcs8KeyDer::from_pem_slice(text).is_ok() {
            return Err(KeyError::Private);
        }
        let mut keys = Vec::new();
        for (nth, found) in SubjectPublicKeyInfoDer::pem_slice_iter(text).enumerate() {
            let bytes = found.ok().and_then(|found| <[u8; 32]>::try_from(found.as_ref().strip_prefix(SPKI)?).ok());
            keys.push(PublicKey::from(bytes.ok_or(KeyError::NotAPublicKey(nth + 1))?));
        }
        if keys.is_empty() { Err(KeyError::NoPublicKeys) } else { Ok(keys.into_iter().collect()) }
    }

    pub fn get(&self, id: KeyId) -> Option<&PublicKey> {
        self.0.get(&id)
    }
}

/// The key that tickets are signed with.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    public: PublicKey,
}

/// Only what anybody may know.
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public.id)
    }
}

impl SigningKey {
    /// The key of a file in PEM.
    pub fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(text).map_err(|_| KeyError::NotAPrivateKey)?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der());
        Self::of(pair.map_err(|_| KeyError::NotAPrivateKey)?)
    }

    /// The key of these 32 bytes.
    pub fn from_seed(seed: &[u8]) -> Result<Self, KeyError> {
        Self::of(Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| KeyError::NotAPrivateKey)?)
    }

    fn of(pair: Ed25519KeyPair) -> Result<Self, KeyError> {
        let public = <[u8; 32]>::try_from(pair.public_key().as_ref()).map_err(|_| KeyError::NotAPrivateKey)?;
        Ok(Self { pair, public: PublicKey::from(public) })
    }

    pub fn id(&self) -> KeyId {
        self.public.id
    }

    pub fn public_key(&self) -> PublicKey {
        self.public.clone()
    }

    pub fn sign(&self, text: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.iter_mut().zip(self.pair.sign(text).as_ref()).for_each(|(own, byte)| *own = *byte);
        signature
    }
}

/// A new key, as the file of the service that signs has it.
pub fn generate() -> Result<String, KeyError> {
    let mut seed = [0; 32];
    SystemRandom::new().fill(&mut seed).map_err(|_| KeyError::NoRandomNumbers)?;
    Ok(pem("PRIVATE KEY", &[&PKCS8[..], &seed].concat()))
}

/// Short enough for one line of base64.
fn pem(what: &str, der: &[u8]) -> String {
    use base64::Engine;
    let mut text = String::new();
    let encoded = base64::engine::general_purpose::STANDARD.encode(der);
    let _ = write!(text, "-----BEGIN {what}-----\n{encoded}\n-----END {what}-----\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By `openssl genpkey -algorithm ed25519`, and `openssl pkey -pubout` of it.
    const OPENSSL: (&str, &str) = (
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIOGvng4xnqi+zhMucg12peqFIUlpKY8rsFxvmy0+t011\n-----END PRIVATE KEY-----\n",
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAD92dxs9h905Q+vE7qZ5kMERfMKvKmrBnbIgNvqirY+Y=\n-----END PUBLIC KEY-----\n",
    );

    #[test]
    fn a_new_key_is_read_again() {
        let text = generate().unwrap();
        let key = SigningKey::from_pem(text.as_bytes()).unwrap();
        assert_ne!(generate().unwrap(), text);
        let public = PublicKeys::from_pem(key.public_key().to_pem().as_bytes()).unwrap();
        assert!(public.get(key.id()).unwrap().has_signed(b"text", &key.sign(b"text")));
        assert!(!public.get(key.id()).unwrap().has_signed(b"test", &key.sign(b"text")));
        assert_eq!(format!("{key:?}"), format!("SigningKey({})", key.id()));
    }

    #[test]
    fn keys_of_openssl_are_read() {
        let key = SigningKey::from_pem(OPENSSL.0.as_bytes()).unwrap();
        assert_eq!(key.public_key().to_pem(), OPENSSL.1);
    }

    #[test]
    fn a_file_may_have_several_public_keys() {
        let keys = [1, 2, 3].map(|seed| SigningKey::from_seed(&[seed; 32]).unwrap());
        let file = keys.each_ref().map(|key| key.public_key().to_pem()).join("a comment\n");
        let public = PublicKeys::from_pem(file.as_bytes()).unwrap();
        assert!(keys.iter().all(|key| public.get(key.id()).is_some()));
    }

    #[test]
    fn what_is_no_key_is_refused_with_a_reason() {
        let private = generate().unwrap();
        assert_eq!(PublicKeys::from_pem(private.as_bytes()), Err(KeyError::Private));
        assert_eq!(PublicKeys::from_pem(b""), Err(KeyError::NoPublicKeys));
        let rsa = pem("PUBLIC KEY", &[7; 40]);
        assert_eq!(PublicKeys::from_pem(rsa.as_bytes()), Err(KeyError::NotAPublicKey(1)));
        for text in ["", "nothing", rsa.as_str(), &pem("PRIVATE KEY", &[7; 40])] {
            assert_eq!(SigningKey::from_pem(text.as_bytes()).err(), Some(KeyError::NotAPrivateKey));
        }
    }
}
