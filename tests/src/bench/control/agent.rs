//! A process that is an agent: the product's session, plan and layout, with maps in its own memory.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result};
use mesh_agent::JoinRequest;
use mesh_agent::simulated::{Event, Simulated};

use super::processes::{die_with_parent, log};
use super::words::{AgentStart, News, Told, now_ns};

/// Runs until it is killed.
pub fn run(start: &str) -> Result<()> {
    die_with_parent()?;
    log();
    let start = serde_json::from_str(start).context("what the agent is to be")?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(follow(start))
}

async fn follow(start: AgentStart) -> Result<()> {
    let AgentStart { dir, number, remotes, token } = start;
    let advertise = IpAddr::V4(Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 1).to_bits() + number));
    let request = JoinRequest { remotes, token: token.parse()?, advertise, data_path: advertise };
    let agent = Simulated::join(&dir, format!("agent-{number}"), request).await?;
    let mut result = Ok(());
    agent.run(|event| result = tell(number, event)).await?;
    result
}

fn tell(agent: u32, event: Event) -> Result<()> {
    let at_ns = now_ns()?;
    let news = match event {
        Event::Applied { index, took } => News::Applied { index, took_ns: u64::try_from(took.as_nanos())? },
        // The managers tell all of them the same.
        Event::Settled { .. } if agent > 0 => return Ok(()),
        Event::Settled { index } => News::Settled { index },
        Event::Connected => News::Connected,
        Event::Disconnected => News::Disconnected,
    };
    // In one piece: all agents write to the same pipe.
    let mut line = serde_json::to_vec(&Told { agent, at_ns, news })?;
    line.push(b'\n');
    Ok(std::io::stdout().lock().write_all(&line)?)
}
