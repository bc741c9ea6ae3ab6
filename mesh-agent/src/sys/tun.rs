//! TUN devices: network interfaces whose packets this process reads and writes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

/// The fields of `struct ifreq` for `TUNSETIFF`.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

/// Makes a TUN device called `name` in the calling thread's network namespace, or takes the one that nobody has open.
/// Each read of what it returns is an IP packet that leaves by the device, each write one that comes in. The device goes
/// with it. To be called inside a tokio runtime. `EBUSY` if somebody has it, `ENOENT` where the kernel has none or there is no /dev/net/tun,
/// `EINVAL` for a name that is too long or another kind of device's.
pub fn open(name: &str) -> io::Result<AsyncFd<File>> {
    let mut request = IfReq {
        name: [0; libc::IFNAMSIZ],
        flags: (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short,
        padding: [0; 22],
    };
    // The last byte stays zero.
    let room = request.name[..libc::IFNAMSIZ - 1].get_mut(..name.len()).ok_or(Errno::EINVAL)?;
    room.copy_from_slice(name.as_bytes());
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: the kernel reads and writes no more than a `struct ifreq`, whose size the request has.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    // SAFETY: the file owns its descriptor, which is open and the same one until it is dropped.
    Ok(unsafe { AsyncFd::register(file) }?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{in_netns, run};

    const _: () = assert!(size_of::<IfReq>() == size_of::<libc::ifreq>());

    #[test]
    fn a_device_is_there_for_as_long_as_it_is_open() {
        in_netns(|| async {
            let device = open("tun-test").unwrap();
            assert!(run("ip link show tun-test").contains("tun-test"));
            assert_eq!(open("tun-test").unwrap_err().raw_os_error(), Some(libc::EBUSY));
            assert_eq!(open("a-name-too-long-").unwrap_err().raw_os_error(), Some(libc::EINVAL));
            drop(device);
            assert!(!run("ip link").contains("tun-test"));
        });
    }
}
