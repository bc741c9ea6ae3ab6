//! Runs processes: an error says the command line, how it ended and what it said.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Runs `command` with this process's own input and output.
pub(crate) fn inherit(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("could not start {}", line(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", line(command));
    }
    Ok(())
}

/// Runs `command` and gives its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("could not start {}", line(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}:\n{}", line(command), output.status, said.trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed what is not UTF-8", line(command)))
}

/// Whether `command` starts and succeeds; it prints nothing.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Runs a long `command` with its words in the file `log`, showing the seconds that go by. A failure shows the log's end.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("could not create {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let status = wait_visibly(command)?;
    if !status.success() {
        let said = std::fs::read(log).unwrap_or_default();
        bail!("{} ended with {status}:\n{}", line(command), last_lines(&String::from_utf8_lossy(&said), 25));
    }
    Ok(())
}

/// On a terminal one line counts the seconds; in a file a line every half minute shows that it lives.
fn wait_visibly(command: &mut Command) -> Result<ExitStatus> {
    let mut child = command.spawn().with_context(|| format!("could not start {}", line(command)))?;
    let started = Instant::now();
    let on_terminal = std::io::stderr().is_terminal();
    let between_reports = Duration::from_secs(if on_terminal { 1 } else { 30 });
    let mut next_report = between_reports;
    loop {
        if let Some(status) = child.try_wait()? {
            if on_terminal {
                eprint!("\r          \r");
            }
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(100));
        if started.elapsed() >= next_report {
            next_report += between_reports;
            let seconds = started.elapsed().as_secs();
            if on_terminal {
                eprint!("\r      {seconds} s");
            } else {
                eprintln!("      {seconds} s");
            }
            std::io::stderr().flush()?;
        }
    }
}

/// The command line as one could type it.
pub(crate) fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The last `count` lines of `text`.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_names_command_and_its_words() {
        let error =
            output(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(
            error.contains("sh -c") && error.contains("exit status: 3") && error.contains("broken"),
            "{error}"
        );
    }

    #[test]
    fn last_lines_of_a_short_text_is_the_text() {
        assert_eq!(last_lines("a\nb", 5), "a\nb");
        assert_eq!(last_lines("a\nb\nc", 2), "b\nc");
    }
}
