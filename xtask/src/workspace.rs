//! Where this workspace and its target directory are, and the cargo that started xtask.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::run;

/// The workspace's root: the folder above xtask's own, wherever xtask was called from.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Cargo's target directory: the one that this program was built in.
pub(crate) fn target_dir() -> PathBuf {
    ebpf_build::target_dir(root(), &std::env::current_exe().unwrap_or_default())
}

/// The cargo that runs xtask, in the workspace's root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // Cargo describes xtask to xtask in these; build scripts below would rerun whenever they differ from a plain `cargo build`.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The names of the workspace's test programs: of all `tests` folders, and others that a manifest declares.
pub(crate) fn test_programs() -> Result<Vec<String>> {
    let output = run::output(cargo().args(["metadata", "--no-deps", "--locked", "--format-version", "1"]))?;
    let Metadata { packages } = serde_json::from_str(&output).context("cargo metadata")?;
    let targets = packages.into_iter().flat_map(|package| package.targets);
    Ok(targets.filter(|target| target.kind == ["test"]).map(|target| target.name).collect())
}

/// What is read of cargo's metadata.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_those_of_the_workspace_whatever_their_folder() {
        let mut found = test_programs().unwrap();
        found.sort_unstable();
        assert_eq!(found, ["agent", "attach", "inspect", "netns", "packet", "socket"]);
    }
}
