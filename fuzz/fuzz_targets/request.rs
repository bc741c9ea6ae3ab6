//! The API's other bodies.

#![no_main]

use control::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzz::request(data);
});
