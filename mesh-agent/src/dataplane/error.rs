//! What can go wrong with the dataplane, and what to do about it.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;

use super::layout::TooMany;

/// Why the dataplane could not be brought up, or to its plan.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The binary has no BPF object.
    #[error("this binary was built without its BPF programs: run `cargo xtask setup` and build again")]
    NoObject,
    /// The folder for pins can't hold any.
    #[error(
        "{path} is not on a BPF file system: mount one with `mount -t bpf bpf {path}`, or name another folder with --bpffs"
    )]
    NotBpffs {
        /// The folder.
        path: PathBuf,
    },
    /// No dataplane is pinned there.
    #[error(
        "no dataplane of this version under {path}: this node is in no cluster, or its agent has another --bpffs"
    )]
    NotSetUp {
        /// The folder.
        path: PathBuf,
    },
    /// The folder for pins can't be used.
    #[error("can't use {path} for pinned programs and maps")]
    PinFolder {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The object does not load.
    #[error("can't load the BPF object (kernel 6.1 or later, CAP_BPF and CAP_NET_ADMIN are needed)")]
    Object(#[source] Box<aya::EbpfError>),
    /// A program is missing from the object, or does not load.
    #[error("can't load the BPF program {name} (kernel 6.1 or later, CAP_BPF and CAP_NET_ADMIN are needed)")]
    Program {
        /// The program.
        name: &'static str,
        /// What the kernel said.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks a program or a map that this agent uses.
    #[error("the BPF object has no {name}: it is of another version; build again")]
    Missing {
        /// The program or map.
        name: &'static str,
    },
    /// A program can't be attached.
    #[error("can't attach {name} to interface {ifindex}{hint}")]
    Attach {
        /// The program.
        name: &'static str,
        /// The interface.
        ifindex: u32,
        /// A remedy, if there is one, after a colon.
        hint: &'static str,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A map can't be read or written.
    #[error("{operation} the BPF map {name} failed")]
    Map {
        /// The map.
        name: &'static str,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The entries of a map can't be read or written.
    #[error("{operation} the BPF map {name} failed")]
    MapAccess {
        /// The map.
        name: &'static str,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A pinned map is of another layout than this agent's.
    #[error(
        "the BPF map {name} has keys of {key} and values of {value} bytes: it is of another build; remove its pin"
    )]
    MapSizes {
        /// The map.
        name: &'static str,
        /// Size of its keys, bytes.
        key: u32,
        /// Size of its values, bytes.
        value: u32,
    },
    /// No thread can be started.
    #[error("can't start the thread that looks after the flows")]
    Thread {
        /// What the system said.
        source: io::Error,
    },
    /// The table doesn't fit the maps.
    #[error(transparent)]
    TooMany(#[from] TooMany),
}
