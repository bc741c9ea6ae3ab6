//! Both families' parsers read a frame as other code reads it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_tests::mutate::targets;

fuzz_target!(|data: &[u8]| targets::parse(data));
