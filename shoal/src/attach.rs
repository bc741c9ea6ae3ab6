//! `shoal attach`, `shoal detach` and `shoal attachments`: what runs on this node without Shoal, on its networks.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use hyper::Method;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::Deserialize;
use serde_json::json;

use crate::api;
use crate::args::{AttachArgs, AttachmentsArgs, DetachArgs, TargetArgs};
use crate::print;

/// Where attachments are.
const PATH: &str = "/shoal/v1/attachments";
/// Where programs look for their name server.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// An attachment, as the agent shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Attachment {
    #[serde(rename = "ID")]
    id: String,
    network: String,
    name: String,
    aliases: Vec<String>,
    pid: Option<u32>,
    netns: Option<String>,
    interface: String,
    addresses: Vec<String>,
    gateways: Vec<String>,
    name_server: String,
}

/// Attaches what is asked for, and prints what it got; or runs a program that is attached.
pub(crate) fn attach(args: &AttachArgs) -> Result<()> {
    let TargetArgs { pid, netns, command } = &args.target;
    let netns = netns.as_deref().map(absolute).transpose()?;
    if !command.is_empty() {
        // Before anything starts a thread: of a process, one leaves its namespaces.
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .context("can't make a network namespace: run this as root")?;
    }
    let pid = if command.is_empty() { *pid } else { Some(std::process::id()) };
    let request = json!({
        "Network": args.network,
        "Name": args.name,
        "Aliases": args.aliases,
        "IPv4Address": args.ip,
        "Pid": pid,
        "Netns": netns,
        "Interface": args.interface,
    });
    let answer = api::send(&args.socket.run_dir, Method::POST, PATH, &request.to_string())?;
    let attachment: Attachment =
        serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    match command.split_first() {
        None if args.json => print::line(&print::json(&answer)?)?,
        None => print::line(&told(&attachment))?,
        Some((program, arguments)) => {
            use_name_server(&args.socket.run_dir, &attachment.name_server)
                .with_context(|| format!("{RESOLV_CONF} can't be replaced for the program"))?;
            // It goes on under this process' number, which is what is attached.
            let error = Command::new(program).args(arguments).exec();
            return Err(error).with_context(|| format!("{program} can't be run"));
        }
    };
    Ok(())
}

/// Ends attachments, and prints what was ended.
pub(crate) fn detach(args: &DetachArgs) -> Result<()> {
    for wanted in &args.attachments {
        api::send(&args.socket.run_dir, Method::DELETE, &format!("{PATH}/{}", api::escaped(wanted)), "")?;
        print::line(wanted)?;
    }
    Ok(())
}

/// Prints what is attached.
pub(crate) fn list(args: &AttachmentsArgs) -> Result<()> {
    let answer = api::send(&args.socket.run_dir, Method::GET, PATH, "")?;
    if args.json {
        print::line(&print::json(&answer)?)?;
        return Ok(());
    }
    let attachments: Vec<Attachment> =
        serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    let rows: Vec<_> = attachments.iter().map(row).collect();
    print::line(&print::table(["ID", "NAME", "NETWORK", "ADDRESSES", "INTERFACE", "OF"], &rows))?;
    Ok(())
}

fn row(attachment: &Attachment) -> [String; 6] {
    [
        attachment.id.clone(),
        attachment.name.clone(),
        attachment.network.clone(),
        attachment.addresses.join(", "),
        attachment.interface.clone(),
        attachment.target(),
    ]
}

fn told(attachment: &Attachment) -> String {
    let Attachment { id, network, name, aliases, interface, addresses, gateways, name_server, .. } =
        attachment;
    let mut lines = vec![
        ("id", id.clone()),
        ("network", network.clone()),
        ("names", [std::slice::from_ref(name), aliases].concat().join(", ")),
        ("interface", format!("{interface} of {}", attachment.target())),
        ("addresses", addresses.join(", ")),
    ];
    if !gateways.is_empty() {
        lines.push(("gateways", gateways.join(", ")));
    }
    lines.push(("name server", name_server.clone()));
    let lines = lines.iter().map(|(title, value)| format!("{title:<12}{value}"));
    lines.collect::<Vec<_>>().join("\n")
}

impl Attachment {
    fn target(&self) -> String {
        match (&self.pid, &self.netns) {
            (Some(pid), _) => format!("process {pid}"),
            (None, Some(path)) => path.clone(),
            (None, None) => String::new(),
        }
    }
}

/// The agent has another working directory.
fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("--netns {}", path.display()))?;
    Ok(path.to_str().with_context(|| format!("--netns {}: not a text", path.display()))?.to_owned())
}

/// Puts the network's name server in the place of the host's, for this process and what it becomes.
fn use_name_server(run_dir: &Path, server: &str) -> io::Result<()> {
    // What is mounted here stays here.
    let no: Option<&str> = None;
    mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_PRIVATE, no)?;
    let path = run_dir.join(format!("attach-{}.resolv.conf", std::process::id()));
    fs::write(&path, format!("nameserver {server}\noptions ndots:0\n"))?;
    let mounted = mount(Some(&path), RESOLV_CONF, no, MsFlags::MS_BIND, no);
    // The mount holds it.
    fs::remove_file(&path)?;
    Ok(mounted?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"{"ID":"0123456789abcdefghijklmno","NetworkID":"n","Network":"front","Name":"db",
        "Aliases":["store"],"Pid":7,"Interface":"eth1","Addresses":["10.0.1.5/24","fd00::5/64"],
        "Gateways":["10.0.1.1"],"NameServer":"10.0.1.1","MacAddress":"02:42:0a:00:01:05","MTU":1450,
        "CreatedAt":"2026-01-31T12:00:00Z"}"#;

    #[test]
    fn what_is_attached_is_told_in_lines_and_rows() {
        let attachment: Attachment = serde_json::from_str(ANSWER).unwrap();
        let expected = "id          0123456789abcdefghijklmno\n\
            network     front\n\
            names       db, store\n\
            interface   eth1 of process 7\n\
            addresses   10.0.1.5/24, fd00::5/64\n\
            gateways    10.0.1.1\n\
            name server 10.0.1.1";
        assert_eq!(told(&attachment), expected);
        assert_eq!(row(&attachment)[3..], ["10.0.1.5/24, fd00::5/64", "eth1", "process 7"]);
    }
}
