//! The flow hash: which place of a service's Maglev table a flow looks at.
//!
//! Every node computes the same value from the same tuple and the cluster's seed, so it is part of the ABI. The
//! mixing steps are MurmurHash3's 64-bit finaliser (public domain); the seed is the cluster's secret, so that an
//! outsider can't aim at one backend.

use crate::addr::Address;
use crate::be::Be16;

/// What a flow is, on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuple<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port.
    pub src_port: Be16,
    /// Destination port.
    pub dst_port: Be16,
    /// IP protocol number.
    pub protocol: u8,
}

impl<A: Address> Tuple<A> {
    /// The flow of the packets the other way.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        let Self { src, dst, src_port, dst_port, protocol } = *self;
        Self { src: dst, dst: src, src_port: dst_port, dst_port: src_port, protocol }
    }
}

/// Hash of a flow's tuple under `seed`.
#[inline(always)]
pub fn flow_hash<A: Address>(tuple: &Tuple<A>, seed: u64) -> u32 {
    let ports =
        (tuple.src_port.get() as u64) << 24 | (tuple.dst_port.get() as u64) << 8 | tuple.protocol as u64;
    (mix(tuple.dst.mixed(tuple.src.mixed(seed)) ^ ports) >> 32) as u32
}

/// Hash of a flow's client alone under `seed`, where all of its flows are to get one backend.
#[inline(always)]
pub fn client_hash<A: Address>(tuple: &Tuple<A>, seed: u64) -> u32 {
    (mix(tuple.src.mixed(seed)) >> 32) as u32
}

/// A place in a table of `len` entries for `hash`: multiply and shift, without a division.
#[inline(always)]
pub const fn place(hash: u32, len: u32) -> u32 {
    ((hash as u64 * len as u64) >> 32) as u32
}

/// What spreads a flow's tunnel packets over the underlay's paths: cheap, and the same for all of the flow's packets.
#[inline(always)]
pub fn path_entropy<A: Address>(tuple: &Tuple<A>) -> u16 {
    const GOLDEN_RATIO: u32 = 0x9e37_79b1;
    let ports = (tuple.src_port.get() as u32) << 16 | tuple.dst_port.get() as u32;
    ((tuple.src.folded() ^ tuple.dst.folded().rotate_left(16) ^ ports).wrapping_mul(GOLDEN_RATIO) >> 16)
        as u16
}

/// Another port for the client's end of a flow with `hash`, for the `attempt`th time: none below 1024.
#[inline(always)]
pub const fn other_port(hash: u32, attempt: u32) -> u16 {
    const UNPRIVILEGED: u64 = 1024;
    let choice = mix(hash as u64 | (attempt as u64 + 1) << 32) >> 32;
    (UNPRIVILEGED + ((choice * (u16::MAX as u64 + 1 - UNPRIVILEGED)) >> 32)) as u16
}

/// MurmurHash3's 64-bit finaliser.
#[inline(always)]
pub const fn mix(mut value: u64) -> u64 {
    value ^= value >> 33;
    value = value.wrapping_mul(0xff51_afd7_ed55_8ccd);
    value ^= value >> 33;
    value = value.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::be::Be32;

    fn tuple(src_port: u16) -> Tuple<Be32> {
        Tuple {
            src: Be32::ipv4(198, 51, 100, 7),
            dst: Be32::ipv4(192, 0, 2, 1),
            src_port: Be16::new(src_port),
            dst_port: Be16::new(8080),
            protocol: 6,
        }
    }

    #[test]
    fn consecutive_source_ports_spread_evenly_over_seven_places() {
        let mut counts = [0_u32; 7];
        for port in 1024..=u16::MAX {
            counts[place(flow_hash(&tuple(port), 42), 7) as usize] += 1;
        }
        let mean = (u16::MAX - 1023) as u32 / 7;
        assert!(counts.iter().all(|count| count.abs_diff(mean) < mean / 20), "{counts:?}");
    }

    #[test]
    fn consecutive_source_ports_take_different_paths() {
        let paths: std::collections::BTreeSet<u16> =
            (1024..2048).map(|port| path_entropy(&tuple(port)) & 0x3fff).collect();
        assert!(paths.len() > 900, "{}", paths.len());
    }

    #[test]
    fn other_ports_differ_and_are_unprivileged() {
        for hash in 0..10_000 {
            let ports = [0, 1, 2, 3].map(|attempt| other_port(hash * 429_496, attempt));
            assert!(ports.iter().all(|port| *port >= 1024));
            assert!(ports.windows(2).any(|pair| pair[0] != pair[1]));
        }
    }

    #[test]
    fn the_seed_changes_the_hash() {
        assert_ne!(flow_hash(&tuple(1024), 1), flow_hash(&tuple(1024), 2));
    }

    #[test]
    fn a_place_is_inside_the_table() {
        for len in [1, 2, 251, 65_521] {
            assert_eq!(place(0, len), 0);
            assert_eq!(place(u32::MAX, len), len - 1);
        }
    }
}
