//! The documents that clients follow: each is made once after a change, for all of its clients together.

use super::{
    failure::Failure,
    message::{MAX_DOCUMENT_BYTES, Room},
    selector::Selected,
};
use crate::{
    context::Context,
    ofrep::{
        document::Document,
        flagd_document,
        route::{Call, Route},
        scopes::{Scope, Scopes},
        service::{published, scope},
    },
};
use bytes::Bytes;
use jiff::Timestamp;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How often is looked whether there is anything new: a number that the index keeps is compared.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Pause after a new document, so that many edits in a row become few documents.
const PAUSE: Duration = Duration::from_millis(250);
/// How long a failure is the answer.
const FAILURE_FOR: Duration = Duration::from_secs(2);
/// How often the compiled flags of a document that does not change are told that somebody wants them.
const TOUCH_EVERY: Duration = Duration::from_secs(60);
/// Most documents that are followed.
const MAX_FEEDS: usize = 256;

/// What there is to tell about a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// It is this one now, as a message.
    Document(Bytes),
    /// There is none any more.
    Failed(Failure),
}

/// All documents that are followed.
#[derive(Default)]
pub struct Feeds {
    by_name: Mutex<HashMap<Selected, Weak<Feed>>>,
    /// What was compiled.
    pub scopes: Scopes,
    room: Room,
}

/// One document that is followed. It is looked after as long as anybody has it.
struct Feed {
    news: watch::Sender<Option<News>>,
}

/// A follower of a document.
pub struct Subscription {
    /// None: it is made for the first time.
    pub news: watch::Receiver<Option<News>>,
    _feed: Arc<Feed>,
}

/// What a document was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Made {
    scope: Scope,
    version: Option<u64>,
    changes_at_ms: Option<i64>,
}

impl Made {
    /// Whether it would be made the same.
    fn is_current(&self, scope: &Scope, version: Option<u64>, now_ms: i64) -> bool {
        self.scope == *scope && self.version == version && self.changes_at_ms.is_none_or(|at| now_ms < at)
    }
}

impl Feeds {
    /// Follows what `selected` names in `ctx`. Its document is made anew by a task of `tasks`, until nobody follows it any more or
    /// `shutdown`; one document at a time has a turn of `turns`.
    pub fn follow(
        self: &Arc<Self>,
        selected: &Selected,
        ctx: &Arc<Context>,
        (tasks, turns, shutdown): (&TaskTracker, &Arc<Semaphore>, &CancellationToken),
    ) -> Result<Subscription, Failure> {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        let subscribe = |feed: Arc<Feed>| Subscription { news: feed.news.subscribe(), _feed: feed };
        if let Some(feed) = by_name.get(selected).and_then(Weak::upgrade) {
            return Ok(subscribe(feed));
        }
        by_name.retain(|_, feed| feed.strong_count() > 0);
        if by_name.len() >= MAX_FEEDS {
            return Err(Failure::NoRoom);
        }
        let feed = Arc::new(Feed { news: watch::Sender::new(None) });
        by_name.insert(selected.clone(), Arc::downgrade(&feed));
        let keeper = Keeper {
            feed: Arc::downgrade(&feed),
            feeds: Arc::clone(self),
            ctx: Arc::clone(ctx),
            turns: Arc::clone(turns),
            selected: selected.clone(),
            made: None,
            last: None,
            touched_at: Instant::now(),
        };
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(keeper.run()));
        Ok(subscribe(feed))
    }
}

/// Looks after one document.
struct Keeper {
    feed: Weak<Feed>,
    feeds: Arc<Feeds>,
    ctx: Arc<Context>,
    turns: Arc<Semaphore>,
    selected: Selected,
    made: Option<Made>,
    /// What the last document was made of: what a set gave that is invalid now comes from there.
    last: Option<Arc<Document>>,
    touched_at: Instant,
}

/// If it is lost before its followers are, they must not wait for changes in vain.
impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(feed) = self.feed.upgrade() {
            publish(&feed.news, News::Failed(Failure::Stopping));
        }
    }
}

impl Keeper {
    async fn run(mut self) {
        loop {
            let news = self.look().await;
            let Some(feed) = self.feed.upgrade() else { return };
            match news {
                // Clients come again and again: they get the same answer, instead of having it worked out for each of them.
                Some(failed @ News::Failed(_)) => {
                    publish(&feed.news, failed);
                    sleep(FAILURE_FOR).await;
                }
                news => {
                    let is_new = news.is_some_and(|news| publish(&feed.news, news));
                    drop(feed);
                    sleep(if is_new { PAUSE } else { LOOK_EVERY }).await;
                }
            }
        }
    }

