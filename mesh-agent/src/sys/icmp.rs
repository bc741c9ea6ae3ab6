//! Raw ICMP sockets that hear nothing but echo replies.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, socket};

/// `ICMP_FILTER` of `SOL_RAW`, in linux/icmp.h: a bit for each type that is not heard.
const ICMP_FILTER: libc::c_int = 1;
/// `ICMPV6_FILTER` of `IPPROTO_ICMPV6`, in linux/icmpv6.h: likewise.
const ICMPV6_FILTER: libc::c_int = 1;
/// Types of echo replies (RFC 792, RFC 4443).
const ECHO_REPLY: u32 = 0;
const ECHO_REPLY6: u32 = 129;

/// A socket for ICMP messages of the address's family, which sends from this address and hears the echo replies to it; calls
/// on it don't wait. The kernel fills in an ICMPv6 message's checksum, and puts the IP header before an ICMP one.
///
/// It has the type of the standard library's whose calls it shares. The port of its addresses is 0. `EPERM` without `CAP_NET_RAW`,
/// `EADDRNOTAVAIL` where no interface has the address.
pub fn echo_socket(addr: IpAddr) -> io::Result<UdpSocket> {
    let (family, protocol) = match addr {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Raw, flags, protocol)?;
    match addr {
        IpAddr::V4(_) => set(&fd, libc::SOL_RAW, ICMP_FILTER, &[!(1 << ECHO_REPLY)])?,
        IpAddr::V6(_) => {
            let mut filter = [u32::MAX; 8];
            filter[ECHO_REPLY6 as usize / 32] &= !(1 << (ECHO_REPLY6 % 32));
            set(&fd, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &filter)?;
        }
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(addr, 0)))?;
    Ok(UdpSocket::from(fd))
}

fn set<const N: usize>(
    fd: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    words: &[u32; N],
) -> io::Result<()> {
    let (value, len) = (words.as_ptr().cast(), size_of_val(words) as libc::socklen_t);
    // SAFETY: the kernel reads no more than `len` bytes of the words, which live through the call.
    Errno::result(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value, len) })?;
    Ok(())
}
