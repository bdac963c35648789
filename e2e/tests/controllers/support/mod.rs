//! What every test stands on.

pub mod audit;
pub mod cluster;
pub mod manifests;
pub mod operator;
pub mod stand_in;
pub mod wait;
pub mod workload;
pub mod world;

pub use manifests::{flag_set, healing_policy, policy};
pub use stand_in::{Manners, StandIn};
pub use wait::{eventually, within};
pub use world::{World, says};
