//! Asking the API server who holds a token, and whether that account may get the FeatureFlags of a namespace.

use super::{
    Digest, Refused,
    verdicts::{MAX_USER_BYTES, Verdict, Verdicts},
};
use crate::kubernetes::{
    clients::{ApiError, call},
    meta::cut,
};
use crds::FeatureFlag;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, Resource, api::PostParams};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tracing::warn;

/// Most reviews at once.
const MAX_AT_ONCE: usize = 8;
/// Longest wait for a place among them.
const PATIENCE: Duration = Duration::from_secs(3);
/// A failure is logged no more often than this.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Reviews by the API server, and what they said.
pub struct Reviews {
    client: Client,
    verdicts: Mutex<Verdicts>,
    places: Semaphore,
    logged: Mutex<Option<Instant>>,
}

impl Reviews {
    /// Reviews through this client.
    pub fn new(client: Client) -> Self {
        Self { client, verdicts: Mutex::default(), places: Semaphore::new(MAX_AT_ONCE), logged: Mutex::default() }
    }

    fn verdicts(&self) -> MutexGuard<'_, Verdicts> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a token.
    pub fn known(&self, digest: &Digest, namespace: &str, now: Instant) -> Option<Verdict> {
        self.verdicts().get(digest, namespace, now)
    }

    /// Asks the API server. If it cannot be asked, nobody gets in.
    pub async fn ask(&self, token: &str, digest: &Digest, namespace: &str) -> Result<Verdict, Refused> {
        let busy = || Refused::Unavailable("too many are being reviewed".to_owned());
        let _place = timeout(PATIENCE, self.places.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())?;
        // Another call with the same token may have been quicker.
        if let Some(known) = self.known(digest, namespace, Instant::now()) {
            return Ok(known);
        }
        match self.review(token, namespace).await {
            Ok(verdict) => {
                self.verdicts().put(*digest, namespace, verdict.clone(), Instant::now());
                Ok(verdict)
            }
            Err(error) => {
                self.log(&error);
                Err(Refused::Unavailable(format!("the API server failed: {error}")))
            }
        }
    }

    async fn review(&self, token: &str, namespace: &str) -> Result<Verdict, ApiError> {
        let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let status = call(reviews.create(&PostParams::default(), &review)).await?.status.unwrap_or_default();
        let Some(user) = status.user.filter(|_| status.authenticated == Some(true)) else {
            return Ok(Verdict::Unauthenticated);
        };
        let name = cut(user.username.as_deref().unwrap_or_default(), MAX_USER_BYTES).to_owned();
        let spec = SubjectAccessReviewSpec {
            user: user.username,
            uid: user.uid,
            groups: user.groups,
            extra: user.extra,
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(namespace.to_owned()),
                verb: Some("get".to_owned()),
                group: Some(FeatureFlag::group(&()).into_owned()),
                resource: Some(FeatureFlag::plural(&()).into_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let status = call(reviews.create(&PostParams::default(), &review)).await?.status;
        let allowed = status.is_some_and(|status| status.allowed && status.denied != Some(true));
        Ok(if allowed { Verdict::Allowed } else { Verdict::Forbidden(name) })
    }

    fn log(&self, error: &ApiError) {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            *logged = Some(Instant::now());
            warn!(%error, "OFREP: tokens cannot be reviewed; callers with unknown tokens are answered 503");
        }
    }
}
