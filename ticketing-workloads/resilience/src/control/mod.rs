//! The operator's side of a workload: configuration in, health out, recovery actions, and the port for all three.

pub mod actions;
pub mod admin;
pub mod authentication;
pub mod config;
pub mod degradation;
pub mod health;
pub mod memory;
pub mod mount;
pub mod spare_memory;
pub mod token;
