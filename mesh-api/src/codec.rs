//! Frames on a stream: a big-endian `u32` length, then that many bytes of JSON.
//!
//! Lengths are bounded by the receiver before anything is allocated, so a peer can't make it hold more than the
//! bound it chose.

use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};

/// Longest frame on a stream by which a host joins, bytes: nobody has proved anything on it.
pub const JOIN_FRAME_BYTES_MAX: u32 = 64 << 10;
/// Longest frame that a manager takes from an agent, bytes.
pub const AGENT_FRAME_BYTES_MAX: u32 = 1 << 20;
/// Longest frame that an agent takes from a manager, bytes: a snapshot of 100,000 tasks is about 40 MB, and more where
/// each is on several networks.
pub const MANAGER_FRAME_BYTES_MAX: u32 = 256 << 20;
/// What is given to a stream at once, bytes, where a message comes in small pieces.
const WRITE_BYTES: usize = 16 << 10;

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
    received: Arc<AtomicU64>,
    message: PhantomData<fn() -> T>,
}

impl<R: AsyncRead + Unpin, T: DeserializeOwned> FrameReader<R, T> {
    /// Reads from `stream`, refusing frames longer than `frame_bytes_max`.
    pub fn new(stream: R, frame_bytes_max: u32) -> Self {
        Self { stream, frame_bytes_max, received: Arc::default(), message: PhantomData }
    }

    /// How many bytes of messages have come so far: more of them are a sign of life before the message is whole.
    pub fn received(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.received)
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
        let mut rest = (&mut self.stream).take(u64::from(len));
        while rest.limit() > 0 {
            let read = rest.read_buf(&mut body).await?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.received.fetch_add(read as u64, Ordering::Relaxed);
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
        let body = serde_json::to_vec(message).map_err(CodecError::Encode)?;
        self.send_pieces(std::iter::once(&body[..])).await
    }

