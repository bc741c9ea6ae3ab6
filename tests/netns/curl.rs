//! curl, as what an ordinary program sees.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::lab;

/// How long a request may take, s.
const PATIENCE_S: u8 = 3;

/// Completes `curl`, a command in the namespace to ask from: it takes no proxy, and says nothing but errors.
pub(crate) fn curl(curl: Command) -> Command {
    curl_within(curl, PATIENCE_S)
}

/// The same within so many seconds.
pub(crate) fn curl_within(mut curl: Command, seconds: u8) -> Command {
    let seconds = seconds.to_string();
    curl.args(["--silent", "--show-error", "--globoff", "--noproxy", "*", "--max-time", &seconds]);
    curl
}

/// The tasks that answered so many requests for `url`, each by a connection of its own, in turn.
pub(crate) fn answering(curl: Command, url: &str, count: usize) -> Result<Vec<String>> {
    let printed = lab::output(self::curl(curl).args(["-H", "Connection: close"]).args(vec![url; count]))?;
    let tasks = printed.lines().filter_map(|line| line.strip_prefix("task: ")).map(str::to_owned);
    let tasks: Vec<String> = tasks.collect();
    ensure!(tasks.len() == count, "{} of {count} requests to {url} were answered", tasks.len());
    Ok(tasks)
}

/// Whom curl is connected with when it asks for `url`.
pub(crate) fn peer(curl: Command, url: &str) -> Result<IpAddr> {
    let mut curl = self::curl(curl);
    let seen = lab::output(curl.args(["--output", "/dev/null", "--write-out", "%{remote_ip}", url]))?;
    Ok(seen.parse()?)
}
