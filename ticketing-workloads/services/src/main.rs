//! `ticketing <service>`: runs one of the ticketing services until SIGTERM, or one of their jobs to its end, or asks one how it
//! is.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use ticketing_services::{
    booking, catalog, database::DatabaseSettings, gateway, health, host, logging, mail_sink, notification, payment,
    provider_simulator, tickets,
};

/// Exit code of a comparison that was not made, of charges with the ledger or of tickets with keys.
const NOT_COMPARED: u8 = 2;

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
    /// The public interface: passes on to catalog and booking.
    Gateway(gateway::Settings),
    /// Shows events and their free seats.
    Catalog(catalog::Settings),
    /// Takes bookings.
    Booking(booking::Settings),
    /// Charges, with the second provider only if the first has not.
    Payment(payment::Settings),
    /// Mails confirmations and tickets.
    Notification(notification::Settings),
    /// A mail server that keeps what it gets, to try things out with.
    MailSink(mail_sink::Settings),
    /// Payment providers to try things out with, and an admin port to make them fail.
    ProviderSimulator(provider_simulator::Settings),
    /// Ends reservations that ran out, makes the seats of every event add up again, and exits.
    BookingCleanup(DatabaseSettings),
    /// Puts mails that were given up (`dead_letters`) back into the outbox, says which, and exits.
    RequeueMail(notification::requeue::Settings),
    /// Compares the providers' charges with the ledger, prints a line for each difference; exit code 1 if there is any.
    Reconcile(payment::reconcile::Settings),
    /// Says of each ticket's code whether it is genuine, without a network; exit code 1 if one is not, 2 if there are no keys to
    /// tell by. It cannot know whether the booking was cancelled, nor whether the code was shown before.
    Verify(tickets::command::Verify),
    /// Makes the key that tickets are signed with, or prints its public half.
    #[command(subcommand)]
    TicketKey(tickets::command::TicketKey),
    /// Makes a token that a gateway with the same TOKEN_HMAC_FILE takes, for the local stack, and prints it.
    Token(gateway::buyers::local_token::Settings),
    /// Prints how the service in this container is, by its own checks; exit code 1 if it is unhealthy or does not answer.
    Health(health::Settings),
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init(cli.log_format);
    let result = match cli.service {
        Service::Gateway(settings) => run(gateway::start(settings)).await,
        Service::Catalog(settings) => run(catalog::start(settings)).await,
        Service::Booking(settings) => run(booking::start(settings)).await,
        Service::Payment(settings) => run(payment::start(settings)).await,
        Service::Notification(settings) => run(notification::start(settings)).await,
        Service::MailSink(settings) => match mail_sink::MailSink::start(&settings) {
            Ok(sink) => {
                sink.run(host::until_terminated()).await;
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        },
        Service::ProviderSimulator(settings) => match provider_simulator::Simulator::start(&settings) {
            Ok(simulator) => {
                simulator.run(host::until_terminated()).await;
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        },
        Service::Health(settings) => match health::run(&settings).await {
            Ok(()) => Ok(()),
            Err(error) => {
                // For a person or a probe, and not for a log.
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        },
        // These are for a person or a scanner, too.
        Service::Verify(settings) => match tickets::command::verify(&settings) {
            Ok(verified) => {
                for one in &verified {
                    println!("{one}");
                }
                let all_valid = verified.iter().all(tickets::command::Verified::is_valid);
                return if all_valid { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(NOT_COMPARED);
            }
        },
        Service::TicketKey(settings) => match tickets::command::ticket_key(&settings) {
            Ok(public) => {
                print!("{public}");
                Ok(())
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        },
        Service::RequeueMail(settings) => {
            // For the person who asked.
            let requeued = notification::requeue::run(&settings, &mut |text| print!("{text}")).await;
            requeued.map(drop).map_err(|error| error.to_string())
        }
        Service::Token(settings) => gateway::buyers::local_token::make(&settings)
            .map(|token| println!("{token}"))
            .map_err(|error| error.to_string()),
        Service::Reconcile(settings) => match payment::reconcile::run(&settings).await {
            Err(error) if !error.has_compared() => {
                tracing::error!(%error, "failed to compare; run it again");
                return ExitCode::from(NOT_COMPARED);
            }
            result => result.map_err(|error| error.to_string()),
        },
        Service::BookingCleanup(database) => {
            booking::cleanup::run(&database).await.map(drop).map_err(|error| error.to_string())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "failed to run");
            ExitCode::FAILURE
        }
    }
}

async fn run(service: Result<host::Service, host::StartError>) -> Result<(), String> {
    // Caught from here on, also while the service starts to serve.
    let terminated = host::until_terminated();
    service.map_err(|error| error.to_string())?.run(terminated).await;
    Ok(())
}
