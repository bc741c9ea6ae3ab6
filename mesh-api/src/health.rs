//! How a node is, by its own word: what an operator looks at first. Beside the session's other messages it decides nothing.

use serde::{Deserialize, Serialize};

/// Most uplinks that a node tells of.
pub const UPLINKS_MAX: usize = 32;
/// Longest text that a node tells of a problem, bytes.
pub const PROBLEM_BYTES_MAX: usize = 512;

/// How a node is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeHealth {
    /// Its interfaces towards the other nodes and clients, at most [`UPLINKS_MAX`].
    pub uplinks: Vec<UplinkHealth>,
    /// What it encrypts with; none where it has no encrypted way.
    pub wireguard: Option<WireguardHealth>,
    /// What went wrong last, since its agent started.
    pub problem: Option<Problem>,
}

/// An interface towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkHealth {
    /// Its name.
    pub name: String,
    /// How the dataplane is attached to it: `xdp-native`, `xdp-generic` or `tc`.
    pub mode: String,
    /// Its MTU, bytes.
    pub mtu: u32,
}

/// The identity that a node sends by inside of WireGuard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardHealth {
    /// Where WireGuard runs.
    pub kind: WireguardKind,
    /// When the key was made, ns since the epoch.
    pub key_made_ns: u64,
}

/// Where WireGuard runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireguardKind {
    /// In the kernel.
    Kernel,
    /// In the agent.
    UserSpace,
}

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What, for people: at most [`PROBLEM_BYTES_MAX`].
    pub text: String,
    /// When, ns since the epoch.
    pub at_ns: u64,
}

impl Problem {
    /// Something that went wrong at a time, in ns since the epoch; what is too long of the text is cut off.
    pub fn new(text: &str, at_ns: u64) -> Self {
        let mut text = text.to_owned();
        if text.len() > PROBLEM_BYTES_MAX {
            let end = PROBLEM_BYTES_MAX - '…'.len_utf8();
            let end = (0..=end).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
            text.truncate(end);
            text.push('…');
        }
        Self { text, at_ns }
    }
}

impl NodeHealth {
    /// Without what is more than a node may tell.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        self.uplinks.truncate(UPLINKS_MAX);
        for uplink in &mut self.uplinks {
            for text in [&mut uplink.name, &mut uplink.mode] {
                if text.len() > PROBLEM_BYTES_MAX {
                    text.clear();
                }
            }
        }
        self.problem = self.problem.map(|Problem { text, at_ns }| Problem::new(&text, at_ns));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_tells_has_a_bound() {
        let uplink = |name: &str| UplinkHealth { name: name.to_owned(), mode: "tc".to_owned(), mtu: 1500 };
        let problem = Problem { text: "é".repeat(PROBLEM_BYTES_MAX), at_ns: 7 };
        let long = uplink(&"x".repeat(PROBLEM_BYTES_MAX + 1));
        let uplinks = vec![long].into_iter().chain((0..UPLINKS_MAX).map(|_| uplink("eth0"))).collect();
        let told = NodeHealth { uplinks, wireguard: None, problem: Some(problem) }.bounded();
        assert_eq!((told.uplinks.len(), told.uplinks[0].name.as_str()), (UPLINKS_MAX, ""));
        let text = told.problem.unwrap().text;
        assert!(text.len() <= PROBLEM_BYTES_MAX && text.len() > PROBLEM_BYTES_MAX - 4, "{}", text.len());
        assert!(text.ends_with("é…"));
        assert_eq!(Problem::new("cut", 7).text, "cut");
    }

    #[test]
    fn wireguards_place_is_a_word() {
        let health = WireguardHealth { kind: WireguardKind::UserSpace, key_made_ns: 7 };
        assert_eq!(serde_json::to_string(&health).unwrap(), r#"{"kind":"user-space","key_made_ns":7}"#);
    }
}
