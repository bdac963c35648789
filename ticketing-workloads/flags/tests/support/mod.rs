//! What tests of bounds need; those of the operator as well.

pub mod counting;
pub mod hostile;
