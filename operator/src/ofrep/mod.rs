//! Flags for every OpenFeature SDK: the OpenFeature Remote Evaluation Protocol, answered by every replica from its caches.
//!
//! What is asked ([`route`], [`request`]) and what is answered ([`answer`], [`etag`]) is pure; [`document`] compiles the flags of
//! a namespace or a workload as the engine merges them, and [`scopes`] keeps them until a set changes; [`access`] says who may
//! read; [`service`] puts it together, and [`server`] holds the connections.

pub mod access;
pub mod answer;
pub mod args;
pub mod cors;
pub mod document;
pub mod etag;
pub mod rate;
pub mod request;
pub mod route;
pub mod scopes;
pub mod server;
pub mod service;

use crate::{supervision::Supervisor, telemetry::server::Status};
use access::{Access, reviews::Reviews};
use args::OfrepArgs;
use cors::Cors;
use kube::Client;
use service::{Service, Watched};
use std::sync::Arc;
use tokio::net::TcpListener;

/// Starts to serve from `contexts`.
pub fn start(
    args: &OfrepArgs,
    listener: TcpListener,
    client: Client,
    contexts: Vec<Watched>,
    status: &Status,
    supervisor: &mut Supervisor,
) {
    let service = Arc::new(Service::new(
        contexts,
        Arc::clone(&status.ready),
        status.metrics.clone(),
        Access::new(Reviews::new(client)),
        Cors::new(&args.ofrep_cors_origins),
        args.ofrep_rate,
    ));
    let shutdown = supervisor.shutdown();
    supervisor.start("OFREP server", server::serve(listener, Arc::clone(&service), shutdown.clone()));
    supervisor.start("OFREP upkeep", server::look_after(service, args.ofrep_tokens.clone(), shutdown));
}
