//! Shoal's own labels, `shoal.*`, on services, nodes and the cluster: what `docker` has no flag for.
//!
//! A label of that prefix that nothing here knows is an error, since a mistyped one would silently do nothing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::table::{Affinity, ReturnPath, SourceRule, WEIGHT_MAX};
use serde::{Deserialize, Serialize};

use super::constraint::{Constraint, parse_all};

/// What all of Shoal's labels begin with.
pub const PREFIX: &str = "shoal.";

const RETURN: &str = "shoal.return";
const AFFINITY: &str = "shoal.affinity";
const ALLOW: &str = "shoal.allow";
const DENY: &str = "shoal.deny";
/// Which addresses a service's tasks send to the outside under.
pub const EGRESS: &str = "shoal.egress";
const PUBLISH_ADDRESSES: &str = "shoal.publish.addresses";
/// Which nodes a service's ports answer on: the one label whose meaning changes with the nodes.
pub const PUBLISH_NODES: &str = "shoal.publish.nodes";
/// How long a task's share of new flows grows.
pub const SLOW_START: &str = "shoal.slow-start";
const WEIGHT: &str = "shoal.weight";

/// Most ranges in one label: a bound on what one service takes of the nodes' tables.
const RANGES_MAX: usize = 256;
/// Most fixed egress addresses of a service: each of its tasks is given all of them.
const EGRESS_MAX: usize = 64;
/// Shortest and longest slow start, ns: a second and an hour.
const SLOW_START_NS: std::ops::RangeInclusive<u64> = 1_000_000_000..=3_600_000_000_000;

/// What has labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// A service (`docker service create --label`).
    Service,
    /// A service's tasks (`docker service create --container-label`).
    Container,
    /// A network (`docker network create --label`).
    Network,
    /// A node (`docker node update --label-add`).
    Node,
    /// The cluster (`Spec.Labels` of the swarm).
    Cluster,
}

impl Owner {
    fn name(self) -> &'static str {
        match self {
            Self::Service => "a service",
            Self::Container => "a container",
            Self::Network => "a network",
            Self::Node => "a node",
            Self::Cluster => "the cluster",
        }
    }

    /// The labels that it may have.
    fn known(self) -> &'static [&'static str] {
        match self {
            Self::Service => {
                &[AFFINITY, ALLOW, DENY, EGRESS, PUBLISH_ADDRESSES, PUBLISH_NODES, RETURN, SLOW_START]
            }
            Self::Container | Self::Network => &[],
            Self::Node => &[WEIGHT],
            Self::Cluster => &[RETURN],
        }
    }
}

/// A label of Shoal's that can't be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum LabelError {
    /// Its value means nothing.
    #[error("label {label} holds '{value}'{problem}: expected {expected}")]
    Value {
        /// The label.
        label: Cow<'static, str>,
        /// What it holds.
        value: String,
        /// What is wrong, after a comma; empty where what is expected says it.
        problem: String,
        /// What it may hold.
        expected: Cow<'static, str>,
    },
    /// It means nothing there.
    #[error("label {label} is none that {} can have: {}", owner.name(), alternatives(*owner, label))]
    Unknown {
        /// The label.
        label: String,
        /// What has it.
        owner: Owner,
    },
    /// One range is let in and refused.
    #[error("labels shoal.allow and shoal.deny both hold {0}: leave it in one of them")]
    Contradiction(IpNet),
}

/// What would do instead of `label`.
fn alternatives(owner: Owner, label: &str) -> String {
    let elsewhere = [Owner::Service, Owner::Node, Owner::Cluster];
    let owners: Vec<&str> =
        elsewhere.into_iter().filter(|other| other.known().contains(&label)).map(Owner::name).collect();
    match (owner.known(), owners.as_slice()) {
        ([], []) => format!("labels that begin with {PREFIX} are Shoal's own, and it can have none of them"),
        (known, []) => format!("expected {}", known.join(", ")),
        (_, owners) => format!("it belongs to {}", owners.join(" or ")),
    }
}

