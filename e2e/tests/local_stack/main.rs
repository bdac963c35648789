//! A sale through all services as real processes, while one thing after the other fails. What a buyer sees, what the
//! metrics say, and how long it takes until all is well again, is printed as a table for each group of failures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod buyers;
mod database;
mod fixture;
mod flags;
mod hostile;
mod http;
mod load;
mod mail;
mod money;
mod pods;
mod providers;
mod schema;
mod services;
mod tickets;
mod waiting_room;
