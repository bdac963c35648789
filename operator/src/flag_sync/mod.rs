//! Whole flag documents for flagd and for SDKs that evaluate flags themselves: `flagd.sync.v1`, over gRPC, by every replica from
//! its caches.
//!
//! What is asked ([`wire`], [`selector`]) and what is sent ([`message`]) is pure; [`feeds`] makes each document
//! ([`crate::ofrep::flagd_document`]) once for all that follow it, [`stream`] brings it to one client, [`places`] counts clients; [`service`] puts it together, and
//! [`server`] holds the connections. Who may read what, and how sets are merged, is the same as in [`crate::ofrep`].

pub mod args;
pub mod body;
pub mod failure;
pub mod feeds;
pub mod message;
pub mod places;
pub mod selector;
pub mod server;
pub mod service;
pub mod stream;
pub mod wire;

use crate::{
    ofrep::{
        access::{Access, reviews::Reviews},
        service::Watched,
        tls::{self, CertificateFolder},
        upkeep::Upkeep,
    },
    supervision::Supervisor,
    telemetry::server::Status,
};
use args::FlagSyncArgs;
use kube::Client;
use service::Service;
use std::sync::Arc;
use tokio::net::TcpListener;
use tracing::error;

/// Starts to serve from `contexts`.
pub fn start(
    args: &FlagSyncArgs,
    listener: TcpListener,
    client: Client,
    contexts: Vec<Watched>,
    status: &Status,
    supervisor: &mut Supervisor,
) {
    let shutdown = supervisor.shutdown();
    let service = Arc::new(Service::new(
        contexts,
        Arc::clone(&status.ready),
        status.metrics.clone(),
        Access::new(Reviews::new(client)),
        args.flag_sync_streams,
        shutdown.clone(),
    ));
    let certificate = args.flag_sync_certificates.clone().map(|folder| CertificateFolder::new("flag sync", folder));
    let acceptor = match certificate.as_ref().map(|certificate| certificate.acceptor(tls::HTTP_2)).transpose() {
        Ok(acceptor) => acceptor,
        // Nobody is served without TLS where TLS is wanted.
        Err(error) => return error!(%error, "flag sync: TLS cannot be set up; flags are not served"),
    };
    let upkeep = Upkeep::new(args.flag_sync_tokens.clone(), certificate);
    supervisor.start("flag sync server", server::serve(listener, acceptor, Arc::clone(&service), shutdown.clone()));
    supervisor.start("flag sync upkeep", async move {
        let reads = &service.metrics.flag_sync_certificate_reads;
        upkeep.run(&service.access, &service.feeds.scopes, reads, shutdown).await;
    });
}
