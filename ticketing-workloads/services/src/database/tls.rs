//! TLS to the database, with `sslmode` and `sslrootcert` as libpq means them.

use crate::host::StartError;
use std::io::Error as IoError;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Socket;
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{WebPkiServerVerifier, verify_server_name};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};
use tokio_rustls::{TlsConnector, client};

/// Largest file with root certificates, in bytes.
const MAX_ROOTS_BYTES: u64 = 1024 * 1024;
/// `sslrootcert` for the certificates that the system trusts.
const SYSTEM: &str = "system";

/// How connections to the server are to be encrypted: libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// Never.
    Disable,
    /// Only if the server lets nobody in without.
    Allow,
    /// If the server can, and lets us in with it.
    Prefer,
    /// Always. With root certificates, those of the server are compared with them.
    Require,
    /// Always, and to a server whose certificate a root certificate vouches for.
    VerifyCa,
    /// The same, and the certificate is for the host that was asked for.
    VerifyFull,
}

impl FromStr for Encryption {
    type Err = StartError;

    fn from_str(text: &str) -> Result<Self, StartError> {
        Ok(match text {
            "disable" => Self::Disable,
            "allow" => Self::Allow,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => {
                let message =
                    format!("sslmode={text} is none of disable, allow, prefer, require, verify-ca and verify-full");
                return Err(StartError::Setting(message));
            }
        })
    }
}

/// Who vouches for servers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Roots {
    System,
    /// PEM, read for each connection: a certificate that is rotated needs no restart.
    File(PathBuf),
}

/// The settings of a connection that concern TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tls {
    pub(super) mode: Encryption,
    roots: Option<Roots>,
}

impl Tls {
    /// From `sslmode` and `sslrootcert`, each absent or empty for libpq's default.
    pub(super) fn new(mode: Option<&str>, roots: Option<&str>) -> Result<Self, StartError> {
        let [mode, roots] = [mode, roots].map(|text| text.filter(|text| !text.is_empty()));
        let refused = |why: &str| Err(StartError::Setting(why.to_owned()));
        let roots = roots.map(|text| if text == SYSTEM { Roots::System } else { Roots::File(text.into()) });
        let is_system = roots == Some(Roots::System);
        let mode = match mode {
            Some(mode) => mode.parse()?,
            None if is_system => Encryption::VerifyFull,
            None => Encryption::Prefer,
        };
        match mode {
            Encryption::VerifyCa | Encryption::VerifyFull if roots.is_none() => refused(
                "sslmode=verify-ca and verify-full need root certificates: sslrootcert names their file (PEM), or \
                 sslrootcert=system takes those of the system",
            ),
            _ if is_system && mode != Encryption::VerifyFull => {
                refused("sslrootcert=system needs sslmode=verify-full: anybody can get a certificate from them")
            }
            _ => Ok(Self { mode, roots }),
        }
    }

    /// What is tried first, and what then if the server does not want it that way.
    pub(super) fn attempts(&self) -> (SslMode, Option<SslMode>) {
        match self.mode {
            Encryption::Disable => (SslMode::Disable, None),
            Encryption::Allow => (SslMode::Disable, Some(SslMode::Require)),
            Encryption::Prefer => (SslMode::Prefer, Some(SslMode::Disable)),
            Encryption::Require | Encryption::VerifyCa | Encryption::VerifyFull => (SslMode::Require, None),
        }
    }

    /// Makes connections encrypted, with the root certificates as they are now. What is wrong with them is said by the
    /// attempt to connect.
    pub(super) async fn connector(&self) -> MakeTls {
        if self.mode == Encryption::Disable {
            return MakeTls(Err("the connection is not to be encrypted".to_owned()));
        }
        MakeTls(self.client().await.map(|config| TlsConnector::from(Arc::new(config))))
    }

    async fn client(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(ring::default_provider());
        let certificates = match &self.roots {
            None => None,
            Some(Roots::System) => Some(system()?),
            Some(Roots::File(path)) => Some(
                read(path)
                    .await
                    .map_err(|why| format!("the root certificates {} cannot be used: {why}", path.display()))?,
            ),
        };
        let chain = certificates.as_ref().map(|certificates| chain_verifier(certificates, &provider)).transpose()?;
        let verifier = Verifier {
            chain,
            certificates: certificates.unwrap_or_default(),
            compares_names: self.mode == Encryption::VerifyFull,
            provider: Arc::clone(&provider),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        // What sslnegotiation=direct asks for.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(config)
    }
}

async fn read(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, String> {
    let length = tokio::fs::metadata(path).await.map_err(|error| error.to_string())?.len();
    if length > MAX_ROOTS_BYTES {
        return Err(format!("the file has more than {MAX_ROOTS_BYTES} bytes"));
    }
    let text = tokio::fs::read(path).await.map_err(|error| error.to_string())?;
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    if certificates.is_empty() { Err("there is no certificate in it (PEM)".to_owned()) } else { Ok(certificates) }
}

fn system() -> Result<Vec<CertificateDer<'static>>, String> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return Err("the system has no root certificates; sslrootcert names a file with some".to_owned());
    }
    Ok(found.certs)
}

