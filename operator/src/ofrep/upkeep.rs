//! What a server of flags looks after beside its calls.

use super::{
    access::{Access, token_file::TokenFile},
    scopes::Scopes,
    tls::CertificateFolder,
};
use crate::telemetry::metrics::CertificateLabels;
use prometheus_client::metrics::{counter::Counter, family::Family};
use std::{path::PathBuf, time::Duration};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// How often the files with tokens and certificates are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The files of a server.
pub struct Upkeep {
    tokens: Option<TokenFile>,
    certificate: Option<CertificateFolder>,
}

impl Upkeep {
    /// Of the file with the static tokens, and of the certificate of TLS.
    pub fn new(tokens: Option<PathBuf>, certificate: Option<CertificateFolder>) -> Self {
        Self { tokens: tokens.map(TokenFile::new), certificate }
    }

    /// Keeps static tokens and certificate as their files have them, counts how often a certificate was read, and gives up flags that
    /// nobody asks for; until `shutdown`.
    pub async fn run(
        mut self,
        access: &Access,
        scopes: &Scopes,
        reads: &Family<CertificateLabels, Counter>,
        shutdown: CancellationToken,
    ) {
        loop {
            if let Some(tokens) = &mut self.tokens {
                tokens.look(access).await;
            }
            if let Some(certificate) = &mut self.certificate
                && let Some(usable) = certificate.look().await
            {
                reads.get_or_create(&CertificateLabels::new(usable)).inc();
            }
            if shutdown.run_until_cancelled(sleep(LOOK_EVERY)).await.is_none() {
                return;
            }
            scopes.sweep(Instant::now());
        }
    }
}
