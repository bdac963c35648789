//! The operator's controllers against a real API server.
//!
//! There are no nodes: a pod is an object that the test makes, and at its address the test itself speaks the
//! contract, correctly or wrongly. The operator runs in the test's process, as a user that may do
//! exactly what the chart allows it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    missing_docs,
    reason = "tests say what is wrong by panicking"
)]

mod admission;
mod claims;
mod config_maps;
mod degradation;
mod deletion;
mod evictions;
mod fairness;
mod flag_sync;
mod flagd_in_process;
mod flags;
mod gitops;
mod hostile;
mod invalid;
mod ipv6;
mod leadership;
mod least_privilege;
mod ledger;
mod observation;
mod ofrep;
mod ofrep_changes;
mod ofrep_fairness;
mod ofrep_tls;
mod older_and_newer;
mod operator_checks;
mod pods;
mod programming;
mod recovery;
mod recovery_gates;
mod releases;
mod reports;
mod rest;
mod rollouts;
mod sdk_clients;
mod signals;
mod signatures;
mod stateful_sets;
mod steps;
mod supervision;
mod support;
