//! A node's Docker API, by the `docker` command line and raw.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::lab::{Lab, Node, until, within};

/// How long a service may take until its tasks run.
const TASKS_LIMIT: Duration = Duration::from_secs(30);
/// For one call of the API.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// How a `docker` command ended.
pub(crate) struct Ended {
    pub(crate) status: std::process::ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `docker` against a node.
pub(crate) fn docker(node: &Node, arguments: &[&str]) -> Result<Ended> {
    ended(docker_command(node, arguments).output())
}

/// The same with something on its standard input.
pub(crate) fn docker_fed(node: &Node, arguments: &[&str], input: &str) -> Result<Ended> {
    let mut command = docker_command(node, arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("could not start docker")?;
    // One that ends without having read it says why.
    let _ = child.stdin.take().context("a child without an input")?.write_all(input.as_bytes());
    ended(child.wait_with_output())
}

fn docker_command(node: &Node, arguments: &[&str]) -> Command {
    // A hanging command fails by itself, rather than by the whole suite's limit.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "60", "docker", "-H", &format!("unix://{}", node.socket().display())]);
    for variable in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_API_VERSION"] {
        command.env_remove(variable);
    }
    command.args(arguments);
    command
}

fn ended(output: std::io::Result<Output>) -> Result<Ended> {
    let Output { status, stdout, stderr } = output.context("could not run docker")?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ended { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Runs `docker` against a node, and gives what it printed; it must succeed.
pub(crate) fn docker_ok(node: &Node, arguments: &[&str]) -> Result<String> {
    let Ended { status, stdout, stderr } = docker(node, arguments)?;
    ensure!(status.success(), "docker {} on {node} ended with {status}: {stderr}", arguments.join(" "));
    Ok(stdout)
}

/// The lines that `docker` prints.
pub(crate) fn names(node: &Node, arguments: &[&str]) -> Result<Vec<String>> {
    Ok(docker_ok(node, arguments)?.lines().map(str::to_owned).collect())
}

/// A raw answer of the API.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    /// The text of Docker's form of an error.
    pub(crate) fn message(&self) -> Result<String> {
        let body: Value =
            serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))?;
        body["message"]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("without a message: {}", self.body))
    }
}

/// Sends a request with `body`.
pub(crate) fn call(node: &Node, method: &str, path: &str, body: &str) -> Result<Answer> {
    let mut stream = UnixStream::connect(node.socket())?;
    stream.set_read_timeout(Some(CALL_LIMIT))?;
    let head = format!("{method} {path} HTTP/1.0\r\nHost: docker\r\nContent-Type: application/json\r\n");
    stream.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok());
    Ok(Answer { status: status.context("an answer without a status")?, body: body.to_owned() })
}

/// Asks for `path`; anything but 200 is an error.
pub(crate) fn get(node: &Node, path: &str) -> Result<String> {
    let Answer { status, body } = call(node, "GET", path, "")?;
    ensure!(status == 200, "{node} answers {path} with {status}: {body}");
    Ok(body)
}

/// Asks for a list of objects.
pub(crate) fn get_list(node: &Node, path: &str) -> Result<Vec<Value>> {
    match serde_json::from_str(&get(node, path)?)? {
        Value::Array(values) => Ok(values),
        other => bail!("{path}: expected a list, got {other}"),
    }
}

/// A task as the manager knows it.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) slot: u64,
    pub(crate) node: Node,
    /// Its program's, as the host counts.
    pub(crate) pid: u32,
    /// One for each network, the ingress network's first where it has one.
    pub(crate) addresses: Vec<Ipv4Addr>,
}

impl Task {
    /// A program in the task's namespaces, with the task's /etc.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--net", "--mount", "--uts", "--", program]);
        command
    }

    /// Runs `work` on a thread in the task's network namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(&PathBuf::from(format!("/proc/{}/ns/net", self.pid)), work)
    }

    /// The address in the service's own network.
    pub(crate) fn address(&self) -> Result<Ipv4Addr> {
        self.addresses.last().copied().context("a task without an address")
    }
}

/// The running tasks of a service, by slot.
pub(crate) fn running(lab: &Lab, service: &str) -> Result<Vec<Task>> {
    let tasks = tasks(lab, service)?;
    let running =
        tasks.iter().filter(|task| task["Status"]["State"] == "running" && task["DesiredState"] == "running");
    let mut running = running.map(|task| read(lab, task)).collect::<Result<Vec<Task>>>()?;
    running.sort_by_key(|task| task.slot);
    Ok(running)
}

