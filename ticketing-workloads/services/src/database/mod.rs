//! PostgreSQL: a pool that can be given up as a whole, classified errors, the health of pooled connections.

mod check;
mod error;
mod loan;
pub mod migrations;
mod pool;
mod settings;

pub use check::{actions, check};
pub use error::DatabaseError;
pub use loan::Connection;
pub use pool::{Database, PoolHealth};
pub use settings::{DatabaseSettings, bulkhead, defaults};
