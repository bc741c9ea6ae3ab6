//! `shoal network`: what managers do with networks beyond the `docker` command line.

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::api;
use crate::args::{NetworkArgs, NetworkCommand, SocketArgs};
use crate::print;

/// What a manager answers.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Rotated {
    key_epoch: u64,
    /// Nodes that have keys.
    nodes: u64,
    /// Those of them that are down.
    nodes_down: u64,
}

/// Does what is asked for, and prints what that was.
pub(crate) fn run(args: &NetworkArgs) -> Result<()> {
    match &args.command {
        NetworkCommand::RotateKeys(args) => rotate_keys(args),
    }
}

fn rotate_keys(args: &SocketArgs) -> Result<()> {
    let answer = api::post(&args.run_dir, "/shoal/v1/networks/rotate-keys")?;
    let rotated: Rotated = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    print::line(&told(&rotated))?;
    Ok(())
}

fn told(rotated: &Rotated) -> String {
    let Rotated { key_epoch, nodes, nodes_down } = rotated;
    let up = nodes.saturating_sub(*nodes_down);
    let count =
        |count| if count == 1 { "1 node replaces".to_owned() } else { format!("{count} nodes replace") };
    let keys = if up == 1 { "its" } else { "their" };
    let later = match nodes_down {
        0 => String::new(),
        1 => ", 1 that is down once it is back".to_owned(),
        down => format!(", {down} that are down once they are back"),
    };
    if *nodes == 0 {
        format!("No node has keys; those that get some begin with key epoch {key_epoch}.")
    } else {
        format!("{} {keys} keys{later} (key epoch {key_epoch}).", count(up))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_told_in_numbers() {
        let answer = r#"{"KeyEpoch":2,"Nodes":4,"NodesDown":1}"#;
        let rotated: Rotated = serde_json::from_str(answer).unwrap();
        assert_eq!((rotated.key_epoch, rotated.nodes, rotated.nodes_down), (2, 4, 1));
        for (nodes, nodes_down, expected) in [
            (0, 0, "No node has keys; those that get some begin with key epoch 7."),
            (1, 0, "1 node replaces its keys (key epoch 7)."),
            (3, 0, "3 nodes replace their keys (key epoch 7)."),
            (3, 1, "2 nodes replace their keys, 1 that is down once it is back (key epoch 7)."),
            (5, 2, "3 nodes replace their keys, 2 that are down once they are back (key epoch 7)."),
        ] {
            assert_eq!(told(&Rotated { key_epoch: 7, nodes, nodes_down }), expected);
        }
    }
}
