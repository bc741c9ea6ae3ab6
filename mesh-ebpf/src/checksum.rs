//! The internet checksum (RFC 1071), whole and by difference (RFC 1624).

use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};

use crate::header::Ipv4;

/// A one's complement sum of 16-bit words, as they lie in memory: the sum does not depend on the byte order, as long
/// as each word begins at an even offset of what is summed. Holds some billion words without overflow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[must_use]
pub struct Sum(u64);

impl Sum {
    /// Of 4 `N` bytes. A header becomes them by `zerocopy::transmute!`.
    #[inline(always)]
    pub fn of<const N: usize>(words: [u32; N]) -> Self {
        let mut sum = 0;
        for word in words {
            sum += u64::from(word);
        }
        Self(sum)
    }

    /// With what `other` sums.
    #[inline(always)]
    pub fn and(self, other: impl Into<Self>) -> Self {
        Self(self.0 + other.into().0)
    }

    /// As if `word` were zero where it was summed.
    #[inline(always)]
    pub const fn without(self, word: Be16) -> Self {
        Self(self.0 + !word.raw() as u64)
    }

    /// Folded to 16 bits, with the carries added back.
    #[inline(always)]
    pub const fn folded(self) -> Be16 {
        let halves = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (halves & 0xffff) + (halves >> 16);
        Be16::from_bytes(fold(sum as u32).to_ne_bytes())
    }

    /// The checksum of what was summed, the checksum's own place having counted as zero.
    #[inline(always)]
    pub const fn checksum(self) -> Be16 {
        Be16::from_bytes((!self.folded().raw()).to_ne_bytes())
    }
}

impl From<u32> for Sum {
    /// Of 4 bytes as they lie in memory.
    #[inline(always)]
    fn from(word: u32) -> Self {
        Self(u64::from(word))
    }
}

impl From<Be16> for Sum {
    #[inline(always)]
    fn from(word: Be16) -> Self {
        Self(u64::from(word.raw()))
    }
}

impl From<Be32> for Sum {
    #[inline(always)]
    fn from(addr: Be32) -> Self {
        addr.raw().into()
    }
}

impl From<Ip6> for Sum {
    #[inline(always)]
    fn from(Ip6([a, b, c, d]): Ip6) -> Self {
        Self::of([a.raw(), b.raw(), c.raw(), d.raw()])
    }
}

/// The sum of the pseudo-header that goes before `len` bytes of layer 4, of either family.
#[inline(always)]
pub fn pseudo_header<A: Into<Sum>>(src: A, dst: A, protocol: u8, len: u16) -> Sum {
    src.into().and(dst).and(Be16::new(u16::from(protocol))).and(Be16::new(len))
}

/// `checksum` after the 16-bit words of `from` became those of `to`. Words are as they lie in memory: the sum does
/// not depend on the byte order.
#[inline(always)]
pub const fn patch(checksum: Be16, from: u32, to: u32) -> Be16 {
    let from = !from;
    let sum = (!checksum.raw()) as u32 + (from & 0xffff) + (from >> 16) + (to & 0xffff) + (to >> 16);
    Be16::from_bytes((!fold(sum)).to_ne_bytes())
}

/// The checksum of a layer 4 field of `width` bytes (2 or 4) after a change. A UDP checksum of zero means none and
/// stays; one that comes out as zero is sent as its other form (RFC 768).
#[inline(always)]
pub const fn patch_l4(checksum: Be16, from: u32, to: u32, udp: bool) -> Be16 {
    if udp && checksum.raw() == 0 {
        return checksum;
    }
    let patched = patch(checksum, from, to);
    if udp && patched.raw() == 0 { Be16::new(0xffff) } else { patched }
}

/// The header checksum of an IPv4 header whose options, if it has any, are all zero. Its own checksum field counts as
/// zero.
#[inline(always)]
pub fn ipv4(header: &Ipv4) -> Be16 {
    Sum::of::<5>(zerocopy::transmute!(Ipv4 { checksum: Be16::new(0), ..*header })).checksum()
}

/// The sum of at most 65,536 words, folded to 16 bits with the carries added back.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;

    fn whole(bytes: &[u8]) -> u16 {
        let sum = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        !fold(sum)
    }

    proptest! {
        #[test]
        fn patching_equals_summing_again(mut bytes in proptest::collection::vec(any::<u8>(), 20), to: [u8; 4]) {
            let before = Be16::new(whole(&bytes));
            let from: [u8; 4] = bytes[8..12].try_into().unwrap();
            bytes[8..12].copy_from_slice(&to);
            let patched = patch(before, u32::from_ne_bytes(from), u32::from_ne_bytes(to));
            let after = whole(&bytes);
            // 0 and 0xffff are the same number in one's complement.
            prop_assert_eq!(patched.get() % 0xffff, after % 0xffff);
        }

        #[test]
        fn a_sum_is_that_of_its_words_in_either_byte_order(words: [u32; 8]) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            prop_assert_eq!(Sum::of(words).checksum().get(), whole(&bytes));
            prop_assert_eq!(Sum::of(words).folded().get(), !whole(&bytes));
        }

        #[test]
        fn a_sum_without_a_word_is_that_with_zero_in_its_place(word: u16, others: [u32; 3]) {
            let with = Sum::of(others).and(Be16::new(word)).without(Be16::new(word)).folded();
            // 0 and 0xffff are the same number in one's complement.
            prop_assert_eq!(with.get() % 0xffff, Sum::of(others).folded().get() % 0xffff);
        }

        #[test]
        fn a_pseudo_header_is_summed_as_it_would_lie_in_memory(src: [u8; 16], dst: [u8; 16], protocol: u8, len: u16) {
            let [low, high] = len.to_be_bytes();
            let tail = [0, 0, low, high, 0, 0, 0, protocol];
            let bytes6: Vec<u8> = [&src[..], &dst, &tail].concat();
            let ip6 = |bytes: [u8; 16]| Ip6::from(core::net::Ipv6Addr::from(bytes));
            prop_assert_eq!(pseudo_header(ip6(src), ip6(dst), protocol, len).checksum().get(), whole(&bytes6));
            let be32 = |bytes: [u8; 16]| Be32::ipv4(bytes[0], bytes[1], bytes[2], bytes[3]);
            let bytes4: Vec<u8> = [&src[..4], &dst[..4], &[0, protocol, low, high]].concat();
            prop_assert_eq!(pseudo_header(be32(src), be32(dst), protocol, len).checksum().get(), whole(&bytes4));
        }

        #[test]
        fn a_zero_udp_checksum_stays_zero(from: u32, to: u32) {
            prop_assert_eq!(patch_l4(Be16::new(0), from, to, true), Be16::new(0));
        }

        #[test]
        fn a_udp_checksum_never_becomes_zero(checksum in 1_u16.., from: u32, to: u32) {
            prop_assert_ne!(patch_l4(Be16::new(checksum), from, to, true), Be16::new(0));
        }

        #[test]
        fn the_ipv4_checksum_makes_the_header_sum_to_zero(src: u32, dst: u32, len: u16, id: u16, ttl: u8) {
            let mut header = Ipv4 {
                version_ihl: 0x45, tos: 0, total_len: Be16::new(len), id: Be16::new(id), fragment: Be16::new(0x4000),
                ttl, protocol: 6, checksum: Be16::new(0), src: Be32::new(src), dst: Be32::new(dst),
            };
            header.checksum = ipv4(&header);
            let bytes: Vec<u8> = zerocopy::IntoBytes::as_bytes(&header).to_vec();
            prop_assert_eq!(whole(&bytes), 0);
        }
    }
}
