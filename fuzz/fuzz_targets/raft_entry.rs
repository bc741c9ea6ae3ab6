//! An entry of the log, kept, read and applied.

#![no_main]

use control::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzz::raft_entry(data);
});
