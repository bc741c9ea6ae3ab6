//! Published ports, dialled by the nodes' own processes and by tasks.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};

use crate::client;
use crate::curl;
use crate::figure;
use crate::lab::{Lab, Node, as_host};
use crate::overlay::{create_idle, create_network};
use crate::ways::{self, Back, Family, Way};

/// What can be dialled on a node, by its own processes.
fn local_addresses(node: &Node, others: &[Node]) -> Vec<IpAddr> {
    let own = Family::ALL.into_iter().flat_map(|family| [family.loopback(), family.of(node)]);
    let others = others.iter().filter(|other| *other != node);
    own.chain(others.flat_map(|other| Family::ALL.map(|family| family.of(other)))).collect()
}

/// Three answers by TCP and two by UDP, all as from the address that was dialled.
fn ask(to: SocketAddr) -> Result<()> {
    for _ in 0..3 {
        client::http(client::anywhere(to), to, "/")?;
    }
    for _ in 0..2 {
        // It checks who answers; a connected socket has the kernel check as well.
        client::udp(client::anywhere(to), to, b"local")?;
        let socket = std::net::UdpSocket::bind(client::anywhere(to))?;
        socket.set_read_timeout(Some(client::LIMIT))?;
        socket.connect(to)?;
        ensure!(socket.peer_addr()? == to, "the peer is {}", socket.peer_addr()?);
        socket.send(b"connected")?;
        let mut answer = [0; 256];
        let len = socket.recv(&mut answer).context("a connected socket got no answer")?;
        ensure!(answer[..len].ends_with(b"\nconnected"), "{:?}", String::from_utf8_lossy(&answer[..len]));
    }
    Ok(())
}

pub(crate) fn processes_of_a_node_reach_its_ports_by_every_address(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    for node in &lab.nodes {
        let addresses = local_addresses(node, &lab.nodes);
        for back in Back::ALL {
            as_host(&node.name, || {
                addresses.iter().try_for_each(|address| {
                    let to = SocketAddr::new(*address, back.port());
                    ask(to).with_context(|| format!("{to} from {node}, {back}"))
                })
            })?;
        }
        figure!("{node}: TCP and UDP by {addresses:?}");
    }
    Ok(())
}

pub(crate) fn curl_on_a_node_sees_whom_it_dialled(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    for node in &lab.nodes[..2] {
        for address in local_addresses(node, &[]) {
            let url = format!("http://{}/", SocketAddr::new(address, Back::Tunnel.port()));
            let seen = curl::peer(node.command("curl"), &url)?;
            ensure!(seen == address, "{url} on {node}: the peer is {seen}");
            figure!("{node}: curl {url} is with {seen}");
        }
    }
    Ok(())
}

pub(crate) fn tasks_reach_the_ports_of_every_node(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    create_network(lab, "blue", &["--ipv6"])?;
    let caller = create_idle(lab, "caller", &["--network", "blue", "--constraint", "node.hostname==n2"])?;
    for way in Way::all() {
        for to in way.targets(lab) {
            caller.inside(|| ask(to)).with_context(|| format!("{to} from a task on n2, {way}"))?;
        }
        figure!("{way}: a task on n2 has answers from every node's port, TCP and UDP");
    }
    Ok(())
}
