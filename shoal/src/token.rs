//! `shoal token`: join tokens beside the swarm's two, each for a time and for so many nodes.

use anyhow::{Context, Result};
use hyper::Method;
use serde::Deserialize;
use serde_json::json;

use crate::api;
use crate::args::{TokenArgs, TokenCommand, TokenCreateArgs, TokenListArgs, TokenRemoveArgs};
use crate::print;

const PATH: &str = "/shoal/v1/tokens";

/// A token, as a manager shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Token {
    #[serde(rename = "ID")]
    id: String,
    role: String,
    expires_at: String,
    /// Any number where there is none.
    uses_left: Option<u32>,
    state: String,
}

/// A token that was made just now.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Made {
    #[serde(flatten)]
    shown: Token,
    token: String,
    remote_addr: Option<String>,
}

/// Does what is asked for, and prints what that was.
pub(crate) fn run(args: &TokenArgs) -> Result<()> {
    match &args.command {
        TokenCommand::Create(args) => create(args),
        TokenCommand::Ls(args) => list(args),
        TokenCommand::Rm(args) => remove(args),
    }
}

fn create(args: &TokenCreateArgs) -> Result<()> {
    let TokenCreateArgs { socket, role, expires, uses, json } = args;
    let request = json!({ "Role": role, "Expires": expires, "Uses": uses });
    let answer = api::send(&socket.run_dir, Method::POST, PATH, &request.to_string())?;
    if *json {
        print::line(&print::json(&answer)?)?;
        return Ok(());
    }
    let made: Made = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    print::line(&told(&made))?;
    Ok(())
}

fn list(args: &TokenListArgs) -> Result<()> {
    let answer = api::send(&args.socket.run_dir, Method::GET, PATH, "")?;
    if args.json {
        print::line(&print::json(&answer)?)?;
        return Ok(());
    }
    let tokens: Vec<Token> = serde_json::from_slice(&answer).context("the agent's answer does not decode")?;
    let rows: Vec<_> = tokens.iter().map(row).collect();
    print::line(&print::table(["ID", "ROLE", "EXPIRES", "USES LEFT", "STATE"], &rows))?;
    Ok(())
}

fn remove(args: &TokenRemoveArgs) -> Result<()> {
    for wanted in &args.tokens {
        let path = format!("{PATH}/{}", api::escaped(wanted));
        api::send(&args.socket.run_dir, Method::DELETE, &path, "")?;
        print::line(wanted)?;
    }
    Ok(())
}

fn row(token: &Token) -> [String; 5] {
    let Token { id, role, expires_at, uses_left, state } = token;
    let uses_left = uses_left.map_or_else(|| "any number".to_owned(), |uses| uses.to_string());
    [id.clone(), role.clone(), expires_at.clone(), uses_left, state.clone()]
}

fn told(made: &Made) -> String {
    let Made { shown: Token { id, role, expires_at, uses_left, state: _ }, token, remote_addr } = made;
    let nodes = match uses_left {
        None => "any number of nodes".to_owned(),
        Some(1) => "1 node".to_owned(),
        Some(uses) => format!("{uses} nodes"),
    };
    let manager = remote_addr.as_deref().unwrap_or("MANAGER:2377");
    format!(
        "To add a {role} to this swarm, run on the host:\n\n    docker swarm join --token {token} {manager}\n\nIt is for {nodes}, \
         until {expires_at}; it is not shown again. `shoal token rm {id}` takes it back."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"{"ID":"abc","Role":"worker","CreatedAt":"2026-01-01T00:00:00Z",
        "ExpiresAt":"2026-01-02T00:00:00Z","UsesLeft":3,"State":"valid","Token":"SWMTKN-1-x-y",
        "RemoteAddr":"192.0.2.1:2377"}"#;

    #[test]
    fn what_was_made_is_told_as_a_command() {
        let made: Made = serde_json::from_str(ANSWER).unwrap();
        let text = told(&made);
        assert!(text.contains("\n    docker swarm join --token SWMTKN-1-x-y 192.0.2.1:2377\n"), "{text}");
        assert!(text.contains("for 3 nodes, until 2026-01-02T00:00:00Z"), "{text}");
        assert!(text.contains("shoal token rm abc"), "{text}");
    }

    #[test]
    fn a_row_says_how_often_a_token_is_good() {
        let mut token: Token = serde_json::from_str(ANSWER).unwrap();
        assert_eq!(row(&token), ["abc", "worker", "2026-01-02T00:00:00Z", "3", "valid"]);
        token.uses_left = None;
        assert_eq!(row(&token)[3], "any number");
    }
}
