//! What every test stands on.

pub mod api_proxy;
pub mod audit;
pub mod cluster;
pub mod fake_pod;
pub mod manifests;
pub mod operator;
pub mod process;
pub mod tcp_proxy;
pub mod wait;
pub mod workload;
pub mod world;

pub use fake_pod::{Behavior, FakePod};
pub use manifests::{flag_set, policy, recovery_policy};
pub use wait::{eventually, within};
pub use world::{World, says};
