//! A BPF ring buffer, waited for by tokio.

use std::io;

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

/// Has tokio tell when there is something in the ring. To be called inside a tokio runtime.
pub fn watch(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: The ring owns its map, whose descriptor stays the same and open until it is dropped.
    Ok(unsafe { AsyncFd::register(ring) }?)
}
