//! Backups of the state.

#![no_main]

use control::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzz::backup(data);
});
