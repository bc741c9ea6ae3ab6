//! What the demo prints: headings, the commands that one could type, and claims that were checked.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::lab::{self, Host};

/// Prints, and counts what was claimed.
pub(super) struct Stage {
    started: Instant,
    claims: u32,
}

impl Stage {
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), claims: 0 }
    }

    pub(super) fn heading(&self, text: &str) {
        println!("\n── {text}  ({:.0} s)", self.started.elapsed().as_secs_f32());
    }

    /// Says that something was seen to be so; what was not so ends the demo.
    pub(super) fn claim(&mut self, holds: bool, text: &str) -> Result<()> {
        if !holds {
            println!(" ✗ not so: {text}");
            bail!("not so: {text}");
        }
        self.claims += 1;
        println!(" ✓ {text}");
        Ok(())
    }

    pub(super) fn close(&self) {
        println!("\n{} claims, each checked, in {:.0} s", self.claims, self.started.elapsed().as_secs_f32());
    }
}

/// Shows lines that a command printed, or what there is to add.
pub(super) fn say(text: &str) {
    for line in text.lines() {
        println!("   {line}");
    }
    // Whatever is being waited for next: what led to it is to be seen meanwhile.
    let _ = std::io::stdout().flush();
}

/// Shows a command as one could type it.
pub(super) fn command(line: &str) {
    println!(" $ {line}");
    let _ = std::io::stdout().flush();
}

/// Shows and runs a docker command, and gives what it printed.
pub(super) fn docker(node: &Host, arguments: &[&str]) -> Result<String> {
    let words = arguments.iter().map(|word| quoted(word));
    command(&format!("docker -H {} {}", node.name, words.collect::<Vec<_>>().join(" ")));
    lab::docker(node, arguments)
}

/// As a shell would need it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+…".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_split_them() {
        assert_eq!(quoted("--publish=8080:80"), "--publish=8080:80");
        assert_eq!(quoted("sleep 1; done"), "'sleep 1; done'");
        assert_eq!(quoted(""), "''");
    }
}
