//! How important a call is to the calls that it competes with for a slot.
//!
//! It goes the way of the [deadline](crate::deadline): a service learns it with the request, keeps it beside the request while
//! it works on it, and sends it on with each call that it makes. So the service at the far end knows what a call is for.

use http::{HeaderMap, HeaderName, HeaderValue};
use std::future::Future;

/// The [`Priority`] by name.
pub const HEADER: HeaderName = HeaderName::from_static("x-priority");

tokio::task_local! {
    static CURRENT: Priority;
}

/// What a call is for, from what can best be done without up to what must not be lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody looks: at what there is, at how something stands. The caller, if it is refused, asks again.
    Look,
    /// Something is begun that takes from what there is, such as an order.
    Start,
    /// Something that was begun comes to its end: seats that are kept are bought or given back, a payment is settled. So does what
    /// nobody has said a priority of: it is not held back for others.
    #[default]
    Finish,
}

impl Priority {
    /// All of them, the lowest first.
    pub const ALL: [Self; 3] = [Self::Look, Self::Start, Self::Finish];

    /// Its name, in the header and as a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Start => "start",
            Self::Finish => "finish",
        }
    }

    /// The one of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|priority| priority.name() == name)
    }

    /// The priority that a request came with. A header that names none says nothing.
    pub fn of_request(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(HEADER)?.to_str().ok()?)
    }

    /// The header for a request of this priority.
    pub fn to_header(self) -> HeaderValue {
        HeaderValue::from_static(self.name())
    }
}

/// The priority of what this task is doing, if it was said.
#[inline]
pub fn current() -> Option<Priority> {
    CURRENT.try_with(|priority| *priority).ok()
}

/// Does `work` with this priority, whatever it was before. A task that `work` spawns does not have it.
pub async fn within<T>(priority: Priority, work: impl Future<Output = T>) -> T {
    CURRENT.scope(priority, work).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_holds_for_what_is_done_within() {
        assert_eq!(current(), None);
        within(Priority::Start, async {
            assert_eq!(current(), Some(Priority::Start));
            within(Priority::Finish, async { assert_eq!(current(), Some(Priority::Finish)) }).await;
            assert_eq!(current(), Some(Priority::Start));
        })
        .await;
        assert_eq!(current(), None);
    }

    #[test]
    fn what_is_sent_is_read() {
        for priority in Priority::ALL {
            let headers = HeaderMap::from_iter([(HEADER, priority.to_header())]);
            assert_eq!(Priority::of_request(&headers), Some(priority));
        }
        for other in ["", "FINISH", "finish,look", "3"] {
            let headers = HeaderMap::from_iter([(HEADER, HeaderValue::from_str(other).unwrap())]);
            assert_eq!(Priority::of_request(&headers), None, "{other:?}");
        }
    }
}
