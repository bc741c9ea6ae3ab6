//! Packets turned into the answer that their sender is owed: a TCP reset, an ICMP error.
//!
//! Both leave their packet's layer 4 header where it is, or move it with all that is before it: a checksum that a later
//! stage is to fill in has a fixed place.

use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{PROTO_TCP, PROTO_UDP};

use crate::checksum::{self, Sum, pseudo_header};
use crate::header::{
    Ethernet, IP_DF, IP_OFFSET, IcmpError, Ipv4, Ipv6, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp, Udp,
};
use crate::packet::{Fault, Packet, Reuse, Rewrite};
use crate::parse::{Fragment, Parsed};
use crate::related::Quote;

/// What a packet's sender is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// Nobody listens.
    PortUnreachable,
    /// The packet is longer than the path carries.
    TooBig {
        /// Longest IP packet that it carries, bytes.
        mtu: u16,
    },
}

/// TTL and hop limit of what is made here.
const TTL: u8 = 64;
/// Traffic class of an ICMP error: internetwork control (RFC 1812, 4.3.2.5).
const TOS_CONTROL: u8 = 0xc0;
/// What of the traffic class an answer takes over: DSCP, not ECN.
const TOS_DSCP: u8 = 0xfc;
/// How much of layer 4 an error quotes, bytes: TCP's header, or what RFC 792 demands.
const L4_QUOTED: usize = 8;
/// Most bytes of IPv6 extension headers in a packet that an error quotes: three short ones.
const EXTENSIONS_QUOTED_MAX: usize = 24;
/// Most bytes of IPv4 options.
const OPTIONS_MAX: usize = 40;

/// What answers look like in each family.
pub trait Answer: Quote + Into<Sum> {
    /// Length of the IP header of an error, bytes.
    const HEADER_LEN: usize;
    /// ICMP type and code of [`Error::PortUnreachable`].
    const PORT_UNREACHABLE: (u8, u8);
    /// ICMP type and code of [`Error::TooBig`].
    const TOO_BIG: (u8, u8);

    /// Whether ICMP of this type is an error, about which there is to be none.
    fn is_error(kind: u8) -> bool;

    /// Where the reset of a segment whose TCP header is at `l4_offset` has its own; `None` if it can't be.
    fn reset_offset(l4_offset: usize, deferred: bool) -> Option<usize>;

    /// Stores the IP header of `answer`.
    fn store_header<P: Rewrite>(packet: &mut P, answer: &Header<Self>) -> Result<(), Fault>;

    /// The sum of the packet's IP header, up to layer 4; `None` if that is longer than an error quotes.
    fn header_sum(packet: &impl Packet, l4_offset: usize) -> Option<Sum>;
}

/// What the IP header of an answer says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// IP protocol.
    pub protocol: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Offset of layer 4, bytes.
    pub l4_offset: usize,
    /// Layer 4, bytes.
    pub l4_len: u16,
}

/// Turns a TCP segment into the reset that answers it (RFC 9293, 3.10.7.1); `false`, and the packet untouched, if none
/// does. After a fault the packet is good for nothing.
#[inline(always)]
pub fn reset<A: Answer, P: Reuse>(packet: &mut P, parsed: &Parsed<A>) -> Result<bool, Fault> {
    if parsed.protocol != PROTO_TCP
        || parsed.fragment != Fragment::Whole
        || parsed.tcp_flags & TCP_RST != 0
        || !has_one_sender(packet, parsed)
    {
        return Ok(false);
    }
    // One after the other: judged together, the second check makes the verifier forget what the first one proved.
    let Some(segment) = packet.load::<Tcp>(parsed.l4_offset) else {
        return Ok(false);
    };
    let Some(end) = A::end(packet) else {
        return Ok(false);
    };
    let header_len = usize::from(segment.data_offset >> 4) * 4;
    let Some(payload) = end.checked_sub(parsed.l4_offset + header_len) else {
        return Ok(false);
    };
    if header_len < Tcp::LEN {
        return Ok(false);
    }
    let deferred = packet.is_checksum_deferred(parsed.l4_offset + core::mem::offset_of!(Tcp, checksum));
    let Some(l4_offset) = A::reset_offset(parsed.l4_offset, deferred) else {
        return Ok(false);
    };

    let pseudo = pseudo_header(parsed.dst, parsed.src, PROTO_TCP, Tcp::LEN as u16);
    let mut tcp = reset_of(&segment, payload as u32);
    // Who fills in a deferred checksum finds the pseudo-header's sum in its place.
    tcp.checksum = if deferred {
        pseudo.folded()
    } else {
        pseudo.and(Sum::of::<5>(zerocopy::transmute!(tcp))).checksum()
    };
    let header = Header {
        src: parsed.dst,
        dst: parsed.src,
        protocol: PROTO_TCP,
        tos: parsed.tos & TOS_DSCP,
        l4_offset,
        l4_len: Tcp::LEN as u16,
    };
    packet.set_len((l4_offset + Tcp::LEN) as u32)?;
    packet.store(l4_offset, &tcp)?;
    A::store_header(packet, &header)?;
    exchange_frame(packet)?;
    Ok(true)
}

