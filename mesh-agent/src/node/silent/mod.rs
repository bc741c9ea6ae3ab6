//! Which of the other nodes are silent: their hosts' kernels, asked several times a second, don't answer.
//!
//! Managers take fifteen seconds to give a node up. Until then, a node that finds another one silent gives its tasks no new
//! flows, where the service has others. What is asked is the host, and not its agent: while that restarts, the tasks go on.
//! So may those of a node that only the managers have lost: they keep the flows that they have while it answers.
//! Nothing of this leaves the node.

pub(crate) mod echo;
mod judge;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use self::echo::Echo;
use self::judge::Judge;
use super::at;
use crate::files;

/// How long one waits who can't ask, before trying again.
const RETRY: Duration = Duration::from_secs(5);
/// Most answers that are heard at a time: nobody gets to keep this from asking.
const ANSWERS_MAX: usize = 1024;

/// Nodes by their VXLAN addresses.
pub(super) type Vteps = BTreeSet<IpAddr>;

/// What is known of the other nodes. One that has never answered is of neither kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Found {
    /// Those that don't answer.
    pub(super) silent: Vteps,
    /// Those that do.
    pub(super) answering: Vteps,
}

/// What asks the other nodes; it ends when dropped.
#[derive(Debug)]
pub(super) struct Silent {
    others: watch::Sender<Vteps>,
    found: watch::Receiver<Found>,
    task: JoinHandle<()>,
}

impl Silent {
    /// Starts to ask from this node's VXLAN address.
    pub(super) fn start(own: IpAddr) -> Self {
        let (others, wanted) = watch::channel(Vteps::new());
        let (sender, found) = watch::channel(Found::default());
        Self { others, found, task: tokio::spawn(run(own, wanted, sender)) }
    }

    /// Says which the other nodes are.
    pub(super) fn follow(&self, others: Vteps) {
        self.others.send_if_modified(|known| {
            *known != others && {
                *known = others;
                true
            }
        });
    }

    /// Waits until there is more to know than at the last [`Silent::found`].
    pub(super) async fn changed(&mut self) {
        if self.found.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What is known.
    pub(super) fn found(&mut self) -> Found {
        self.found.borrow_and_update().clone()
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(own: IpAddr, mut wanted: watch::Receiver<Vteps>, found: watch::Sender<Found>) {
    let mut echo = open(own).await;
    let mut judge = Judge::default();
    loop {
        let now = Instant::now();
        judge.wake(now);
        if wanted.has_changed().unwrap_or_default() {
            judge.follow(&wanted.borrow_and_update(), now);
        }
        for addr in std::iter::from_fn(|| echo.next_answer()).take(ANSWERS_MAX) {
            judge.heard(addr);
        }
        let silent = judge.silent(now);
        let news = Found { silent, answering: judge.answering() };
        found.send_if_modified(|known| {
            *known != news && {
                *known = news;
                true
            }
        });
        for addr in judge.due(now) {
            match echo.ask(addr) {
                Ok(()) => judge.asked(addr, now),
                Err(error) => debug!(%addr, %error, "can't ask a node whether it is there"),
            }
        }
        tokio::select! {
            () = at(judge.next()) => {}
            changed = wanted.changed() => match changed {
                Ok(()) => wanted.mark_changed(),
                Err(_) => return,
            },
        }
    }
}

/// Opens the socket as soon as that is possible: the host may get the address later.
async fn open(own: IpAddr) -> Echo {
    let mut said = false;
    loop {
        match Echo::open(own) {
            Ok(echo) => return echo,
            Err(error) if !said => {
                warn!(%own, %error, "can't ask other nodes whether they are there: only managers tell of lost ones");
                said = true;
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

fn file(state_dir: &Path) -> PathBuf {
    state_dir.join("silent.json")
}

/// Leaves word for [`recorded`] of whose tasks the maps give no new flows. No more is lost with it than with the maps.
pub(super) fn record(state_dir: &Path, silent: &Vteps) -> io::Result<()> {
    if silent.is_empty() {
        return files::remove(&file(state_dir));
    }
    let temporary = state_dir.join("silent.json.tmp");
    std::fs::write(&temporary, serde_json::to_vec(silent)?)?;
    std::fs::rename(temporary, file(state_dir))
}

/// The nodes that were silent when the agent brought the maps up to date for the last time.
pub(crate) fn recorded(state_dir: &Path) -> io::Result<Vteps> {
    Ok(files::read_json(&file(state_dir))?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::sys::testing::{in_netns, run, until};

    #[test]
    fn what_is_recorded_reads_back_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(recorded(folder.path()).unwrap(), Vteps::new());
        let silent = Vteps::from(["198.18.0.12".parse().unwrap(), "2001:db8::13".parse().unwrap()]);
        record(folder.path(), &silent).unwrap();
        assert_eq!(recorded(folder.path()).unwrap(), silent);
        for _ in 0..2 {
            record(folder.path(), &Vteps::new()).unwrap();
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    /// What this thread has used of a processor.
    fn used() -> Duration {
        let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
    }

    #[test]
    fn two_hundred_nodes_are_silent_while_they_do_not_answer() {
        in_netns(|| async {
            run("ip link set lo up");
            let mut silent = Silent::start("127.0.0.1".parse().unwrap());
            let others: Vteps = (1..=200).map(|last| IpAddr::from([127, 0, 1, last])).collect();
            silent.follow(others.clone());
            // Until all are trusted to answer.
            sleep(Duration::from_secs(3)).await;
            let (before, period) = (used(), Duration::from_secs(2));
            sleep(period).await;
            let used = used().saturating_sub(before).as_secs_f64() / period.as_secs_f64();
            println!("asking 200 nodes takes {:.2} % of a processor, their answers included", used * 100.0);
            assert_eq!(silent.found(), Found { silent: Vteps::new(), answering: others.clone() });
            for (ignored, expected) in [(1, others), (0, Vteps::new())] {
                let began = Instant::now();
                fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", ignored.to_string()).unwrap();
                until("all of them are found out", || silent.found().silent == expected).await;
                println!("after {:?}, {} are silent", began.elapsed(), expected.len());
            }
        });
    }
}
