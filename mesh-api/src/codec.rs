//! Frames on a stream: a big-endian `u32` length, then that many bytes of JSON.
//!
//! Lengths are bounded by the receiver before anything is allocated, so a peer can't make it hold more than the
//! bound it chose.

use std::io;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest frame on a stream by which a host joins, bytes: nobody has proved anything on it.
pub const JOIN_FRAME_BYTES_MAX: u32 = 64 << 10;
/// Longest frame that a manager takes from an agent, bytes.
pub const AGENT_FRAME_BYTES_MAX: u32 = 1 << 20;
/// Longest frame that an agent takes from a manager, bytes: a snapshot of 100,000 tasks is about 40 MB, and more where
/// each is on several networks.
pub const MANAGER_FRAME_BYTES_MAX: u32 = 256 << 20;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The stream failed, or ended inside a frame.
    #[error("the session's stream failed")]
    Io(#[from] io::Error),
    /// The peer announced more than the bound.
    #[error("a frame of {len} bytes exceeds the {max} allowed")]
    TooLong {
        /// What the peer announced, bytes.
        len: u32,
        /// The bound, bytes.
        max: u32,
    },
    /// The frame is not a message of the expected type.
    #[error("a frame does not decode")]
    Decode(#[source] serde_json::Error),
    /// A message could not be encoded, or is longer than a frame can be.
    #[error("a message does not encode")]
    Encode(#[source] serde_json::Error),
}

/// Reads messages of type `T` from a stream.
#[derive(Debug)]
pub struct FrameReader<R, T> {
    stream: R,
    frame_bytes_max: u32,
    message: PhantomData<fn() -> T>,
}

impl<R: AsyncRead + Unpin, T: DeserializeOwned> FrameReader<R, T> {
    /// Reads from `stream`, refusing frames longer than `frame_bytes_max`.
    pub fn new(stream: R, frame_bytes_max: u32) -> Self {
        Self { stream, frame_bytes_max, message: PhantomData }
    }

    /// The next message; `None` when the peer closed between frames. Not cancel-safe: own the reader by one task.
    pub async fn next(&mut self) -> Result<Option<T>, CodecError> {
        let mut len = [0; 4];
        match self.stream.read_exact(&mut len).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let len = u32::from_be_bytes(len);
        if len > self.frame_bytes_max {
            return Err(CodecError::TooLong { len, max: self.frame_bytes_max });
        }
        let mut body = Vec::new();
        // Grows with what arrives, so that an announced length alone costs nothing.
        let read = (&mut self.stream).take(u64::from(len)).read_to_end(&mut body).await?;
        if read < len as usize {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        serde_json::from_slice(&body).map(Some).map_err(CodecError::Decode)
    }
}

/// Writes messages of type `T` to a stream.
#[derive(Debug)]
pub struct FrameWriter<W, T> {
    stream: W,
    message: PhantomData<fn(T)>,
}

impl<W: AsyncWrite + Unpin, T: Serialize> FrameWriter<W, T> {
    /// Writes to `stream`.
    pub fn new(stream: W) -> Self {
        Self { stream, message: PhantomData }
    }

    /// Writes one message and flushes it.
    pub async fn send(&mut self, message: &T) -> Result<(), CodecError> {
        let mut frame = vec![0; 4];
        serde_json::to_writer(&mut frame, message).map_err(CodecError::Encode)?;
        let len = u32::try_from(frame.len() - 4)
            .map_err(|_| CodecError::TooLong { len: u32::MAX, max: MANAGER_FRAME_BYTES_MAX })?;
        frame[..4].copy_from_slice(&len.to_be_bytes());
        self.stream.write_all(&frame).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// Says that nothing more comes.
    pub async fn finish(&mut self) -> Result<(), CodecError> {
        Ok(self.stream.shutdown().await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::AgentMessage;

    #[tokio::test]
    async fn a_message_survives_the_stream() {
        let (a, b) = tokio::io::duplex(64);
        let sent = AgentMessage::Applied { index: 42 };
        let mut writer = FrameWriter::new(a);
        writer.send(&sent).await.unwrap();
        drop(writer);
        let mut reader = FrameReader::<_, AgentMessage>::new(b, AGENT_FRAME_BYTES_MAX);
        assert_eq!(reader.next().await.unwrap(), Some(sent));
        assert!(reader.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn an_overlong_frame_is_refused_by_its_length() {
        let bytes: &[u8] = &[0xff, 0xff, 0xff, 0xff, b'{'];
        let mut reader = FrameReader::<_, AgentMessage>::new(bytes, AGENT_FRAME_BYTES_MAX);
        assert!(matches!(reader.next().await, Err(CodecError::TooLong { len: u32::MAX, .. })));
    }

    #[tokio::test]
    async fn a_truncated_frame_and_a_frame_of_nonsense_are_errors() {
        let truncated: &[u8] = &[0, 0, 0, 9, b'{'];
        let mut reader = FrameReader::<_, AgentMessage>::new(truncated, AGENT_FRAME_BYTES_MAX);
        assert!(matches!(reader.next().await, Err(CodecError::Io(_))));
        let nonsense: &[u8] = &[0, 0, 0, 2, b'{', b'}'];
        let mut reader = FrameReader::<_, AgentMessage>::new(nonsense, AGENT_FRAME_BYTES_MAX);
        assert!(matches!(reader.next().await, Err(CodecError::Decode(_))));
    }
}
