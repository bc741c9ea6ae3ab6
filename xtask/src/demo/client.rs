//! The client outside the swarm: curl in its own namespace, and what `shoal/whoami` answers.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bounded;
use crate::lab::{Host, in_netns};

/// One answer of `shoal/whoami`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Answer {
    /// The task's name: `web.2.…`.
    pub(super) task: String,
    pub(super) task_id: String,
    pub(super) node: String,
    /// The client's address as the task saw it, with its port.
    pub(super) client: String,
}

impl Answer {
    /// The answers in the output of a curl that fetched several.
    pub(super) fn all(text: &str) -> Vec<Self> {
        let mut answers: Vec<BTreeMap<&str, &str>> = Vec::new();
        for (key, value) in text.lines().filter_map(|line| line.split_once(": ")) {
            if key == "task" {
                answers.push(BTreeMap::new());
            }
            // Request headers come last, and can't speak for the task.
            if let Some(answer) = answers.last_mut() {
                answer.entry(key).or_insert(value);
            }
        }
        let field = |answer: &BTreeMap<&str, &str>, key| answer.get(key).copied().unwrap_or("-").to_owned();
        let answers = answers.iter().map(|answer| Self {
            task: field(answer, "task"),
            task_id: field(answer, "task-id"),
            node: field(answer, "node"),
            client: field(answer, "client"),
        });
        answers.collect()
    }

    /// The client's address, without the port.
    pub(super) fn client_address(&self) -> &str {
        self.client.rsplit_once(':').map_or(self.client.as_str(), |(address, _)| address)
    }

    /// `web.2`, as people call it.
    pub(super) fn slot(&self) -> String {
        self.task.splitn(3, '.').take(2).collect::<Vec<_>>().join(".")
    }
}

/// Asks a node's port 8080 `count` times, each by a connection of its own; those that fail are missing from what comes.
pub(super) fn ask(node: &Host, count: usize) -> Result<Vec<Answer>> {
    let mut curl = curl();
    curl.args(["--max-time", "3", "--header", "Connection: close"]);
    curl.args(std::iter::repeat_n(url(node, ""), count));
    let finished = bounded::run(&mut curl, Duration::from_mins(1))?;
    Ok(Answer::all(&finished.stdout))
}

/// A download that lives: a line a second, until it is dropped.
pub(super) struct Stream {
    curl: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Stream {
    pub(super) fn open(node: &Host) -> Result<Self> {
        use std::io::BufRead;
        let mut curl = curl();
        curl.args(["--no-buffer", &url(node, "stream")]);
        curl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut curl = curl.spawn().context("could not start curl")?;
        let output = curl.stdout.take().context("curl without an output")?;
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { curl, lines })
    }

    /// Waits for one line more than what came so far.
    pub(super) fn goes_on(&self) -> bool {
        while self.lines.try_recv().is_ok() {}
        self.lines.recv_timeout(Duration::from_secs(5)).is_ok()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.curl.kill();
        let _ = self.curl.wait();
    }
}

fn curl() -> Command {
    let mut curl = in_netns(&Host::client().netns(), "curl");
    curl.args(["--silent", "--noproxy", "*"]);
    curl
}

fn url(node: &Host, path: &str) -> String {
    format!("http://{}:8080/{path}", node.address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart_and_headers_do_not_count() {
        let one = "task: web.1.abc\ntask-id: abc\nservice: web\nnode: n2\nlocal: 10.0.0.5:80\nclient: 198.18.0.100:4711\n\
                   method: GET\npath: /\nhost: x\nnode: liar\n";
        let answers = Answer::all(&format!("{one}{one}"));
        assert_eq!(answers.len(), 2);
        assert_eq!(answers[0].node, "n2");
        assert_eq!((answers[1].slot().as_str(), answers[1].client_address()), ("web.1", "198.18.0.100"));
        assert!(Answer::all("curl: (7) refused").is_empty());
    }
}
