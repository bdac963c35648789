//! A real Kubernetes for tests and demos, and what runs on it.
//!
//! Three things are here: [`provider`] brings clusters up and down, [`image`] writes the container
//! images that run on them, and [`apiserver`] starts a bare API server for tests that need no nodes.
//! Programs come from [`binaries`] (Kubernetes, Helm, CoreDNS) and [`packages`] (Debian).

pub mod apiserver;
pub mod bench;
pub mod binaries;
pub mod checkout;
pub mod command;
pub mod demo;
pub mod filelock;
pub mod goodput;
pub mod image;
pub mod kubectl;
pub mod load_generator;
pub mod local_stack;
pub mod memory_growth;
pub mod packages;
pub mod pod_admin;
pub mod process;
pub mod progress;
pub mod provider;
pub mod quick_policy;
pub mod recovery_bench;
pub mod release;
pub mod sabotage;
pub mod sale;
pub mod scale;
pub mod sdk_clients;
pub mod soak;
pub mod testbed;
pub mod traffic;

mod audit;
mod kubeconfig;
mod pki;
mod token;
