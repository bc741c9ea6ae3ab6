//! Packets that no socket would send: from whatever address they claim to be, to whatever address, by whichever host.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv, sendto, socket,
};

/// An address of nobody here, of RFC 5737's for documentation.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// TCP's flags.
pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
const SYN_ACK: u8 = SYN | ACK;
const RST: u8 = 0x04;

/// Sends packets from the namespace that it was opened in.
pub(crate) struct Sender {
    v4: OwnedFd,
    v6: OwnedFd,
}

impl Sender {
    pub(crate) fn open() -> Result<Self> {
        let open = |family| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
        Ok(Self { v4: open(AddressFamily::Inet)?, v6: open(AddressFamily::Inet6)? })
    }

    /// Sends a packet to the host `by`, whatever addresses are in it; of an IPv4 header the kernel fills in the length, the
    /// identification and the checksum (raw(7)). False if the queue was full, and that one is lost.
    pub(crate) fn send(&self, packet: &[u8], by: impl Into<IpAddr>) -> Result<bool> {
        let none = MsgFlags::empty();
        let sent = match by.into() {
            IpAddr::V4(by) => {
                sendto(self.v4.as_raw_fd(), packet, &SockaddrIn::from(SocketAddrV4::new(by, 0)), none)
            }
            IpAddr::V6(by) => {
                sendto(self.v6.as_raw_fd(), packet, &SockaddrIn6::from(SocketAddrV6::new(by, 0, 0, 0)), none)
            }
        };
        match sent {
            Ok(_) => Ok(true),
            Err(Errno::ENOBUFS) => Ok(false),
            Err(error) => Err(error).context("sending a packet"),
        }
    }
}

/// IPv4 and TCP header of a segment without data.
pub(crate) fn segment(flags: u8, from: SocketAddrV4, to: SocketAddrV4) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[0] = 0x45;
    packet[8] = 64;
    packet[9] = 6;
    packet[12..16].copy_from_slice(&from.ip().octets());
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[20..22].copy_from_slice(&from.port().to_be_bytes());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[24..28].copy_from_slice(&from.ip().to_bits().rotate_left(7).to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, flags, 0xff, 0xff]);
    // Of the pseudo header: protocol and length; the addresses stand before the TCP header already.
    let words = packet[12..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum::<u32>() + 6 + 20;
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[36..38].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// What answered a scan.
#[derive(Debug, Default)]
pub(crate) struct Scanned {
    /// Ports that accept connections.
    pub(crate) open: Vec<u16>,
    /// How many ports refuse them.
    pub(crate) closed: usize,
}

/// Sends a SYN to every port of `target` by the host `by`, whether or not there is a route to it, and takes down what
/// `target` answers.
pub(crate) fn scan(from: SocketAddrV4, target: Ipv4Addr, by: Ipv4Addr) -> Result<Scanned> {
    let sender = Sender::open()?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let answers = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Tcp)?;
    let mut scanned = Scanned::default();
    let mut read = || {
        let mut packet = [0; 128];
        while let Ok(len) = recv(answers.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            if len < 40 || packet[12..16] != target.octets() || packet[22..24] != from.port().to_be_bytes() {
                continue;
            }
            match packet[33] & (SYN_ACK | RST) {
                SYN_ACK => scanned.open.push(u16::from_be_bytes([packet[20], packet[21]])),
                flags if flags & RST != 0 => scanned.closed += 1,
                _ => {}
            }
        }
    };
    for port in 1..=u16::MAX {
        sender.send(&segment(SYN, from, SocketAddrV4::new(target, port)), by)?;
        if port % 64 == 0 {
            read();
        }
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    read();
    scanned.open.sort_unstable();
    scanned.open.dedup();
    Ok(scanned)
}
