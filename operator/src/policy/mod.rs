//! The policy controller: one driver, a file per step.

pub mod asked;
pub mod cleanup_jobs;
pub mod degradation;
pub mod events;
pub mod execute;
pub mod gather;
pub mod job_pods;
pub mod observe;
pub mod outages;
pub mod reconcile;
pub mod rollout;
pub mod signals;
pub mod status;
pub mod waiting;

#[cfg(test)]
mod tests;
