//! Tickets: one code for each seat, signed, so that an entrance can tell a genuine one without asking anybody.

mod code;
pub mod command;
mod keys;

pub use code::{Code, CodeError, MAX_CODE_BYTES, Ticket};
pub use keys::{KeyError, KeyId, MAX_FILE_BYTES, PublicKey, PublicKeys, SigningKey, generate};
