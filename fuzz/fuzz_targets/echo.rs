//! Replies to echo requests.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::fuzz;

fuzz_target!(|data: &[u8]| {
    fuzz::echo(data);
});
