//! TLS with a certificate that may change while connections are served.

use super::files::{self, FileContent};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        Error, ServerConfig,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::{ClientHello, ResolvesServerCert},
        sign::CertifiedKey,
    },
    server::TlsStream,
};
use tracing::{info, warn};

/// Largest file that is read, in bytes.
const MAX_FILE_BYTES: usize = 64 * 1024;
/// Most certificates of a chain.
const MAX_CHAIN: usize = 16;
/// Longest time for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What is spoken in a connection, as handshakes name it.
pub const HTTP_1: &[u8] = b"http/1.1";
/// The same for HTTP/2, and so for gRPC.
pub const HTTP_2: &[u8] = b"h2";

/// Why a certificate cannot be used. It quotes nothing of the files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{file} cannot be read: {why}")]
    Unreadable {
        /// Which.
        file: &'static str,
        /// Why not.
        why: String,
    },
    /// A file is too large.
    #[error("{0} has more than {MAX_FILE_BYTES} bytes")]
    TooLarge(&'static str),
    /// There is no certificate.
    #[error("{CHAIN} has no certificate that can be read, as PEM")]
    NoCertificate,
    /// There are too many.
    #[error(
        "{CHAIN} has more than {MAX_CHAIN} certificates: the server's own one and those between it and the root are enough"
    )]
    LongChain,
    /// There is no key.
    #[error("{KEY} has no private key that can be read, as PEM")]
    NoKey,
    /// Both are read, and cannot be used together.
    #[error("{KEY} is not the key of the first certificate of {CHAIN}, or is of a kind that is not known: {0}")]
    NoPair(String),
}

/// The names of the files, as a Secret of the type `kubernetes.io/tls` has them.
const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";

/// The certificate that is shown now.
#[derive(Debug, Default)]
pub struct Certificate(RwLock<Option<Arc<CertifiedKey>>>);

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What both files hold, or why they cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files([FileContent; 2]);

impl Files {
    /// Reads both files of a folder.
    pub async fn read(folder: &Path) -> Self {
        let [chain, key] = [CHAIN, KEY].map(|name| -> PathBuf { folder.join(name) });
        Self([files::read(&chain, MAX_FILE_BYTES).await, files::read(&key, MAX_FILE_BYTES).await])
    }
}

impl Certificate {
    /// Takes in what the files hold. If that cannot be used, the last one that could stays; without one, no handshake succeeds.
    pub fn take_in(&self, files: &Files) -> Result<(), CertificateError> {
        let [chain, key] = &files.0;
        let certified = certified(content(CHAIN, chain)?, content(KEY, key)?)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(certified));
        Ok(())
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

fn content<'a>(file: &'static str, content: &'a FileContent) -> Result<&'a [u8], CertificateError> {
    match content {
        Ok(content) if content.len() > MAX_FILE_BYTES => Err(CertificateError::TooLarge(file)),
        Ok(content) => Ok(content),
        Err(why) => Err(CertificateError::Unreadable { file, why: why.clone() }),
    }
}

fn provider() -> CryptoProvider {
    ring::default_provider()
}

/// A chain and its key, as PEM.
fn certified(chain: &[u8], key: &[u8]) -> Result<CertifiedKey, CertificateError> {
    // The texts of these errors could quote what was read, so they are left out.
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).take(MAX_CHAIN + 1).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty()).ok_or(CertificateError::NoCertificate)?;
    if chain.len() > MAX_CHAIN {
        return Err(CertificateError::LongChain);
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| CertificateError::NoKey)?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(|error| CertificateError::NoPair(error.to_string()))
}

/// A certificate that is kept as its folder has it.
#[derive(Debug)]
pub struct CertificateFolder {
    /// Whose it is, in messages.
    of: &'static str,
    folder: PathBuf,
    certificate: Arc<Certificate>,
    last: Option<Files>,
}

impl CertificateFolder {
    /// The one in `folder`, which is not looked at yet.
    pub fn new(of: &'static str, folder: PathBuf) -> Self {
        Self { of, folder, certificate: Arc::default(), last: None }
    }

    /// Accepts connections with it, as [`acceptor`] does.
    pub fn acceptor(&self, protocol: &[u8]) -> Result<TlsAcceptor, Error> {
        acceptor(Arc::clone(&self.certificate), protocol)
    }

    /// Takes in what the folder has, if that is news, and says whether it can be used; one that cannot changes nothing.
    pub async fn look(&mut self) -> Option<bool> {
        let read = Files::read(&self.folder).await;
        if self.last.as_ref() == Some(&read) {
            return None;
        }
        let taken = self.certificate.take_in(&read);
        self.last = Some(read);
        let (of, folder) = (self.of, self.folder.display());
        match &taken {
            Ok(()) => info!(%folder, "{of}: certificate read"),
            Err(error) if self.certificate.is_there() => {
                warn!(%folder, %error, "{of}: the certificate cannot be used; the one that was read before stays");
            }
            Err(error) => {
                warn!(%folder, %error, "{of}: the certificate cannot be used; nobody is served until there is one that can");
            }
        }
        Some(taken.is_ok())
    }
}