    /// Writes the pieces that one encoded message consists of, and flushes it. They are not brought together in memory: what
    /// many peers are sent is there once.
    pub async fn send_pieces<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), CodecError> {
        let len = u32::try_from(pieces.clone().map(<[u8]>::len).sum::<usize>())
            .map_err(|_| CodecError::TooLong { len: u32::MAX, max: MANAGER_FRAME_BYTES_MAX })?;
        let capacity = WRITE_BYTES.min(4 + len as usize);
        let mut stream = BufWriter::with_capacity(capacity, &mut self.stream);
        stream.write_all(&len.to_be_bytes()).await?;
        for piece in pieces {
            stream.write_all(piece).await?;
        }
        stream.flush().await?;
        Ok(())
    }

    /// Says that nothing more comes.
    pub async fn finish(&mut self) -> Result<(), CodecError> {
        Ok(self.stream.shutdown().await?)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;
    use serde_json::value::to_raw_value;

    use super::*;
    use crate::session::{
        AgentMessage, EncodedDelta, JoinAnswer, JoinRequest, ManagerMessage, NodeDescription,
    };
    use crate::table::{Change, Delta};

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
    async fn a_message_may_come_in_pieces_of_any_length() {
        let (a, b) = tokio::io::duplex(64);
        let sent = JoinRequest { csr: "c".repeat(3 * WRITE_BYTES), ..join_request() };
        let body = serde_json::to_vec(&sent).unwrap();
        let (small, rest) = body.split_at(WRITE_BYTES / 2);
        let mut pieces: Vec<Vec<u8>> = small.chunks(7).map(<[u8]>::to_vec).collect();
        pieces.extend([Vec::new(), rest.to_vec()]);
        let writing = tokio::spawn(async move {
            let mut writer = FrameWriter::<_, JoinRequest>::new(a);
            writer.send_pieces(pieces.iter().map(Vec::as_slice)).await
        });
        let mut reader = FrameReader::<_, JoinRequest>::new(b, JOIN_FRAME_BYTES_MAX);
        assert_eq!(reader.next().await.unwrap(), Some(sent));
        writing.await.unwrap().unwrap();
        assert!(reader.next().await.unwrap().is_none());
    }

    #[test]
    fn a_delta_of_encoded_changes_is_a_message() {
        let changes = [Change::NodeRemoved("n1".into()), Change::ServiceRemoved("s".into())];
        for count in 0..=changes.len() {
            let encoded =
                changes[..count].iter().map(|change| to_raw_value(change).unwrap()).collect::<Vec<_>>();
            let delta = EncodedDelta::new(3, 7, encoded.iter().map(|change| &**change).collect()).unwrap();
            let bytes: Vec<u8> = delta.pieces().flatten().copied().collect();
            let delta = Delta { from: 3, to: 7, changes: changes[..count].to_vec() };
            assert_eq!(bytes, serde_json::to_vec(&ManagerMessage::Delta { delta }).unwrap());
        }
    }

    fn join_request() -> JoinRequest {
        let node = NodeDescription {
            hostname: "n1".to_owned(),
            addr: Ipv4Addr::LOCALHOST.into(),
            vtep: Ipv4Addr::LOCALHOST.into(),
            os: "linux".to_owned(),
            architecture: "x86_64".to_owned(),
            nano_cpus: 1_000_000_000,
            memory_bytes: 1 << 30,
            version: "0.1.0".to_owned(),
            labels: vec![("a".to_owned(), "b".to_owned())],
            dataplane: "eth0=tc".to_owned(),
            routes: Vec::new(),
            wireguard: Vec::new(),
            addresses: Vec::new(),
            manager: None,
        };
        JoinRequest { protocol: 1, token: "SWMTKN-1-x-y".to_owned(), csr: "csr".to_owned(), node }
    }

    /// Reads `bytes` as frames of `T`, to the first error or the end.
    async fn read_all<T: DeserializeOwned>(bytes: &[u8]) {
        let mut reader = FrameReader::<_, T>::new(bytes, JOIN_FRAME_BYTES_MAX);
        while matches!(reader.next().await, Ok(Some(_))) {}
    }

    fn read_as_every_message(bytes: &[u8]) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            read_all::<JoinRequest>(bytes).await;
            read_all::<JoinAnswer>(bytes).await;
            read_all::<AgentMessage>(bytes).await;
            read_all::<ManagerMessage>(bytes).await;
        });
    }

    fn framed(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32).to_be_bytes(), body].concat()
    }

    #[tokio::test]
    async fn what_has_come_of_a_message_shows_before_it_is_whole() {
        let (mut a, b) = tokio::io::duplex(1024);
        let mut reader = FrameReader::<_, AgentMessage>::new(b, AGENT_FRAME_BYTES_MAX);
        let received = reader.received();
        let body = serde_json::to_vec(&AgentMessage::Applied { index: 7 }).unwrap();
        let (first, rest) = body.split_at(5);
        a.write_u32(u32::try_from(body.len()).unwrap()).await.unwrap();
        a.write_all(first).await.unwrap();
        let reading = tokio::spawn(async move { reader.next().await });
        while received.load(Ordering::Relaxed) < 5 {
            tokio::task::yield_now().await;
        }
        assert!(!reading.is_finished());
        a.write_all(rest).await.unwrap();
        assert_eq!(reading.await.unwrap().unwrap(), Some(AgentMessage::Applied { index: 7 }));
        assert_eq!(received.load(Ordering::Relaxed), body.len() as u64);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            read_as_every_message(&bytes);
            read_as_every_message(&framed(&bytes));
        }

        #[test]
        fn no_change_of_a_message_makes_a_reader_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let resume = AgentMessage::Resume { protocol: 1, node: join_request().node, index: Some(7) };
            for mut body in [serde_json::to_vec(&join_request()).unwrap(), serde_json::to_vec(&resume).unwrap()] {
                for (at, byte) in &changes {
                    let at = at.index(body.len());
                    body[at] = *byte;
                }
                read_as_every_message(&framed(&body));
            }
        }
    }

    #[test]
    fn a_request_to_join_hides_its_token() {
        let shown = format!("{:?}", join_request());
        assert!(shown.contains("n1") && !shown.contains("SWMTKN"), "{shown}");
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
