//! Published ports: unique in the cluster per protocol, automatic ones from Docker's range.

use std::collections::{BTreeMap, BTreeSet};

use mesh_api::id::ServiceId;
use mesh_api::session;
use mesh_api::table::{Protocol, PublishMode};

use super::Draft;
use crate::model::{EndpointSpec, PortConfig, Service};
use crate::refusal::Refusal;

/// Automatic published ports.
const AUTOMATIC: std::ops::RangeInclusive<u16> = 30000..=32767;

/// Who has a published port: ports in host mode may be shared, as they meet only on a node.
struct Owner<'a> {
    service: &'a Service,
    host: bool,
}

/// What the cluster itself answers on.
struct Reserved {
    data_path_port: u16,
    /// Of the nodes' WireGuard identities.
    wireguard: BTreeSet<u16>,
}

impl Reserved {
    fn of(draft: &Draft) -> Result<Self, Refusal> {
        let identities = draft.state.nodes.values().flat_map(|node| &node.description.wireguard);
        let wireguard = identities.map(|identity| identity.port).collect();
        Ok(Self { data_path_port: draft.cluster()?.data_path_port, wireguard })
    }

    /// Who among the cluster's own parts answers on a port.
    fn owner(&self, port: (Protocol, u16)) -> Option<&'static str> {
        match port {
            (Protocol::Tcp, session::DEFAULT_PORT) => Some("the cluster's managers"),
            (Protocol::Udp, port) if port == self.data_path_port => Some("the overlay between nodes"),
            (Protocol::Udp, port) if self.wireguard.contains(&port) => Some("encryption between nodes"),
            (Protocol::Tcp | Protocol::Udp, _) => None,
        }
    }
}

/// The ports of a service whose specification asks for `spec`; `kept` are those it has.
pub(super) fn allocate(
    draft: &Draft,
    id: &ServiceId,
    spec: &EndpointSpec,
    kept: &[PortConfig],
) -> Result<Vec<PortConfig>, Refusal> {
    let others = draft.state.services.values().filter(|service| service.id != *id);
    let mut owners: BTreeMap<(Protocol, u16), Owner<'_>> = BTreeMap::new();
    for service in others {
        for port in &service.endpoint.ports {
            let owner = Owner { service, host: port.mode == PublishMode::Host };
            owners.insert((port.protocol, port.published), owner);
        }
    }
    let reserved = Reserved::of(draft)?;
    let mut ports = spec.ports.clone();
    for port in &ports {
        check(&reserved, &owners, port)?;
    }
    for at in 0..ports.len() {
        if ports[at].published == 0 {
            let free = |port: &u16| {
                let key = (ports[at].protocol, *port);
                reserved.owner(key).is_none()
                    && !owners.contains_key(&key)
                    && !ports.iter().any(|other| (other.protocol, other.published) == key)
            };
            let before = kept.iter().find(|old| PortConfig { published: 0, ..(*old).clone() } == ports[at]);
            let before =
                before.map(|old| old.published).filter(|port| AUTOMATIC.contains(port) && free(port));
            let found = before.or_else(|| AUTOMATIC.clone().find(free));
            ports[at].published = found.ok_or(Refusal::PortsExhausted)?;
        }
    }
    Ok(ports)
}

fn check(
    reserved: &Reserved,
    owners: &BTreeMap<(Protocol, u16), Owner<'_>>,
    port: &PortConfig,
) -> Result<(), Refusal> {
    if port.published == 0 {
        return Ok(());
    }
    if let Some(owner) = reserved.owner((port.protocol, port.published)) {
        let protocol = match port.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let (protocol, owner) = (protocol.into(), owner.into());
        return Err(Refusal::PortReserved { port: port.published, protocol, owner });
    }
    match owners.get(&(port.protocol, port.published)) {
        Some(owner) if !(owner.host && port.mode == PublishMode::Host) => Err(Refusal::PortInUse {
            port: port.published,
            name: owner.service.spec.name.clone(),
            service: owner.service.id.clone(),
            host: owner.host,
        }),
        _ => Ok(()),
    }
}
