//! Pinned BPF links, where aya stops: another program in one of any kind, and detaching at once.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The first fields of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The fields of `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The field of `union bpf_attr` for `BPF_LINK_DETACH`.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// Puts `program` in the place of the one in the link that is pinned at `pin`: whatever comes meets the one or the
/// other. `ENOENT` without a pin, `ENOLINK` when what the link attached to is gone.
pub fn update_pinned(pin: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let link = pinned(pin)?;
    let update = LinkUpdate {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &update).map(drop)
}

/// Detaches the link that is pinned at `pin`. Without this, a link whose pin is removed is detached some time later, and
/// whoever attaches in its place meanwhile is refused. `ENOENT` without a pin, `EOPNOTSUPP` for a kind of link that can't.
pub fn detach_pinned(pin: &Path) -> io::Result<()> {
    let link = pinned(pin)?;
    bpf(BPF_LINK_DETACH, &LinkDetach { link_fd: link.as_raw_fd().cast_unsigned() }).map(drop)
}

/// The link, program or map that is pinned at a path.
fn pinned(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    let fd = RawFd::try_from(bpf(BPF_OBJ_GET, &get)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor, close-on-exec, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads no more than the given size, and what the attributes point to outlives the call.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) } {
        result if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_path_without_a_pin_is_not_found() {
        let file = File::open("/dev/null").unwrap();
        let error = update_pinned(Path::new("/no/such/pin"), file.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(detach_pinned(Path::new("/no/such/pin")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
