//! Echo requests and the answers to them: a host's kernel gives these, whatever its agent does (RFC 792, RFC 4443).

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};

use mesh_datapath::checksum::Sum;

use crate::sys::icmp;

/// Types of requests and replies.
const REQUEST: u8 = 8;
const REPLY: u8 = 0;
const REQUEST6: u8 = 128;
const REPLY6: u8 = 129;
/// Bytes of a message: its header of 8, and the token.
const LEN: usize = 16;

/// Asks other hosts, and hears their answers.
#[derive(Debug)]
pub(super) struct Echo {
    socket: UdpSocket,
    /// What tells own messages from others', and from forged ones.
    token: [u8; 8],
    sequence: u16,
}

impl Echo {
    /// One that asks from the host's address `own`.
    pub(super) fn open(own: IpAddr) -> io::Result<Self> {
        Ok(Self { socket: icmp::echo_socket(own)?, token: rand::random(), sequence: 0 })
    }

    /// Asks a host. An error means that it was not asked; that there is no way to it is none.
    pub(super) fn ask(&mut self, addr: IpAddr) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        match self.socket.send_to(&request(addr, self.token, self.sequence), SocketAddr::new(addr, 0)) {
            Err(error) if is_no_way(&error) => Ok(()),
            sent => sent.map(drop),
        }
    }

    /// The next of the hosts that have answered; `None` if no other has.
    pub(super) fn next_answer(&self) -> Option<IpAddr> {
        // An IP header has 60 bytes at most.
        let mut message = [0; 60 + LEN];
        loop {
            let (len, from) = self.socket.recv_from(&mut message).ok()?;
            if is_reply(from.ip(), &message[..len], self.token) {
                return Some(from.ip());
            }
        }
    }
}

fn is_no_way(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown
    )
}

/// A request to `addr`, its identifier being the token's beginning.
fn request(addr: IpAddr, token: [u8; 8], sequence: u16) -> [u8; LEN] {
    let kind = if addr.is_ipv4() { REQUEST } else { REQUEST6 };
    let (mut message, [high, low]) = ([0; LEN], sequence.to_be_bytes());
    message[..8].copy_from_slice(&[kind, 0, 0, 0, token[0], token[1], high, low]);
    message[8..].copy_from_slice(&token);
    if addr.is_ipv4() {
        let words = message.as_chunks::<4>().0.iter().map(|word| Sum::from(u32::from_ne_bytes(*word)));
        let sum = words.fold(Sum::default(), Sum::and);
        message[2..4].copy_from_slice(&sum.checksum().to_bytes());
    }
    message
}

/// Whether what came from `addr`, with its IP header if that is of IPv4, replies to a request with this token.
fn is_reply(addr: IpAddr, packet: &[u8], token: [u8; 8]) -> bool {
    let (kind, header) = match addr {
        IpAddr::V4(_) => (REPLY, packet.first().map_or(0, |first| usize::from(first & 0xf) * 4)),
        IpAddr::V6(_) => (REPLY6, 0),
    };
    packet.get(header..).is_some_and(|message| {
        message.len() == LEN
            && message[..2] == [kind, 0]
            && message[4..6] == token[..2]
            && message[8..] == token
    })
}

/// What a fuzzer is given to try: what comes from a host of either family, as the first byte has it.
///
/// # Panics
///
/// If something without the token counts as a reply.
#[cfg(any(test, feature = "fuzz"))]
pub fn fuzz(data: &[u8]) -> bool {
    let Some((family, packet)) = data.split_first() else { return false };
    let addr = if family % 2 == 0 {
        IpAddr::from([192, 0, 2, 1])
    } else {
        IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])
    };
    let token = *b"shoal-v1";
    let is_reply = is_reply(addr, packet, token);
    assert!(!is_reply || packet.ends_with(&token) && packet.len() >= LEN);
    is_reply
}

/// What the search begins with: replies of both families.
#[cfg(test)]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let reply = |addr: IpAddr, kind, header: &[u8]| {
        let mut message = request(addr, *b"shoal-v1", 1);
        message[0] = kind;
        [&[u8::from(addr.is_ipv6())], header, &message].concat()
    };
    let (v4, v6) = (IpAddr::from([192, 0, 2, 1]), "2001:db8::1".parse().unwrap());
    let mut longest = [0; 60];
    longest[0] = 0x4f;
    let short = [0x45, 0, 0, 36, 0, 0, 0, 0, 64, 1, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2];
    vec![
        reply(v4, REPLY, &short),
        reply(v4, REPLY, &longest),
        reply(v6, REPLY6, &[]),
        reply(v4, REQUEST, &short),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys::testing::{in_netns, run};

    #[test]
    fn requests_are_as_the_rfcs_have_them() {
        let v4 = request("192.0.2.1".parse().unwrap(), [1, 2, 3, 4, 5, 6, 7, 8], 0x0a0b);
        // RFC 1071, by hand: 0800 + 0102 + 0a0b + 0102 + 0304 + 0506 + 0708 = 2321.
        assert_eq!(v4, [8, 0, 0xdc, 0xde, 1, 2, 0x0a, 0x0b, 1, 2, 3, 4, 5, 6, 7, 8]);
        let v6 = request("2001:db8::1".parse().unwrap(), [1, 2, 3, 4, 5, 6, 7, 8], 0x0a0b);
        assert_eq!(v6, [128, 0, 0, 0, 1, 2, 0x0a, 0x0b, 1, 2, 3, 4, 5, 6, 7, 8], "the kernel sums");
    }

    #[test]
    fn only_a_reply_with_the_token_is_one() {
        let (addr, token) = ("2001:db8::1".parse().unwrap(), [1, 2, 3, 4, 5, 6, 7, 8]);
        let mut reply = request(addr, token, 1);
        assert!(!is_reply(addr, &reply, token), "a request");
        reply[0] = REPLY6;
        assert!(is_reply(addr, &reply, token));
        assert!(!is_reply(addr, &reply, [1, 2, 3, 4, 5, 6, 7, 9]));
        for len in 0..LEN {
            assert!(!is_reply(addr, &reply[..len], token));
            assert!(!is_reply("192.0.2.1".parse().unwrap(), &reply[..len], token));
        }
    }

    #[test]
    fn a_kernel_answers_in_both_families_and_nothing_else_is_heard() {
        in_netns(|| async {
            run("ip link set lo up");
            for (own, other, net) in
                [("192.0.2.1", "192.0.2.2", "/32"), ("2001:db8::1", "2001:db8::2", "/128 nodad")]
            {
                for addr in [own, other] {
                    run(&format!("ip address add {addr}{net} dev lo"));
                }
                let [own, other]: [IpAddr; 2] = [own, other].map(|addr| addr.parse().unwrap());
                let (mut echo, mut another) = (Echo::open(own).unwrap(), Echo::open(own).unwrap());
                let deadline = Instant::now() + Duration::from_secs(5);
                // The kernel may take a moment to have routes to what it was just given.
                let heard = |echo: &mut Echo| loop {
                    echo.ask(other).unwrap();
                    std::thread::sleep(Duration::from_millis(10));
                    if let Some(addr) = echo.next_answer() {
                        break addr;
                    }
                    assert!(Instant::now() < deadline, "{own} hears nothing");
                };
                assert_eq!(heard(&mut another), other);
                // That came to both of them.
                assert_eq!(echo.next_answer(), None);
                assert_eq!(heard(&mut echo), other);
                assert!(echo.ask("203.0.113.1".parse().unwrap()).is_ok() || own.is_ipv6(), "no route");
            }
        });
    }
}
