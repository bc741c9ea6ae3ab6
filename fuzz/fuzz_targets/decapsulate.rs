//! A frame at XDP, where VXLAN is unpacked, ends as every packet must.

#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_tests::mutate::targets;

fuzz_target!(|data: &[u8]| targets::decapsulate(data));
