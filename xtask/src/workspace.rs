//! Where this workspace and its target directory are, and the cargo that started xtask.

use std::path::{Path, PathBuf};
use std::process::Command;

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
