//! The documents that were asked for last, so that flags are compiled once for each edit and not for each call.

use super::document::Document;
use contract::WorkloadId;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Most documents that are kept.
const MAX_SCOPES: usize = 256;
/// Most bytes of all documents that are kept; the one that is asked for now is kept in any case.
const MAX_BYTES: usize = 4 * 1024 * 1024;
/// A document that nobody has asked for so long is given up.
const MAX_IDLE: Duration = Duration::from_secs(600);

/// Whose flags.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of a namespace.
    Namespace(String),
    /// Those of a workload.
    Workload(WorkloadId),
}

impl Scope {
    /// Its namespace.
    pub fn namespace(&self) -> &str {
        match self {
            Self::Namespace(namespace) => namespace,
            Self::Workload(id) => &id.namespace,
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Namespace(namespace) => write!(f, "namespace {namespace}"),
            Self::Workload(id) => write!(f, "{} {} of namespace {}", id.kind, id.name, id.namespace),
        }
    }
}

/// The documents.
#[derive(Default)]
pub struct Scopes(Mutex<HashMap<Scope, Kept>>);

struct Kept {
    version: Option<u64>,
    /// None while it is made for the first time.
    document: Option<Arc<Document>>,
    used: Instant,
    /// Held by the one that compiles it anew: the others wait for the outcome instead of doing the same.
    turn: Arc<Mutex<()>>,
}

impl Scopes {
    fn lock(&self) -> MutexGuard<'_, HashMap<Scope, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The document of `scope`, if it is of `version`.
    pub fn fresh(&self, scope: &Scope, version: Option<u64>, now: Instant) -> Option<Arc<Document>> {
        let mut kept = self.lock();
        let kept = kept.get_mut(scope).filter(|kept| kept.version == version)?;
        kept.used = now;
        kept.document.clone()
    }

    /// Whether there is a document of `scope`, of whatever version.
    pub fn is_known(&self, scope: &Scope) -> bool {
        self.lock().get(scope).is_some_and(|kept| kept.document.is_some())
    }

    /// The document of `scope`, made anew by `make` if it is not of `version`; `make` gets the last one. It blocks while another
    /// thread makes it.
    pub fn refresh<E>(
        &self,
        scope: &Scope,
        version: Option<u64>,
        now: Instant,
        make: impl FnOnce(Option<&Document>) -> Result<Document, E>,
    ) -> Result<Arc<Document>, E> {
        let first = || Kept { version: None, document: None, used: now, turn: Arc::default() };
        let turn = Arc::clone(&self.lock().entry(scope.clone()).or_insert_with(first).turn);
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fresh) = self.fresh(scope, version, now) {
            return Ok(fresh);
        }
        let before = self.lock().get(scope).and_then(|kept| kept.document.clone());
        let document = Arc::new(make(before.as_deref())?);
        let new = Kept { version, document: Some(Arc::clone(&document)), used: now, turn: Arc::clone(&turn) };
        let mut kept = self.lock();
        kept.insert(scope.clone(), new);
        make_room(&mut kept, scope);
        Ok(document)
    }

    /// Gives up what nobody asks for.
    pub fn sweep(&self, now: Instant) {
        self.lock().retain(|_, kept| now.saturating_duration_since(kept.used) < MAX_IDLE);
    }
}

/// Gives up what was asked for longest ago, until what is left is not too much. `asked` stays.
fn make_room(kept: &mut HashMap<Scope, Kept>, asked: &Scope) {
    let bytes = |kept: &HashMap<Scope, Kept>| -> usize {
        kept.values().filter_map(|kept| kept.document.as_ref()).map(|document| document.bytes).sum()
    };
    while kept.len() > MAX_SCOPES || bytes(kept) > MAX_BYTES {
        let others = kept.iter().filter(|(scope, _)| *scope != asked);
        let Some(oldest) = others.min_by_key(|(_, kept)| kept.used).map(|(scope, _)| scope.clone()) else { return };
        kept.remove(&oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn scope(number: usize) -> Scope {
        Scope::Namespace(format!("n{number}"))
    }

    #[expect(clippy::unnecessary_wraps, reason = "what makes a document may fail")]
    fn document(bytes: usize) -> Result<Document, Infallible> {
        let mut document = Document::default();
        document.bytes = bytes;
        Ok(document)
    }

    #[test]
    fn a_document_is_made_once_for_each_version_and_from_the_last_one() {
        let (scopes, now) = (Scopes::default(), Instant::now());
        let mut seen = Vec::new();
        for version in [Some(1), Some(1), Some(2), None, None] {
            let Ok(_) = scopes.refresh(&scope(1), version, now, |before| {
                seen.push((version, before.map(|before| before.bytes)));
                document(seen.len())
            });
        }
        assert_eq!(seen, [(Some(1), None), (Some(2), Some(1)), (None, Some(2))]);
        assert!(scopes.fresh(&scope(1), None, now).is_some() && scopes.fresh(&scope(1), Some(1), now).is_none());
    }

    #[test]
    fn many_threads_make_it_once() {
        let (scopes, made) = (Scopes::default(), Mutex::new(0));
        std::thread::scope(|threads| {
            for _ in 0..8 {
                threads.spawn(|| {
                    scopes.refresh(&scope(1), Some(2), Instant::now(), |_| {
                        *made.lock().unwrap() += 1;
                        document(1)
                    })
                });
            }
        });
        assert_eq!(made.into_inner().unwrap(), 1);
    }

    #[test]
    fn one_that_cannot_be_made_leaves_the_last_one() {
        let (scopes, now) = (Scopes::default(), Instant::now());
        let Ok(_) = scopes.refresh(&scope(1), Some(1), now, |_| document(7));
        assert!(scopes.refresh(&scope(1), Some(2), now, |_| Err(())).is_err());
        assert_eq!(scopes.fresh(&scope(1), Some(1), now).map(|document| document.bytes), Some(7));
    }

    #[test]
    fn what_is_asked_for_longest_ago_makes_room() {
        let (scopes, start) = (Scopes::default(), Instant::now());
        let at = |number: usize| start + Duration::from_millis(number as u64);
        for number in 0..=MAX_SCOPES {
            let Ok(_) = scopes.refresh(&scope(number), Some(1), at(number), |_| document(1));
        }
        let is_kept = |number: usize| scopes.is_known(&scope(number));
        let count = || scopes.lock().len();
        assert_eq!((count(), is_kept(0), is_kept(1)), (MAX_SCOPES, false, true));
        let Ok(_) = scopes.refresh(&scope(1_000), Some(1), at(1_000), |_| document(MAX_BYTES + 1));
        assert_eq!((count(), is_kept(1_000)), (1, true), "larger than all together may be, and asked for");
    }

    #[test]
    fn what_nobody_asks_for_is_given_up() {
        let (scopes, start) = (Scopes::default(), Instant::now());
        for number in [1, 2] {
            let Ok(_) = scopes.refresh(&scope(number), Some(1), start, |_| document(1));
        }
        let later = start + MAX_IDLE;
        assert!(scopes.fresh(&scope(2), Some(1), later).is_some());
        scopes.sweep(later);
        assert!(scopes.fresh(&scope(1), Some(1), later).is_none() && scopes.fresh(&scope(2), Some(1), later).is_some());
    }
}
