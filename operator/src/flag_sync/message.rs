//! Messages as they go over the wire: requests, and documents, which are made once and shared by all who read them.

use super::{
    failure::{Failure, MAX_MESSAGE_BYTES},
    wire::SyncFlagsResponse,
};
use bytes::{BufMut, Bytes};
use http_body::Body;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Streaming;
use tonic_prost::ProstDecoder;

/// Largest request, in bytes: it may hold a token.
const MAX_REQUEST_BYTES: usize = 20 * 1024;

/// Bytes around a document: the head of a message of gRPC, and of the member that holds it.
const HEAD_BYTES: usize = 5;
const MAX_MEMBER_HEAD_BYTES: usize = 11;
/// Largest document, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = MAX_MESSAGE_BYTES - MAX_MEMBER_HEAD_BYTES;

/// Most bytes of all messages that somebody reads or waits for, and the unit that they are counted in.
const MAX_BYTES: usize = 16 * 1024 * 1024;
const UNIT: usize = 1024;

/// Room for messages.
pub struct Room(Arc<Semaphore>);

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_BYTES / UNIT)))
    }
}

/// A message that takes room as long as anybody has it.
struct Held {
    message: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.message
    }
}

impl Room {
    /// The message of a document, if there is room for it.
    pub fn message(&self, document: String) -> Result<Bytes, Failure> {
        let units = u32::try_from(document.len().div_ceil(UNIT)).map_err(|_| Failure::NoRoom)?;
        let room = Arc::clone(&self.0).try_acquire_many_owned(units).map_err(|_| Failure::NoRoom)?;
        let message = framed(&SyncFlagsResponse { flag_configuration: document });
        Ok(Bytes::from_owner(Held { message, _room: room }))
    }
}

/// A message with its head: not compressed, and its length.
pub fn framed(message: &impl prost::Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut framed = Vec::with_capacity(HEAD_BYTES + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A vector takes whatever is put into it.
    let _ = message.encode(&mut framed);
    framed
}

/// The message of a request, which has this body.
pub async fn read<M, B>(body: B) -> Result<M, Failure>
where
    M: prost::Message + Default + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let decoder = ProstDecoder::<M>::default();
    let mut messages = Streaming::new_request(decoder, body, None, Some(MAX_REQUEST_BYTES));
    let message = messages.message().await.map_err(|status| Failure::Request(status.message().to_owned()))?;
    message.ok_or_else(|| Failure::Request("the request has no message".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_framed_as_grpc_wants_it() {
        let message = Room::default().message("{}".into()).unwrap();
        assert_eq!(&message[..], b"\x00\x00\x00\x00\x04\x0a\x02{}");
    }

    #[test]
    fn the_largest_document_is_a_message_that_clients_take() {
        let message = Room::default().message("x".repeat(MAX_DOCUMENT_BYTES)).unwrap();
        assert!(message.len() - HEAD_BYTES <= MAX_MESSAGE_BYTES);
    }

    #[test]
    fn messages_take_room_as_long_as_somebody_has_them() {
        let room = Room::default();
        let large = || room.message("x".repeat(MAX_BYTES / 4));
        let mut held: Vec<_> = (0..4).map(|_| large().unwrap()).collect();
        let reader = held[0].slice(1..2);
        held.clear();
        let _three: Vec<_> = (0..3).map(|_| large().unwrap()).collect();
        assert_eq!(large(), Err(Failure::NoRoom));
        drop(reader);
        assert!(large().is_ok());
    }
}
