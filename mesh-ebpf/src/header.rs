//! Protocol headers as they lie in a packet.
//!
//! An Ethernet header is 14 bytes, so what follows is aligned to 2: hence `packed(2)`.

use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! headers {
    ($($(#[$doc:meta])* struct $name:ident($size:literal) {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
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

    /// IPv6, RFC 8200.
    struct Ipv6(40) {
        /// Version (6), traffic class, flow label.
        version_class_flow: Be32,
        /// What follows this header, bytes.
        payload_len: Be16,
        /// Protocol of what follows.
        next_header: u8,
        /// Hop limit.
        hop_limit: u8,
        /// Source.
        src: Ip6,
        /// Destination.
        dst: Ip6,
    }

    /// The beginning of most IPv6 extension headers.
    struct Extension(2) {
        /// Protocol of what follows.
        next_header: u8,
        /// Length beyond the first 8 bytes, in 8 bytes.
        len: u8,
    }

    /// IPv6's fragment header.
    struct Fragment6(8) {
        /// Protocol of what follows.
        next_header: u8,
        /// 0.
        reserved: u8,
        /// Offset in 8 bytes (13 bits), two zero bits, "more fragments".
        offset: Be16,
        /// Identification of the fragments of one packet.
        id: Be32,
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

    /// TCP without options, RFC 9293.
    struct Tcp(20) {
        /// Source port.
        src: Be16,
        /// Destination port.
        dst: Be16,
        /// Sequence number.
        sequence: Be32,
        /// Acknowledgement number.
        acknowledgement: Be32,
        /// Length of the header in 32-bit words, in the upper 4 bits.
        data_offset: u8,
        /// `TCP_…`.
        flags: u8,
        /// Window.
        window: Be16,
        /// Checksum.
        checksum: Be16,
        /// Urgent pointer.
        urgent: Be16,
    }

    /// The beginning of ICMP (RFC 792) and ICMPv6 (RFC 4443) errors: what follows is the packet in question.
    struct IcmpError(8) {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Checksum.
        checksum: Be16,
        /// Zero, or the MTU.
        rest: Be32,
    }

    /// ICMP and ICMPv6 echo.
    struct IcmpEcho(8) {
        /// Request or reply.
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

    /// IPv6 neighbour discovery, RFC 4861: a solicitation or an advertisement with its one link-layer address option.
    struct Neighbor(32) {
        /// 135: solicitation; 136: advertisement.
        kind: u8,
        /// 0.
        code: u8,
        /// Checksum.
        checksum: Be16,
        /// Flags in the highest bits.
        flags: Be32,
        /// The address in question.
        target: Ip6,
        /// 1: the sender's; 2: the target's.
        option: u8,
        /// 1, in 8 bytes.
        option_len: u8,
        /// An Ethernet address.
        mac: [u8; 6],
    }

    /// VXLAN, RFC 7348.
    struct Vxlan(8) {
        /// [`VXLAN_FLAGS`].
        flags: Be32,
        /// The VNI in the upper 24 bits.
        vni: Be32,
    }

    /// What encapsulation puts in front of a frame on an IPv4 underlay.
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

    /// What encapsulation puts in front of a frame on an IPv6 underlay.
    struct Outer6(70) {
        /// Ethernet.
        ethernet: Ethernet,
        /// IPv6.
        ip: Ipv6,
        /// UDP.
        udp: Udp,
        /// VXLAN.
        vxlan: Vxlan,
    }
}

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: Be16 = Be16::new(0x0800);
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: Be16 = Be16::new(0x86dd);
/// EtherType of ARP.
pub const ETHERTYPE_ARP: Be16 = Be16::new(0x0806);
/// EtherType of a negative acknowledgement between nodes: the first that IEEE 802 leaves to local experiments.
pub const ETHERTYPE_NACK: Be16 = Be16::new(0x88b5);
/// The I flag: the VNI is valid.
pub const VXLAN_FLAGS: Be32 = Be32::new(0x0800_0000);
/// IPv4 "don't fragment".
pub const IP_DF: Be16 = Be16::new(0x4000);
/// IPv4 "more fragments" and the fragment offset.
pub const IP_FRAGMENT_MASK: u16 = 0x3fff;
/// IPv4 fragment offset.
pub const IP_OFFSET_MASK: u16 = 0x1fff;

/// TCP's FIN among the flags.
pub const TCP_FIN: u8 = 0x01;
/// TCP's SYN among the flags.
pub const TCP_SYN: u8 = 0x02;
/// TCP's RST among the flags.
pub const TCP_RST: u8 = 0x04;
/// TCP's ACK among the flags.
pub const TCP_ACK: u8 = 0x10;

/// Offset of the IP header.
pub const IP_OFFSET: usize = Ethernet::LEN;
/// Offset of the IPv4 header's checksum.
pub const IP_CHECKSUM_OFFSET: usize = IP_OFFSET + 10;
