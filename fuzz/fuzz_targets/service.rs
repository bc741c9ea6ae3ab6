//! Services' specs, as the API has them: read, shown, read again, and applied.

#![no_main]

use control::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzz::service(data);
});
