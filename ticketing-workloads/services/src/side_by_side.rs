//! Work that is claimed somewhere and done several at once.

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::pin::pin;
use std::time::Duration;

/// Does all that `claim` brings, up to `at_once` side by side, for as long as it is polled. What there is to do is
/// claimed only when there is room for it: others may come to it sooner. `look`: time until the next claim, after one
/// that has brought less than there was room for.
pub async fn side_by_side<T, C, W>(
    at_once: impl Fn() -> usize,
    look: Duration,
    claim: impl Fn(usize) -> C,
    work: impl Fn(T) -> W,
) where
    C: Future<Output = Vec<T>>,
    W: Future<Output = ()>,
{
    let mut under_way = FuturesUnordered::new();
    loop {
        let room = at_once().max(1).saturating_sub(under_way.len());
        if room == 0 {
            under_way.next().await;
            continue;
        }
        let claimed = beside(&mut under_way, claim(room)).await;
        let is_all = claimed.len() < room;
        under_way.extend(claimed.into_iter().map(&work));
        if is_all {
            beside(&mut under_way, tokio::time::sleep(look)).await;
        }
    }
}

/// Goes on with what is under way until `other` is done.
async fn beside<T>(under_way: &mut FuturesUnordered<impl Future<Output = ()>>, other: impl Future<Output = T>) -> T {
    let mut other = pin!(other);
    loop {
        tokio::select! {
            done = &mut other => return done,
            Some(()) = under_way.next() => {}
        }
    }
}
