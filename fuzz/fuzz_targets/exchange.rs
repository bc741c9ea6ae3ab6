//! Requests to join and to come back, and their answers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_api::fuzz;

fuzz_target!(|data: &[u8]| {
    fuzz::exchange(data);
});
