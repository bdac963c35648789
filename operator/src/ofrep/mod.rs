//! Flags for every OpenFeature SDK: the OpenFeature Remote Evaluation Protocol, answered by every replica from its caches.
//!
//! What is asked ([`route`], [`request`]) and what is answered ([`answer`], [`etag`]) is pure; [`document`] compiles the flags of
//! a namespace or a workload as the engine merges them, [`flagd`] writes them as flagd reads them, and [`scopes`] keeps them until a
//! set changes; [`access`] says who may read, [`turns`] and [`rate`] how much; [`stream`] tells a client of changes, [`hub`] and
//! [`teller`] tell its streams, and [`tickets`] open them for browsers; [`service`] puts it together, and [`server`] holds the
//! connections, with [`tls`], and [`upkeep`] looks after their files.

pub mod access;
pub mod answer;
pub mod args;
pub mod compiled;
pub mod cors;
pub mod document;
pub mod etag;
pub mod files;
pub mod flagd;
pub mod flagd_document;
pub mod hub;
pub mod patient;
pub mod rate;
pub mod request;
pub mod route;
pub mod scopes;
pub mod server;
pub mod service;
pub mod spans;
pub mod stream;
pub mod teller;
pub mod thread_time;
pub mod tickets;
pub mod tls;
pub mod turns;
pub mod upkeep;

use crate::{pods::tokens::Tokens, supervision::Supervisor, telemetry::server::Status};
use access::{Access, reviews::Reviews};
use args::OfrepArgs;
use cors::Cors;
use kube::Client;
use server::Listening;
use service::{Parts, Service, Watched};
use std::sync::Arc;
use tickets::Tickets;
use tls::CertificateFolder;
use tokio::net::TcpListener;
use tracing::error;
use upkeep::Upkeep;

/// What clients and their tickets are known by.
const TICKET_KEY: &str = "ofrep-tickets";

/// Starts to serve from `contexts`.
pub fn start(
    args: &OfrepArgs,
    listener: TcpListener,
    client: Client,
    keys: &Tokens,
    contexts: Vec<Watched>,
    status: &Status,
    supervisor: &mut Supervisor,
) {
    let shutdown = supervisor.shutdown();
    let streams = usize::from(args.ofrep_streams);
    let service = Arc::new(Service::new(Parts {
        contexts,
        ready: Arc::clone(&status.ready),
        metrics: status.metrics.clone(),
        access: Access::new(Reviews::new(client)),
        tickets: Tickets::new(keys.derived_key(TICKET_KEY)),
        cors: Cors::new(&args.ofrep_cors_origins),
        calls_per_second: args.ofrep_rate,
        streams,
        shutdown: shutdown.clone(),
    }));
    let certificate = args.ofrep_certificates.clone().map(|folder| CertificateFolder::new("OFREP", folder));
    let acceptor = match certificate.as_ref().map(|certificate| certificate.acceptor(tls::HTTP_1)).transpose() {
        Ok(acceptor) => acceptor,
        // Nobody is served without TLS where TLS is wanted.
        Err(error) => return error!(%error, "OFREP: TLS cannot be set up; flags are not served"),
    };
    let listening = Listening { listener, acceptor, streams };
    let upkeep = Upkeep::new(args.ofrep_tokens.clone(), certificate);
    supervisor.start("OFREP server", server::serve(listening, Arc::clone(&service), shutdown.clone()));
    supervisor.start("OFREP upkeep", async move {
        let reads = &service.metrics().ofrep_certificate_reads;
        upkeep.run(service.access(), &service.scopes, reads, shutdown).await;
    });
}
