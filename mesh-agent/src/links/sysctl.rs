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
