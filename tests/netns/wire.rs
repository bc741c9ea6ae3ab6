//! An interface's own frames: sent as they are, past the sender's stack, and heard as they come.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recvfrom,
    send, socket,
};

use crate::lab::within;

/// `PACKET_OUTGOING` of packet(7): a frame that this host sends.
const OUTGOING: u8 = 4;

/// A packet socket at an interface.
pub(crate) struct Wire(OwnedFd);

impl Wire {
    /// At the interface with this address, in the network namespace behind a file.
    pub(crate) fn open(namespace: &Path, address: Ipv4Addr) -> Result<Self> {
        within(namespace, || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
            bind(fd.as_raw_fd(), &link_of(address)?).context("binding a packet socket")?;
            Ok(Self(fd))
        })
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty()).context("sending a frame")?;
        Ok(())
    }

    /// How many frames that `is_wanted` have come since it was asked last.
    pub(crate) fn heard(&self, mut is_wanted: impl FnMut(&[u8]) -> bool) -> Result<usize> {
        let mut frame = vec![0; 65_536];
        let mut heard = 0;
        loop {
            match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut frame) {
                Ok((len, from)) => {
                    let came = from.is_none_or(|from| from.pkttype() != OUTGOING);
                    heard += usize::from(came && is_wanted(&frame[..len]));
                }
                Err(Errno::EAGAIN) => return Ok(heard),
                Err(error) => return Err(error).context("hearing frames"),
            }
        }
    }
}

/// Whether a frame holds `mark` anywhere.
pub(crate) fn holds(frame: &[u8], mark: &[u8]) -> bool {
    frame.windows(mark.len()).any(|part| part == mark)
}

/// The link-layer address of the interface with `address`, in the thread's namespace.
fn link_of(address: Ipv4Addr) -> Result<SockaddrStorage> {
    let has_address = |found: &SockaddrStorage| {
        found.as_sockaddr_in().is_some_and(|found| IpAddr::from(found.ip()) == IpAddr::from(address))
    };
    let all: Vec<_> = getifaddrs()?.collect();
    let interface = all.iter().find(|found| found.address.as_ref().is_some_and(has_address));
    let name = &interface.with_context(|| format!("no interface has {address}"))?.interface_name;
    let link = |found: &SockaddrStorage| found.as_link_addr().is_some();
    let found =
        all.iter().find(|found| found.interface_name == *name && found.address.as_ref().is_some_and(link));
    found.and_then(|found| found.address).with_context(|| format!("{name} is no link"))
}