    /// What there is now, if it may be other than before.
    async fn look(&mut self) -> Option<News> {
        let Selected { namespace, workload } = &self.selected;
        let route = Route { namespace: namespace.clone(), workload: workload.clone(), call: Call::Document };
        let Ok(scope) = scope(&self.ctx, &route) else {
            self.made = None;
            let (namespace, workload) = (namespace.clone(), workload.clone().unwrap_or_default());
            return Some(News::Failed(Failure::NoWorkload { namespace, workload }));
        };
        // Before the sets are read: what changes in between makes another version.
        let version = self.ctx.index.flag_sets_version(namespace);
        let now_ms = Timestamp::now().as_millisecond();
        if self.made.as_ref().is_some_and(|made| made.is_current(&scope, version, now_ms)) {
            if self.touched_at.elapsed() >= TOUCH_EVERY {
                self.touched_at = Instant::now();
                let _ = self.feeds.scopes.fresh(&scope, version, self.touched_at);
            }
            return None;
        }
        match self.make(&scope, version, now_ms).await {
            Ok((message, changes_at_ms)) => {
                self.made = Some(Made { scope, version, changes_at_ms });
                Some(News::Document(message))
            }
            // It is tried again; clients that have a document keep it.
            Err(Failure::NoRoom) if self.made.is_some() => None,
            Err(failure @ (Failure::NoRoom | Failure::Internal)) => Some(News::Failed(failure)),
            Err(failure) => {
                self.made = Some(Made { scope, version, changes_at_ms: None });
                Some(News::Failed(failure))
            }
        }
    }

    /// The message of the document, and when it is another one.
    async fn make(
        &mut self,
        scope: &Scope,
        version: Option<u64>,
        now_ms: i64,
    ) -> Result<(Bytes, Option<i64>), Failure> {
        let _turn = self.turns.acquire().await.map_err(|_| Failure::Internal)?;
        let published = match scope {
            Scope::Workload(id) if self.last.is_none() && !self.feeds.scopes.is_known(scope) => {
                published(&self.ctx, id).await
            }
            _ => None,
        };
        let (feeds, ctx, last) = (Arc::clone(&self.feeds), Arc::clone(&self.ctx), self.last.clone());
        let (scope, selected) = (scope.clone(), self.selected.clone());
        let compiled = tokio::task::spawn_blocking(move || {
            let compiled = feeds.scopes.refresh(&scope, version, Instant::now(), |before| {
                let before = before.or(last.as_deref());
                let made = Document::of(&scope, &ctx.index, before, published.as_ref());
                made.map_err(|error| Failure::Compile(error.to_string()))
            })?;
            let text = flagd_document::at(&compiled, now_ms, MAX_DOCUMENT_BYTES);
            let text = text.map_err(|_| Failure::large(&selected));
            let changes_at_ms = flagd_document::changes_at(&compiled.section.settings, now_ms);
            let message = text.and_then(|text| Ok((feeds.room.message(text)?, changes_at_ms)));
            Ok::<_, Failure>((compiled, message))
        });
        let (compiled, message) = compiled.await.map_err(|_| Failure::Internal)??;
        self.last = Some(compiled);
        message
    }
}

/// Puts `news` in place of what is there, if it is other than that. Says whether it is.
fn publish(feed: &watch::Sender<Option<News>>, news: News) -> bool {
    feed.send_if_modified(|present| {
        let differs = present.as_ref() != Some(&news);
        if differs {
            *present = Some(news);
        }
        differs
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_made_anew_for_an_edit_another_workload_and_the_end_of_an_override() {
        let scope = Scope::Namespace("n".into());
        let made = Made { scope: scope.clone(), version: Some(1), changes_at_ms: Some(1_000) };
        assert!(made.is_current(&scope, Some(1), 999));
        assert!(!made.is_current(&scope, Some(1), 1_000));
        assert!(!made.is_current(&scope, Some(2), 999));
        assert!(!made.is_current(&scope, None, 999));
        assert!(!made.is_current(&Scope::Namespace("m".into()), Some(1), 999));
        assert!(Made { changes_at_ms: None, ..made }.is_current(&scope, Some(1), i64::MAX));
    }

    #[test]
    fn what_does_not_differ_is_no_news() {
        let (feed, mut news) = watch::channel(None);
        let document = |text: &'static str| News::Document(Bytes::from_static(text.as_bytes()));
        assert!(publish(&feed, document("a")) && news.has_changed().unwrap());
        news.borrow_and_update();
        assert!(!publish(&feed, document("a")) && !news.has_changed().unwrap());
        assert!(publish(&feed, document("b")) && news.has_changed().unwrap());
    }
}
