//! Mutations of a frame that know where its fields are.

use super::random::Random;
use super::starts::Stand;

/// Longest frame that is made, bytes.
const FRAME_MAX: usize = 1800;
/// Bytes of the Ethernet header.
const ETHERNET: usize = 14;
/// Bytes of the UDP and VXLAN headers.
const UDP_VXLAN: usize = 16;
/// The VXLAN port.
const VXLAN_PORT: u16 = 4789;

/// EtherTypes: IPv4, IPv6, ARP, VLAN tags, none.
const ETHERTYPES: [u16; 6] = [0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8, 0];
/// IP protocols: ICMP, TCP, UDP, ICMPv6, IPv6's extension headers, IPsec, tunnels, SCTP, none.
const PROTOCOLS: [u8; 16] = [1, 6, 17, 58, 0, 43, 44, 60, 51, 50, 4, 41, 47, 132, 59, 255];
/// IPv6 extension headers that are walked.
const EXTENSIONS: [u8; 4] = [0, 43, 44, 60];
/// IPv4's flags and fragment offset.
const FRAGMENTS: [u16; 8] = [0, 0x2000, 0x4000, 0x8000, 0x2001, 0x0001, 0x1fff, 0x6000];
/// Ports: those of the fixtures, and the ends of the range.
const PORTS: [u16; 9] = [80, 53, 8080, 8081, 8082, 40_000, VXLAN_PORT, 0, 0xffff];
/// ICMP and ICMPv6: echoes, errors, neighbour discovery.
const ICMP_KINDS: [u8; 15] = [0, 1, 2, 3, 4, 5, 8, 11, 12, 128, 129, 133, 135, 136, 137];
/// VNIs: the mesh's, networks', the ends of the range.
const VNIS: [u32; 7] = [0, 1, 2, 3, 4096, 4097, 0xff_ffff];

/// A frame for `stand`: one of the fixtures, most often changed.
pub fn frame(random: &mut Random, stand: &Stand<'_>) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_MAX + 64);
    frame.extend(stand.frame(random));
    match random.below(32) {
        0 => {}
        1 => {
            let len = random.below(160);
            frame = random.bytes(len);
        }
        2 => {
            // A valid Ethernet header before what is none.
            let len = random.below(120);
            frame.truncate(ETHERNET);
            frame.extend(random.bytes(len));
        }
        3..=6 => truncate(random, &mut frame),
        _ => {
            for _ in 0..=random.below(4) {
                change(random, stand, &mut frame);
            }
            if random.one_in(8) {
                truncate(random, &mut frame);
            }
        }
    }
    frame.truncate(FRAME_MAX);
    frame
}

fn truncate(random: &mut Random, frame: &mut Vec<u8>) {
    frame.truncate(random.below(frame.len() + 1));
}

/// Where the headers of a packet begin, as far as they are there.
#[derive(Debug, Clone, Copy)]
struct Headers {
    ethernet: usize,
    ip: usize,
    is_ipv4: bool,
    l4: usize,
    protocol: u8,
}

impl Headers {
    /// Those of the frame at `ethernet`.
    fn at(frame: &[u8], ethernet: usize) -> Self {
        let ip = ethernet + ETHERNET;
        let is_ipv4 = byte(frame, ip) >> 4 != 6;
        let (l4, protocol) = if is_ipv4 {
            (ip + usize::from(byte(frame, ip) & 0xf).max(5) * 4, byte(frame, ip + 9))
        } else {
            walk(frame, ip)
        };
        Self { ethernet, ip, is_ipv4, l4, protocol }
    }

    /// Those of the outer packet, or of the one in the tunnel.
    fn any(random: &mut Random, frame: &[u8]) -> Self {
        let outer = Self::at(frame, 0);
        if outer.is_tunnel(frame) && random.one_in(2) {
            return Self::at(frame, outer.l4 + UDP_VXLAN);
        }
        outer
    }

    fn is_tunnel(&self, frame: &[u8]) -> bool {
        self.protocol == 17 && word(frame, self.l4 + 2) == VXLAN_PORT
    }
}

/// Behind the IPv6 extension headers.
fn walk(frame: &[u8], ip: usize) -> (usize, u8) {
    let (mut l4, mut protocol) = (ip + 40, byte(frame, ip + 6));
    for _ in 0..6 {
        if !EXTENSIONS.contains(&protocol) {
            break;
        }
        let len = if protocol == 44 { 8 } else { (usize::from(byte(frame, l4 + 1)) + 1) * 8 };
        protocol = byte(frame, l4);
        l4 += len;
    }
    (l4, protocol)
}

