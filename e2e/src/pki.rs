//! Keys and certificates of a cluster that lives for a test.

use crate::kubeconfig::write_private;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::path::{Path, PathBuf};

/// Keys or certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The library refused.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A file could not be written.
    #[error("cannot write keys to {path}: {source}")]
    Write {
        /// The directory.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
}

/// The files of a cluster's keys.
#[derive(Clone, Debug)]
pub struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// Makes all keys in `dir`; the API server's certificate names `names` (host names and addresses).
    pub fn create(dir: &Path, names: &[String]) -> Result<Self, PkiError> {
        let fail = |source| PkiError::Write { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(fail)?;
        let pki = Self { dir: dir.to_owned() };

        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign];
        ca.distinguished_name.push(DnType::CommonName, "ticketwave test cluster");
        std::fs::write(pki.ca(), ca.self_signed(&ca_key)?.pem()).map_err(fail)?;
        write_private(&pki.ca_key(), ca_key.serialize_pem().as_bytes()).map_err(fail)?;
        let issuer = Issuer::new(ca, ca_key);

        let mut server = CertificateParams::new(names.to_vec())?;
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        pki.issue(&issuer, server, &pki.server_cert(), &pki.server_key())?;

        let mut client = CertificateParams::default();
        client.distinguished_name.push(DnType::CommonName, "kube-apiserver-kubelet-client");
        client.distinguished_name.push(DnType::OrganizationName, "system:masters");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        pki.issue(&issuer, client, &pki.kubelet_client_cert(), &pki.kubelet_client_key())?;

        let signer = KeyPair::generate()?;
        std::fs::write(pki.service_account_public(), signer.public_key_pem()).map_err(fail)?;
        write_private(&pki.service_account_key(), signer.serialize_pem().as_bytes()).map_err(fail)?;
        Ok(pki)
    }

    fn issue(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        mut params: CertificateParams,
        cert: &Path,
        key: &Path,
    ) -> Result<(), PkiError> {
        let fail = |source| PkiError::Write { path: self.dir.clone(), source };
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let pair = KeyPair::generate()?;
        std::fs::write(cert, params.signed_by(&pair, issuer)?.pem()).map_err(fail)?;
        write_private(key, pair.serialize_pem().as_bytes()).map_err(fail)
    }

    /// Certificate of the authority.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }
    /// Key of the authority.
    pub fn ca_key(&self) -> PathBuf {
        self.dir.join("ca.key")
    }
    /// What the API server shows.
    pub fn server_cert(&self) -> PathBuf {
        self.dir.join("apiserver.crt")
    }
    /// Its key.
    pub fn server_key(&self) -> PathBuf {
        self.dir.join("apiserver.key")
    }
    /// What the API server shows to kubelets.
    pub fn kubelet_client_cert(&self) -> PathBuf {
        self.dir.join("kubelet-client.crt")
    }
    /// Its key.
    pub fn kubelet_client_key(&self) -> PathBuf {
        self.dir.join("kubelet-client.key")
    }
    /// Signs service-account tokens.
    pub fn service_account_key(&self) -> PathBuf {
        self.dir.join("sa.key")
    }
    /// Verifies service-account tokens.
    pub fn service_account_public(&self) -> PathBuf {
        self.dir.join("sa.pub")
    }
}
