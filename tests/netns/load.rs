//! A steady load of new connections from the client, with a record of how each request went.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::client;
use crate::lab::as_client;

/// Connections at a time.
const THREADS: usize = 8;
/// Between two requests of a thread.
const PAUSE: Duration = Duration::from_millis(10);

/// Runs until [`Load::finish`].
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Request>>>>,
}

/// A request that is over.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// Why it failed.
    pub(crate) error: Option<String>,
}

impl Load {
    /// Starts to ask each of `targets` in turn for `path`.
    pub(crate) fn start(targets: &[SocketAddrV4], path: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = |number| {
            let (targets, stop) = (targets.to_vec(), Arc::clone(&stop));
            std::thread::spawn(move || as_client(|| Ok(requests(&targets, number, path, &stop))))
        };
        let threads = (0..THREADS).map(thread).collect();
        Self { stop, threads }
    }

    /// Stops, and gives all requests.
    pub(crate) fn finish(self) -> Result<Vec<Request>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for thread in self.threads {
            requests.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(requests)
    }
}

fn requests(targets: &[SocketAddrV4], first: usize, path: &str, stop: &AtomicBool) -> Vec<Request> {
    let mut requests = Vec::new();
    for target in targets.iter().cycle().skip(first) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let began = Instant::now();
        let answer = client::http(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0), *target, path);
        let error = answer.err().map(|error| format!("{error:#}"));
        requests.push(Request { began, ended: Instant::now(), error });
        std::thread::sleep(PAUSE);
    }
    requests
}
