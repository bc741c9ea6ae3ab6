//! A client that chooses its source ports, for `shoal/whoami`. To be called in the client's namespace (`lab::as_client`).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::sockopt::{Linger, ReuseAddr, SendTimeout};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Without an answer for this long a request has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(3);
/// The byte at offset n of `/bytes/N` is n modulo this.
const PERIOD: usize = 251;

/// Who answered, and what it saw.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    pub(crate) task: String,
    pub(crate) node: String,
    /// The client's address and port, as the task saw them.
    pub(crate) client: String,
}

/// Any port of any address of the family of `to`.
pub(crate) fn anywhere(to: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, 0)
}

/// A connection from `source`, whose port may be 0 for any.
pub(crate) fn connect_from(source: impl Into<SocketAddr>, to: impl Into<SocketAddr>) -> Result<TcpStream> {
    connect_within(source.into(), to.into(), LIMIT)
}

/// The same within a time.
pub(crate) fn connect_within(source: SocketAddr, to: SocketAddr, limit: Duration) -> Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(source)).with_context(|| format!("binding {source}"))?;
    // It bounds connect(2) as well.
    setsockopt(&fd, SendTimeout, &TimeVal::milliseconds(limit.as_millis().try_into()?))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))
        .with_context(|| format!("connecting to {to} from {source}"))?;
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// One request by a connection of its own, asking for `path`.
pub(crate) fn http(source: impl Into<SocketAddr>, to: impl Into<SocketAddr>, path: &str) -> Result<Answer> {
    http_within(source.into(), to.into(), path, LIMIT)
}

/// The same, where connecting, and waiting for the answer, take no longer than `limit` each.
pub(crate) fn http_within(source: SocketAddr, to: SocketAddr, path: &str, limit: Duration) -> Result<Answer> {
    let mut stream = connect_within(source, to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    request(&mut stream, to, path)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("reading the answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{}", head.lines().next().unwrap_or_default());
    read(body)
}

/// What a body says.
pub(crate) fn read(body: &str) -> Result<Answer> {
    let mut fields: BTreeMap<&str, &str> = BTreeMap::new();
    for (key, value) in body.lines().filter_map(|line| line.split_once(": ")) {
        fields.entry(key).or_insert(value);
    }
    let field =
        |key: &str| fields.get(key).map(|value| (*value).to_owned()).context("an answer without a field");
    Ok(Answer { task: field("task")?, node: field("node")?, client: field("client")? })
}

fn request(stream: &mut TcpStream, to: SocketAddr, path: &str) -> Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("sending the request")
}

/// One datagram to the echo, and its answer.
pub(crate) fn udp(
    source: impl Into<SocketAddr>,
    to: impl Into<SocketAddr>,
    payload: &[u8],
) -> Result<Answer> {
    udp_within(source.into(), to.into(), payload, LIMIT)
}

/// The same within a time.
pub(crate) fn udp_within(
    source: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
    limit: Duration,
) -> Result<Answer> {
    let socket = UdpSocket::bind(source).with_context(|| format!("binding {source}"))?;
    socket.set_read_timeout(Some(limit))?;
    socket.send_to(payload, to)?;
    let mut answer = vec![0; 65_536];
    let (len, from) =
        socket.recv_from(&mut answer).with_context(|| format!("no answer from {to} to {source}"))?;
    ensure!(from == to, "asked {to}, and {from} answered");
    let answer = &answer[..len];
    let end = answer.iter().position(|byte| *byte == b'\n').context("an answer without a line")?;
    ensure!(&answer[end + 1..] == payload, "the payload came back changed");
    let line = String::from_utf8_lossy(&answer[..end]).into_owned();
    let field = |key: &str| {
        let found = line.split(' ').find_map(|word| word.strip_prefix(key));
        found.map(str::to_owned).context("an answer without a field")
    };
    Ok(Answer { task: field("task=")?, node: field("node=")?, client: field("client=")? })
}