/// The reset of a segment with so many bytes of payload, its checksum zero.
#[inline(always)]
fn reset_of(segment: &Tcp, payload: u32) -> Tcp {
    let flags = segment.flags;
    let (sequence, acknowledgement, flags) = if flags & TCP_ACK != 0 {
        (segment.acknowledgement, Be32::new(0), TCP_RST)
    } else {
        let controls = u32::from(flags & TCP_SYN != 0) + u32::from(flags & TCP_FIN != 0);
        let next = { segment.sequence }.get().wrapping_add(payload).wrapping_add(controls);
        (Be32::new(0), Be32::new(next), TCP_RST | TCP_ACK)
    };
    Tcp {
        src: segment.dst,
        dst: segment.src,
        sequence,
        acknowledgement,
        data_offset: (Tcp::LEN as u8 / 4) << 4,
        flags,
        window: Be16::new(0),
        checksum: Be16::new(0),
        urgent: Be16::new(0),
    }
}

/// Turns a packet into the ICMP error about itself, `from` an address of this side; `false`, and the packet untouched,
/// if there is to be none (RFC 1122, 3.2.2; RFC 4443, 2.4). After a fault the packet is good for nothing.
///
/// It quotes the IP header, and of what follows TCP's header without options, or 8 bytes.
#[inline(always)]
pub fn error<A: Answer, P: Reuse>(
    packet: &mut P,
    parsed: &Parsed<A>,
    from: A,
    error: Error,
) -> Result<bool, Fault> {
    if parsed.fragment == Fragment::Later || !has_one_sender(packet, parsed) || is_error(packet, parsed) {
        return Ok(false);
    }
    let (l4_quoted, checksum) = match parsed.protocol {
        PROTO_TCP => (Tcp::LEN, Some(core::mem::offset_of!(Tcp, checksum))),
        PROTO_UDP => (L4_QUOTED, Some(core::mem::offset_of!(Udp, checksum))),
        _ => (L4_QUOTED, None),
    };
    let end = parsed.l4_offset + l4_quoted;
    if A::end(packet).is_none_or(|packet_end| packet_end < end) {
        return Ok(false);
    }
    let Some(header_sum) = A::header_sum(packet, parsed.l4_offset) else {
        return Ok(false);
    };
    let deferred = checksum.filter(|offset| packet.is_checksum_deferred(parsed.l4_offset + offset));
    packet.set_len(end as u32)?;
    let l4_sum = match deferred {
        // With the checksum filled in, the quoted part of layer 4 will sum to zero if the field's former content, the
        // pseudo-header's sum, is counted as well.
        Some(offset) => Sum::default().without(packet.load(parsed.l4_offset + offset).ok_or(Fault)?),
        None if l4_quoted == Tcp::LEN => Sum::of::<5>(packet.load(parsed.l4_offset).ok_or(Fault)?),
        None => Sum::of::<2>(packet.load(parsed.l4_offset).ok_or(Fault)?),
    };

    let l4_len = (IcmpError::LEN + end - IP_OFFSET) as u16;
    let (kind, code, mtu) = match error {
        Error::PortUnreachable => (A::PORT_UNREACHABLE.0, A::PORT_UNREACHABLE.1, 0),
        Error::TooBig { mtu } => (A::TOO_BIG.0, A::TOO_BIG.1, mtu),
    };
    let mut icmp = IcmpError { kind, code, checksum: Be16::new(0), rest: Be32::new(u32::from(mtu)) };
    let mut sum = header_sum.and(l4_sum).and(Sum::of::<2>(zerocopy::transmute!(icmp)));
    if A::ICMP_COVERS_ADDRESSES {
        sum = sum.and(pseudo_header(from, parsed.src, A::ICMP, l4_len));
    }
    icmp.checksum = sum.checksum();

    let l4_offset = IP_OFFSET + A::HEADER_LEN;
    packet.insert_header((A::HEADER_LEN + IcmpError::LEN) as u32)?;
    packet.store(l4_offset, &icmp)?;
    let (dst, protocol) = (parsed.src, A::ICMP);
    A::store_header(packet, &Header { src: from, dst, protocol, tos: TOS_CONTROL, l4_offset, l4_len })?;
    exchange_frame(packet)?;
    Ok(true)
}

