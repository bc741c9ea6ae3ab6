//! `cargo xtask bench probe …`, hidden: the client and the server that latencies are measured with. Benchmarks start it in
//! network namespaces.

use std::hint::black_box;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use serde::{Deserialize, Serialize};

/// Bytes of a message that is sent to and fro.
const MESSAGE_BYTES: usize = 64;
/// Measurements before those that count.
const WARM_UP: usize = 100;
/// For one connection, message or answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Measurements that may fail.
const FAILED_MAX: usize = 3;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: shoal\r\nConnection: close\r\n\r\n";

/// What to do.
#[derive(Subcommand)]
pub(crate) enum Probe {
    /// Connects, requests a page and reads to the end, one after another, and prints how long that takes
    Requests(Targets),
    /// Sends a message to and fro on one connection, and prints how long that takes
    RoundTrips(Targets),
    /// Returns what it gets, for ever
    Echo {
        /// Address and port to listen on
        listen: SocketAddrV4,
    },
}

/// Whom to measure, and for how long.
#[derive(clap::Args)]
pub(crate) struct Targets {
    #[arg(long)]
    seconds: u64,
    /// Address and port, in turns
    #[arg(required = true)]
    servers: Vec<SocketAddrV4>,
}

/// What a probe measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Latencies {
    /// Half of them take this long or less.
    pub(super) p50_us: f64,
    /// All but a hundredth of them take this long or less.
    pub(super) p99_us: f64,
}

impl Latencies {
    fn of(mut samples: Vec<Duration>) -> Result<Self> {
        samples.sort_unstable();
        let at = |percent: usize| samples.get(samples.len() * percent / 100).map(|at| at.as_secs_f64() * 1e6);
        Ok(Self { p50_us: at(50).context("nothing measured")?, p99_us: at(99).context("nothing measured")? })
    }
}

/// `cargo xtask bench probe …`.
pub(super) fn run(probe: &Probe) -> Result<()> {
    let latencies = match probe {
        Probe::Requests(targets) => measure(targets, request)?,
        Probe::RoundTrips(targets) => {
            let mut connection = connect(targets.servers[0])?;
            measure(targets, |_| round_trip(&mut connection))?
        }
        Probe::Echo { listen } => return echo(*listen),
    };
    println!("{}", serde_json::to_string(&latencies)?);
    Ok(())
}

fn measure(targets: &Targets, mut once: impl FnMut(SocketAddrV4) -> Result<()>) -> Result<Latencies> {
    let mut servers = targets.servers.iter().copied().cycle();
    let mut timed = || {
        let server = servers.next().context("no server")?;
        let started = Instant::now();
        let outcome = once(server).with_context(|| format!("measuring {server}"));
        Ok::<_, anyhow::Error>((started.elapsed(), outcome))
    };
    for _ in 0..WARM_UP {
        timed()?.1?;
    }
    let until = Instant::now() + Duration::from_secs(targets.seconds);
    let mut samples = Vec::with_capacity(1 << 17);
    let mut failed = 0;
    while Instant::now() < until {
        // A failure took as long as the client waited for it: a translation may be taken for a while.
        let (took, outcome) = timed()?;
        samples.push(took);
        if let Err(error) = outcome {
            failed += 1;
            ensure!(failed <= FAILED_MAX, "{failed} of {} failed, the last one: {error:#}", samples.len());
        }
    }
    Latencies::of(samples)
}

fn connect(server: SocketAddrV4) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server.into(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn request(server: SocketAddrV4) -> Result<()> {
    let mut stream = connect(server)?;
    stream.write_all(REQUEST)?;
    let mut buffer = [0; 4096];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            length => received += length,
        }
    }
    ensure!(received > 0, "a connection without an answer");
    black_box(&buffer);
    Ok(())
}

fn round_trip(stream: &mut TcpStream) -> Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    stream.write_all(&message)?;
    Ok(stream.read_exact(&mut message)?)
}

fn echo(listen: SocketAddrV4) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        stream.set_nodelay(true)?;
        std::thread::spawn(move || {
            let mut message = [0; MESSAGE_BYTES];
            loop {
                match stream.read_exact(&mut message).and_then(|()| stream.write_all(&message)) {
                    Ok(()) => {}
                    // The client has gone.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
                    Err(error) => return eprintln!("echo: {error}"),
                }
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_measurements() {
        let samples: Vec<_> = (1..=200).rev().map(Duration::from_micros).collect();
        let latencies = Latencies::of(samples).unwrap();
        assert!(
            (latencies.p50_us - 101.0).abs() < 1e-6 && (latencies.p99_us - 199.0).abs() < 1e-6,
            "{latencies:?}"
        );
        assert!(Latencies::of(Vec::new()).is_err());
    }
}
