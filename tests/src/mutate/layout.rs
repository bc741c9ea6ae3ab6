//! Where a packet's headers are, read by other code than the one under test, and what its checksums come to.

use crate::packet::family::Family;

/// Bytes of the Ethernet header.
pub const ETHERNET: usize = 14;
/// IP protocols.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;
/// Bytes of the shortest layer 4 headers.
const TCP_LEN: usize = 20;
/// See [`TCP_LEN`].
const UDP_LEN: usize = 8;
/// See [`TCP_LEN`].
const ICMP_LEN: usize = 8;
/// Most IPv6 extension headers that a node walks.
const EXTENSIONS_MAX: usize = 4;

/// A sound packet's headers: nothing that they say is beyond what holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The family.
    pub family: Family,
    /// Offset of the IP header.
    pub ip: usize,
    /// Offset of layer 4.
    pub l4: usize,
    /// Where the packet ends by its own account.
    pub end: usize,
    /// IP protocol of layer 4.
    pub protocol: u8,
    /// Whether it is a part of a packet.
    pub is_fragment: bool,
    /// Whether it is a part without the layer 4 header.
    pub is_later: bool,
}

impl Layout {
    /// Reads the frame at an offset; `None` if it is no IP packet, or an unsound one.
    pub fn read(frame: &[u8], ethernet: usize) -> Option<Self> {
        let layout = Self::walk(frame, ethernet)?;
        let needed = match layout.protocol {
            _ if layout.is_later => 0,
            TCP => TCP_LEN,
            UDP => UDP_LEN,
            protocol if protocol == layout.family.icmp_protocol() => ICMP_LEN,
            _ => 0,
        };
        (layout.l4 + needed <= layout.end && layout.end <= frame.len()).then_some(layout)
    }

    /// The IP header of the frame at an offset, whatever it announces; `None` if it is no IP packet, or not all there.
    pub fn read_ip(frame: &[u8], ethernet: usize) -> Option<Self> {
        let ip = ethernet + ETHERNET;
        let layout = match word(frame, ip - 2)? {
            0x0800 => Self::ipv4(frame, ip),
            0x86dd => Self::ipv6_header(frame, ip),
            _ => None,
        };
        layout.filter(|layout| layout.end <= frame.len())
    }

    fn walk(frame: &[u8], ethernet: usize) -> Option<Self> {
        let ip = ethernet + ETHERNET;
        match word(frame, ip - 2)? {
            0x0800 => Self::ipv4(frame, ip),
            0x86dd => Self::ipv6(frame, ip),
            _ => None,
        }
    }

    fn ipv4(frame: &[u8], ip: usize) -> Option<Self> {
        let header = frame.get(ip..ip + 20)?;
        let header_len = usize::from(header[0] & 0xf) * 4;
        let len = usize::from(word(header, 2)?);
        let fragment = word(header, 6)?;
        let sound = header[0] >> 4 == 4 && header_len >= 20 && len >= header_len;
        sound.then_some(Self {
            family: Family::V4,
            ip,
            l4: ip + header_len,
            end: ip + len,
            protocol: header[9],
            is_fragment: fragment & 0x3fff != 0,
            is_later: fragment & 0x1fff != 0,
        })
    }

    fn ipv6_header(frame: &[u8], ip: usize) -> Option<Self> {
        let header = frame.get(ip..ip + 40)?;
        (header[0] >> 4 == 6).then_some(Self {
            family: Family::V6,
            ip,
            l4: ip + 40,
            end: ip + 40 + usize::from(word(header, 4)?),
            protocol: header[6],
            is_fragment: false,
            is_later: false,
        })
    }

    fn ipv6(frame: &[u8], ip: usize) -> Option<Self> {
        let mut layout = Self::ipv6_header(frame, ip)?;
        for _ in 0..EXTENSIONS_MAX {
            let Self { l4, protocol, .. } = layout;
            match protocol {
                0 | 43 | 60 => layout.l4 += (usize::from(*frame.get(l4 + 1)?) + 1) * 8,
                44 => {
                    let bits = word(frame, l4 + 2)?;
                    layout.is_fragment = bits & 0xfff9 != 0;
                    layout.is_later = bits & 0xfff8 != 0;
                    layout.l4 += 8;
                }
                _ => break,
            }
            layout.protocol = *frame.get(l4)?;
            if layout.is_later {
                break;
            }
        }
        Some(layout)
    }

    /// Offset of the layer 4 checksum, if there is one here.
    pub fn checksum(&self) -> Option<usize> {
        let icmp = self.family.icmp_protocol();
        let offset = match self.protocol {
            TCP => 16,
            UDP => 6,
            protocol if protocol == icmp => 2,
            _ => return None,
        };
        let at = self.l4 + offset;
        (!self.is_later && at + 2 <= self.end).then_some(at)
    }

    /// The one's complement sum over all that the layer 4 checksum covers: zero if that is right. `None` without one, and
    /// for UDP that says to have none.
    pub fn residue(&self, frame: &[u8]) -> Option<u16> {
        let at = self.checksum()?;
        if self.protocol == UDP && word(frame, at) == Some(0) {
            return None;
        }
        let l4 = sum(&frame[self.l4..self.end]);
        let pseudo = match self.family {
            Family::V4 if self.protocol == Family::V4.icmp_protocol() => 0,
            _ => {
                let len = self.end - self.l4;
                sum(&frame[self.addresses()]) + u64::from(self.protocol) + len as u64
            }
        };
        Some(folded(pseudo + l4))
    }

    /// The same of the IP header; zero for IPv6, which has no checksum.
    pub fn ip_residue(&self, frame: &[u8]) -> u16 {
        match self.family {
            Family::V4 => folded(sum(&frame[self.ip..self.l4])),
            Family::V6 => 0,
        }
    }

    /// Where both addresses are.
    pub fn addresses(&self) -> std::ops::Range<usize> {
        match self.family {
            Family::V4 => self.ip + 12..self.ip + 20,
            Family::V6 => self.ip + 8..self.ip + 40,
        }
    }
}

/// Two bytes of a packet.
pub fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(2);
    words.map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0))).sum()
}

/// Of the two zeroes of one's complement, the one without bits.
fn folded(sum: u64) -> u16 {
    (sum % 0xffff) as u16
}
