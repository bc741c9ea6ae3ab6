//! Connections that live long: each asks for a number and gets it back, over and over, and tells when it first failed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::{self, Answer};
use crate::lab::{self, as_client};

/// Threads that the connections are spread over.
const THREADS: usize = 4;

/// How long an answer may take: a flood takes the machine's CPUs as well, and TCP's own timers double.
const PATIENCE: Duration = Duration::from_secs(15);

/// A connection that is kept open between requests.
pub(crate) struct Connection {
    reader: BufReader<TcpStream>,
    to: SocketAddr,
    asked: u64,
}

impl Connection {
    /// Opens one, and asks once: its flow is known on the way.
    pub(crate) fn open(to: SocketAddr) -> Result<(Self, Answer)> {
        let stream = client::connect_from(client::anywhere(to), to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut connection = Self { reader: BufReader::new(stream), to, asked: 0 };
        let answer = connection.ask()?;
        Ok((connection, answer))
    }

    /// The client's end.
    pub(crate) fn client(&self) -> Result<SocketAddr> {
        Ok(self.reader.get_ref().local_addr()?)
    }

    /// Asks for the next number. An answer to another question is an error.
    pub(crate) fn ask(&mut self) -> Result<Answer> {
        self.asked += 1;
        let path = format!("/{}", self.asked);
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.to);
        self.reader.get_mut().write_all(request.as_bytes()).context("sending a request")?;
        let mut len = None;
        loop {
            let mut line = String::new();
            ensure!(self.reader.read_line(&mut line).context("no answer")? > 0, "the connection was closed");
            match line.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    len = Some(value.parse()?);
                }
                None if line == "\r\n" => break,
                _ => {}
            }
        }
        let mut body = vec![0; len.context("an answer without a length")?];
        self.reader.read_exact(&mut body).context("half an answer")?;
        let body = String::from_utf8(body)?;
        ensure!(body.contains(&format!("\npath: {path}\n")), "not the answer to {path}: {body}");
        client::read(&body)
    }
}

/// Lets this process have as many connections as a case may need: some systems allow 1024 files.
pub(crate) fn allow_files() -> Result<()> {
    let own = std::process::id().to_string();
    lab::output(Command::new("prlimit").args(["--nofile=4096:", "--pid", &own])).map(drop)
}

/// How a connection went.
#[derive(Clone, Debug)]
pub(crate) struct Fate {
    /// The task that it is with.
    pub(crate) task: String,
    pub(crate) to: SocketAddr,
    pub(crate) requests: u64,
    /// The longest that a request took.
    pub(crate) slowest: Duration,
    pub(crate) error: Option<String>,
}

/// Connections under way until [`Steady::finish`].
pub(crate) struct Steady {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Fate>>>>,
}

impl Steady {
    /// Opens `count` connections from the client to each of `targets` in turn; on each a request every `pause`, about.
    pub(crate) fn start(targets: &[SocketAddr], count: usize, pause: Duration) -> Result<Self> {
        let connections = as_client(|| {
            let targets = targets.iter().cycle().take(count);
            targets.map(|to| Connection::open(*to)).collect::<Result<Vec<_>>>()
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut shares: Vec<Vec<(Connection, Answer)>> = (0..THREADS).map(|_| Vec::new()).collect();
        for (at, connection) in connections.into_iter().enumerate() {
            shares[at % THREADS].push(connection);
        }
        let thread = |share: Vec<(Connection, Answer)>| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || Ok(drive(share, pause, &stop)))
        };
        let threads = shares.into_iter().map(thread).collect();
        Ok(Self { stop, threads })
    }

    /// Asks once more on each, and tells how they went.
    pub(crate) fn finish(self) -> Result<Vec<Fate>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut fates = Vec::new();
        for thread in self.threads {
            fates.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(fates)
    }
}

fn drive(connections: Vec<(Connection, Answer)>, pause: Duration, stop: &AtomicBool) -> Vec<Fate> {
    let fate = |(connection, answer): (Connection, Answer)| {
        let to = connection.to;
        (connection, Fate { task: answer.task, to, requests: 0, slowest: Duration::ZERO, error: None })
    };
    let mut connections: Vec<(Connection, Fate)> = connections.into_iter().map(fate).collect();
    let mut last_round = false;
    loop {
        for (connection, fate) in connections.iter_mut().filter(|(_, fate)| fate.error.is_none()) {
            let started = Instant::now();
            match connection.ask() {
                Ok(_) => fate.requests += 1,
                Err(error) => fate.error = Some(format!("{error:#}")),
            }
            fate.slowest = fate.slowest.max(started.elapsed());
        }
        if last_round {
            return connections.into_iter().map(|(_, fate)| fate).collect();
        }
        std::thread::sleep(pause);
        last_round = stop.load(Ordering::Relaxed);
    }
}

/// Requests in all, the slowest, and what went wrong where.
pub(crate) fn sum(fates: &[Fate]) -> (u64, Duration, Vec<String>) {
    let broken = fates.iter().filter_map(|fate| {
        fate.error.as_ref().map(|error| format!("{} with {}: {error}", fate.to, fate.task))
    });
    (
        fates.iter().map(|fate| fate.requests).sum(),
        fates.iter().map(|fate| fate.slowest).max().unwrap_or_default(),
        broken.collect(),
    )
}