/// What the labels of a service ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceOptions {
    /// How replies return; `None` for the cluster's way.
    pub return_path: Option<ReturnPath>,
    /// What keeps a client with one task.
    pub affinity: Affinity,
    /// Which clients are let in.
    pub sources: Vec<SourceRule>,
    /// The nodes' addresses that published ports answer on; empty: all.
    pub publish_addresses: Vec<IpNet>,
    /// The nodes that published ports answer on, all of these holding; `None`: all.
    pub publish_nodes: Option<Vec<Constraint>>,
    /// How long a task's share of new flows grows, ns; 0: it begins with all of it.
    pub slow_start_ns: u64,
    /// What its tasks send to the outside under: the first of each family that their node has. Families that are not listed
    /// leave by the node's own addresses.
    pub egress: Vec<IpAddr>,
}

type Labels = BTreeMap<String, String>;

/// Reads the labels of a service.
pub fn service(labels: &Labels) -> Result<ServiceOptions, LabelError> {
    only_known(Owner::Service, labels)?;
    let sources = sources(labels)?;
    Ok(ServiceOptions {
        return_path: return_path(labels)?,
        affinity: match value(labels, AFFINITY) {
            None | Some("none") => Affinity::None,
            Some("client-ip") => Affinity::ClientIp,
            Some(_) => return Err(wrong(labels, AFFINITY, "", "client-ip or none")),
        },
        sources,
        publish_addresses: ranges(labels, PUBLISH_ADDRESSES)?,
        publish_nodes: publish_nodes(labels)?,
        slow_start_ns: slow_start(labels)?,
        egress: read_egress(labels)?,
    })
}

/// The fixed egress addresses of a service. What its labels can't be was refused when they came in.
pub fn egress(labels: &Labels) -> Vec<IpAddr> {
    read_egress(labels).unwrap_or_default()
}

/// The share of new flows that tasks of a node get by its labels: 1 to [`WEIGHT_MAX`].
pub fn node(labels: &Labels) -> Result<u8, LabelError> {
    only_known(Owner::Node, labels)?;
    let Some(text) = value(labels, WEIGHT) else { return Ok(WEIGHT_MAX) };
    let weight = text.parse().ok().filter(|weight| (1..=WEIGHT_MAX).contains(weight));
    weight.ok_or_else(|| wrong(labels, WEIGHT, "", "a whole number from 1 to 100"))
}

/// How replies return by the cluster's labels, where a service doesn't say.
pub fn cluster(labels: &Labels) -> Result<ReturnPath, LabelError> {
    only_known(Owner::Cluster, labels)?;
    Ok(return_path(labels)?.unwrap_or_default())
}

/// Refuses those of Shoal's labels that `owner` can't have.
pub fn only_known(owner: Owner, labels: &Labels) -> Result<(), LabelError> {
    let is_ours = |label: &&String| {
        label.split_at_checked(PREFIX.len()).is_some_and(|(start, _)| start.eq_ignore_ascii_case(PREFIX))
    };
    match labels.keys().filter(is_ours).find(|label| !owner.known().contains(&label.as_str())) {
        Some(label) => Err(LabelError::Unknown { label: label.clone(), owner }),
        None => Ok(()),
    }
}

fn value<'a>(labels: &'a Labels, label: &str) -> Option<&'a str> {
    labels.get(label).map(|value| value.trim())
}

fn wrong(labels: &Labels, label: &'static str, problem: &str, expected: &'static str) -> LabelError {
    let value = labels.get(label).cloned().unwrap_or_default();
    let (label, expected) = (label.into(), expected.into());
    LabelError::Value { label, value, problem: problem.to_owned(), expected }
}

fn return_path(labels: &Labels) -> Result<Option<ReturnPath>, LabelError> {
    match value(labels, RETURN) {
        None => Ok(None),
        Some("tunnel") => Ok(Some(ReturnPath::Tunnel)),
        Some("direct") => Ok(Some(ReturnPath::Direct)),
        Some(_) => Err(wrong(labels, RETURN, "", "direct or tunnel")),
    }
}

