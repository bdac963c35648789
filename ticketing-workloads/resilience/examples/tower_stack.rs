//! A tower service behind all layers of a dependency, with a fallback around them: when the catalog does not answer, what
//! it answered before is given again, and said to be old.
//!
//! ```sh
//! cargo run --package resilience --example tower_stack
//! ```

use contract::{PolicySettings, RetrySettings, WorkloadId};
use resilience::{
    Attempt, Failure, FailureKind, Repeatable, Resilience,
    fallback::{Fallbacks, Source},
};
use serde_json::json;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

/// A page of the catalog. Reading it twice does no harm, so it may be asked for again.
#[derive(Clone, Debug)]
struct Page(u32);

impl Repeatable for Page {
    fn may_repeat(&self, _: &RetrySettings) -> bool {
        true
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the catalog answered 503")]
struct Unavailable;

impl Failure for Unavailable {
    fn kind(&self) -> FailureKind {
        FailureKind::Status(503)
    }
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let defaults: PolicySettings = serde_json::from_value(json!({
        "dependencies": { "catalog": {
            "timeout": { "requestMs": 2_000, "perTryMs": 500 },
            "retry": { "numRetries": 1, "baseIntervalMs": 10 },
            "fallback": [{ "type": "Cache", "ttlMs": 60_000, "maxStaleMs": 600_000 }],
        } },
    }))?;
    let id: WorkloadId =
        serde_json::from_value(json!({ "namespace": "ticketing", "kind": "Deployment", "name": "shop" }))?;
    let workload = Resilience::builder(id).dependency("catalog").defaults(defaults).build();
    let catalog = workload.dependency("catalog").ok_or("it was declared above")?;

    // The innermost service gets an attempt: the request, its number, and when nobody waits for it any more.
    let up = Arc::new(AtomicBool::new(true));
    let answers = Arc::clone(&up);
    let upstream = service_fn(move |attempt: Attempt<Page>| {
        let up = answers.load(Ordering::Relaxed);
        async move { if up { Ok(format!("page {}", attempt.request.0)) } else { Err(Unavailable) } }
    });
    let earlier = Fallbacks::new(catalog).cache(
        1 << 20,
        |page: &Page| Some(page.0.to_string()),
        |text: &String| Some(text.len()),
    );
    let mut shop = ServiceBuilder::new().layer(earlier.layer()).layer(catalog.layer()).service(upstream);

    let answer = shop.ready().await?.call(Page(1)).await?;
    println!("{:?} from {:?}", answer.value, answer.source);
    assert_eq!(answer.source, Source::Dependency);

    up.store(false, Ordering::Relaxed);
    let answer = shop.ready().await?.call(Page(1)).await?;
    println!("{:?} from {:?}", answer.value, answer.source);
    assert!(matches!(answer.source, Source::Cache { stale: false, .. }));

    let error = shop.ready().await?.call(Page(2)).await.err().ok_or("nothing is known of page 2")?;
    println!("page 2: {error}");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    run().await
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn it_runs() {
        super::run().await.unwrap();
    }
}
