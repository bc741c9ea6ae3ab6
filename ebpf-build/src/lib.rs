//! Finds a toolchain that can build Shoal's BPF object, and builds the object.
//!
//! mesh-agent's build script embeds the object with [`build_script::run`]; `cargo xtask` looks for the same toolchain
//! with [`toolchain::find`] and says how to get one. This crate installs nothing (that is `cargo xtask setup`), and has
//! no dependencies, because every build of the agent waits for it.

pub mod build_script;
pub mod compile;
pub mod toolchain;

use std::path::{Path, PathBuf};

/// Path to a prebuilt object, which is then used as it is.
pub const OBJECT_VAR: &str = "SHOAL_BPF_OBJECT";
/// `1` builds the agent without its dataplane: an empty object, and `cfg(shoal_bpf_stub)`.
pub const SKIP_VAR: &str = "SHOAL_BPF_SKIP";
/// Path to the one rustc that may be used.
pub const RUSTC_VAR: &str = "SHOAL_BPF_RUSTC";

/// The BPF package, from the workspace's root.
pub const BPF_PACKAGE: &str = "mesh-ebpf/bpf";
/// The binary that the agent embeds.
pub const PRODUCT: &str = "shoal-bpf";
/// What the object is called in the build script's `OUT_DIR`.
pub const OBJECT_NAME: &str = "shoal.bpf.o";

/// Whether the environment says to build no object: one is given, or the agent goes without.
pub fn is_overridden() -> bool {
    std::env::var_os(OBJECT_VAR).is_some() || is_skipped()
}

fn is_skipped() -> bool {
    std::env::var_os(SKIP_VAR).is_some_and(|value| value == "1")
}

/// Cargo's target directory that `inside` (an `OUT_DIR`, an executable) lies in.
///
/// Cargo marks the directory with a CACHEDIR.TAG, but only where it created it: a mounted volume has none, and then the
/// directory is the one that `CARGO_TARGET_DIR` names, or `target` of the workspace.
pub fn target_dir(workspace: &Path, inside: &Path) -> PathBuf {
    if let Some(tagged) = inside.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file()) {
        return tagged.to_owned();
    }
    let named = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace.join(named)
}