/// A connection after its handshake; `None`: the client was too slow, spoke something else, or does not trust the certificate. TLS
/// itself tells it so.
pub async fn handshake<S>(acceptor: &TlsAcceptor, stream: S) -> Option<TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await.ok()?.ok()
}

/// Accepts connections with TLS 1.2 or later, and `protocol` in them.
pub fn acceptor(certificate: Arc<Certificate>, protocol: &[u8]) -> Result<TlsAcceptor, Error> {
    let builder = ServerConfig::builder_with_provider(Arc::new(provider()));
    let mut config =
        builder.with_safe_default_protocol_versions()?.with_no_client_auth().with_cert_resolver(certificate);
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tls::{unverified, verified};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio_rustls::{
        TlsConnector,
        rustls::{ClientConfig, pki_types::ServerName, version},
    };

    fn pair() -> (String, String) {
        let certified = rcgen::generate_simple_self_signed(vec!["flags.example".to_owned()]).unwrap();
        (certified.cert.pem(), certified.signing_key.serialize_pem())
    }

    fn files(chain: &str, key: &str) -> Files {
        Files([Ok(chain.as_bytes().to_vec()), Ok(key.as_bytes().to_vec())])
    }

    /// What a client says to a server with this certificate.
    async fn handshake(certificate: &Arc<Certificate>, client: Arc<ClientConfig>) -> Result<Vec<u8>, String> {
        let (near, far) = duplex(64 * 1024);
        let server = acceptor(Arc::clone(certificate), HTTP_1).unwrap();
        let server = tokio::spawn(async move {
            let Ok(mut stream) = server.accept(far).await else { return };
            stream.write_all(b"hello").await.unwrap();
            let _ = stream.shutdown().await;
        });
        let name = ServerName::try_from("flags.example").unwrap();
        let mut stream = TlsConnector::from(client).connect(name, near).await.map_err(|error| error.to_string())?;
        let mut said = Vec::new();
        stream.read_to_end(&mut said).await.map_err(|error| error.to_string())?;
        server.await.unwrap();
        Ok(said)
    }

    #[tokio::test]
    async fn a_new_certificate_is_shown_at_once_and_a_bad_one_never() {
        let certificate = Arc::new(Certificate::default());
        let ((first, first_key), (second, second_key)) = (pair(), pair());
        assert!(handshake(&certificate, unverified().unwrap()).await.is_err(), "there is none yet");
        certificate.take_in(&files(&first, &first_key)).unwrap();
        let clients = [&first, &second].map(|pem| verified(pem).unwrap());
        let shown = async || {
            let [first, second] = [clients[0].clone(), clients[1].clone()];
            (handshake(&certificate, first).await.is_ok(), handshake(&certificate, second).await.is_ok())
        };
        assert_eq!(shown().await, (true, false));
        let error = certificate.take_in(&files(&second, &first_key)).unwrap_err();
        assert!(matches!(error, CertificateError::NoPair(_)), "{error}");
        assert_eq!(shown().await, (true, false), "the last good one stays");
        certificate.take_in(&files(&second, &second_key)).unwrap();
        assert_eq!(shown().await, (false, true));
        assert!(certificate.is_there());
    }

    #[tokio::test]
    async fn tls_1_2_is_spoken_and_another_protocol_than_http_1_is_not() {
        let certificate = Arc::new(Certificate::default());
        let (chain, key) = pair();
        certificate.take_in(&files(&chain, &key)).unwrap();
        let mut old = ClientConfig::clone(&verified(&chain).unwrap());
        old.alpn_protocols = vec![b"h2".to_vec()];
        assert!(handshake(&certificate, Arc::new(old)).await.is_err());
        let builder = ClientConfig::builder_with_provider(Arc::new(provider()));
        let mut roots = tokio_rustls::rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()).unwrap();
        let old = builder.with_protocol_versions(&[&version::TLS12]).unwrap();
        let old = old.with_root_certificates(roots).with_no_client_auth();
        assert_eq!(handshake(&certificate, Arc::new(old)).await, Ok(b"hello".to_vec()));
    }

    #[test]
    fn what_is_wrong_is_said_and_nothing_is_quoted() {
        let certificate = Certificate::default();
        let (chain, key) = pair();
        let long = chain.repeat(MAX_CHAIN + 1);
        let large = "x".repeat(MAX_FILE_BYTES + 1);
        for (chain, key, expected) in [
            ("", key.as_str(), CertificateError::NoCertificate),
            ("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", &key, CertificateError::NoCertificate),
            (&long, &key, CertificateError::LongChain),
            (&large, &key, CertificateError::TooLarge(CHAIN)),
            (&chain, &large, CertificateError::TooLarge(KEY)),
            (&chain, "", CertificateError::NoKey),
            (&chain, &chain, CertificateError::NoKey),
        ] {
            let error = certificate.take_in(&files(chain, key)).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.to_string().contains('!'));
        }
        let missing = Files([Err("it is not there".to_owned()), Ok(Vec::new())]);
        let error = certificate.take_in(&missing).unwrap_err().to_string();
        assert_eq!(error, "tls.crt cannot be read: it is not there");
        assert!(!certificate.is_there());
    }
}
