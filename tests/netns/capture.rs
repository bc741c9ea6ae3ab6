//! tcpdump, for what packets look like on the way.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long tcpdump may take to listen, and packets to show up.
const LIMIT: Duration = Duration::from_secs(10);

/// A tcpdump that listens.
pub(crate) struct Capture {
    tcpdump: Child,
    lines: Receiver<String>,
}

impl Capture {
    /// Starts `tcpdump`, a command in the namespace to listen in, on `interface`; and waits until it listens.
    pub(crate) fn start(mut tcpdump: Command, interface: &str, arguments: &[&str]) -> Result<Self> {
        tcpdump.args(["-Z", "root", "--immediate-mode", "-l", "-nn", "-vv", "-i", interface]).args(arguments);
        tcpdump.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut tcpdump = tcpdump.spawn().context("could not start tcpdump")?;
        let (sender, lines) = mpsc::channel();
        let stdout = tcpdump.stdout.take().context("tcpdump without an output")?;
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut words = BufReader::new(tcpdump.stderr.take().context("tcpdump without an output")?);
        let mut said = String::new();
        while !said.contains("listening on") {
            if words.read_line(&mut said)? == 0 {
                bail!("tcpdump on {interface}: {said}");
            }
        }
        Ok(Self { tcpdump, lines })
    }

    /// Waits until every one of `patterns` was seen, and gives all lines.
    pub(crate) fn finish(mut self, patterns: &[String]) -> Result<String> {
        let started = Instant::now();
        let mut text = String::new();
        while !patterns.iter().all(|pattern| text.contains(pattern)) && started.elapsed() < LIMIT {
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
                text.push_str(&line);
                text.push('\n');
            }
        }
        kill(Pid::from_raw(self.tcpdump.id().try_into()?), Signal::SIGINT)?;
        self.tcpdump.wait()?;
        text.extend(self.lines.iter().flat_map(|line| [line, "\n".to_owned()]));
        match patterns.iter().find(|pattern| !text.contains(*pattern)) {
            Some(pattern) => bail!("{pattern:?} was not seen in:\n{text}"),
            None => Ok(text),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // After `finish` it has ended already.
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}
