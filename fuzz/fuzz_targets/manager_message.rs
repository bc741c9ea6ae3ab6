//! What managers say to agents, and the tables that this leads to.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_api::fuzz;

fuzz_target!(|data: &[u8]| {
    fuzz::manager_message(data);
});
