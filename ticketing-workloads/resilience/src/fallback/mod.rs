//! Fallbacks (ADR-007 §5): what a caller gets when the dependency does not answer.

mod cache;
mod layer;

pub use cache::Cache;
pub use layer::{Answer, Fallback, FallbackLayer, Fallbacks, ResponseFuture, Source};
