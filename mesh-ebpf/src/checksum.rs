//! The internet checksum (RFC 1071), whole and by difference (RFC 1624).

use mesh_common::be::Be16;

use crate::header::Ipv4;

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

/// The header checksum of an IPv4 header without options, whose own checksum field counts as zero.
#[inline(always)]
pub fn ipv4(header: &Ipv4) -> Be16 {
    let word = |high: u8, low: u8| u32::from(u16::from_be_bytes([high, low]));
    let halves = |value: u32| (value >> 16) + (value & 0xffff);
    let sum = word(header.version_ihl, header.tos)
        + u32::from({ header.total_len }.get())
        + u32::from({ header.id }.get())
        + u32::from({ header.fragment }.get())
        + word(header.ttl, header.protocol)
        + halves({ header.src }.get())
        + halves({ header.dst }.get());
    Be16::new(!fold(sum))
}

/// The sum of at most 65,536 words, folded to 16 bits with the carries added back.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use mesh_common::be::Be32;
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
