//! Asking many tasks at once from inside of one: by TCP, UDP and ICMP echo, each checked for who answers.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, getpeername, socket,
};

use crate::client;
use crate::ways::Family;

/// How long an answer that is not to come is waited for.
const PATIENCE: Duration = Duration::from_millis(400);
/// The port of `shoal/whoami`.
const PORT: u16 = 80;
/// What echo requests carry.
const ECHO: &[u8] = b"isolated";

/// How somebody is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

impl Protocol {
    pub(crate) const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Icmp];
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Whom to ask.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) address: IpAddr,
    /// The id of the task that is to answer, of `shoal/whoami`.
    pub(crate) task: String,
    /// Whether it is to answer at all.
    pub(crate) allowed: bool,
}

/// Which of the targets, all of one family, answer the calling thread's namespace. An answer of somebody else is an
/// error.
pub(crate) fn dial(protocol: Protocol, family: Family, targets: &[Target]) -> Result<Vec<bool>> {
    match protocol {
        Protocol::Tcp => connect_to(family, targets),
        Protocol::Udp => {
            let any: IpAddr = match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            };
            exchange(targets, &UdpSocket::bind((any, 0))?, |number| number.to_vec(), read_datagram)
        }
        Protocol::Icmp => {
            let (domain, protocol) = match family {
                Family::V4 => (AddressFamily::Inet, SockProtocol::Icmp),
                Family::V6 => (AddressFamily::Inet6, SockProtocol::IcmpV6),
            };
            // A socket of icmp(7), which any task may have: the kernel fills in identifier and checksum.
            let fd = socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
            let (request, reply) = if family == Family::V4 { (8, 0) } else { (128, 129) };
            let question = |number: [u8; 2]| [&[request, 0, 0, 0, 0, 0], &number[..], ECHO].concat();
            let read = |data: &[u8], _: &Target| {
                let is_reply = data.len() == 8 + ECHO.len() && data[0] == reply && data.ends_with(ECHO);
                is_reply.then(|| [data[6], data[7]])
            };
            exchange(targets, &UdpSocket::from(fd), question, read)
        }
    }
}

/// The number of the question that `shoal/whoami` answers, if it is the task that was asked.
fn read_datagram(data: &[u8], target: &Target) -> Option<[u8; 2]> {
    let (line, number) = data.split_last_chunk()?;
    let line = String::from_utf8_lossy(line);
    line.split(' ').next()?.ends_with(&target.task).then_some(*number)
}

/// Connects to all at once; whoever accepts has to say who it is.
fn connect_to(family: Family, targets: &[Target]) -> Result<Vec<bool>> {
    let domain = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let mut waiting = Vec::new();
    for target in targets {
        let to = SocketAddr::new(target.address, PORT);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(domain, SockType::Stream, flags, None)?;
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS | Errno::ENETUNREACH | Errno::EHOSTUNREACH) => {}
            Err(error) => return Err(error).with_context(|| format!("connecting to {to}")),
        }
        waiting.push(Some(fd));
    }
    let mut answered = vec![false; targets.len()];
    let started = Instant::now();
    while !is_over(targets, &answered, started) {
        for (at, slot) in waiting.iter_mut().enumerate() {
            let accepted = slot.take_if(|fd| getpeername::<SockaddrStorage>(fd.as_raw_fd()).is_ok());
            if let Some(fd) = accepted {
                let told =
                    tell(TcpStream::from(fd)).with_context(|| format!("asking {}", targets[at].address))?;
                let is_meant = told.contains(&format!("\ntask-id: {}\n", targets[at].task));
                ensure!(is_meant, "{} is answered by another: {told}", targets[at].address);
                answered[at] = true;
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(answered)
}

/// What `shoal/whoami` says of itself.
fn tell(mut stream: TcpStream) -> Result<String> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(client::LIMIT))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: task\r\nConnection: close\r\n\r\n")?;
    let mut told = String::new();
    stream.read_to_string(&mut told)?;
    Ok(told)
}

/// Whether there is nothing left to wait for.
fn is_over(targets: &[Target], answered: &[bool], started: Instant) -> bool {
    let missing = targets.iter().zip(answered).any(|(target, answered)| target.allowed && !answered);
    started.elapsed() > if missing { client::LIMIT } else { PATIENCE }
}

/// Sends each target a question with its number, and reads who answers which.
fn exchange(
    targets: &[Target],
    socket: &UdpSocket,
    question: impl Fn([u8; 2]) -> Vec<u8>,
    read: impl Fn(&[u8], &Target) -> Option<[u8; 2]>,
) -> Result<Vec<bool>> {
    socket.set_nonblocking(true)?;
    for (number, target) in (0_u16..).zip(targets) {
        send(socket, &question(number.to_be_bytes()), target)?;
    }
    let mut answered = vec![false; targets.len()];
    let started = Instant::now();
    let mut data = [0; 512];
    while !is_over(targets, &answered, started) {
        let (len, from) = match socket.recv_from(&mut data) {
            Ok(received) => received,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            Err(error) => return Err(error).context("waiting for answers"),
        };
        let asked = targets.iter().position(|target| target.address == from.ip());
        let asked = asked.with_context(|| format!("{from} answers, whom nobody asked"))?;
        let number =
            read(&data[..len], &targets[asked]).map(|number| usize::from(u16::from_be_bytes(number)));
        ensure!(number == Some(asked), "{from} gives another's answer");
        answered[asked] = true;
    }
    Ok(answered)
}

/// Sends a datagram; false if the sender's own stack has no way there.
fn send(socket: &UdpSocket, data: &[u8], target: &Target) -> Result<bool> {
    match socket.send_to(data, (target.address, PORT)) {
        Ok(_) => Ok(true),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => Ok(false),
            _ => Err(error).with_context(|| format!("sending to {}", target.address)),
        },
    }
}
