//! Join tokens.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_api::fuzz;

fuzz_target!(|data: &[u8]| {
    fuzz::token(data);
});
