//! Streams between the nodes of a [`Net`]: what is said arrives late but in order, stands still while a way is cut, and
//! the end of a process is heard of, or not.

use std::time::Duration;

use mesh_api::id::NodeId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split};
use tokio::time::sleep;

use super::net::{Fate, Net};

const BUFFER_BYTES: usize = 64 << 10;
/// How long until what was lost is sent again.
const RESEND: Duration = Duration::from_millis(200);
/// How long a node waits for another to take its connection.
const CONNECT: Duration = Duration::from_secs(1);

/// Both ends of a stream that `from` opens to `to`, if they hear each other.
pub(super) async fn connect(net: &Net, from: &NodeId, to: &NodeId) -> Option<(DuplexStream, DuplexStream)> {
    for (from, to) in [(from, to), (to, from)] {
        match net.fate(from, to) {
            Fate::Arrives { after, .. } => sleep(after).await,
            Fate::Lost => {
                sleep(CONNECT).await;
                return None;
            }
        }
    }
    let (near, near_end) = duplex(BUFFER_BYTES);
    let (far, far_end) = duplex(BUFFER_BYTES);
    let (near_read, near_write) = split(near_end);
    let (far_read, far_write) = split(far_end);
    let ages = net.ages(from, to);
    let way = |from: &NodeId, to: &NodeId| Way { net: net.clone(), from: from.clone(), to: to.clone(), ages };
    tokio::spawn(way(from, to).carry(near_read, far_write));
    tokio::spawn(way(to, from).carry(far_read, near_write));
    Some((near, far))
}

/// One direction of a stream.
struct Way {
    net: Net,
    from: NodeId,
    to: NodeId,
    ages: u64,
}

impl Way {
    async fn carry(self, mut read: ReadHalf<DuplexStream>, mut write: WriteHalf<DuplexStream>) {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = read.read(&mut buffer).await.unwrap_or(0);
            self.arrive().await;
            if count == 0 {
                let _ = write.shutdown().await;
                return;
            }
            if write.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    }

    /// Returns when what was sent is there.
    async fn arrive(&self) {
        loop {
            if self.net.ages(&self.from, &self.to) != self.ages {
                // One of the hosts forgot the stream, and the other is not told.
                return std::future::pending().await;
            }
            match self.net.fate(&self.from, &self.to) {
                Fate::Arrives { after, .. } => return sleep(after).await,
                Fate::Lost => sleep(RESEND).await,
            }
        }
    }
}
