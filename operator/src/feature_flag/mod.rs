//! The flag set controller.

pub mod events;
pub mod reconcile;
pub mod status;
