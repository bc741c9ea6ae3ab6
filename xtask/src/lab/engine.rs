//! A node's Docker API: directly, for what the lab itself asks, and by the `docker` command line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::layout::Host;
use crate::bounded;

/// For one call of the API.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// For one `docker` command; those that wait for tasks take longest.
const DOCKER_LIMIT: Duration = Duration::from_mins(1);

/// Whether the socket answers.
pub(super) fn answers(node: &Host) -> bool {
    get(node, "/_ping").is_ok()
}

/// The node's own view: `docker info`.
pub(super) fn info(node: &Host) -> Result<Value> {
    get_json(node, "/info")
}

/// Asks the API, on behalf of whoever shows or checks something of the lab.
pub(crate) fn get_json(node: &Host, path: &str) -> Result<Value> {
    let body = get(node, path)?;
    serde_json::from_str(&body).with_context(|| format!("{} answers {path} with what is not JSON", node.name))
}

fn get(node: &Host, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(node.socket())?;
    stream.set_read_timeout(Some(CALL_LIMIT))?;
    stream.set_write_timeout(Some(CALL_LIMIT))?;
    // HTTP/1.0: the answer comes in one piece, and the connection's end is its end.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    if head.split_whitespace().nth(1) != Some("200") {
        bail!("{} answers {path}: {}", node.name, head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}

/// `docker` against a node, whatever host or context the user works with otherwise.
fn docker_command(node: &Host, arguments: &[&str]) -> Command {
    let mut command = Command::new("docker");
    for variable in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_API_VERSION", "DOCKER_TLS_VERIFY"] {
        command.env_remove(variable);
    }
    command.args(["-H", &node.docker_host()]).args(arguments);
    command
}

/// Runs `docker` against a node, and gives what it prints.
pub(crate) fn docker(node: &Host, arguments: &[&str]) -> Result<String> {
    let printed = bounded::output(&mut docker_command(node, arguments), DOCKER_LIMIT)?;
    Ok(printed.trim_end().to_owned())
}
