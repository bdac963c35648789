//! The circuit breaker (ADR-007 §1): after too many failures calls are refused at once, until trial calls succeed.

mod layer;
mod state;

pub use layer::{CircuitBreaker, CircuitBreakerLayer, ResponseFuture};
pub use state::{Breaker, OnChange, Permit, Totals};