fn sources(labels: &Labels) -> Result<Vec<SourceRule>, LabelError> {
    let (allowed, denied) = (ranges(labels, ALLOW)?, ranges(labels, DENY)?);
    if let Some(both) = allowed.iter().find(|net| denied.contains(net)) {
        return Err(LabelError::Contradiction(*both));
    }
    let rules = |nets: Vec<IpNet>, allow| nets.into_iter().map(move |net| SourceRule { net, allow });
    Ok(rules(allowed, true).chain(rules(denied, false)).collect())
}

/// Ranges of addresses, separated by commas; a bare address is a range of one.
fn ranges(labels: &Labels, label: &'static str) -> Result<Vec<IpNet>, LabelError> {
    const EXPECTED: &str = "ranges such as 192.0.2.0/24,2001:db8::/32, separated by commas";
    let Some(text) = value(labels, label) else { return Ok(Vec::new()) };
    let mut nets = Vec::new();
    for part in text.split(',').map(str::trim) {
        let net = part.parse::<IpNet>().or_else(|_| part.parse::<IpAddr>().map(IpNet::from));
        let net =
            net.map_err(|_| wrong(labels, label, &format!(", and '{part}' is not a range"), EXPECTED))?;
        if net.trunc() != net {
            let problem = format!(", and {net} should be {}", net.trunc());
            return Err(wrong(labels, label, &problem, EXPECTED));
        }
        if matches!(net, IpNet::V6(net) if net.addr().to_ipv4_mapped().is_some()) {
            return Err(wrong(labels, label, &format!(", and {net} is IPv4 written as IPv6"), EXPECTED));
        }
        if !nets.contains(&net) {
            nets.push(net);
        }
    }
    if nets.len() > RANGES_MAX {
        return Err(wrong(labels, label, &format!(", {} ranges", nets.len()), "up to 256 ranges"));
    }
    Ok(nets)
}

fn read_egress(labels: &Labels) -> Result<Vec<IpAddr>, LabelError> {
    const EXPECTED: &str = "addresses of nodes such as 192.0.2.7,2001:db8::7, separated by commas";
    let Some(text) = value(labels, EGRESS) else { return Ok(Vec::new()) };
    let mut addresses = Vec::new();
    for part in text.split(',').map(str::trim) {
        let problem =
            |problem: &str| wrong(labels, EGRESS, &format!(", and '{part}' is {problem}"), EXPECTED);
        let addr: IpAddr = part.parse().map_err(|_| problem("not an address"))?;
        if let Some(what) = never_sent_under(addr) {
            return Err(problem(what));
        }
        if !addresses.contains(&addr) {
            addresses.push(addr);
        }
    }
    if addresses.len() > EGRESS_MAX {
        let problem = format!(", {} addresses", addresses.len());
        return Err(wrong(labels, EGRESS, &problem, "up to 64 addresses"));
    }
    Ok(addresses)
}

/// What an address is that nothing on the outside can answer to; `None` for all others.
fn never_sent_under(addr: IpAddr) -> Option<&'static str> {
    let is_local = match addr {
        IpAddr::V4(addr) if addr.is_broadcast() || addr.octets()[0] == 0 => return Some("no host's address"),
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) if addr.to_ipv4_mapped().is_some() => return Some("IPv4 written as IPv6"),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    if addr.is_unspecified() || addr.is_multicast() {
        Some("no host's address")
    } else if addr.is_loopback() {
        Some("a loopback address")
    } else if is_local {
        Some("an address of one link alone")
    } else {
        None
    }
}

fn publish_nodes(labels: &Labels) -> Result<Option<Vec<Constraint>>, LabelError> {
    const EXPECTED: &str = "constraints such as node.role==worker,node.labels.edge==yes, separated by commas";
    let Some(text) = value(labels, PUBLISH_NODES) else { return Ok(None) };
    let texts: Vec<String> = text.split(',').map(str::to_owned).collect();
    let constraints = parse_all(&texts);
    constraints.map(Some).map_err(|error| wrong(labels, PUBLISH_NODES, &format!(", and {error}"), EXPECTED))
}

