//! Why a call has no answer, or a stream no more of it, in the words and the codes of gRPC.

use super::selector::{InvalidSelector, Selected};
use crate::{kubernetes::meta::cut, ofrep::access::Refused};
use tonic::{Code, Status};

/// Largest message that clients take unless they are told otherwise, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Longest message of a status, in bytes: clients bound what comes beside an answer.
const MAX_STATUS_BYTES: usize = 1024;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nobody said who asks.
    #[error("send a token: the metadata authorization: Bearer TOKEN; or token=TOKEN at the end of the selector")]
    NoToken,
    /// The caller may not have it.
    #[error(transparent)]
    Access(Refused),
    /// It does not say which flags.
    #[error(transparent)]
    Selector(#[from] InvalidSelector),
    /// The request is no message of the protocol.
    #[error("{0}")]
    Request(String),
    /// The request took too long.
    #[error("the request did not arrive within {0} s")]
    SlowRequest(u64),
    /// There is no such call.
    #[error("there is no such call: FlagSyncService of flagd.sync.v1 has SyncFlags, FetchAllFlags and GetMetadata")]
    NoSuchCall,
    /// The operator does not look there.
    #[error("this operator does not watch the namespace {0}")]
    NotWatched(String),
    /// There is no such workload.
    #[error(
        "there is no Deployment or StatefulSet {workload} in the namespace {namespace}, and no FeatureFlag targets one"
    )]
    NoWorkload {
        /// Its namespace.
        namespace: String,
        /// Its name.
        workload: String,
    },
    /// The flags do not go together.
    #[error("the flags cannot be put together: {0}")]
    Compile(String),
    /// Clients would not take the document.
    #[error(
        "the flags of {0} have more than {MAX_MESSAGE_BYTES} bytes, which clients do not take: follow those of a workload (selector namespace=NAMESPACE,workload=NAME), or make the sets smaller"
    )]
    LargeDocument(String),
    /// All flags that are followed have too many bytes.
    #[error(
        "the flags that this replica's clients follow have too many bytes together: follow those of workloads, or try another replica"
    )]
    NoRoom,
    /// The client has enough.
    #[error("this client has {0} streams open, and may have no more at this replica (--flag-sync-streams)")]
    ManyStreams(usize),
    /// All clients together have enough.
    #[error("this replica has {0} streams open, and may have no more: try another one")]
    FullOfStreams(usize),
    /// The client calls too often.
    #[error("more calls than a client may make in a second: a stream brings changes by itself")]
    ManyCalls,
    /// Not yet.
    #[error("the caches are still being filled")]
    NotReady,
    /// Too much to do.
    #[error("too many calls at once")]
    Busy,
    /// The replica ends.
    #[error("this replica stops: connect again")]
    Stopping,
    /// A mistake of ours.
    #[error("the operator failed inside")]
    Internal,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NoToken => Self::NoToken,
            other => Self::Access(other),
        }
    }
}

impl Failure {
    /// Clients would not take what is asked for.
    pub fn large(selected: &Selected) -> Self {
        let Selected { namespace, workload } = selected;
        Self::LargeDocument(match workload {
            Some(workload) => format!("{workload} of namespace {namespace}"),
            None => format!("namespace {namespace}"),
        })
    }

    /// Its code.
    pub const fn code(&self) -> Code {
        match self {
            Self::NoToken | Self::Access(Refused::NoToken | Refused::InvalidToken) => Code::Unauthenticated,
            Self::Access(Refused::Forbidden(_)) => Code::PermissionDenied,
            Self::Access(Refused::TooMany(_))
            | Self::LargeDocument(_)
            | Self::NoRoom
            | Self::ManyStreams(_)
            | Self::FullOfStreams(_)
            | Self::ManyCalls => Code::ResourceExhausted,
            Self::Access(Refused::Unavailable(_)) | Self::NotReady | Self::Busy | Self::Stopping => Code::Unavailable,
            Self::Selector(_) | Self::Request(_) => Code::InvalidArgument,
            Self::SlowRequest(_) => Code::DeadlineExceeded,
            Self::NoSuchCall => Code::Unimplemented,
            Self::NotWatched(_) | Self::NoWorkload { .. } => Code::NotFound,
            Self::Compile(_) | Self::Internal => Code::Internal,
        }
    }

    /// As it is told to the client.
    pub fn status(&self) -> Status {
        Status::new(self.code(), cut(&self.to_string(), MAX_STATUS_BYTES))
    }
}

/// The label of a code.
pub const fn result(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Unauthenticated => "unauthorized",
        Code::PermissionDenied => "forbidden",
        Code::ResourceExhausted => "limited",
        Code::Unavailable => "unavailable",
        Code::NotFound => "not_found",
        Code::InvalidArgument | Code::DeadlineExceeded | Code::Unimplemented => "invalid",
        _ => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut() {
        let status = Failure::Compile("x".repeat(100_000)).status();
        assert!(status.message().len() <= MAX_STATUS_BYTES && status.message().starts_with("the flags cannot"));
    }

    #[test]
    fn a_document_that_is_too_large_is_named() {
        let selected =
            |workload: Option<&str>| Selected { namespace: "n".into(), workload: workload.map(str::to_owned) };
        let said = |workload| Failure::large(&selected(workload)).to_string();
        assert!(said(None).contains("the flags of namespace n have more than 4194304 bytes"), "{}", said(None));
        assert!(said(Some("w")).contains("the flags of w of namespace n"), "{}", said(Some("w")));
    }
}