/// Whether the packet is from one sender to one receiver, as a packet must be that is answered.
#[inline(always)]
fn has_one_sender<A: Answer>(packet: &impl Packet, parsed: &Parsed<A>) -> bool {
    // The group bit of an Ethernet address.
    let group = packet.load::<u8>(0).is_none_or(|first| first & 1 != 0);
    !group && !parsed.dst.is_multicast() && !parsed.src.is_multicast() && parsed.src != A::default()
}

/// Whether the packet is an ICMP error, or too short to tell.
#[inline(always)]
fn is_error<A: Answer>(packet: &impl Packet, parsed: &Parsed<A>) -> bool {
    parsed.protocol == A::ICMP && packet.load::<u8>(parsed.l4_offset).is_none_or(A::is_error)
}

#[inline(always)]
fn exchange_frame<P: Rewrite>(packet: &mut P) -> Result<(), Fault> {
    let frame: Ethernet = packet.load(0).ok_or(Fault)?;
    packet.store(0, &Ethernet { dst: frame.src, src: frame.dst, ethertype: frame.ethertype })
}

impl Answer for Be32 {
    const HEADER_LEN: usize = Ipv4::LEN;
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    const TOO_BIG: (u8, u8) = (3, 4);

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, source quench, redirect, time exceeded, parameter problem.
        matches!(kind, 3..=5 | 11 | 12)
    }

    #[inline(always)]
    fn reset_offset(l4_offset: usize, _deferred: bool) -> Option<usize> {
        Some(l4_offset)
    }

    /// Options that the packet had become the end of the list of options.
    #[inline(always)]
    fn store_header<P: Rewrite>(packet: &mut P, answer: &Header<Self>) -> Result<(), Fault> {
        let header_len = answer.l4_offset - IP_OFFSET;
        let mut header = Ipv4 {
            version_ihl: 0x40 | (header_len / 4) as u8,
            tos: answer.tos,
            total_len: Be16::new(header_len as u16 + answer.l4_len),
            id: Be16::new(0),
            fragment: IP_DF,
            ttl: TTL,
            protocol: answer.protocol,
            checksum: Be16::new(0),
            src: answer.src,
            dst: answer.dst,
        };
        header.checksum = checksum::ipv4(&header);
        packet.store(IP_OFFSET, &header)?;
        // A variable: a constant would be put into a map.
        let end_of_list = Be32::new(0);
        for option in 0..OPTIONS_MAX / 4 {
            let offset = IP_OFFSET + Ipv4::LEN + 4 * option;
            if offset >= answer.l4_offset {
                break;
            }
            packet.store(offset, &end_of_list)?;
        }
        Ok(())
    }

    /// A header with a right checksum sums to zero; about one with a wrong checksum there is to be no error, and the
    /// one that is made is wrong itself.
    #[inline(always)]
    fn header_sum(_packet: &impl Packet, _l4_offset: usize) -> Option<Sum> {
        Some(Sum::default())
    }
}

