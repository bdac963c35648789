//! PostgreSQL: a pool that can be given up as a whole, classified errors, the health of pooled connections.

mod check;
mod error;
pub mod migrations;
mod pool;
mod settings;
mod tracking;

pub use check::{actions, check};
pub use error::DatabaseError;
pub use pool::{Database, PoolHealth};
pub use settings::{DatabaseSettings, bulkhead, defaults};
pub use tracking::Connection;
