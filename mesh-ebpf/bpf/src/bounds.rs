//! Proving to the verifier that a header lies inside a packet.

use core::arch::asm;

/// A pointer to a `T` at `offset` behind `start`, if it ends at or before `end`.
#[inline(always)]
pub fn at<T>(start: usize, end: usize, offset: usize) -> Option<*mut T> {
    let mut address = start + offset;
    // The verifier ties a check to the register that was checked. Without this, LLVM computes the address once for the
    // check and, reassociated, once more for the access.
    // (An empty template would give two lines of source to one instruction, which the kernel refuses.)
    // SAFETY: A register moved to itself.
    unsafe { asm!("{0} = {0}", inout(reg) address, options(pure, nomem, nostack, preserves_flags)) };
    (address + size_of::<T>() <= end).then_some(address as *mut T)
}
