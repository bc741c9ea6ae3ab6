//! The clock that BPF programs read.

use std::time::Duration;

/// Seconds of the monotonic clock.
pub fn monotonic_s() -> u32 {
    monotonic().as_secs() as u32
}

/// The monotonic clock. Programs read it a few ms late.
pub fn monotonic() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which lives through the call. It can't fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned() as u32)
}
