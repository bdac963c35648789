//! The pods: what is known of them, and the calls to their admin ports.

pub mod built_ins;
pub mod client;
pub mod fair_queue;
pub mod http;
pub mod prober;
pub mod pusher;
pub mod state;
pub mod tallies;
pub mod tokens;
