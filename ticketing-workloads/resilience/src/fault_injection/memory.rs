//! Memory that a drill has the process hold, as one that leaks does: no cache, so nothing gives it back for the asking. It is
//! freed when its lease is over: no process has to be alive to end it.

use crate::sync::lock;
use contract::admin::MemoryFault;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Held in pieces that the allocator maps one by one, and so gives back to the system when they are freed.
const PIECE_BYTES: usize = 4 << 20;

/// What is held, and under which lease.
#[derive(Default)]
struct Held {
    lease: u64,
    pieces: Vec<Vec<u8>>,
}

/// The memory that the process holds for a drill.
#[derive(Default)]
pub struct FilledMemory(Mutex<Held>);

impl FilledMemory {
    /// Holds as much as `fault` says, in place of what is held already, until its lease is over. An error says what is wrong
    /// with it.
    pub async fn hold(self: &Arc<Self>, fault: MemoryFault) -> Result<(), String> {
        let MemoryFault { mebibytes, lease_seconds } = fault;
        let (most, longest) = (MemoryFault::MAX_MEBIBYTES, MemoryFault::MAX_LEASE_SECONDS);
        if mebibytes > most {
            return Err(format!("mebibytes must be at most {most}"));
        }
        if !(1..=longest).contains(&lease_seconds) {
            return Err(format!("leaseSeconds must be from 1 to {longest}"));
        }
        let wanted = usize::try_from(mebibytes).unwrap_or_default() << 20;
        // It takes the machine a while to find that much.
        let filled = tokio::task::spawn_blocking(move || pieces(wanted)).await.map_err(|error| error.to_string())?;
        let lease = {
            let mut held = lock(&self.0);
            held.pieces = filled;
            held.lease += 1;
            held.lease
        };
        tracing::warn!(mebibytes, lease_seconds, "a drill has this process hold memory");
        let this = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(u64::from(lease_seconds))).await;
            this.end(lease);
        });
        Ok(())
    }

    /// Frees what is held under this lease.
    fn end(&self, lease: u64) {
        let mut held = lock(&self.0);
        if held.lease == lease {
            held.pieces = Vec::new();
        }
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        lock(&self.0).pieces.iter().map(Vec::len).sum()
    }
}

/// Written to, so that the system has to find memory for them.
fn pieces(bytes: usize) -> Vec<Vec<u8>> {
    let whole = std::iter::repeat_n(PIECE_BYTES, bytes / PIECE_BYTES);
    whole.chain(std::iter::once(bytes % PIECE_BYTES)).map(|length| vec![1; length]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn fault(mebibytes: u32, lease_seconds: u32) -> MemoryFault {
        MemoryFault { mebibytes, lease_seconds }
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_held_until_its_lease_is_over_and_a_newer_one_takes_its_place() {
        let memory = Arc::new(FilledMemory::default());
        memory.hold(fault(9, 10)).await.unwrap();
        assert_eq!(memory.bytes(), 9 << 20);
        tokio::time::sleep(Duration::from_secs(9)).await;
        memory.hold(fault(5, 10)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(memory.bytes(), 5 << 20, "the lease of the one before does not end it");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(memory.bytes(), 0);
        memory.hold(fault(5, 10)).await.unwrap();
        memory.hold(fault(0, 10)).await.unwrap();
        assert_eq!(memory.bytes(), 0, "that is how it is taken back");
    }

    #[tokio::test]
    async fn it_is_bounded() {
        let memory = Arc::new(FilledMemory::default());
        for wrong in [fault(1025, 10), fault(1, 0), fault(1, 601)] {
            memory.hold(wrong).await.unwrap_err();
        }
        assert_eq!(memory.bytes(), 0);
    }
}
