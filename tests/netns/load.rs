//! A steady load of new connections from the client, with a record of how each request went.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::client;
use crate::figure;
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

    /// Stops, and fails if a request did, or if there were too few to say anything.
    pub(crate) fn finish_unfailed(self) -> Result<()> {
        let requests = self.finish()?;
        let errors: Vec<&String> = requests.iter().filter_map(|request| request.error.as_ref()).collect();
        figure!("{} requests meanwhile, {} failed", requests.len(), errors.len());
        ensure!(errors.is_empty() && requests.len() > 100, "{errors:?}");
        Ok(())
    }
}

/// Runs `beside` on a thread of its own while `work` does something, and then tells it to stop; what both came to.
pub(crate) fn beside<B: Send, W>(
    beside: impl FnOnce(&AtomicBool) -> Result<B> + Send,
    work: impl FnOnce() -> Result<W>,
) -> Result<(B, W)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| beside(&stop));
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let ran = running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // What failed first has most to say of why the other did.
        let worked = worked?;
        Ok((ran?, worked))
    })
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
