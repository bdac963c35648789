//! The operator's process: command line, signals, exit code.

use clap::Parser;
use operator::{args::Args, run, telemetry::logging};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

#[tokio::main]
async fn main() -> ExitCode {
    // Wrong usage ends here, with 2.
    let args = Args::parse();
    if let Err(error) = logging::init(&args.log_level, args.log_format) {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    raise_open_files();
    let shutdown = CancellationToken::new();
    if let Err(error) = cancel_on_signal(&shutdown) {
        error!(%error, "failed to install signal handlers");
        return ExitCode::FAILURE;
    }
    let config = match kube::Config::infer().await {
        Ok(config) => config,
        Err(error) => {
            error!(%error, "there is neither a service account nor a kubeconfig: run in a cluster, or set KUBECONFIG");
            return ExitCode::FAILURE;
        }
    };
    match run(args, config, shutdown).await {
        Ok(()) => {
            info!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!(%error, "stopped");
            ExitCode::FAILURE
        }
    }
}

/// Lets this process have as many connections as the system allows: one for each pod, and some more.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, limit = ?limit.current, "the limit of open files could not be raised; with very many pods, connections may fail");
    }
}

/// The first signal asks everything to end; the second ends the process at once.
fn cancel_on_signal(shutdown: &CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        for count in 1.. {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if count > 1 {
                std::process::exit(130);
            }
            info!("stopping; a second signal stops at once");
            shutdown.cancel();
        }
    });
    Ok(())
}
