//! How many streams there may be: of each client, and in all.

use super::failure::Failure;
use crate::ofrep::access::Digest;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Most streams of all clients.
pub const MAX_STREAMS: usize = 1024;

/// The streams that are open.
pub struct Places {
    each: usize,
    taken: Mutex<HashMap<Digest, usize>>,
}

/// The place of one stream; it is free again when this is dropped.
pub struct Place {
    places: Arc<Places>,
    client: Digest,
}

impl Places {
    /// So many for each client.
    pub fn new(each: usize) -> Self {
        Self { each, taken: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a client.
    pub fn take(self: &Arc<Self>, client: Digest) -> Result<Place, Failure> {
        let mut taken = self.lock();
        if taken.values().sum::<usize>() >= MAX_STREAMS {
            return Err(Failure::FullOfStreams(MAX_STREAMS));
        }
        let own = taken.entry(client).or_default();
        if *own >= self.each {
            return Err(Failure::ManyStreams(*own));
        }
        *own += 1;
        Ok(Place { places: Arc::clone(self), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if let Some(own) = taken.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_its_own_and_takes_none_of_others() {
        let places = Arc::new(Places::new(2));
        let held: Vec<_> = (0..2).map(|_| places.take([1; 32]).unwrap()).collect();
        assert_eq!(places.take([1; 32]).err(), Some(Failure::ManyStreams(2)));
        assert!(places.take([2; 32]).is_ok());
        drop(held);
        assert!(places.take([1; 32]).is_ok());
        assert!(places.lock().is_empty(), "who has none is forgotten");
    }

    #[test]
    fn there_are_never_too_many() {
        let places = Arc::new(Places::new(MAX_STREAMS));
        let held: Vec<_> = (0..MAX_STREAMS).map(|_| places.take([1; 32]).unwrap()).collect();
        assert_eq!(places.take([2; 32]).err(), Some(Failure::FullOfStreams(MAX_STREAMS)));
        drop(held);
        assert!(places.take([2; 32]).is_ok());
    }
}
