//! What a node says in its session, and what becomes of the state by it.

#![no_main]

use control::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzz::node(data);
});
