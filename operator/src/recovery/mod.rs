//! The `Recovery` resource: the ledger of what is being done and was done, one object for each action.
//!
//! An object is made before anything is done, and brought to its outcome afterwards. Policies decide; this room reads and
//! writes the objects, and forgets what is needed no more.

pub mod events;
pub mod index;
pub mod ledger;
pub mod migration;
pub mod object;
pub mod reconcile;
