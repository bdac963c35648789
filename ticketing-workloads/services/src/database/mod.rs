//! PostgreSQL: a pool that can be given up as a whole, classified errors, the health of pooled connections, TLS, migrations.

mod check;
mod connector;
mod error;
mod loan;
pub mod migrations;
mod pool;
mod sample;
mod settings;
mod statement;
mod tls;

pub use check::{actions, check};
pub use connector::Connector;
pub use error::DatabaseError;
pub use loan::Connection;
pub use pool::{Database, PoolHealth};
pub use sample::Sample;
pub use settings::{DatabaseSettings, Sessions, bulkhead, defaults};
pub use statement::{AsStatement, Prepared, execute, query};
