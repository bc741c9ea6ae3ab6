//! Placement constraints: `node.role==worker`, `node.labels.disk != ssd`. Only `==` and `!=`, all of which must hold.
//!
//! Syntax and matching are SwarmKit's (`manager/constraint`): keys and values compare without regard to case, except for
//! the names of labels.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::table::Role;

use super::Node;

const NODE_LABEL: &str = "node.labels.";
const ENGINE_LABEL: &str = "engine.labels.";

/// A constraint that holds on some nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constraint {
    key: Key,
    negated: bool,
    value: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Id,
    Hostname,
    Ip,
    Role,
    Os,
    Arch,
    NodeLabel(String),
    EngineLabel(String),
}

/// A text that is not a constraint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedConstraint {
    /// No operator.
    #[error("constraint expected one operator from ==, !=")]
    NoOperator,
    /// The part before the operator names nothing that nodes have.
    #[error("key '{0}' is invalid")]
    Key(String),
    /// The part after the operator can't be compared with.
    #[error("value '{0}' is invalid")]
    Value(String),
}

impl std::str::FromStr for Constraint {
    type Err = MalformedConstraint;

    fn from_str(text: &str) -> Result<Self, MalformedConstraint> {
        let equal = text.find("==");
        let unequal = text.find("!=");
        let (at, negated) = match (equal, unequal) {
            (Some(equal), Some(unequal)) if unequal < equal => (unequal, true),
            (Some(equal), _) => (equal, false),
            (None, Some(unequal)) => (unequal, true),
            (None, None) => return Err(MalformedConstraint::NoOperator),
        };
        let name = text[..at].trim();
        let value = text[at + 2..].trim();
        if value.is_empty() || !value.chars().all(is_value_char) {
            return Err(MalformedConstraint::Value(value.to_owned()));
        }
        Ok(Self { key: parse_key(name)?, negated, value: value.to_owned() })
    }
}

/// SwarmKit's `[a-zA-Z0-9:\-_\s\.\*\(\)\?\+\[\]\\\^\$\|\/]+`.
fn is_value_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c.is_whitespace() || ":-_.*()?+[]\\^$|/".contains(c)
}

fn parse_key(name: &str) -> Result<Key, MalformedConstraint> {
    let label = |rest: &str| {
        let valid = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        (!rest.is_empty() && rest.chars().all(valid))
            .then(|| rest.to_owned())
            .ok_or_else(|| MalformedConstraint::Key(name.to_owned()))
    };
    if let Some(rest) = strip_prefix(name, NODE_LABEL) {
        return Ok(Key::NodeLabel(label(rest)?));
    }
    if let Some(rest) = strip_prefix(name, ENGINE_LABEL) {
        return Ok(Key::EngineLabel(label(rest)?));
    }
    match name.to_ascii_lowercase().as_str() {
        "node.id" => Ok(Key::Id),
        "node.hostname" => Ok(Key::Hostname),
        "node.ip" => Ok(Key::Ip),
        "node.role" => Ok(Key::Role),
        "node.platform.os" => Ok(Key::Os),
        "node.platform.arch" => Ok(Key::Arch),
        _ => Err(MalformedConstraint::Key(name.to_owned())),
    }
}

fn strip_prefix<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let (start, rest) = name.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

impl Constraint {
    /// Whether the constraint holds on `node`.
    pub fn holds(&self, node: &Node) -> bool {
        let same = |text: &str| text.eq_ignore_ascii_case(&self.value);
        let equal = match &self.key {
            Key::Id => same(node.id.as_str()),
            Key::Hostname => same(&node.description.hostname),
            Key::Ip => self.covers(node.description.addr),
            Key::Role => same(match node.spec.role {
                Role::Manager => "manager",
                Role::Worker => "worker",
            }),
            Key::Os => same(&node.description.os),
            Key::Arch => {
                same(&node.description.architecture) || same(docker_arch(&node.description.architecture))
            }
            Key::NodeLabel(key) => same(node.spec.labels.get(key).map_or("", String::as_str)),
            Key::EngineLabel(key) => {
                let label = node.description.labels.iter().find(|(name, _)| name == key);
                same(label.map_or("", |(_, value)| value))
            }
        };
        equal != self.negated
    }

    /// `node.ip` takes an address or a subnet.
    fn covers(&self, addr: IpAddr) -> bool {
        match (self.value.parse::<IpAddr>(), self.value.parse::<IpNet>()) {
            (Ok(value), _) => value == addr,
            (_, Ok(subnet)) => subnet.contains(&addr),
            _ => false,
        }
    }
}

/// Docker's word for a machine that the kernel names otherwise.
fn docker_arch(machine: &str) -> &str {
    match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Reads all of a placement's constraints; the error names the first that can't be read.
pub fn parse_all(texts: &[String]) -> Result<Vec<Constraint>, MalformedConstraint> {
    texts.iter().map(|text| text.parse()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn constraints_hold_where_they_should() {
        let mut node = testing::node("n1");
        node.spec.labels.insert("disk".into(), "SSD".into());
        node.description.labels.push(("zone".into(), "b".into()));
        let cases = [
            ("node.hostname==n1", true),
            ("node.hostname == N1", true),
            ("node.hostname != n1", false),
            ("node.role==worker", true),
            ("node.role==manager", false),
            ("Node.Role==worker", true),
            ("NODE.LABELS.disk==ssd", true),
            ("node.labels.Disk==ssd", false),
            ("node.labels.disk==ssd", true),
            ("node.labels.absent!=x", true),
            ("node.labels.absent==x", false),
            ("engine.labels.zone==b", true),
            ("node.ip==192.0.2.0/24", true),
            ("node.ip==192.0.2.77", false),
            ("node.ip!=198.51.100.0/24", true),
            ("node.platform.os==linux", true),
            ("node.platform.arch==amd64", true),
            ("node.platform.arch==x86_64", true),
        ];
        for (text, expected) in cases {
            let constraint: Constraint = text.parse().unwrap();
            assert_eq!(constraint.holds(&node), expected, "{text}");
        }
    }

    #[test]
    fn malformed_constraints_say_what_is_wrong() {
        let parse = |text: &str| text.parse::<Constraint>();
        assert_eq!(parse("node.role=worker"), Err(MalformedConstraint::NoOperator));
        assert_eq!(parse("node.rolle==x"), Err(MalformedConstraint::Key("node.rolle".into())));
        assert_eq!(parse("node.labels.==x"), Err(MalformedConstraint::Key("node.labels.".into())));
        assert_eq!(parse("node.role=="), Err(MalformedConstraint::Value(String::new())));
    }
}
