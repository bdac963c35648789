//! The checks that the operator asks itself, `http` and `tcp`: which pods are asked, how, and what they say together.
//!
//! Only the leader asks, and only ready pods of the policy's own namespace that the selector of a Service finds there: what
//! an EndpointSlice says, anybody who may write one can make up.

pub mod ask;
pub mod cut_off;
pub mod lookup;
pub mod prober;
pub mod results;
pub mod service;
pub mod suspects;
pub mod tls;
pub mod turns;

pub use prober::Checks;

use std::time::Duration;

/// How long a place for an ask is held at least. Places are few, so no namespace has more than 320 asks in a second, and all of
/// them together no more than 2,560, however fast the answers come.
const PLACE_HELD: Duration = Duration::from_millis(100);
