//! As much of DNS as a client needs that asks often: questions, and what answers say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Types of records.
pub(crate) const A: u16 = 1;
pub(crate) const PTR: u16 = 12;
pub(crate) const AAAA: u16 = 28;
/// Response codes.
pub(crate) const NO_ERROR: u8 = 0;
pub(crate) const NO_SUCH_NAME: u8 = 3;
/// Where name servers listen.
pub(crate) const PORT: u16 = 53;

/// What came back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    pub(crate) id: u16,
    pub(crate) code: u8,
    pub(crate) records: Vec<Record>,
}

/// A record of an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) kind: u16,
    pub(crate) ttl: Duration,
    pub(crate) data: Vec<u8>,
}

impl Record {
    /// The address that an A or AAAA record has.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        match self.kind {
            A => <[u8; 4]>::try_from(&self.data[..]).ok().map(|data| Ipv4Addr::from(data).into()),
            AAAA => <[u8; 16]>::try_from(&self.data[..]).ok().map(|data| Ipv6Addr::from(data).into()),
            _ => None,
        }
    }
}

/// A question for recursion.
pub(crate) fn question(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut question = id.to_be_bytes().to_vec();
    question.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        // Labels of tests are short.
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.push(0);
    question.extend(kind.to_be_bytes());
    question.extend([0, 1]);
    question
}

/// The name that an address' PTR record has.
pub(crate) fn reverse(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(v6) => {
            let digits = format!("{:032x}", v6.to_bits());
            digits.chars().rev().flat_map(|digit| [digit, '.']).collect::<String>() + "ip6.arpa"
        }
    }
}

/// Reads an answer.
pub(crate) fn read(message: &[u8]) -> Result<Answer> {
    ensure!(message.len() >= 12 && message[2] & 0x80 != 0, "no answer: {message:02x?}");
    let number = |at: usize| {
        let bytes = message.get(at..at + 2).context("an answer cut off")?;
        anyhow::Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    let mut at = 12;
    for _ in 0..number(4)? {
        at = behind_name(message, at)? + 4;
    }
    let mut records = Vec::new();
    for _ in 0..number(6)? {
        at = behind_name(message, at)?;
        let (kind, ttl, len) = (number(at)?, number(at + 6)?, usize::from(number(at + 8)?));
        let data = message.get(at + 10..at + 10 + len).context("a record cut off")?.to_vec();
        records.push(Record { kind, ttl: Duration::from_secs(ttl.into()), data });
        at += 10 + len;
    }
    Ok(Answer { id: number(0)?, code: message[3] & 0x0f, records })
}

/// Where what follows a name begins.
fn behind_name(message: &[u8], mut at: usize) -> Result<usize> {
    loop {
        match *message.get(at).context("a name cut off")? {
            0 => return Ok(at + 1),
            // The rest is elsewhere.
            0xc0.. => return Ok(at + 2),
            len => at += 1 + usize::from(len),
        }
    }
}

/// Asks by UDP, once more for each `patience` without an answer.
pub(crate) fn ask(server: IpAddr, name: &str, kind: u16, patience: Duration) -> Result<Answer> {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(1);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(SocketAddr::new(server, PORT))?;
    for _ in 0..3 {
        let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        socket.send(&question(id, name, kind))?;
        let started = Instant::now();
        let mut message = [0; 4096];
        while let Some(left) = patience.checked_sub(started.elapsed()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            let Ok(len) = socket.recv(&mut message) else { break };
            let answer = read(&message[..len])?;
            if answer.id == id {
                return Ok(answer);
            }
        }
    }
    anyhow::bail!("{server} does not answer for {name}")
}
