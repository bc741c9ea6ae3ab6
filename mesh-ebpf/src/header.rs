//! Protocol headers as they lie in a packet.
//!
//! An Ethernet header is 14 bytes, so what follows is aligned to 2: hence `packed(2)`.

use mesh_common::be::{Be16, Be32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! headers {
    ($($(#[$doc:meta])* struct $name:ident($size:literal) {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C, packed(2))]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == $size);

        impl $name {
            /// Bytes of the header.
            pub const LEN: usize = size_of::<Self>();
        }
    )*};
}

headers! {
    /// Ethernet.
    struct Ethernet(14) {
        /// Destination.
        dst: [u8; 6],
        /// Source.
        src: [u8; 6],
        /// Type of what follows.
        ethertype: Be16,
    }

    /// IPv4 without options, RFC 791.
    struct Ipv4(20) {
        /// Version (4) and header length in 32-bit words.
        version_ihl: u8,
        /// DSCP and ECN.
        tos: u8,
        /// Header and payload, bytes.
        total_len: Be16,
        /// Identification of the fragments of one packet.
        id: Be16,
        /// Flags and fragment offset.
        fragment: Be16,
        /// Hop limit.
        ttl: u8,
        /// Protocol of the payload.
        protocol: u8,
        /// Header checksum.
        checksum: Be16,
        /// Source.
        src: Be32,
        /// Destination.
        dst: Be32,
    }

    /// The first bytes of TCP and UDP.
    struct Ports(4) {
        /// Source.
        src: Be16,
        /// Destination.
        dst: Be16,
    }

    /// UDP, RFC 768.
    struct Udp(8) {
        /// Source port.
        src: Be16,
        /// Destination port.
        dst: Be16,
        /// Header and payload, bytes.
        len: Be16,
        /// Checksum; zero: none.
        checksum: Be16,
    }

    /// ICMP echo, RFC 792.
    struct IcmpEcho(8) {
        /// 8: request; 0: reply.
        kind: u8,
        /// 0.
        code: u8,
        /// Checksum.
        checksum: Be16,
        /// Identifier.
        id: Be16,
        /// Sequence number.
        sequence: Be16,
    }

    /// ARP for IPv4 over Ethernet, RFC 826.
    struct Arp(28) {
        /// 1: Ethernet.
        hardware: Be16,
        /// [`ETHERTYPE_IPV4`].
        protocol: Be16,
        /// 6.
        hardware_len: u8,
        /// 4.
        protocol_len: u8,
        /// 1: request; 2: reply.
        operation: Be16,
        /// Sender's Ethernet address.
        sender_mac: [u8; 6],
        /// Sender's IPv4 address.
        sender: Be32,
        /// Target's Ethernet address.
        target_mac: [u8; 6],
        /// Target's IPv4 address.
        target: Be32,
    }

    /// VXLAN, RFC 7348.
    struct Vxlan(8) {
        /// [`VXLAN_FLAGS`].
        flags: Be32,
        /// The VNI in the upper 24 bits.
        vni: Be32,
    }

    /// What encapsulation puts in front of a frame.
    struct Outer(50) {
        /// Ethernet.
        ethernet: Ethernet,
        /// IPv4.
        ip: Ipv4,
        /// UDP.
        udp: Udp,
        /// VXLAN.
        vxlan: Vxlan,
    }
}

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: Be16 = Be16::new(0x0800);
/// EtherType of ARP.
pub const ETHERTYPE_ARP: Be16 = Be16::new(0x0806);
/// The I flag: the VNI is valid.
pub const VXLAN_FLAGS: Be32 = Be32::new(0x0800_0000);
/// IPv4 "don't fragment".
pub const IP_DF: Be16 = Be16::new(0x4000);
/// IPv4 "more fragments" and the fragment offset.
pub const IP_FRAGMENT_MASK: u16 = 0x3fff;
/// IPv4 fragment offset.
pub const IP_OFFSET_MASK: u16 = 0x1fff;

/// Offset of the IPv4 header.
pub const IP_OFFSET: usize = Ethernet::LEN;
/// Offset of the IPv4 header's checksum.
pub const IP_CHECKSUM_OFFSET: usize = IP_OFFSET + 10;
/// Offset of the IPv4 source address.
pub const IP_SRC_OFFSET: usize = IP_OFFSET + 12;
/// Offset of the IPv4 destination address.
pub const IP_DST_OFFSET: usize = IP_OFFSET + 16;
