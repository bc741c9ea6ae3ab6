//! The harness of Shoal's tests.

pub mod bench;
pub mod packet;
