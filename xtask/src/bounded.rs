//! Runs programs that must not hang: each has a time limit, hears nothing of Ctrl-C, and is ended when the user gives up.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{run, sys};

/// What a program that ended left.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Everything it said, for a message about its failure.
    pub(crate) fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr).trim_end().to_owned()
    }
}

/// Runs `command` for at most `limit`; how it ended is the caller's to judge.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    // A process group of its own: Ctrl-C is for xtask, which then decides what to undo.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("could not start {}", run::line(command)))?;
    let stdout = read_aside(child.stdout.take());
    let stderr = read_aside(child.stderr.take());
    let status = wait(&mut child, limit).with_context(|| run::line(command))?;
    // Whoever inherited the pipes may hold them for longer than the program lived.
    let text = |receiver: Receiver<Vec<u8>>| {
        let bytes = receiver.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ok(Finished { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Runs `command` for at most `limit`, and gives its standard output; a failure says the rest.
pub(crate) fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let finished = run(command, limit)?;
    if !finished.status.success() {
        bail!("{} ended with {}: {}", run::line(command), finished.status, finished.said());
    }
    Ok(finished.stdout)
}

/// Waits until `child` has ended; past `limit`, or when the user gives up, kills it.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let late = started.elapsed() > limit;
        if late || sys::interrupted() {
            child.kill()?;
            child.wait()?;
            if late {
                bail!("no end after {} s", limit.as_secs_f32());
            }
            bail!("interrupted");
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Polls until `condition` gives something; past `limit`, or when the user gives up, fails with `what`.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = condition()? {
            return Ok(found);
        }
        if sys::interrupted() {
            bail!("interrupted");
        }
        if started.elapsed() > limit {
            bail!("{what}: not within {} s", limit.as_secs_f32());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn read_aside(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before a failure is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_past_its_limit_is_ended_and_named() {
        let started = Instant::now();
        let error = output(Command::new("sleep").arg("30"), Duration::from_millis(100)).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(format!("{error:#}").contains("sleep 30: no end after 0.1 s"), "{error:#}");
    }

    #[test]
    fn both_outputs_are_kept_apart() {
        let mut command = Command::new("sh");
        let finished =
            run(command.args(["-c", "echo out; echo err >&2; exit 3"]), Duration::from_secs(5)).unwrap();
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!(finished.status.code(), Some(3));
    }
}
