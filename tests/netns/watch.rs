//! Whether a node's programs stay attached, looked at again and again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, ensure};
use aya::programs::links::{FdLink, PinnedLink};

use crate::lab::Node;

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(1);

/// The attachments of a node, until [`Watch::finish`].
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Watched>>,
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// How many attachments there are.
    pub(crate) attachments: usize,
    /// How often they were looked at.
    pub(crate) looks: usize,
    /// Programs that they had, one after another, over all attachments.
    pub(crate) programs: usize,
    /// Attachments that were not there at a look, or were others than before.
    pub(crate) gaps: Vec<String>,
}

/// The link that is pinned at a path, and its program, by their ids.
fn attached(pin: &Path) -> Option<(u32, u32)> {
    let info = FdLink::from(PinnedLink::from_pin(pin).ok()?).info().ok()?;
    Some((info.id(), info.program_id())).filter(|(_, program)| *program != 0)
}

impl Watch {
    pub(crate) fn start(node: &Node) -> Result<Self> {
        let mut seen = BTreeMap::new();
        for entry in fs::read_dir(node.run_dir().join("bpf/links"))? {
            let pin = entry?.path();
            if let Some((link, program)) = attached(&pin) {
                seen.insert(pin, (link, vec![program]));
            }
        }
        ensure!(!seen.is_empty(), "{node} has no attachments");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || Ok(watch(seen, &stopped)));
        Ok(Self { stop, thread })
    }

    /// Stops looking.
    pub(crate) fn finish(self) -> Result<Watched> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn watch(mut seen: BTreeMap<PathBuf, (u32, Vec<u32>)>, stop: &AtomicBool) -> Watched {
    let mut watched = Watched { attachments: seen.len(), ..Watched::default() };
    while !stop.load(Ordering::Relaxed) {
        watched.looks += 1;
        for (pin, (link, programs)) in &mut seen {
            match attached(pin) {
                Some((now, program)) if now == *link => {
                    if programs.last() != Some(&program) {
                        programs.push(program);
                    }
                }
                other => watched.gaps.push(format!("{}: {other:?}", pin.display())),
            }
        }
        std::thread::sleep(PERIOD);
    }
    watched.programs = seen.values().map(|(_, programs)| programs.len()).sum();
    watched
}
