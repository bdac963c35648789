//! What a process gives back when memory is short: caches that it can do without, and what its allocator holds for later.

use crate::control::memory::MemoryProbe;
use crate::sync::lock;
use std::sync::Mutex;

/// Empties a cache; how many bytes it took.
type Empty = Box<dyn Fn() -> usize + Send + Sync>;

/// The caches of a workload that can be emptied.
#[derive(Default)]
pub struct SpareMemory(Mutex<Vec<Empty>>);

impl SpareMemory {
    /// Adds a cache, by the function that empties it; that returns how many bytes the cache took.
    pub fn add(&self, empty: impl Fn() -> usize + Send + Sync + 'static) {
        lock(&self.0).push(Box::new(empty));
    }

    /// Empties the caches, and asks the allocator to give what is free back to the system. Blocks for as long as that takes.
    /// The value says what came of it.
    pub fn give_back(&self) -> String {
        let probe = MemoryProbe::default();
        let before = probe.resident_bytes();
        let dropped: usize = lock(&self.0).iter().map(|empty| empty()).sum();
        trim_allocator();
        let in_use = match before.zip(probe.resident_bytes()) {
            Some((before, after)) => format!("{} MiB in use, {} MiB before", after >> 20, before >> 20),
            None => "the memory in use is unknown".to_owned(),
        };
        format!("dropped {} KiB of caches; {in_use}", dropped >> 10)
    }
}

/// Asks the allocator for what it holds and does not need. Only glibc's keeps much of it; others give it back by themselves.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn trim_allocator() {
    #[expect(unsafe_code, reason = "a call of the C library that takes no pointer, and locks what it works on")]
    // SAFETY: malloc_trim may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim_allocator() {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// As a cache holds its answers: many of them, each by itself.
    fn filled(mib: usize) -> Vec<Vec<u8>> {
        (0..mib * 256).map(|_| vec![1; 4_000]).collect()
    }

    #[test]
    fn what_caches_held_goes_back_to_the_system() {
        const MIB: usize = 64;
        let spare = SpareMemory::default();
        let cache = Arc::new(Mutex::new(filled(MIB)));
        // Allocated last, so that the heap cannot shrink by itself.
        let above = vec![1_u8; 4_000];
        spare.add({
            let cache = Arc::clone(&cache);
            move || std::mem::take(&mut *lock(&cache)).len() * 4_000
        });
        let probe = MemoryProbe::default();
        let before = probe.resident_bytes().unwrap();
        let told = spare.give_back();
        let after = probe.resident_bytes().unwrap();
        assert!(told.starts_with("dropped 64000 KiB of caches; ") && told.contains("MiB before"), "{told}");
        assert!(after + ((MIB as u64 / 2) << 20) < before, "{told}");
        assert_eq!(above.len(), 4_000);
        assert!(spare.give_back().starts_with("dropped 0 KiB"), "there is nothing left");
    }
}
