//! The ticketing services. Each is a module here and a subcommand of the binary `ticketing`.

pub mod booking;
pub mod database;
pub mod host;
pub mod logging;
