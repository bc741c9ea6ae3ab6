//! Resolvers' answers, as tasks get them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::fuzz;

fuzz_target!(|data: &[u8]| {
    fuzz::dns_answer(data);
});
