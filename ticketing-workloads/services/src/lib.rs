//! The ticketing services. Each is a module here and a subcommand of the binary `ticketing`.

#![allow(
    missing_docs,
    reason = "only our own binary and tests use this library; names speak where a comment would repeat them"
)]

pub mod answers;
pub mod booking;
pub mod buyer;
pub mod cancel_reason;
pub mod catalog;
pub mod checks;
pub mod database;
pub mod events_query;
pub mod gateway;
pub mod health;
pub mod host;
pub mod http_client;
pub mod logging;
pub mod mail_address;
pub mod mail_sink;
pub mod notification;
mod password_file;
pub mod payment;
pub mod priority;
pub mod provider_simulator;
pub mod retention;
pub mod schema;
mod side_by_side;
pub mod tickets;
pub mod waiting_room;

#[cfg(test)]
mod adr_numbers;
#[cfg(test)]
mod test_certificate;
