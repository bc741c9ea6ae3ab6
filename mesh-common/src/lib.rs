//! The ABI between Shoal's BPF programs and its user space: map keys and values, constants, counters, the flow hash.
//!
//! Everything here is `no_std` and shared by the programs in the kernel, the packet library and the agent. It knows
//! neither maps nor packets nor serde: only the layout of what the two sides exchange, declared once.
//!
//! Layout rules: `#[repr(C)]`, no implicit padding (zerocopy's derives refuse it), no `bool`, enum, `Option` or
//! `usize` inside. A change of layout needs a new [`ABI_VERSION`]; `cargo xtask tidy` holds it to that.
#![no_std]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]

pub mod addr;
pub mod be;
pub mod counter;
pub mod hash;
pub mod map;
pub mod vxlan;

/// Version of the layout of everything in [`map`], part of the pin path: maps of another version are not reused.
pub const ABI_VERSION: u32 = 3;
