//! How the certificate of an endpoint is verified.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

/// Longest text with certificates that is read, in bytes.
pub const MAX_CA: usize = 64 * 1024;
/// Most certificates that are read of one text.
const MAX_CERTIFICATES: usize = 16;
/// Most of them that have one subject. A new one beside an old one is usual; with many each would be tried in every handshake,
/// and such a try is costly.
const MAX_OF_ONE_SUBJECT: usize = 2;

/// Why nothing can be verified.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaError {
    /// The text is too long.
    #[error("it has {0} bytes, more than the {MAX_CA} that are read")]
    TooLong(usize),
    /// There are too many.
    #[error("it has more than {MAX_CERTIFICATES} certificates")]
    TooMany,
    /// Too many of them have one name.
    #[error("more than {MAX_OF_ONE_SUBJECT} of its certificates have the same subject")]
    OneSubject,
    /// It has none that can be used.
    #[error("it has no certificate that can be read, as PEM")]
    NoCertificate,
    /// TLS itself cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

/// Takes only certificates that one of these, as PEM, has signed.
pub fn verified(pem: &str) -> Result<Arc<ClientConfig>, CaError> {
    if pem.len() > MAX_CA {
        return Err(CaError::TooLong(pem.len()));
    }
    // The text of an error could quote what was read, so it is left out.
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).take(MAX_CERTIFICATES + 1).collect();
    let certificates = read.map_err(|_| CaError::NoCertificate)?;
    if certificates.len() > MAX_CERTIFICATES {
        return Err(CaError::TooMany);
    }
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(certificates);
    if usable == 0 {
        return Err(CaError::NoCertificate);
    }
    let mut of_subject = HashMap::<&[u8], usize>::new();
    for root in &roots.roots {
        let count = of_subject.entry(root.subject.as_ref()).or_default();
        *count += 1;
        if *count > MAX_OF_ONE_SUBJECT {
            return Err(CaError::OneSubject);
        }
    }
    Ok(finished(builder()?.with_root_certificates(roots).with_no_client_auth()))
}

/// Takes any certificate.
pub fn unverified() -> Result<Arc<ClientConfig>, CaError> {
    static MADE: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(made) = MADE.get() {
        return Ok(Arc::clone(made));
    }
    let verifier = Arc::new(AnyCertificate(provider()));
    let config = finished(builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth());
    Ok(Arc::clone(MADE.get_or_init(|| config)))
}

fn provider() -> Arc<CryptoProvider> {
    static MADE: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(MADE.get_or_init(|| Arc::new(ring::default_provider())))
}

type Builder = tokio_rustls::rustls::ConfigBuilder<ClientConfig, tokio_rustls::rustls::WantsVerifier>;

fn builder() -> Result<Builder, CaError> {
    let builder = ClientConfig::builder_with_provider(provider());
    builder.with_safe_default_protocol_versions().map_err(|error| CaError::Setup(error.to_string()))
}

fn finished(mut config: ClientConfig) -> Arc<ClientConfig> {
    // A check is to see a whole handshake, and nothing is to be kept of those that were.
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// Takes any certificate, from any peer that has its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    fn certificate_of(subject: &str) -> String {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["web.n.svc".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, subject);
        params.self_signed(&key).unwrap().pem()
    }

    fn certificate() -> String {
        certificate_of("web")
    }

    #[test]
    fn no_handshake_has_many_certificates_to_try() {
        let many = |number: usize| (0..number).map(|number| certificate_of(&number.to_string())).collect::<String>();
        assert!(verified(&many(MAX_CERTIFICATES)).is_ok());
        assert_eq!(verified(&many(MAX_CERTIFICATES + 1)).err(), Some(CaError::TooMany));
        let [one, other, third] = [certificate(), certificate(), certificate()];
        assert!(verified(&[one.as_str(), &other].concat()).is_ok());
        assert_eq!(verified(&[one, other, third].concat()).err(), Some(CaError::OneSubject));
    }

    #[test]
    fn certificates_are_read_and_bounded() {
        let one = certificate();
        assert!(verified(&one).is_ok() && verified(&format!("{one}\nwords\n{one}")).is_ok());
        assert!(unverified().is_ok());
        let why = |pem: &str| verified(pem).err();
        assert_eq!(why(""), Some(CaError::NoCertificate));
        assert_eq!(why("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), Some(CaError::NoCertificate));
        assert_eq!(why("-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n"), Some(CaError::NoCertificate));
        assert_eq!(why(&"x".repeat(MAX_CA + 1)), Some(CaError::TooLong(MAX_CA + 1)));
    }
}