fn chain_verifier(
    certificates: &[CertificateDer<'static>],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates.iter().cloned());
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| format!("the root certificates cannot be used: {error}"))
}

/// Checks a server's certificate as far as the mode asks for it.
#[derive(Debug)]
struct Verifier {
    /// Absent: any certificate will do.
    chain: Option<Arc<WebPkiServerVerifier>>,
    certificates: Vec<CertificateDer<'static>>,
    compares_names: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn is_trusted_itself(&self, certificate: &CertificateDer<'_>) -> bool {
        self.certificates.iter().any(|trusted| trusted.as_ref() == certificate.as_ref())
    }
}

/// Whether nothing else is known to be wrong with a server's certificate than that it is an authority's. The library looks
/// at the time of a certificate before, and has no name of its own for this.
fn is_authority(error: &TlsError) -> bool {
    match error {
        TlsError::InvalidCertificate(CertificateError::Other(other)) => other.to_string() == "CaUsedAsEndEntity",
        _ => false,
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        // The name is looked at last: a certificate that fails there has passed everything else.
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // A server that has signed itself, as PostgreSQL's manual shows it, has the certificate of an authority. It
            // needs no other one to vouch for it if that very certificate is trusted; its time was looked at before.
            Err(error) if is_authority(&error) && self.is_trusted_itself(end_entity) => {
                if self.compares_names {
                    verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                }
                Ok(ServerCertVerified::assertion())
            }
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.compares_names => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("{0}")]
    Settings(String),
    #[error("{0} is neither the name of a host nor an address")]
    Host(String),
    #[error(transparent)]
    Io(#[from] IoError),
}

/// Makes the TLS of one connection.
#[derive(Clone)]
pub(super) struct MakeTls(Result<TlsConnector, String>);

impl MakeTlsConnect<Socket> for MakeTls {
    type Stream = TlsStream;
    type TlsConnect = Handshake;
    type Error = HandshakeError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Handshake, HandshakeError> {
        Ok(Handshake { connector: self.0.clone(), host: host.to_owned() })
    }
}

/// The handshake of one connection.
pub(super) struct Handshake {
    connector: Result<TlsConnector, String>,
    host: String,
}

impl TlsConnect<Socket> for Handshake {
    type Stream = TlsStream;
    type Error = HandshakeError;
    type Future = Pin<Box<dyn Future<Output = Result<TlsStream, HandshakeError>> + Send>>;

    fn connect(self, stream: Socket) -> Self::Future {
        Box::pin(async move {
            let connector = self.connector.map_err(HandshakeError::Settings)?;
            let name = ServerName::try_from(self.host.clone()).map_err(|_| HandshakeError::Host(self.host))?;
            Ok(TlsStream(connector.connect(name, stream).await?))
        })
    }
}

/// An encrypted connection.
pub struct TlsStream(client::TlsStream<Socket>);

impl tokio_postgres::tls::TlsStream for TlsStream {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), IoError>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, IoError>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), IoError>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), IoError>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::as_libpq(None, None, Encryption::Prefer)]
    #[case::empty(Some(""), Some(""), Encryption::Prefer)]
    #[case::system_means_full(None, Some("system"), Encryption::VerifyFull)]
    #[case::full(Some("verify-full"), Some("/ca.crt"), Encryption::VerifyFull)]
    #[case::ca(Some("verify-ca"), Some("/ca.crt"), Encryption::VerifyCa)]
    #[case::require(Some("require"), None, Encryption::Require)]
    #[case::allow(Some("allow"), None, Encryption::Allow)]
    fn takes_the_modes_of_libpq(#[case] mode: Option<&str>, #[case] roots: Option<&str>, #[case] expected: Encryption) {
        assert_eq!(Tls::new(mode, roots).unwrap().mode, expected);
    }

    #[rstest::rstest]
    #[case::unknown(Some("on"), None, "none of disable, allow")]
    #[case::without_roots(Some("verify-full"), None, "sslrootcert names their file")]
    #[case::too_weak(Some("require"), Some("system"), "needs sslmode=verify-full")]
    fn says_what_does_not_fit(#[case] mode: Option<&str>, #[case] roots: Option<&str>, #[case] expected: &str) {
        let error = Tls::new(mode, roots).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
