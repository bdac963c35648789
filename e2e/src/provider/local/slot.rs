//! Slots: which `10.x` network is whose, on this machine.

use super::plan::{SLOTS, overlaps};
use super::{LocalError, state_root};
use crate::command::Run;
use crate::filelock::FileLock;
use std::path::PathBuf;

fn dir() -> PathBuf {
    state_root().join("slots")
}

async fn lock() -> Result<FileLock, LocalError> {
    Ok(FileLock::acquire(&dir().join(".lock"), || ()).await?)
}

/// Takes the first slot that no cluster and no route of this machine uses.
pub async fn take(cluster: &str) -> Result<u8, LocalError> {
    let _lock = lock().await?;
    let routes = Run::new("ip").words("-4 route show table all").output().await?;
    let addresses = Run::new("ip").words("-4 -o addr show").output().await?;
    let words: Vec<&str> = routes.split_whitespace().chain(addresses.split_whitespace()).collect();
    let slot = choose(|slot| {
        let owner = std::fs::read_to_string(dir().join(slot.to_string())).ok();
        let in_use = owner.is_some_and(|name| name.trim() != cluster && state_root().join(name.trim()).exists());
        in_use || words.iter().any(|word| overlaps(slot, word))
    });
    let slot = slot.ok_or(LocalError::NoSlot)?;
    let file = dir().join(slot.to_string());
    std::fs::write(&file, cluster).map_err(LocalError::file(&file))?;
    Ok(slot)
}

/// The slot that a cluster holds.
pub fn of(cluster: &str) -> Option<u8> {
    let holds =
        |slot: &u8| std::fs::read_to_string(dir().join(slot.to_string())).is_ok_and(|name| name.trim() == cluster);
    SLOTS.into_iter().find(holds)
}

/// Gives a slot back; calls `last` while nobody can take one, if no other cluster has one.
pub async fn give_back(slot: u8, last: impl FnOnce()) -> Result<(), LocalError> {
    let _lock = lock().await?;
    let _ = std::fs::remove_file(dir().join(slot.to_string()));
    if SLOTS.into_iter().all(|s| !dir().join(s.to_string()).exists()) {
        last();
    }
    Ok(())
}

fn choose(taken: impl Fn(u8) -> bool) -> Option<u8> {
    SLOTS.into_iter().find(|slot| !taken(*slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_slot_is_taken() {
        assert_eq!(choose(|_| false), Some(*SLOTS.start()));
        assert_eq!(choose(|s| s < *SLOTS.start() + 2), Some(*SLOTS.start() + 2));
        assert_eq!(choose(|_| true), None);
    }
}
