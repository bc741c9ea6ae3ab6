//! Networks and subnets, as the API has them, read and applied.

#![no_main]

use control::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzz::network(data);
});
