//! Proving to the verifier that a header lies inside a packet.

use core::arch::asm;

/// Where the last header that is looked at may begin: behind the longest chain of IPv6 extension headers.
const OFFSET_MAX: usize = 0x3fff;

/// A pointer to a `T` at `offset` behind `start`, if it ends at or before `end`.
#[inline(always)]
pub fn at<T>(start: usize, end: usize, offset: usize) -> Option<*mut T> {
    // An offset that comes out of a map may be anything, as far as the verifier knows.
    if offset > OFFSET_MAX {
        return None;
    }
    let mut offset = offset;
    // Linux 7.2 follows branches that no offset takes, once it has compared one with this and with that, and refuses what it
    // finds there. An AND gives it back a range that has members. (LLVM would leave out one that changes nothing.)
    // SAFETY: A register, to which this does nothing.
    unsafe { asm!("{0} &= 0x3fff", inout(reg) offset, options(pure, nomem, nostack)) };
    let mut address = start + offset;
    // The verifier ties a check to the register that was checked. Without this, LLVM computes the address once for the
    // check and, reassociated, once more for the access.
    // (An empty template would give two lines of source to one instruction, which the kernel refuses.)
    // SAFETY: A register moved to itself.
    unsafe { asm!("{0} = {0}", inout(reg) address, options(pure, nomem, nostack, preserves_flags)) };
    (address + size_of::<T>() <= end).then_some(address as *mut T)
}

/// The same number, of which LLVM knows no more than the verifier does: neither drops a check that the other one needs.
#[inline(always)]
pub fn forgotten(mut number: u32) -> u32 {
    // SAFETY: A register moved to itself.
    unsafe { asm!("{0} = {0}", inout(reg) number, options(pure, nomem, nostack, preserves_flags)) };
    number
}

/// A value as it lies in a packet: Ethernet headers begin at even addresses, so everything behind them does.
#[derive(Clone, Copy)]
#[repr(C, packed(2))]
struct Even<T>(T);

/// Reads the `T` at `from`, two bytes at a time rather than one.
///
/// # Safety
/// `from` is inside a packet, as [`at`] proves, and any bytes are a `T`.
#[inline(always)]
pub unsafe fn read<T: Copy>(from: *const T) -> T {
    // SAFETY: By the caller.
    let Even(value) = unsafe { from.cast::<Even<T>>().read() };
    value
}

/// Writes `value` to `to`, two bytes at a time rather than one.
///
/// # Safety
/// `to` is inside a packet, as [`at`] proves, and nobody else has it.
#[inline(always)]
pub unsafe fn write<T: Copy>(to: *mut T, value: T) {
    // SAFETY: By the caller.
    unsafe { to.cast::<Even<T>>().write(Even(value)) };
}
