//! The services over their real ports, against a real PostgreSQL that the tests start themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod abandoned;
mod ages;
mod booking;
mod buyers;
mod catalog;
mod durability;
mod failover;
mod gateway;
mod hot_event;
mod hot_statements;
mod mail_login;
mod notification;
mod paid_booking;
mod password;
mod payment;
mod pgbouncer;
mod pool;
mod priority;
mod recovery;
mod retention;
mod sale_night;
mod schema;
mod support;
mod tls;
mod turns;
mod waiting_room;
