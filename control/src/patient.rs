//! A stream whose peer may keep its side waiting for so long, and no longer.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A stream that fails where its peer says nothing, or takes nothing, for too long.
pub(crate) struct Patient<S> {
    stream: S,
    reading: Option<Wait>,
    writing: Wait,
    told: Option<Box<dyn FnMut(Turn) + Send>>,
}

/// Whose turn it is on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The peer's: it was listened to, and has said nothing more.
    Theirs,
    /// Ours: the peer has taken all that was written.
    Ours,
}

impl<S> Patient<S> {
    /// Gives a peer up that takes nothing of what is written for `taking`.
    pub(crate) fn new(stream: S, taking: Duration) -> Self {
        Self { stream, reading: None, writing: Wait::new(taking), told: None }
    }

    /// Gives it up as well where it says nothing for `saying` while it is listened to.
    #[must_use]
    pub(crate) fn hearing_within(self, saying: Duration) -> Self {
        Self { reading: Some(Wait::new(saying)), ..self }
    }

    /// Tells `told` each time that it turns out whose turn it is.
    #[must_use]
    pub(crate) fn telling(self, told: impl FnMut(Turn) + Send + 'static) -> Self {
        Self { told: Some(Box::new(told)), ..self }
    }

    fn tell(&mut self, turn: Turn) {
        if let Some(told) = &mut self.told {
            told(turn);
        }
    }
}

/// How long something may not be ready, and since when it isn't.
struct Wait {
    limit: Duration,
    end: Option<Pin<Box<Sleep>>>,
}

impl Wait {
    fn new(limit: Duration) -> Self {
        Self { limit, end: None }
    }

    /// What was polled, or that it took too long.
    fn bound<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.end = None;
            return polled;
        }
        let end = self.end.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        ready!(end.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if polled.is_pending() {
            self.tell(Turn::Theirs);
        }
        match &mut self.reading {
            Some(wait) => wait.bound(cx, polled),
            None => polled,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.writing.bound(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.writing.bound(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        let flushed = ready!(self.writing.bound(cx, polled));
        if flushed.is_ok() {
            self.tell(Turn::Ours);
        }
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.writing.bound(cx, polled)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        let (ours, mut theirs) = duplex(16);
        let mut stream = Patient::new(ours, LIMIT);
        let slow = async {
            let mut read = [0; 100];
            for piece in read.chunks_mut(10) {
                tokio::time::sleep(LIMIT / 2).await;
                theirs.read_exact(piece).await.unwrap();
            }
            theirs
        };
        let (written, theirs) = tokio::join!(stream.write_all(&[7; 100]), slow);
        written.unwrap();
        let began = Instant::now();
        let error = stream.write_all(&[7; 100]).await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), (io::ErrorKind::TimedOut, LIMIT));
        drop(theirs);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_is_given_up_where_that_is_asked_for() {
        let (ours, mut theirs) = duplex(16);
        let mut stream = Patient::new(ours, LIMIT).hearing_within(LIMIT);
        let slow = async {
            for _ in 0..10 {
                tokio::time::sleep(LIMIT / 2).await;
                theirs.write_u8(7).await.unwrap();
            }
            theirs
        };
        let mut read = [0; 10];
        let (read, theirs) = tokio::join!(stream.read_exact(&mut read), slow);
        assert_eq!(read.unwrap(), 10);
        let began = Instant::now();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), (io::ErrorKind::TimedOut, LIMIT));
        let (ours, mut silent) = duplex(16);
        let mut stream = Patient::new(ours, LIMIT);
        let late = async {
            tokio::time::sleep(3 * LIMIT).await;
            silent.write_u8(7).await.unwrap();
        };
        assert_eq!(tokio::join!(stream.read_u8(), late).0.unwrap(), 7);
        drop(theirs);
    }
}
