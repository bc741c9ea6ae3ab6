//! What other nodes say of tasks that are not there: the programs' ring of negative acknowledgements.

use std::io;
use std::path::Path;

use aya::maps::{MapData, RingBuf};
use mesh_common::map::Nack;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use zerocopy::FromBytes as _;

use super::error::DataplaneError;
use super::map::open_ring;
use super::plan::AttachmentKey;
use crate::sys::ring;

/// The ring, under its pin.
const NACKS: &str = "shoal_nacks";
/// How many may wait for who hears them; the rest waits in the ring.
const WAITING: usize = 64;

/// Follows the ring of the maps in `folder` until the receiver is dropped. To be called inside a tokio runtime.
pub fn follow(folder: &Path) -> Result<mpsc::Receiver<AttachmentKey>, DataplaneError> {
    let ring = open_ring(folder, NACKS)?;
    let failed = |source| DataplaneError::MapAccess { name: NACKS, operation: "waiting for", source };
    let ring = ring::watch(ring).map_err(failed)?;
    let (sender, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = read(ring, &sender) => ended,
            () = sender.closed() => Ok(()),
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "other nodes' word of tasks that are gone is not heard any more");
        }
    });
    Ok(receiver)
}

async fn read(mut ring: AsyncFd<RingBuf<MapData>>, sender: &mpsc::Sender<AttachmentKey>) -> io::Result<()> {
    loop {
        let mut ready = ring.readable_mut().await?;
        while let Some(key) = ready.get_inner_mut().next().map(|item| key_of(&item)) {
            let Some(key) = key else { continue };
            if sender.send(key).await.is_err() {
                return Ok(());
            }
        }
        ready.clear_ready();
    }
}

fn key_of(item: &[u8]) -> Option<AttachmentKey> {
    let (Nack { incarnation, vni }, _) = Nack::read_from_prefix(item).ok()?;
    Some(AttachmentKey { incarnation, vni })
}
