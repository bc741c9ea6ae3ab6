//! What the agent is started with: the flags of `shoal agent`, already parsed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::health::Health;

/// How the agent runs on this host.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the membership, the last table and the tasks' folders are kept, across restarts.
    pub state_dir: PathBuf,
    /// Sockets and other files that a reboot may take.
    pub run_dir: PathBuf,
    /// A folder on a mounted BPF file system, where programs and maps are pinned.
    pub bpffs: PathBuf,
    /// The node's host name.
    pub hostname: String,
    /// Whether and how XDP runs on the uplinks.
    pub xdp: XdpMode,
    /// Names of the uplinks; empty for those that hold the advertised address or the VXLAN address.
    pub uplinks: Vec<String>,
    /// Capacity of the flow table.
    pub flows_max: u32,
    /// How long a WireGuard key is used; mostly [`crate::KEY_ROTATION`].
    pub key_rotation: Duration,
    /// Says how the node is; what goes wrong is noted there.
    pub health: Health,
}

/// Whether and how XDP runs on the uplinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XdpMode {
    /// Native where the driver has it and the uplink is no veth; TC alone otherwise.
    #[default]
    Auto,
    /// In the driver, or fail.
    Native,
    /// In the kernel's generic hook.
    Generic,
    /// None: TC alone.
    Off,
}

/// A word that is not an [`XdpMode`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown XDP mode {0:?}: use auto, native, generic or off")]
pub struct UnknownXdpMode(String);

impl FromStr for XdpMode {
    type Err = UnknownXdpMode;

    fn from_str(text: &str) -> Result<Self, UnknownXdpMode> {
        match text {
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "generic" => Ok(Self::Generic),
            "off" => Ok(Self::Off),
            other => Err(UnknownXdpMode(other.to_owned())),
        }
    }
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Off => "off",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_reads_back_as_written_and_others_are_refused() {
        for mode in [XdpMode::Auto, XdpMode::Native, XdpMode::Generic, XdpMode::Off] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert!("driver".parse::<XdpMode>().is_err());
    }
}
