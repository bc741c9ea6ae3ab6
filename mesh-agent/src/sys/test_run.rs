//! BPF_PROG_TEST_RUN: a loaded program, run once on a packet that is on no wire.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// `BPF_PROG_TEST_RUN` of `enum bpf_cmd` in linux/bpf.h.
const PROG_TEST_RUN: libc::c_long = 10;
/// By how much a program may lengthen a packet, bytes: more than two layers of headers.
const GROWTH_MAX: usize = 512;
/// Bytes of `struct __sk_buff`, and where its `ifindex` is.
const SKB_LEN: usize = 192;
const SKB_IFINDEX: usize = 40;
/// Bytes of `struct xdp_md`, and where its `data_end` and `ingress_ifindex` are.
const XDP_LEN: usize = 24;
const XDP_DATA_END: usize = 4;
const XDP_INGRESS_IFINDEX: usize = 12;

/// The anonymous struct of `union bpf_attr` for test runs.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    reserved: u32,
}

/// What a program left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Its return value.
    pub code: u32,
    /// The packet.
    pub output: Vec<u8>,
}

/// Runs a TC program on `packet`, an Ethernet frame, as if it came in by `ifindex`. What the program returns is not
/// carried out, but what it writes to maps stays.
pub fn run_tc(program: BorrowedFd<'_>, packet: &[u8], ifindex: u32) -> io::Result<Ran> {
    let mut context = [0; SKB_LEN];
    context[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    run(program, packet, &context)
}

/// The same for an XDP program. The kernel takes only interfaces that have XDP in their driver; for others the packet
/// comes in by the loopback, and the second value is `false`.
pub fn run_xdp(program: BorrowedFd<'_>, packet: &[u8], ifindex: u32) -> io::Result<(Ran, bool)> {
    let mut context = [0; XDP_LEN];
    context[XDP_DATA_END..XDP_DATA_END + 4].copy_from_slice(&(packet.len() as u32).to_ne_bytes());
    context[XDP_INGRESS_IFINDEX..XDP_INGRESS_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    match run(program, packet, &context) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            run(program, packet, &[]).map(|ran| (ran, false))
        }
        ran => ran.map(|ran| (ran, true)),
    }
}

fn run(program: BorrowedFd<'_>, packet: &[u8], context: &[u8]) -> io::Result<Ran> {
    let mut output = vec![0_u8; packet.len() + GROWTH_MAX];
    let mut attr = TestAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_size_in: packet.len() as u32,
        data_size_out: output.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: output.as_mut_ptr() as u64,
        ctx_size_in: context.len() as u32,
        ctx_in: if context.is_empty() { 0 } else { context.as_ptr() as u64 },
        ..TestAttr::default()
    };
    let attr_ptr = std::ptr::from_mut(&mut attr);
    // SAFETY: the kernel reads the packet and the context, and writes to the output and the attribute, each within the
    // size it is told; all live through the call.
    if unsafe { libc::syscall(libc::SYS_bpf, PROG_TEST_RUN, attr_ptr, size_of::<TestAttr>()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    output.truncate(attr.data_size_out as usize);
    Ok(Ran { code: attr.retval, output })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn what_is_no_program_does_not_run() {
        let file = File::open("/dev/null").unwrap();
        assert!(run_tc(file.as_fd(), &[0; 64], 1).is_err());
        assert!(run_xdp(file.as_fd(), &[0; 64], 1).is_err());
    }
}