fn byte(frame: &[u8], at: usize) -> u8 {
    frame.get(at).copied().unwrap_or_default()
}

fn word(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([byte(frame, at), byte(frame, at + 1)])
}

/// Writes `bytes` at `at`, as much as fits.
fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    for (i, value) in bytes.iter().enumerate() {
        if let Some(place) = frame.get_mut(at + i) {
            *place = *value;
        }
    }
}

fn put_word(frame: &mut [u8], at: usize, word: u16) {
    put(frame, at, &word.to_be_bytes());
}

/// Puts `bytes` between what is before `at` and what is behind.
fn insert(frame: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if at <= frame.len() {
        frame.splice(at..at, bytes.iter().copied());
    }
}

/// Copies so many bytes from the same place in another frame.
fn copy(frame: &mut [u8], other: &[u8], at: usize, len: usize) {
    if let Some(bytes) = other.get(at..at + len) {
        put(frame, at, bytes);
    }
}

/// One change.
fn change(random: &mut Random, stand: &Stand<'_>, frame: &mut Vec<u8>) {
    let headers = Headers::any(random, frame);
    match random.below(22) {
        0 => ethernet(random, stand, &headers, frame),
        1 => tag(random, &headers, frame),
        2 | 3 => lengths(random, &headers, frame),
        4 => put_nibbles(random, &headers, frame),
        5 | 6 => fragment(random, &headers, frame),
        7 => {
            let protocol = *random.pick(&PROTOCOLS);
            put(frame, headers.ip + if headers.is_ipv4 { 9 } else { 6 }, &[protocol]);
        }
        8 | 9 => addresses(random, stand, &headers, frame),
        10 => ports(random, stand, &headers, frame),
        11 | 12 => l4(random, &headers, frame),
        13 => options(random, &headers, frame),
        14 | 15 => quote(random, stand, &headers, frame),
        16 => tunnel(random, stand, frame),
        17 => {
            // The beginning of one packet, the rest of another.
            let other = stand.other(random);
            let at = random.below(frame.len().min(other.len()) + 1);
            frame.truncate(at);
            frame.extend(&other[at..]);
        }
        18 => {
            let at = random.below(frame.len() + 1);
            let len = random.below(9).min(frame.len() - at);
            frame.drain(at..at + len);
        }
        19 => {
            let len_max = if random.one_in(8) { FRAME_MAX } else { 64 };
            let len = random.below(len_max);
            let bytes = random.bytes(len);
            frame.extend(bytes);
        }
        20 => {
            // TTL or hop limit, DSCP and ECN.
            let (ttl, tos) = if headers.is_ipv4 { (8, 1) } else { (7, 0) };
            let at = headers.ip + if random.one_in(2) { ttl } else { tos };
            let value = if at == headers.ip { 0x60 | random.byte() >> 4 } else { random.byte() };
            put(frame, at, &[value]);
        }
        _ => {
            for _ in 0..=random.below(8) {
                let at = random.below(frame.len());
                let bit = 1 << random.below(8);
                let flipped = byte(frame, at) ^ bit;
                put(frame, at, &[flipped]);
            }
        }
    }
}

/// Another EtherType, or other Ethernet addresses.
fn ethernet(random: &mut Random, stand: &Stand<'_>, headers: &Headers, frame: &mut [u8]) {
    let Headers { ethernet, .. } = *headers;
    match random.below(4) {
        0 => put_word(frame, ethernet + 12, *random.pick(&ETHERTYPES)),
        1 => {
            let to_group = byte(frame, ethernet) ^ 1;
            put(frame, ethernet, &[to_group]);
        }
        2 => copy(frame, stand.other(random), ethernet, 6),
        _ => copy(frame, stand.other(random), ethernet + 6, 6),
    }
}

/// Up to four VLAN tags.
fn tag(random: &mut Random, headers: &Headers, frame: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        let [high, low] = if random.one_in(2) { [0x81, 0] } else { [0x88, 0xa8] };
        let tag = [high, low, random.byte(), random.byte()];
        insert(frame, headers.ethernet + 12, &tag);
    }
}

