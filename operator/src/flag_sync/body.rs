//! The body of an answer: its end is known before, or a task sends it part by part.

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::sync::mpsc;
use tonic::Status;

/// Parts that wait for the connection to take them.
const PARTS: usize = 1;

/// A body.
#[derive(Default)]
pub struct Answer {
    known: VecDeque<Frame<Bytes>>,
    rest: Option<mpsc::Receiver<Frame<Bytes>>>,
}

/// The sender of a body was lost before its end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the answer was given up")]
pub struct GivenUp;

impl Answer {
    /// One message, and the end.
    pub fn of(message: Vec<u8>) -> Self {
        let end = Frame::trailers(trailers(&Status::ok("")));
        Self { known: [Frame::data(message.into()), end].into(), rest: None }
    }

    /// What comes through the sender, until trailers.
    pub fn stream() -> (mpsc::Sender<Frame<Bytes>>, Self) {
        let (sender, rest) = mpsc::channel(PARTS);
        (sender, Self { known: VecDeque::new(), rest: Some(rest) })
    }
}

/// The end of an answer.
pub fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    // A text is escaped, so nothing in it cannot be sent.
    let _ = status.add_header(&mut trailers);
    trailers
}

impl Body for Answer {
    type Data = Bytes;
    type Error = GivenUp;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, GivenUp>>> {
        if let Some(frame) = self.known.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        let next = ready!(rest.poll_recv(context));
        if next.as_ref().is_none_or(Frame::is_trailers) {
            self.rest = None;
        }
        Poll::Ready(Some(next.ok_or(GivenUp)))
    }

    fn is_end_stream(&self) -> bool {
        self.known.is_empty() && self.rest.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn a_message_and_the_end() {
        let mut answer = Answer::of(b"abc".to_vec());
        assert_eq!(answer.frame().await.unwrap().unwrap().into_data().unwrap(), "abc");
        let end = answer.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(end["grpc-status"], "0");
        assert!(answer.is_end_stream() && answer.frame().await.is_none());
        assert!(Answer::default().is_end_stream());
    }

    #[tokio::test]
    async fn a_stream_ends_with_trailers_and_breaks_without() {
        let (sender, mut answer) = Answer::stream();
        sender.send(Frame::trailers(trailers(&Status::not_found("a b")))).await.unwrap();
        let end = answer.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!((&end["grpc-status"], &end["grpc-message"]), (&"5".parse().unwrap(), &"a%20b".parse().unwrap()));
        assert!(answer.frame().await.is_none());

        let (sender, mut answer) = Answer::stream();
        drop(sender);
        assert!(answer.frame().await.unwrap().is_err());
        assert!(answer.frame().await.is_none());
    }
}
