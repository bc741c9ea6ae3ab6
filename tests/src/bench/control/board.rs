//! What the agents have told, for who waits for it.

use std::io::{BufRead as _, BufReader, PipeReader, PipeWriter};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::words::{News, Told};

/// How often a wait looks whether there is still something to wait for.
const CHECK: Duration = Duration::from_millis(200);

/// What the agents have told.
#[derive(Debug, Default)]
struct Known {
    /// All of it, since it was taken last.
    told: Vec<Told>,
    /// The index of each agent's table, by the agent's number.
    applied: Vec<u64>,
    /// Which have a session.
    connected: Vec<bool>,
    settled: u64,
}

/// Where the agents tell.
#[derive(Debug)]
pub(super) struct Board {
    known: Arc<(Mutex<Known>, Condvar)>,
}

impl Board {
    /// For so many agents; they write to the second of these.
    pub(super) fn new(agents: u32) -> Result<(Self, PipeWriter)> {
        let (reader, writer) = std::io::pipe()?;
        let agents = agents as usize;
        let known = Known { applied: vec![0; agents], connected: vec![false; agents], ..Known::default() };
        let known = Arc::new((Mutex::new(known), Condvar::new()));
        let noted = Arc::clone(&known);
        std::thread::spawn(move || read(reader, &noted));
        Ok((Self { known }, writer))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the first `count` agents have a session.
    pub(super) fn connected(
        &self,
        count: u32,
        limit: Duration,
        check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let all = |known: &Known| known.connected.iter().take(count as usize).all(|connected| *connected);
        self.wait("sessions", limit, check, all)
    }

    /// Waits until all agents' maps hold a change of `index`, and the managers know that.
    pub(super) fn applied(
        &self,
        index: u64,
        limit: Duration,
        check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let all =
            |known: &Known| known.settled >= index && known.applied.iter().all(|applied| *applied >= index);
        self.wait("agents' maps", limit, check, all)
    }

    /// Waits until the managers say that all agents' maps hold the table up to `index`, whatever concerns them of it.
    pub(super) fn settled(
        &self,
        index: u64,
        limit: Duration,
        check: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        self.wait("settled", limit, check, |known| known.settled >= index)
    }

    /// Takes what was told since the last time.
    pub(super) fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.lock().told)
    }

    /// Forgets that agents have sessions, as far as they don't say so again; and what settled by an earlier leader.
    pub(super) fn forget_sessions(&self) {
        let mut known = self.lock();
        known.connected.fill(false);
        known.settled = 0;
    }

    fn wait(
        &self,
        what: &str,
        limit: Duration,
        mut check: impl FnMut() -> Result<()>,
        holds: impl Fn(&Known) -> bool,
    ) -> Result<()> {
        let started = Instant::now();
        let mut known = self.lock();
        while !holds(&known) {
            if started.elapsed() > limit {
                let Known { applied, connected, settled, .. } = &*known;
                let least = applied.iter().min();
                let lost = connected.iter().filter(|connected| !**connected).count();
                bail!(
                    "{what}: not within {limit:?}; settled {settled}, least applied {least:?}, {lost} without a session"
                );
            }
            let (again, timeout) =
                self.known.1.wait_timeout(known, CHECK).unwrap_or_else(PoisonError::into_inner);
            known = again;
            if timeout.timed_out() {
                drop(known);
                check()?;
                known = self.lock();
            }
        }
        Ok(())
    }
}

fn read(reader: PipeReader, known: &(Mutex<Known>, Condvar)) {
    for line in BufReader::new(reader).lines().map_while(Result::ok) {
        // An agent that is killed may leave half a line.
        let Ok(told) = serde_json::from_str::<Told>(&line) else { continue };
        let mut noted = known.0.lock().unwrap_or_else(PoisonError::into_inner);
        let agent = told.agent as usize;
        match told.news {
            News::Applied { index, took_ns: _ } => noted.applied[agent] = index,
            News::Settled { index } => noted.settled = index,
            News::Connected => noted.connected[agent] = true,
            News::Disconnected => noted.connected[agent] = false,
        }
        noted.told.push(told);
        known.1.notify_all();
    }
}
