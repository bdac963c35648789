//! Retries (ADR-007 §1): which failures get another attempt, after which wait, within the deadline and the budget.

mod budget;
mod layer;
mod wait;

pub use budget::RetryBudget;
pub use layer::{ResponseFuture, Retry, RetryLayer};
pub use wait::{BUDGET, next, wait};
