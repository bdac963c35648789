//! `ticketing <service>`: runs one of the ticketing services until SIGTERM.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use ticketing_services::{booking, host, logging};

/// TicketWave's services; one process runs one of them.
#[derive(Parser)]
#[command(name = "ticketing", version, about)]
struct Cli {
    /// How log lines are written.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t, global = true)]
    log_format: logging::Format,
    #[command(subcommand)]
    service: Service,
}

#[derive(Subcommand)]
enum Service {
    /// Takes bookings.
    Booking(booking::Settings),
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init(cli.log_format);
    let result = match cli.service {
        Service::Booking(settings) => match booking::Service::start(settings).await {
            Ok(service) => service.run(host::until_terminated()).await,
            Err(error) => Err(error),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot run");
            ExitCode::FAILURE
        }
    }
}
