//! A frame at any hook of the fixtures' worlds ends as every packet must.

#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_tests::mutate::targets;

fuzz_target!(|data: &[u8]| targets::hooks(data));
