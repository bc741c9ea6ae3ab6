//! `shoal node`: nodes that ask to come back because their certificates have expired.

use anyhow::{Context, Result};
use hyper::Method;
use serde::Deserialize;

use crate::api;
use crate::args::{NodeApproveArgs, NodeArgs, NodeCommand, NodeListArgs};
use crate::print;

const PATH: &str = "/shoal/v1/nodes";

/// A node, as a manager shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(rename = "ID")]
    id: String,
    hostname: String,
    role: String,
    state: String,
    asking_since: Option<String>,
    approved_until: Option<String>,
}

/// Does what is asked for, and prints what that was.
pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    match &args.command {
        NodeCommand::Ls(args) => list(args),
        NodeCommand::Approve(args) => approve(args),
    }
}

fn list(args: &NodeListArgs) -> Result<()> {
    let answer = api::send(&args.socket.run_dir, Method::GET, PATH, "")?;
    if args.json {
        print::line(&print::json(&answer)?)?;
        return Ok(());
    }
    let nodes: Vec<Node> = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    let rows: Vec<_> = nodes.iter().map(row).collect();
    print::line(&print::table(["ID", "HOSTNAME", "ROLE", "STATE", "COMES BACK"], &rows))?;
    Ok(())
}

fn approve(args: &NodeApproveArgs) -> Result<()> {
    let path = format!("{PATH}/{}/approve", api::escaped(&args.node));
    let answer = api::send(&args.socket.run_dir, Method::POST, &path, "")?;
    let node: Node = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    print::line(&approved(&node))?;
    Ok(())
}

fn row(node: &Node) -> [String; 5] {
    let Node { id, hostname, role, state, asking_since, approved_until } = node;
    let comes_back = match (asking_since, approved_until) {
        (_, Some(until)) => format!("approved until {until}"),
        (Some(since), None) => format!("asks since {since}"),
        (None, None) => String::new(),
    };
    [id.clone(), hostname.clone(), role.clone(), state.clone(), comes_back]
}

fn approved(node: &Node) -> String {
    let Node { id, hostname, approved_until, .. } = node;
    match approved_until {
        Some(until) => {
            format!(
                "Node {hostname} ({id}) comes back with its next question: it asks every 30 s. Good until {until}."
            )
        }
        None => format!("Node {hostname} ({id}) has come back."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(rest: &str) -> Node {
        let text = format!(r#"{{"ID":"abc","Hostname":"n1","Role":"worker","State":"down"{rest}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_row_says_whether_a_node_asks_and_is_approved() {
        assert_eq!(row(&node("")), ["abc", "n1", "worker", "down", ""]);
        assert_eq!(row(&node(r#","AskingSince":"T1""#))[4], "asks since T1");
        assert_eq!(row(&node(r#","AskingSince":"T1","ApprovedUntil":"T2""#))[4], "approved until T2");
    }

    #[test]
    fn an_approval_is_told_with_its_end() {
        let text = approved(&node(r#","ApprovedUntil":"T2""#));
        assert!(text.contains("n1 (abc)") && text.contains("Good until T2"), "{text}");
        assert_eq!(approved(&node("")), "Node n1 (abc) has come back.");
    }
}