fn slow_start(labels: &Labels) -> Result<u64, LabelError> {
    const EXPECTED: &str = "a duration from 1s to 1h, such as 30s or 1m30s, or 0s for none";
    let Some(text) = value(labels, SLOW_START) else { return Ok(0) };
    let ns = duration_ns(text).filter(|ns| *ns == 0 || SLOW_START_NS.contains(ns));
    ns.ok_or_else(|| wrong(labels, SLOW_START, "", EXPECTED))
}

/// Reads a duration as Go writes it, in whole numbers: `1m30s`, `500ms`.
pub(crate) fn duration_ns(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, after) = rest.split_at(digits);
        let unit_end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_end);
        let unit_ns: u64 = match unit {
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        total = total.checked_add(number.parse::<u64>().ok()?.checked_mul(unit_ns)?)?;
        rest = next;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_service_gets_what_its_labels_ask_for() {
        assert_eq!(service(&labels(&[("tier", "front"), ("shoals", "x")])), Ok(ServiceOptions::default()));
        let options = service(&labels(&[
            ("shoal.return", "direct"),
            ("shoal.affinity", "client-ip"),
            ("shoal.allow", "10.0.0.0/8, 2001:db8::/32,192.0.2.1"),
            ("shoal.deny", "10.1.0.0/16"),
            ("shoal.publish.addresses", "192.0.2.0/24"),
            ("shoal.publish.nodes", "node.labels.edge==yes, node.hostname != n2"),
            ("shoal.slow-start", "1m30s"),
            ("shoal.egress", "192.0.2.7, 2001:db8::7,192.0.2.8,192.0.2.7"),
        ]))
        .unwrap();
        assert_eq!(options.return_path, Some(ReturnPath::Direct));
        assert_eq!(options.affinity, Affinity::ClientIp);
        let sources: Vec<(String, bool)> =
            options.sources.iter().map(|rule| (rule.net.to_string(), rule.allow)).collect();
        let rule = |net: &str, allow| (net.to_owned(), allow);
        assert_eq!(
            sources,
            [
                rule("10.0.0.0/8", true),
                rule("2001:db8::/32", true),
                rule("192.0.2.1/32", true),
                rule("10.1.0.0/16", false)
            ]
        );
        assert_eq!(options.publish_addresses, ["192.0.2.0/24".parse().unwrap()]);
        assert_eq!(options.slow_start_ns, 90_000_000_000);
        let addresses: Vec<String> = options.egress.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.0.2.7", "2001:db8::7", "192.0.2.8"]);
        let constraints = options.publish_nodes.unwrap();
        let mut node = testing::node("n1");
        assert!(!constraints.iter().all(|constraint| constraint.holds(&node)));
        node.spec.labels.insert("edge".into(), "yes".into());
        assert!(constraints.iter().all(|constraint| constraint.holds(&node)));
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, ns) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("1500ms", Some(1_500_000_000)),
            ("1h", Some(3_600_000_000_000)),
        ] {
            assert_eq!(duration_ns(text), ns, "{text}");
        }
        for text in ["", "s", "30", "1.5s", "-1s", "1 s", "1d", "99999999999999999999s", "9999999999h"] {
            assert_eq!(duration_ns(text), None, "{text}");
        }
    }

    #[test]
    fn wrong_labels_say_what_they_hold_and_what_they_may() {
        let long = vec!["10.0.0.1"; 300];
        let many: Vec<String> = (0..300).map(|at| format!("10.0.{}.{}", at / 200, at % 200)).collect();
        assert!(service(&labels(&[("shoal.allow", &long.join(","))])).is_ok(), "one range, often");
        let addresses: Vec<String> = (1..=65).map(|at| format!("192.0.2.{at}")).collect();
        for (label, value, expected) in [
            ("shoal.return", "dirct", "label shoal.return holds 'dirct': expected direct or tunnel"),
            ("shoal.affinity", "", "label shoal.affinity holds '': expected client-ip or none"),
            ("shoal.allow", "", "label shoal.allow holds '', and '' is not a range: expected ranges such as"),
            ("shoal.allow", "10.0.0.0/8,x", "holds '10.0.0.0/8,x', and 'x' is not a range"),
            ("shoal.deny", "10.1.2.3/8", "and 10.1.2.3/8 should be 10.0.0.0/8"),
            ("shoal.deny", "::ffff:10.0.0.0/104", "is IPv4 written as IPv6"),
            ("shoal.deny", &many.join(","), "300 ranges: expected up to 256"),
            ("shoal.publish.addresses", "eth0", "label shoal.publish.addresses holds 'eth0'"),
            ("shoal.publish.nodes", "node.role=worker", "and constraint expected one operator from ==, !="),
            ("shoal.publish.nodes", "", "label shoal.publish.nodes holds ''"),
            ("shoal.slow-start", "soon", "label shoal.slow-start holds 'soon': expected a duration"),
            ("shoal.slow-start", "999ms", "expected a duration from 1s to 1h"),
            ("shoal.slow-start", "61m", "expected a duration from 1s to 1h"),
            ("shoal.egress", "", "holds '', and '' is not an address: expected addresses of nodes such as"),
            ("shoal.egress", "192.0.2.7/32", "and '192.0.2.7/32' is not an address"),
            ("shoal.egress", "192.0.2.7,eth0", "and 'eth0' is not an address"),
            ("shoal.egress", "0.0.0.0", "and '0.0.0.0' is no host's address"),
            ("shoal.egress", "::", "and '::' is no host's address"),
            ("shoal.egress", "255.255.255.255", "is no host's address"),
            ("shoal.egress", "224.0.0.1", "is no host's address"),
            ("shoal.egress", "ff02::1", "is no host's address"),
            ("shoal.egress", "127.0.0.1", "is a loopback address"),
            ("shoal.egress", "::1", "is a loopback address"),
            ("shoal.egress", "169.254.1.1", "is an address of one link alone"),
            ("shoal.egress", "fe80::1", "is an address of one link alone"),
            ("shoal.egress", "::ffff:192.0.2.7", "is IPv4 written as IPv6"),
            ("shoal.egress", &addresses.join(","), "65 addresses: expected up to 64"),
            (
                "shoal.afinity",
                "client-ip",
                "label shoal.afinity is none that a service can have: expected shoal.affinity, ",
            ),
            ("Shoal.Return", "direct", "label Shoal.Return is none"),
            ("shoal.weight", "5", "label shoal.weight is none that a service can have: it belongs to a node"),
        ] {
            let error = service(&labels(&[(label, value)])).unwrap_err().to_string();
            assert!(error.contains(expected), "{label}={value}: {error}");
        }
        let both = labels(&[("shoal.allow", "10.0.0.0/8"), ("shoal.deny", "192.0.2.0/24,10.0.0.0/8")]);
        let error = service(&both).unwrap_err().to_string();
        assert_eq!(error, "labels shoal.allow and shoal.deny both hold 10.0.0.0/8: leave it in one of them");
        let on_containers = only_known(Owner::Container, &labels(&[("shoal.return", "direct")])).unwrap_err();
        assert!(
            on_containers.to_string().ends_with("it belongs to a service or the cluster"),
            "{on_containers}"
        );
        assert!(only_known(Owner::Network, &labels(&[("shoal.x", "")])).is_err());
    }

    #[test]
    fn nodes_have_a_weight_and_the_cluster_a_return_path() {
        assert_eq!(node(&labels(&[])), Ok(100));
        assert_eq!(node(&labels(&[("shoal.weight", "25")])), Ok(25));
        for weight in ["0", "101", "-1", "", "half", "256"] {
            let error = node(&labels(&[("shoal.weight", weight)])).unwrap_err().to_string();
            assert!(error.contains("expected a whole number from 1 to 100"), "{error}");
        }
        assert!(node(&labels(&[("shoal.wieght", "1")])).is_err());
        assert_eq!(cluster(&labels(&[])), Ok(ReturnPath::Tunnel));
        assert_eq!(cluster(&labels(&[("shoal.return", "direct")])), Ok(ReturnPath::Direct));
        assert!(cluster(&labels(&[("shoal.affinity", "client-ip")])).is_err());
    }
}