/// A length that lies, a little or a lot.
fn lengths(random: &mut Random, headers: &Headers, frame: &mut [u8]) {
    let Headers { ip, is_ipv4, l4, .. } = *headers;
    let ip_at = if is_ipv4 { ip + 2 } else { ip + 4 };
    // IP's, or UDP's.
    let at = if random.one_in(4) { l4 + 4 } else { ip_at };
    let len = match random.below(7) {
        0 => 0,
        1 => 0xffff,
        2 => random.number() as u16,
        3 => random.below(80) as u16,
        4 => word(frame, at).wrapping_add(1 + random.below(24) as u16),
        5 => word(frame, at).wrapping_sub(1 + random.below(24) as u16),
        // As far as the frame goes, or to the end of the headers.
        _ if random.one_in(2) => frame.len().saturating_sub(if is_ipv4 { ip } else { ip + 40 }) as u16,
        _ => l4.wrapping_sub(if is_ipv4 { ip } else { ip + 40 }) as u16,
    };
    put_word(frame, at, len);
}

/// Another version or header length.
fn put_nibbles(random: &mut Random, headers: &Headers, frame: &mut [u8]) {
    let first = byte(frame, headers.ip);
    let value = match random.below(3) {
        0 => random.byte(),
        1 => first & 0xf0 | random.byte() & 0xf,
        _ => first & 0x0f | random.byte() & 0xf0,
    };
    put(frame, headers.ip, &[value]);
}

/// Makes a fragment of it, or changes which one it is.
fn fragment(random: &mut Random, headers: &Headers, frame: &mut Vec<u8>) {
    let Headers { ip, is_ipv4, .. } = *headers;
    let bits = if random.one_in(3) { random.number() as u16 } else { *random.pick(&FRAGMENTS) };
    if is_ipv4 {
        return put_word(frame, ip + 6, bits);
    }
    if byte(frame, ip + 6) == 44 {
        return put_word(frame, ip + 42, bits);
    }
    let mut header = vec![byte(frame, ip + 6), 0];
    header.extend(bits.to_be_bytes());
    header.extend([0, 0, 0, random.byte() & 3]);
    extend(random, ip, 44, &header, frame);
}

/// Puts an IPv6 extension header in, most often with the length that follows.
fn extend(random: &mut Random, ip: usize, kind: u8, header: &[u8], frame: &mut Vec<u8>) {
    if frame.len() < ip + 40 {
        return;
    }
    insert(frame, ip + 40, header);
    put(frame, ip + 6, &[kind]);
    if !random.one_in(8) {
        let len = word(frame, ip + 4).wrapping_add(header.len() as u16);
        put_word(frame, ip + 4, len);
    }
}

/// Other addresses: exchanged, another frame's, or those that are nobody's.
fn addresses(random: &mut Random, stand: &Stand<'_>, headers: &Headers, frame: &mut [u8]) {
    let Headers { ip, is_ipv4, .. } = *headers;
    let (at, len) = if is_ipv4 { (ip + 12, 4) } else { (ip + 8, 16) };
    let either = at + if random.one_in(2) { len } else { 0 };
    match random.below(6) {
        0 => {
            if let Some([src, dst]) = frame.get_mut(at..at + 2 * len).map(|both| {
                let (src, dst) = both.split_at_mut(len);
                [src, dst]
            }) {
                src.swap_with_slice(dst);
            }
        }
        1 | 2 => copy(frame, stand.other(random), either, len),
        3 => put(frame, either, &[0; 16][..len]),
        4 => put(frame, either, &[if is_ipv4 { 0xe0 } else { 0xff }]),
        _ => {
            let last = random.byte();
            put(frame, either + len - 1, &[last]);
        }
    }
}

fn ports(random: &mut Random, stand: &Stand<'_>, headers: &Headers, frame: &mut [u8]) {
    let at = headers.l4 + 2 * random.below(2);
    match random.below(3) {
        0 => copy(frame, stand.other(random), at, 2),
        1 => put_word(frame, at, random.number() as u16),
        _ => put_word(frame, at, *random.pick(&PORTS)),
    }
}

/// A field of layer 4: TCP's flags and header length, a checksum, ICMP's type and code.
fn l4(random: &mut Random, headers: &Headers, frame: &mut [u8]) {
    let Headers { l4, protocol, .. } = *headers;
    match (protocol, random.below(3)) {
        (6, 0) => put(frame, l4 + 12, &[random.byte()]),
        (6, 1) => put(frame, l4 + 13, &[random.byte() & 0x1f]),
        (6, _) => put_word(frame, l4 + 16, random.number() as u16),
        (17, 0) => put_word(frame, l4 + 6, 0),
        (17, 1) => put_word(frame, l4 + 6, 0xffff),
        (17, _) => put_word(frame, l4 + 6, random.number() as u16),
        (_, 0 | 1) => put(frame, l4, &[*random.pick(&ICMP_KINDS)]),
        _ => put(frame, l4 + 1, &[random.byte() & 7]),
    }
}

