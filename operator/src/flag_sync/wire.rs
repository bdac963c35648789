//! The messages of `flagd.sync.v1`, as flagd publishes them. They are few and small, so they are written here, and the build needs
//! no compiler for protocol buffers.

use prost::Message;

/// Paths of the calls.
pub mod path {
    /// A stream of documents: the present one, and each that comes after it.
    pub const SYNC_FLAGS: &str = "/flagd.sync.v1.FlagSyncService/SyncFlags";
    /// The present document.
    pub const FETCH_ALL_FLAGS: &str = "/flagd.sync.v1.FlagSyncService/FetchAllFlags";
    /// What clients were to put into every context; older clients still ask.
    pub const GET_METADATA: &str = "/flagd.sync.v1.FlagSyncService/GetMetadata";
}

/// Asks for the stream.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SyncFlagsRequest {
    /// How the client calls itself.
    #[prost(string, tag = "1")]
    pub provider_id: String,
    /// Which flags it wants; newer clients say it in the metadata `flagd-selector`.
    #[prost(string, tag = "2")]
    pub selector: String,
}

/// A document of the stream. `sync_context`, the attributes that a client adds to every context, stays away: with them rules could
/// choose otherwise than in our pods.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SyncFlagsResponse {
    /// The flags as flagd's schema has them, in JSON.
    #[prost(string, tag = "1")]
    pub flag_configuration: String,
}

/// Asks for the present document.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FetchAllFlagsRequest {
    /// How the client calls itself.
    #[prost(string, tag = "1")]
    pub provider_id: String,
    /// Which flags it wants; newer clients say it in the metadata `flagd-selector`.
    #[prost(string, tag = "2")]
    pub selector: String,
}

/// The present document: on the wire the same as one of the stream.
pub type FetchAllFlagsResponse = SyncFlagsResponse;

/// Asks for the metadata.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct GetMetadataRequest {}

/// The metadata.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct GetMetadataResponse {
    /// An object without members.
    #[prost(message, optional, tag = "2")]
    pub metadata: Option<EmptyStruct>,
}

/// A `google.protobuf.Struct` without fields.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct EmptyStruct {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_that_flagd_publishes() {
        let request = SyncFlagsRequest { provider_id: "p".into(), selector: "s".into() };
        assert_eq!(request.encode_to_vec(), b"\x0a\x01p\x12\x01s");
        let request = FetchAllFlagsRequest { provider_id: "p".into(), selector: "s".into() };
        assert_eq!(request.encode_to_vec(), b"\x0a\x01p\x12\x01s");
        assert_eq!(SyncFlagsResponse { flag_configuration: "{}".into() }.encode_to_vec(), b"\x0a\x02{}");
        assert_eq!(GetMetadataResponse { metadata: Some(EmptyStruct {}) }.encode_to_vec(), b"\x12\x00");
        let later = SyncFlagsRequest::decode(&b"\x0a\x01p\x1a\x01x"[..]).unwrap();
        assert_eq!(later.provider_id, "p", "what later clients send besides is skipped");
    }
}
