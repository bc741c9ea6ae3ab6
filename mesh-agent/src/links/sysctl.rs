//! Sysctls, written through /proc/sys.
//!
//! /proc/sys/net shows the namespace of the thread that opens a file: inside a task's namespace, call this from
//! [`crate::sys::netns::Netns::run`].

use std::fs;
use std::io;
use std::path::PathBuf;

use super::LinkError;

/// Writes `value` to the sysctl whose path below /proc/sys is `parts`, unless it has that value already.
///
/// Parts are given one by one since an interface's name may hold what a dotted path would be cut at.
pub fn set(parts: &[&str], value: &str) -> Result<(), LinkError> {
    // A container's /proc/sys is often read-only but set right by whoever started it.
    if is(parts, value) {
        return Ok(());
    }
    let path = path_of(parts);
    fs::write(&path, value).map_err(|source| LinkError::Sysctl { path, source })
}

/// Whether a sysctl has this value.
pub fn is(parts: &[&str], value: &str) -> bool {
    fs::read_to_string(path_of(parts)).is_ok_and(|current| current.trim() == value)
}

fn path_of(parts: &[&str]) -> PathBuf {
    ["/proc/sys"].iter().chain(parts).collect()
}

/// Like [`set`], where a kernel built without the feature has nothing to write to.
pub fn set_if_present(parts: &[&str], value: &str) -> Result<(), LinkError> {
    match set(parts, value) {
        Err(LinkError::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether the kernel has IPv6: built with it, and not started with `ipv6.disable=1`.
pub fn has_ipv6() -> bool {
    path_of(&["net", "ipv6", "conf", "all", "forwarding"]).exists()
}

/// Keeps IPv6 off an interface of Shoal's own whose packets the host's stack has no part in.
pub fn disable_ipv6(link: &str) -> Result<(), LinkError> {
    set_if_present(&["net", "ipv6", "conf", link, "disable_ipv6"], "1")
}

/// Turns IPv6 on for an interface that has the addresses it is given and no others: no link-local one, none from
/// router advertisements, and none that has to be probed for first. To be called before the interface is started.
pub fn enable_ipv6(link: &str) -> Result<(), LinkError> {
    // 1: none (IN6_ADDR_GEN_MODE_NONE).
    let settings = [
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("accept_dad", "0"),
        ("dad_transmits", "0"),
        ("disable_ipv6", "0"),
    ];
    settings.into_iter().try_for_each(|(name, value)| set(&["net", "ipv6", "conf", link, name], value))
}

/// Has the host forward IPv6 packets. Forwarding ends the acceptance of router advertisements, so an interface that
/// has accepted them is told to go on first: the host keeps the routes that it has from them.
pub fn forward_ipv6() -> Result<(), LinkError> {
    let all = ["net", "ipv6", "conf", "all", "forwarding"];
    if is(&all, "1") {
        return Ok(());
    }
    let folder = path_of(&["net", "ipv6", "conf"]);
    let entries = fs::read_dir(&folder).map_err(|source| LinkError::Sysctl { path: folder, source })?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        // Interfaces yet to come, which start from `default`, are not all to be trusted: a bridge of containers.
        let Some(link) = name.to_str().filter(|link| !["all", "default"].contains(link)) else { continue };
        let accept_ra = ["net", "ipv6", "conf", link, "accept_ra"];
        // One that forwards already has not accepted any.
        if is(&accept_ra, "1") && is(&["net", "ipv6", "conf", link, "forwarding"], "0") {
            // An interface may go away meanwhile.
            set_if_present(&accept_ra, "2")?;
        }
    }
    set(&all, "1")
}