/// IPv4 options or IPv6 extension headers, with the lengths that follow, or without.
fn options(random: &mut Random, headers: &Headers, frame: &mut Vec<u8>) {
    let Headers { ip, is_ipv4, .. } = *headers;
    if !is_ipv4 {
        for _ in 0..=random.below(6) {
            let kind = *random.pick(&EXTENSIONS);
            let units = if random.one_in(8) { random.byte() } else { random.byte() & 1 };
            let mut header = vec![byte(frame, ip + 6), units];
            let len = if kind == 44 { 8 } else { (usize::from(units & 1) + 1) * 8 };
            header.resize(len, 0);
            extend(random, ip, kind, &header, frame);
        }
        return;
    }
    let words = 1 + random.below(10);
    insert(frame, ip + 20, &vec![1; words * 4]);
    let (first, len) = (byte(frame, ip), word(frame, ip + 2));
    put(frame, ip, &[first & 0xf0 | (first & 0xf).wrapping_add(words as u8) & 0xf]);
    if !random.one_in(8) {
        put_word(frame, ip + 2, len.wrapping_add(words as u16 * 4));
    }
}

/// Makes an ICMP error of it that quotes another frame, or changes what an error quotes.
fn quote(random: &mut Random, stand: &Stand<'_>, headers: &Headers, frame: &mut Vec<u8>) {
    let Headers { ip, is_ipv4, l4, .. } = *headers;
    if frame.len() < l4 + 8 {
        return;
    }
    if random.one_in(2) {
        // What is quoted begins where a frame's IP header would: the same changes apply to it.
        let quoted = Headers::at(frame, l4 + 8 - ETHERNET);
        return match random.below(6) {
            0 => put_nibbles(random, &quoted, frame),
            1 => lengths(random, &quoted, frame),
            2 => fragment(random, &quoted, frame),
            3 => addresses(random, stand, &quoted, frame),
            4 => ports(random, stand, &quoted, frame),
            _ => options(random, &quoted, frame),
        };
    }
    let other = stand.other(random);
    let quoted = other.get(ETHERNET..).unwrap_or_default();
    let quoted = &quoted[..quoted.len().min(8 + random.below(80))];
    let (protocol_at, protocol, kind) = if is_ipv4 {
        (ip + 9, 1, *random.pick(&[3, 4, 11, 12]))
    } else {
        (ip + 6, 58, 1 + random.byte() % 4)
    };
    put(frame, protocol_at, &[protocol]);
    let l4 = if is_ipv4 { l4 } else { ip + 40 };
    frame.truncate(l4);
    frame.extend([kind, random.byte() & 7, 0, 0, 0, 0, 5, 0]);
    frame.extend(quoted);
    let len = frame.len();
    if is_ipv4 {
        put_word(frame, ip + 2, (len - ip) as u16);
    } else {
        put_word(frame, ip + 4, (len - l4) as u16);
    }
}

/// Changes the tunnel's header, or puts another frame into the tunnel.
fn tunnel(random: &mut Random, stand: &Stand<'_>, frame: &mut Vec<u8>) {
    let outer = Headers::at(frame, 0);
    let vxlan = outer.l4 + 8;
    match random.below(5) {
        0 => put(frame, vxlan, &[random.byte()]),
        1 => put(frame, vxlan + 1 + random.below(3), &[random.byte()]),
        2 => put(frame, vxlan + 4, &(*random.pick(&VNIS) << 8).to_be_bytes()),
        3 => put(frame, vxlan + 7, &[random.byte()]),
        _ if outer.is_tunnel(frame) && frame.len() >= vxlan + 8 => {
            frame.truncate(vxlan + 8);
            frame.extend(stand.other(random));
            let len = frame.len();
            put_word(frame, outer.l4 + 4, (len - outer.l4) as u16);
            let at = if outer.is_ipv4 { outer.ip + 2 } else { outer.ip + 4 };
            let from = if outer.is_ipv4 { outer.ip } else { outer.ip + 40 };
            put_word(frame, at, (len - from) as u16);
        }
        _ => put_word(frame, outer.l4 + 2, VXLAN_PORT),
    }
}
