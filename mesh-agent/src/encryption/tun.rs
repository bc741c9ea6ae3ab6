//! The user-space device's end of its link: IP packets of any size that the link may carry, read several at a time.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::sync::Arc;

use gotatun::packet::{Ip, Packet, PacketBufPool};
use gotatun::tun::{IpRecv, IpSend, MtuWatcher};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::sys::tun;

/// Packets that are read before they are passed on.
const READ_MAX: usize = 32;

/// A TUN device, for as long as one of its clones lives.
#[derive(Clone)]
pub(super) struct Tun {
    file: Arc<AsyncFd<File>>,
    mtu: watch::Receiver<u16>,
}

impl Tun {
    /// Makes the link `name`. `mtu` is to follow the link's.
    pub(super) fn open(name: &str, mtu: watch::Receiver<u16>) -> io::Result<Self> {
        Ok(Self { file: Arc::new(tun::open(name)?), mtu })
    }
}

impl IpSend for Tun {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        let bytes = packet.into_bytes();
        let write = |mut file: &File| file.write(&bytes).map(drop);
        self.file.async_io(Interest::WRITABLE, write).await
    }
}

impl IpRecv for Tun {
    async fn recv<'a>(
        &'a mut self,
        pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        // The MTU may be another one by the time that there is something to read.
        let read = |file: &File| read_several(file, usize::from(*self.mtu.borrow()), pool);
        let packets = self.file.async_io(Interest::READABLE, read).await?;
        // What is no IP packet has nowhere to go.
        Ok(packets.into_iter().filter_map(|packet| packet.try_into_ip().ok()))
    }

    fn mtu(&self) -> MtuWatcher {
        self.mtu.clone().into()
    }
}

/// Reads what there is, at least one packet. The pool's buffers are too small for large MTUs.
fn read_several(mut file: &File, mtu: usize, pool: &PacketBufPool) -> io::Result<Vec<Packet>> {
    let mut packets = Vec::new();
    while packets.len() < READ_MAX {
        let mut packet = pool.get();
        if packet.len() < mtu {
            packet.buf_mut().resize(mtu, 0);
        }
        match file.read(&mut packet) {
            Ok(len) => packet.truncate(len),
            Err(_) if !packets.is_empty() => break,
            Err(error) => return Err(error),
        }
        packets.push(packet);
    }
    Ok(packets)
}