impl Answer for Ip6 {
    const HEADER_LEN: usize = Ipv6::LEN;
    const PORT_UNREACHABLE: (u8, u8) = (1, 4);
    const TOO_BIG: (u8, u8) = (2, 0);

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // All below the echo request; a redirect.
        kind < 128 || kind == 137
    }

    /// Extension headers are left out, which moves the TCP header.
    #[inline(always)]
    fn reset_offset(l4_offset: usize, deferred: bool) -> Option<usize> {
        let plain = IP_OFFSET + Ipv6::LEN;
        (l4_offset == plain || !deferred).then_some(plain)
    }

    #[inline(always)]
    fn store_header<P: Rewrite>(packet: &mut P, answer: &Header<Self>) -> Result<(), Fault> {
        let header = Ipv6 {
            version_class_flow: Be32::new(6 << 28 | u32::from(answer.tos) << 20),
            payload_len: Be16::new(answer.l4_len),
            next_header: answer.protocol,
            hop_limit: TTL,
            src: answer.src,
            dst: answer.dst,
        };
        packet.store(IP_OFFSET, &header)
    }

    #[inline(always)]
    fn header_sum(packet: &impl Packet, l4_offset: usize) -> Option<Sum> {
        let header: [u32; Ipv6::LEN / 4] = packet.load(IP_OFFSET)?;
        let mut sum = Sum::of(header);
        for extension in 0..EXTENSIONS_QUOTED_MAX / 4 {
            let offset = IP_OFFSET + Ipv6::LEN + 4 * extension;
            if offset >= l4_offset {
                break;
            }
            sum = sum.and(packet.load::<u32>(offset)?);
        }
        (l4_offset <= IP_OFFSET + Ipv6::LEN + EXTENSIONS_QUOTED_MAX).then_some(sum)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::*;
    use crate::testing::{Bytes, Frame, RECEIVER, SENDER, assert_checksums, frame, split, with_options};

    const CLIENT: Be32 = Be32::ipv4(192, 0, 2, 9);
    const SERVER: Be32 = Be32::ipv4(10, 1, 0, 7);
    const NODE: Be32 = Be32::ipv4(10, 1, 0, 1);
    const CLIENT6: Ip6 = Ip6::from_groups([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]);
    const SERVER6: Ip6 = Ip6::from_groups([0xfd00, 0, 0, 0, 0, 0, 0x0a01, 7]);
    const NODE6: Ip6 = Ip6::from_groups([0xfd00, 0, 0, 0, 0, 0, 0x0a01, 1]);
    const TCP_CHECKSUM: usize = 16;
    const UDP_CHECKSUM: usize = 6;

    /// A segment from port 1000 to port 80, with `options` words of options.
    fn segment(flags: u8, sequence: u32, acknowledgement: u32, options: u8, payload: &[u8]) -> Vec<u8> {
        let header =
            [&[0x03, 0xe8, 0, 80][..], &sequence.to_be_bytes(), &acknowledgement.to_be_bytes()].concat();
        let rest = [(5 + options) << 4, flags, 1, 2, 0, 0, 0, 0];
        [&header[..], &rest, &[1; 40][..usize::from(options) * 4], payload].concat()
    }

    fn datagram(payload: &[u8]) -> Vec<u8> {
        [&[0x03, 0xe8, 0, 53][..], &(8 + payload.len() as u16).to_be_bytes(), &[0, 0], payload].concat()
    }

    /// An IPv6 frame with extension headers, the first of type `first`, before layer 4.
    fn with_extensions(mut bytes: Vec<u8>, first: u8, extensions: &[u8]) -> Vec<u8> {
        bytes[20] = first;
        bytes.splice(54..54, extensions.iter().copied());
        let len = (bytes.len() - 54) as u16;
        bytes[18..20].copy_from_slice(&len.to_be_bytes());
        bytes
    }

    /// Hop-by-hop options, padding alone, before `next`.
    fn hop_by_hop(next: u8) -> [u8; 8] {
        [next, 0, 1, 4, 0, 0, 0, 0]
    }

    /// Both ways in which `packet` may come: its checksum filled in, or deferred.
    fn both_ways<A: Frame>(packet: &[u8], checksum: usize) -> [Bytes; 2] {
        let packet = Bytes::new(packet.to_vec());
        let start = packet.parsed::<A>().l4_offset;
        [packet.clone(), packet.defer(start, checksum)]
    }

    /// Asserts the reset that answers `l4` from `src` to `dst`.
    fn assert_reset<A: Frame + Answer>(
        packet: Bytes,
        src: A,
        dst: A,
        sequence: u32,
        acknowledgement: u32,
        flags: u8,
    ) {
        let mut packet = packet;
        let parsed = packet.parsed::<A>();
        assert_eq!(reset(&mut packet, &parsed), Ok(true));
        let bytes = packet.on_the_wire();
        assert_checksums(&bytes);
        let (protocol, tcp) = split(&bytes);
        let mut expected = [
            &[0, 80, 0x03, 0xe8][..],
            &sequence.to_be_bytes(),
            &acknowledgement.to_be_bytes(),
            &[0x50, flags, 0, 0, tcp[16], tcp[17], 0, 0],
        ]
        .concat();
        assert_eq!((protocol, tcp), (6, &expected[..]));
        expected.clear();
        let reply = Bytes::new(bytes.clone()).parsed::<A>();
        assert_eq!((reply.src, reply.dst, reply.fragment), (dst, src, Fragment::Whole));
        assert_eq!(bytes[..12], [SENDER, RECEIVER].concat());
        assert_eq!(bytes[if A::FAMILY == 4 { 22 } else { 21 }], 64);
        if A::FAMILY == 4 {
            assert_eq!(bytes[20..22], [0x40, 0]);
            // Options have ended.
            assert!(bytes[34..bytes.len() - 20].iter().all(|byte| *byte == 0));
        }
    }

    fn assert_resets(l4: &[u8], sequence: u32, acknowledgement: u32, flags: u8) {
        let bytes = frame(CLIENT, SERVER, 6, Some(TCP_CHECKSUM), l4);
        for options in [0, 1, 10] {
            for packet in both_ways::<Be32>(&with_options(bytes.clone(), options), TCP_CHECKSUM) {
                assert_reset(packet, CLIENT, SERVER, sequence, acknowledgement, flags);
            }
        }
        let bytes = frame(CLIENT6, SERVER6, 6, Some(TCP_CHECKSUM), l4);
        for packet in both_ways::<Ip6>(&bytes, TCP_CHECKSUM) {
            assert_reset(packet, CLIENT6, SERVER6, sequence, acknowledgement, flags);
        }
        let packet = Bytes::new(with_extensions(bytes, 0, &hop_by_hop(6)));
        assert_reset(packet, CLIENT6, SERVER6, sequence, acknowledgement, flags);
    }

    proptest! {
        #[test]
        fn a_segment_with_ack_is_reset_at_what_it_acknowledges(
            sequence: u32, acknowledgement: u32, options in 0_u8..=10,
            payload in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            assert_resets(&segment(TCP_ACK, sequence, acknowledgement, options, &payload), acknowledgement, 0, TCP_RST);
        }

        #[test]
        fn a_segment_without_ack_has_its_reset_acknowledge_all_of_it(
            sequence: u32, syn: bool, fin: bool, options in 0_u8..=10,
            payload in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let flags = (u8::from(syn) * TCP_SYN) | (u8::from(fin) * TCP_FIN);
            let next = sequence.wrapping_add(payload.len() as u32 + u32::from(syn) + u32::from(fin));
            assert_resets(&segment(flags, sequence, 77, options, &payload), 0, next, TCP_RST | TCP_ACK);
        }

        #[test]
        fn an_error_quotes_the_packet_and_all_checksums_are_right(
            payload in proptest::collection::vec(any::<u8>(), 0..80), mtu in 68_u16.., sequence: u32, options in 0_u8..=10,
        ) {
            let tcp = segment(TCP_ACK, sequence, 1, options, &payload);
            let udp = datagram(&payload);
            let echo = [&[8, 0, 0, 0, 1, 2, 3, 4][..], &payload].concat();
            for error in [Error::PortUnreachable, Error::TooBig { mtu }] {
                for words in [0, 3, 10] {
                    let ip = |protocol, checksum, l4: &[u8]| {
                        with_options(frame(CLIENT, SERVER, protocol, Some(checksum), l4), words)
                    };
                    assert_error(&ip(6, TCP_CHECKSUM, &tcp), CLIENT, NODE, error, TCP_CHECKSUM, 20);
                    assert_error(&ip(17, UDP_CHECKSUM, &udp), CLIENT, NODE, error, UDP_CHECKSUM, 8);
                    let packet = Bytes::new(ip(1, 2, &echo));
                    assert_error_of(packet, CLIENT, NODE, error, 8);
                }
                let fragment = [17, 0, 0, 1, 1, 2, 3, 4];
                let extensions: [(u8, Vec<u8>); 4] = [
                    (6, [].into()),
                    (0, hop_by_hop(6).into()),
                    (0, [hop_by_hop(60), hop_by_hop(6)].concat()),
                    (0, [hop_by_hop(60), hop_by_hop(60), hop_by_hop(6)].concat()),
                ];
                let tcp6 = frame(CLIENT6, SERVER6, 6, Some(TCP_CHECKSUM), &tcp);
                for (first, extensions) in extensions {
                    let bytes = with_extensions(tcp6.clone(), first, &extensions);
                    assert_error(&bytes, CLIENT6, NODE6, error, TCP_CHECKSUM, 20);
                }
                let udp6 = frame(CLIENT6, SERVER6, 17, Some(UDP_CHECKSUM), &udp);
                assert_error(&udp6, CLIENT6, NODE6, error, UDP_CHECKSUM, 8);
                assert_error_of(Bytes::new(with_extensions(udp6, 44, &fragment)), CLIENT6, NODE6, error, 8);
                let echo6 = [&[128][..], &echo[1..]].concat();
                let echo6 = Bytes::new(frame(CLIENT6, SERVER6, 58, Some(2), &echo6));
                assert_error_of(echo6, CLIENT6, NODE6, error, 8);
            }
        }

        #[test]
        fn whatever_comes_is_answered_rightly_or_left_as_it_is(
            l4 in proptest::collection::vec(any::<u8>(), 0..40),
            protocol in prop_oneof![Just(1_u8), Just(6), Just(17), Just(58), any::<u8>()],
            deferred: bool,
        ) {
            for packet in [
                Bytes::new(frame(CLIENT, SERVER, protocol, None, &l4)),
                Bytes::new(frame(CLIENT6, SERVER6, protocol, None, &l4)),
            ] {
                let mut packet = packet;
                if deferred && protocol == 17 && l4.len() >= 8 {
                    let start = packet.bytes.len() - l4.len();
                    packet = packet.defer(start, UDP_CHECKSUM);
                }
                if packet.bytes[14] >> 4 == 4 {
                    assert_right_or_untouched::<Be32>(&packet, NODE);
                } else {
                    assert_right_or_untouched::<Ip6>(&packet, NODE6);
                }
            }
        }
    }

    fn assert_right_or_untouched<A: Frame + Answer>(packet: &Bytes, from: A) {
        let Ok(parsed) = A::parse(packet) else {
            return;
        };
        let mut answers = [packet.clone(), packet.clone()];
        let made =
            [reset(&mut answers[0], &parsed), error(&mut answers[1], &parsed, from, Error::PortUnreachable)];
        for (answer, made) in answers.into_iter().zip(made) {
            match made {
                Ok(true) => assert_checksums(&answer.on_the_wire()),
                Ok(false) => assert_eq!(answer, *packet),
                Err(Fault) => panic!("{packet:x?}"),
            }
        }
    }

    fn assert_error<A: Frame + Answer>(
        packet: &[u8],
        src: A,
        from: A,
        error: Error,
        checksum: usize,
        l4_quoted: usize,
    ) {
        for packet in both_ways::<A>(packet, checksum) {
            assert_error_of(packet, src, from, error, l4_quoted);
        }
    }

    fn assert_error_of<A: Frame + Answer>(packet: Bytes, src: A, from: A, error: Error, l4_quoted: usize) {
        let mut packet = packet;
        let parsed = packet.parsed::<A>();
        let mut quote = packet.bytes[14..parsed.l4_offset + l4_quoted].to_vec();
        let deferred = packet.deferred;
        assert_eq!(super::error(&mut packet, &parsed, from, error), Ok(true));
        // Whether or not the quoted checksum is ever filled in, nothing else of the quoted packet changes.
        let filled = packet.on_the_wire();
        assert_checksums(&filled);
        let (protocol, icmp) = split(&filled);
        if let Some((start, offset)) = deferred {
            let at = start - 14 + offset;
            quote[at..at + 2].copy_from_slice(&icmp[8 + at..10 + at]);
        }
        assert_eq!((protocol, &icmp[8..]), (A::ICMP, &quote[..]));
        let expected = match (A::FAMILY, error) {
            (4, Error::PortUnreachable) => (3, 3, 0),
            (4, Error::TooBig { mtu }) => (3, 4, u32::from(mtu)),
            (_, Error::PortUnreachable) => (1, 4, 0),
            (_, Error::TooBig { mtu }) => (2, 0, u32::from(mtu)),
        };
        let rest = u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]);
        assert_eq!((icmp[0], icmp[1], rest), expected);
        let reply = Bytes::new(filled.clone()).parsed::<A>();
        assert_eq!((reply.src, reply.dst, reply.tos), (from, src, 0xc0));
        assert_eq!(filled[..12], [SENDER, RECEIVER].concat());
    }

    #[test]
    fn what_is_owed_no_answer_is_left_as_it_is() {
        let tcp = |src, dst, flags| frame(src, dst, 6, Some(TCP_CHECKSUM), &segment(flags, 1, 2, 0, b"data"));
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = tcp(CLIENT, SERVER, TCP_ACK);
            change(&mut bytes);
            bytes
        };
        let neither = [
            // Later fragment; group address of Ethernet; multicast, broadcast and no address.
            with(&|bytes| bytes[21] = 1),
            with(&|bytes| bytes[0] = 0xff),
            tcp(CLIENT, Be32::ipv4(224, 0, 0, 5), TCP_ACK),
            tcp(CLIENT, Be32::ipv4(255, 255, 255, 255), TCP_ACK),
            tcp(Be32::ipv4(224, 0, 0, 5), SERVER, TCP_ACK),
            tcp(Be32::default(), SERVER, TCP_ACK),
        ];
        let no_reset = [
            tcp(CLIENT, SERVER, TCP_RST),
            tcp(CLIENT, SERVER, TCP_RST | TCP_ACK),
            frame(CLIENT, SERVER, 17, Some(UDP_CHECKSUM), &datagram(&[0; 32])),
            // First fragment; header lengths below 20 bytes and beyond the packet.
            with(&|bytes| bytes[20] = 0x20),
            with(&|bytes| bytes[46] = 0x40),
            with(&|bytes| bytes[46] = 0xf0),
        ];
        let icmp = |kind| frame(CLIENT, SERVER, 1, Some(2), &[kind, 0, 0, 0, 0, 0, 0, 0]);
        let no_error = [icmp(3), icmp(4), icmp(5), icmp(11), icmp(12)];
        let unreset = neither.iter().chain(&no_reset);
        for bytes in unreset {
            let before = Bytes::new(bytes.clone());
            let mut packet = before.clone();
            let parsed = packet.parsed::<Be32>();
            assert_eq!(reset(&mut packet, &parsed), Ok(false), "{before:x?}");
            assert_eq!(packet, before);
        }
        for bytes in neither.iter().chain(&no_error) {
            let before = Bytes::new(bytes.clone());
            let mut packet = before.clone();
            let parsed = packet.parsed::<Be32>();
            assert_eq!(error(&mut packet, &parsed, NODE, Error::PortUnreachable), Ok(false), "{before:x?}");
            assert_eq!(packet, before);
        }
    }

    #[test]
    fn ipv6_that_is_owed_no_answer_is_left_as_it_is() {
        let tcp = frame(CLIENT6, SERVER6, 6, Some(TCP_CHECKSUM), &segment(TCP_ACK, 1, 2, 0, b"data"));
        let icmp = |kind| frame(CLIENT6, SERVER6, 58, Some(2), &[kind, 0, 0, 0, 0, 0, 0, 0]);
        let group = Ip6::from_groups([0xff02, 0, 0, 0, 0, 0, 0, 1]);
        let long = (0, [hop_by_hop(60), hop_by_hop(60), hop_by_hop(60), hop_by_hop(6)].concat());
        let no_error = [
            icmp(1),
            icmp(2),
            icmp(3),
            icmp(4),
            icmp(127),
            icmp(137),
            frame(CLIENT6, group, 17, Some(UDP_CHECKSUM), &datagram(b"data")),
            frame(Ip6::default(), SERVER6, 17, Some(UDP_CHECKSUM), &datagram(b"data")),
            with_extensions(tcp.clone(), long.0, &long.1),
        ];
        for bytes in no_error {
            let before = Bytes::new(bytes);
            let mut packet = before.clone();
            let parsed = packet.parsed::<Ip6>();
            assert_eq!(error(&mut packet, &parsed, NODE6, Error::PortUnreachable), Ok(false), "{before:x?}");
            assert_eq!(packet, before);
        }
        // The reset's header can't be where the deferred checksum is.
        let before = Bytes::new(with_extensions(tcp, 0, &hop_by_hop(6))).defer(62, TCP_CHECKSUM);
        let mut packet = before.clone();
        let parsed = packet.parsed::<Ip6>();
        assert_eq!(reset(&mut packet, &parsed), Ok(false));
        assert_eq!(packet, before);
    }
}
