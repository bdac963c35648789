//! The API server: connections, watches, Events, leader election.

pub mod clients;
pub mod controller;
pub mod events;
pub mod filling;
pub mod guard;
pub mod leader_election;
pub mod meta;
pub mod observation;
pub mod queue;
pub mod releases;
pub mod watches;
