//! The harness of Shoal's tests.

pub mod packet;
