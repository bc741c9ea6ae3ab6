//! The ways that a published port can be dialled and answered: family of the client's address, way of the replies.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::client::{self, anywhere};
use crate::engine::{self, Task};
use crate::lab::{CLIENT, CLIENT6, Lab, Node, ROUTED_CLIENT, ROUTED_CLIENT6, as_client, until};

/// An address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The client's address.
    pub(crate) fn client(self) -> IpAddr {
        match self {
            Self::V4 => CLIENT.into(),
            Self::V6 => CLIENT6.into(),
        }
    }

    /// The client's address behind the switch's router.
    pub(crate) fn routed_client(self) -> IpAddr {
        match self {
            Self::V4 => ROUTED_CLIENT.into(),
            Self::V6 => ROUTED_CLIENT6.into(),
        }
    }

    /// A node's address.
    pub(crate) fn of(self, node: &Node) -> IpAddr {
        match self {
            Self::V4 => node.address.into(),
            Self::V6 => node.address6.into(),
        }
    }

    /// The loopback's address.
    pub(crate) fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
            Self::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// The flag that `ip`, `ping` and `traceroute` know it by.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::V4 => "-4",
            Self::V6 => "-6",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How replies return to the client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Back {
    /// By the node that the client dialled.
    Tunnel,
    /// Straight from the task's node.
    Direct,
}

impl Back {
    pub(crate) const ALL: [Self; 2] = [Self::Tunnel, Self::Direct];

    /// The published port of the service whose replies return like this.
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Tunnel => 8080,
            Self::Direct => 8081,
        }
    }
}

impl fmt::Display for Back {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tunnel => "tunnel",
            Self::Direct => "direct",
        })
    }
}

/// A family, and how replies return.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Way {
    pub(crate) family: Family,
    pub(crate) back: Back,
}

impl Way {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Family::ALL.into_iter().flat_map(|family| Back::ALL.map(|back| Self { family, back }))
    }

    /// What a client dials on `node`.
    pub(crate) fn to(self, node: &Node) -> SocketAddr {
        SocketAddr::new(self.family.of(node), self.back.port())
    }

    /// What a client dials, on every node.
    pub(crate) fn targets(self, lab: &Lab) -> Vec<SocketAddr> {
        lab.nodes.iter().map(|node| self.to(node)).collect()
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.family, self.back)
    }
}

/// Creates a service for each way of replies, published for TCP and UDP to `port` of its tasks, which run `image`. Gives
/// the tasks of both.
pub(crate) fn create(
    lab: &Lab,
    replicas: usize,
    port: u16,
    options: &[&str],
    image: &[&str],
) -> Result<Vec<Task>> {
    let count = replicas.to_string();
    let mut tasks = Vec::new();
    for back in Back::ALL {
        let (tcp, udp) = (format!("{}:{port}", back.port()), format!("{}:{port}/udp", back.port()));
        let label = format!("shoal.return={back}");
        let arguments = ["--replicas", &count, "--publish", &tcp, "--publish", &udp, "--label", &label];
        tasks.extend(engine::create(
            lab,
            &back.to_string(),
            replicas,
            &[&arguments, options, image].concat(),
        )?);
    }
    Ok(tasks)
}

/// [`create`] for `shoal/whoami`; waits until every node answers on every way.
pub(crate) fn create_web(lab: &Lab, replicas: usize, options: &[&str]) -> Result<Vec<Task>> {
    let tasks = create(lab, replicas, 80, options, &["shoal/whoami"])?;
    for to in Way::all().flat_map(|way| way.targets(lab)) {
        until_answered(to)?;
    }
    Ok(tasks)
}

/// Waits until `shoal/whoami` answers the client.
pub(crate) fn until_answered(to: SocketAddr) -> Result<()> {
    let mut last = None;
    let answered = until(&format!("{to} answers"), Duration::from_secs(10), || {
        last = as_client(|| client::http(anywhere(to), to, "/")).err();
        Ok(last.is_none().then_some(()))
    });
    answered.with_context(|| last.map_or_else(String::new, |error| format!("{error:#}")))
}
