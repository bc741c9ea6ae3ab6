//! Writes at a steady pace, to all managers in turn: what they acknowledged must be there in the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::engine;
use crate::lab::Lab;
use crate::load::beside;

/// Between two writes: 50 a second.
const BETWEEN_WRITES: Duration = Duration::from_millis(20);
/// Fewer writes say nothing.
const ENOUGH: usize = 100;
/// How long a write may take until it is acknowledged, by whichever manager.
const WRITTEN: Duration = Duration::from_secs(20);
/// What the names of the services begin with that they make.
const PREFIX: &str = "w-";
/// Services that one command removes.
const REMOVED_AT_ONCE: usize = 50;

/// A write that some manager acknowledged: a service without tasks.
pub(crate) struct Write {
    pub(crate) name: String,
    /// The first manager that was told of it found it done: managers told each other twice.
    twice: bool,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

/// Writes while `work` does something, and on until there are [`ENOUGH`], in the order in which they were acknowledged: the
/// next begins once one has ended.
pub(crate) fn during<T>(lab: &Lab, work: impl FnOnce() -> Result<T>) -> Result<(Vec<Write>, T)> {
    beside(|stop| write(lab, stop), work)
}

/// Writes until told to stop, and has written enough. A write that fails is tried with the next manager.
fn write(lab: &Lab, stop: &AtomicBool) -> Result<Vec<Write>> {
    let body = |name: &str| {
        format!(
            r#"{{"Name":"{name}","TaskTemplate":{{"ContainerSpec":{{"Image":"shoal/whoami"}}}},"Mode":{{"Replicated":{{"Replicas":0}}}}}}"#
        )
    };
    let mut writes: Vec<Write> = Vec::new();
    let started = Instant::now();
    while !stop.load(Ordering::Relaxed) || writes.len() < ENOUGH {
        let number = writes.len();
        let due = BETWEEN_WRITES * u32::try_from(number)?;
        std::thread::sleep(due.saturating_sub(started.elapsed()));
        let name = format!("{PREFIX}{number}");
        let began = Instant::now();
        let mut twice = false;
        for (tried, node) in lab.nodes.iter().cycle().skip(number % lab.nodes.len()).enumerate() {
            match engine::call(node, "POST", "/services/create", &body(&name)) {
                Ok(answer) if answer.status == 201 => break,
                // An earlier try took effect after all; where there was none, the managers' own did.
                Ok(answer) if answer.status == 409 => {
                    twice = tried == 0;
                    break;
                }
                Ok(_) | Err(_) => {
                    ensure!(began.elapsed() < WRITTEN, "{name} is not acknowledged by anybody");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
        writes.push(Write { name, twice, began, ended: Instant::now() });
    }
    Ok(writes)
}

/// Fails unless all writes took effect, each once; then removes what they made.
pub(crate) fn settle(lab: &Lab, writes: &[Write]) -> Result<()> {
    let listed = engine::names(lab.manager(), &["service", "ls", "--format", "{{.Name}}"])?;
    let made: Vec<&str> = listed.iter().map(String::as_str).filter(|name| name.starts_with(PREFIX)).collect();
    let lost = writes.iter().filter(|write| !made.contains(&write.name.as_str())).count();
    let twice = writes.iter().filter(|write| write.twice).count();
    ensure!(
        lost == 0 && twice == 0 && made.len() == writes.len(),
        "{} writes, {} services: {lost} acknowledged ones lost, {twice} took effect twice",
        writes.len(),
        made.len()
    );
    for some in made.chunks(REMOVED_AT_ONCE) {
        engine::docker_ok(lab.manager(), &[&["service", "rm"], some].concat())?;
    }
    Ok(())
}
