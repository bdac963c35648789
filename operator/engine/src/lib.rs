//! Every decision of the operator, as pure functions.
//!
//! Nothing here knows Kubernetes, reads a clock, draws a random number or does I/O: callers pass what they observed and
//! `now`, and get back what to do. So every rule is table-tested, and the same input always gives the same answer.

pub mod ack;
pub mod admin_auth;
pub mod check;
pub mod claim;
pub mod compile;
pub mod degradation;
pub mod flag_scope;
pub mod fleet;
pub mod json_size;
pub mod policy_review;
pub mod publish;
pub mod recovery;
pub mod report_validation;
pub mod shared_rules;
pub mod signals;
