//! The harness of Shoal's tests.

pub mod bench;
pub mod mutate;
pub mod packet;