/// All tasks of a service that the manager keeps, as the API shows them.
pub(crate) fn tasks(lab: &Lab, service: &str) -> Result<Vec<Value>> {
    get_list(lab.manager(), &format!("/tasks?filters={{%22service%22:[%22{service}%22]}}"))
}

fn read(lab: &Lab, task: &Value) -> Result<Task> {
    let id = task["ID"].as_str().context("a task without an id")?.to_owned();
    let node_id = task["NodeID"].as_str().context("a running task without a node")?;
    let node: Value = serde_json::from_str(&get(lab.manager(), &format!("/nodes/{node_id}"))?)?;
    let node = lab.node(node["Description"]["Hostname"].as_str().unwrap_or_default())?.clone();
    let pid = task["Status"]["ContainerStatus"]["PID"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    let attachments = task["NetworksAttachments"].as_array().map(Vec::as_slice).unwrap_or_default();
    let addresses = attachments.iter().filter_map(|attachment| attachment["Addresses"][0].as_str());
    let addresses = addresses.filter_map(|address| address.split('/').next()?.parse().ok()).collect();
    let pid = pid.filter(|pid| *pid > 1).context("a running task without a process id")?;
    Ok(Task { id, slot: task["Slot"].as_u64().unwrap_or_default(), node, pid, addresses })
}

/// Waits until exactly `count` tasks of a service run, and no other is on its way up or down.
pub(crate) fn until_running(lab: &Lab, service: &str, count: usize) -> Result<Vec<Task>> {
    let settled = |task: &Value| match task["Status"]["State"].as_str() {
        Some("running") => task["DesiredState"] == "running",
        state => {
            matches!(state, Some("complete" | "shutdown" | "failed" | "rejected" | "remove" | "orphaned"))
        }
    };
    let found = until(&format!("{count} tasks of {service} run"), TASKS_LIMIT, || {
        let tasks = tasks(lab, service)?;
        let running = tasks.iter().filter(|task| task["Status"]["State"] == "running").count();
        Ok((running == count && tasks.iter().all(settled)).then_some(()))
    });
    if found.is_err() {
        let shown = docker(lab.manager(), &["service", "ps", "--no-trunc", service])?;
        return Err(found
            .err()
            .context("until")?
            .context(format!("service ps:\n{}{}", shown.stdout, shown.stderr)));
    }
    running(lab, service)
}

/// Creates a service without waiting for docker's own idea of done, and waits until `count` tasks run.
pub(crate) fn create(lab: &Lab, name: &str, count: usize, arguments: &[&str]) -> Result<Vec<Task>> {
    let create = ["service", "create", "--detach", "--name", name];
    docker_ok(lab.manager(), &[&create[..], arguments].concat())?;
    until_running(lab, name, count)
}

/// The VIPs of a service, in the order in which the API shows them.
pub(crate) fn vips(lab: &Lab, service: &str) -> Result<Vec<Ipv4Addr>> {
    let service: Value = serde_json::from_str(&get(lab.manager(), &format!("/services/{service}"))?)?;
    let vips = service["Endpoint"]["VirtualIPs"].as_array().cloned().unwrap_or_default();
    let addresses = vips.iter().filter_map(|vip| vip["Addr"].as_str()?.split('/').next()?.parse().ok());
    Ok(addresses.collect())
}

/// Has a worker leave the swarm, and the manager forget it.
pub(crate) fn leave(lab: &Lab, node: &Node) -> Result<()> {
    docker_ok(node, &["swarm", "leave"])?;
    let info = docker_ok(node, &["info", "--format", "{{.Swarm.LocalNodeState}}"])?;
    ensure!(info.trim() == "inactive", "{info}");
    until(&format!("{node} is down"), Duration::from_secs(30), || {
        let listed = docker_ok(lab.manager(), &["node", "ls"])?;
        Ok(listed.lines().any(|line| line.contains(&node.name) && line.contains("Down")).then_some(()))
    })?;
    docker_ok(lab.manager(), &["node", "rm", &node.name]).map(drop)
}

/// Has a host join the swarm as a worker, and waits until all nodes are ready.
pub(crate) fn join(lab: &Lab, node: &Node) -> Result<()> {
    let token = docker_ok(lab.manager(), &["swarm", "join-token", "--quiet", "worker"])?;
    let address = format!("{}:2377", lab.manager().address);
    let joined = docker_ok(node, &["swarm", "join", "--token", token.trim(), &address])?;
    ensure!(joined.contains("This node joined a swarm as a worker."), "{joined}");
    lab.until_ready(lab.nodes.len())
}