/// Downloads `len` bytes, and compares each with what it has to be.
pub(crate) fn download(to: impl Into<SocketAddr>, len: usize) -> Result<()> {
    let to = to.into();
    download_from(anywhere(to), to, len, LIMIT)
}

/// The same from an address of the client, where nothing comes for no longer than `limit`.
pub(crate) fn download_from(source: SocketAddr, to: SocketAddr, len: usize, limit: Duration) -> Result<()> {
    let mut stream = connect_from(source, to)?;
    stream.set_read_timeout(Some(limit))?;
    request(&mut stream, to, &format!("/bytes/{len}"))?;
    let mut reader = BufReader::with_capacity(1 << 20, stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200"), "{line}");
    while line != "\r\n" {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "an answer without a body");
    }
    let mut received = vec![0; 64 << 10];
    let expected: Vec<u8> = (0..received.len() + PERIOD).map(|at| (at % PERIOD) as u8).collect();
    let mut offset = 0;
    loop {
        let count = reader.read(&mut received).with_context(|| format!("after {offset} of {len} bytes"))?;
        if count == 0 {
            break;
        }
        let start = offset % PERIOD;
        ensure!(
            received[..count] == expected[start..start + count],
            "bytes from {offset} on are not what was sent"
        );
        offset += count;
    }
    ensure!(offset == len, "{offset} bytes of {len}");
    Ok(())
}

/// Opens a connection and resets it: neither side remembers it.
pub(crate) fn touch(source: impl Into<SocketAddr>, to: impl Into<SocketAddr>) -> Result<()> {
    let stream = connect_from(source, to)?;
    let reset = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, Linger, &reset).context("setting SO_LINGER")
}

/// Uploads `len` bytes to a server that answers with what it thinks of them.
pub(crate) fn upload(to: impl Into<SocketAddr>, len: usize) -> Result<String> {
    let to = to.into();
    let mut stream = connect_from(anywhere(to), to)?;
    let pattern: Vec<u8> = (0..PERIOD << 8).map(|at| (at % PERIOD) as u8).collect();
    let mut left = len;
    while left > 0 {
        // Every piece but the last is whole periods.
        let part = &pattern[..left.min(pattern.len())];
        stream.write_all(part).with_context(|| format!("with {left} of {len} bytes to go"))?;
        left -= part.len();
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("reading the answer")?;
    Ok(answer)
}

/// A download that lives: a line a second.
pub(crate) struct Stream {
    reader: BufReader<TcpStream>,
}

impl Stream {
    pub(crate) fn open(to: impl Into<SocketAddr>) -> Result<Self> {
        let to = to.into();
        let mut stream = connect_from(anywhere(to), to)?;
        request(&mut stream, to, "/stream")?;
        let mut stream = Self { reader: BufReader::new(stream) };
        stream.ticks(1)?;
        Ok(stream)
    }

    /// Waits for so many lines more.
    pub(crate) fn ticks(&mut self, count: usize) -> Result<()> {
        let mut seen = 0;
        while seen < count {
            let mut line = String::new();
            let len = self.reader.read_line(&mut line).context("the connection stands still")?;
            ensure!(len > 0, "the connection was closed");
            seen += usize::from(line.starts_with("tick "));
        }
        Ok(())
    }
}

/// How often each task answered, and how far the least is below the most, in percent of the most.
pub(crate) fn shares<'a>(tasks: impl Iterator<Item = &'a str>) -> (BTreeMap<String, u32>, u32) {
    let mut shares: BTreeMap<String, u32> = BTreeMap::new();
    for task in tasks {
        *shares.entry(task.splitn(3, '.').take(2).collect::<Vec<_>>().join(".")).or_default() += 1;
    }
    let least = shares.values().min().copied().unwrap_or_default();
    let most = shares.values().max().copied().unwrap_or_default();
    let spread = (100 * (most - least)).checked_div(most).unwrap_or_default();
    (shares, spread)
}
