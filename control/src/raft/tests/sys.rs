//! The kernel's randomness, as a seed says: tokio draws from it which of several tasks that wait for the same thing goes
//! first, and a simulation is to go the same way each time.
//!
//! The standard library takes `getrandom` from whoever defines it ("a weak symbol allows interposition"), and so do the
//! crates that ask for randomness. Threads without a seed get the kernel's.

use std::cell::Cell;
use std::ffi::{c_uint, c_void};
use std::io::Read as _;

thread_local! {
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From here on, what this thread is given at random follows from `seed`.
pub(super) fn seed(seed: u64) {
    SEED.set(Some(seed));
}

/// Takes libc's place.
// SAFETY: it has the signature and does what getrandom(2) does, for every buffer that is valid there.
#[unsafe(no_mangle)]
extern "C" fn getrandom(buffer: *mut c_void, length: usize, _: c_uint) -> isize {
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller has `length` bytes to be written there, and uses them for nothing else meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    match SEED.get() {
        Some(mut seed) => {
            for byte in bytes {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = (seed >> 56) as u8;
            }
            SEED.set(Some(seed));
        }
        None => match std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(bytes)) {
            Ok(()) => {}
            Err(_) => return -1,
        },
    }
    length.cast_signed()
}
