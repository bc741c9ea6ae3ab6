//! Shoal's packet logic: what happens to a packet at each of a node's hooks.
//!
//! Pure and `no_std`: packets and tables come in as traits ([`packet::Packet`], [`packet::Rewrite`],
//! [`tables::Tables`]), a [`verdict`] goes out. The BPF binary in `bpf/` adapts the traits to XDP and TC contexts and
//! to maps; host tests adapt them to byte vectors and hash maps. Nothing here knows aya, and nothing here redirects,
//! counts or looks up routes: that is what a verdict asks its caller for.
//!
//! | hook | function |
//! |---|---|
//! | XDP on an uplink | [`uplink::decide`], [`encap`] |
//! | TC on an uplink | [`uplink::from_uplink`] |
//! | TC on a task's veth | [`task::from_task`] |
//! | TC on the VXLAN device | [`overlay::from_overlay`] |
//! | TC on `shoal0p` | [`host::from_host`] |
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod answer;
pub mod arp;
pub mod balance;
#[cfg(any(test, feature = "alloc"))]
pub mod bytes;
pub mod checksum;
pub mod encap;
pub mod family;
pub mod flow;
pub mod fragment;
pub mod header;
pub mod hook;
pub mod host;
pub mod icmp;
pub mod mesh;
pub mod nack;
pub mod nat;
pub mod neighbor;
pub mod overlay;
pub mod packet;
pub mod parse;
pub mod refuse;
pub mod related;
pub mod socket;
pub mod tables;
pub mod task;
pub mod translation;
pub mod uplink;
pub mod verdict;

#[cfg(test)]
mod testing;
