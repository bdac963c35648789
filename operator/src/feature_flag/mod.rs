//! The flag set controller.

pub mod events;
pub mod mismatch;
pub mod reconcile;
pub mod status;
