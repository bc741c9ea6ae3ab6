//! Tasks' questions to the name server.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::fuzz;

fuzz_target!(|data: &[u8]| {
    fuzz::dns_question(data);
});
