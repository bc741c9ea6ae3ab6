//! The programs that lab, demo, tests and benchmarks call, and the Debian packages that bring them.

use std::path::{Path, PathBuf};

/// A program, and where it comes from.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
}

const PROGRAMS: [Program; 16] = [
    Program { name: "nft", package: "nftables" },
    Program { name: "ip", package: "iproute2" },
    Program { name: "ethtool", package: "ethtool" },
    Program { name: "tcpdump", package: "tcpdump" },
    Program { name: "iperf3", package: "iperf3" },
    Program { name: "wrk", package: "wrk" },
    Program { name: "curl", package: "curl" },
    Program { name: "nginx", package: "nginx-light" },
    Program { name: "dig", package: "bind9-dnsutils" },
    Program { name: "ping", package: "iputils-ping" },
    Program { name: "traceroute", package: "traceroute" },
    Program { name: "tracepath", package: "iputils-tracepath" },
    Program { name: "ps", package: "procps" },
    Program { name: "unshare", package: "util-linux" },
    Program { name: "python3", package: "python3-minimal" },
    // From Debian 13 on the client is a package of its own; `debian::missing` names it where there is one.
    Program { name: "docker", package: "docker.io" },
];

/// What only benchmarks call: the mesh's peers.
const PEERS: [Program; 3] = [
    Program { name: "haproxy", package: "haproxy" },
    Program { name: "wg", package: "wireguard-tools" },
    Program { name: "wireguard-go", package: "wireguard-go" },
];

/// The programs that this machine lacks, by whatever means it got the others.
pub(super) fn missing() -> Vec<&'static Program> {
    let directories = directories();
    PROGRAMS.iter().filter(|program| !is_in(&directories, program.name)).collect()
}

/// Those that it lacks for benchmarks.
pub(super) fn missing_for_benchmarks() -> Vec<&'static Program> {
    let directories = directories();
    PROGRAMS.iter().chain(&PEERS).filter(|program| !is_in(&directories, program.name)).collect()
}

/// A user's PATH often lacks the folders of the administrator's programs.
fn directories() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from)).collect()
}

fn is_in(directories: &[PathBuf], name: &str) -> bool {
    directories.iter().any(|directory: &PathBuf| Path::new(directory).join(name).is_file())
}
