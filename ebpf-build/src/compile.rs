//! One run of the BPF toolchain's cargo over the BPF package.
//!
//! The run must not see the outer cargo's variables: a job server, wrapper, flag or profile meant for the host's build
//! breaks it, or makes it rebuild `core` each time.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::BPF_PACKAGE;
use crate::toolchain::Toolchain;

const TARGET: &str = "bpfel-unknown-none";

/// The BPF package did not build; the compiler's own words are on stderr.
#[derive(Debug)]
pub struct BuildFailed {
    cargo: PathBuf,
    package: PathBuf,
    reason: String,
}

impl fmt::Display for BuildFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (package, cargo) = (self.package.display(), self.cargo.display());
        write!(f, "{package} did not build with {cargo}: {}", self.reason)
    }
}

impl std::error::Error for BuildFailed {}

/// Builds the BPF package of `workspace` below `target_dir`; gives the path of its `binary`.
pub fn build_object(
    toolchain: &Toolchain,
    workspace: &Path,
    target_dir: &Path,
    binary: &str,
) -> Result<PathBuf, BuildFailed> {
    let bpf_target_dir = target_dir.join("bpf");
    let package = workspace.join(BPF_PACKAGE);
    let status = command(toolchain, &package, &bpf_target_dir).status();
    let reason = match status {
        Ok(status) if status.success() => {
            return Ok(bpf_target_dir.join(TARGET).join("release").join(binary));
        }
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    Err(BuildFailed { cargo: toolchain.compiler.cargo.clone(), package, reason })
}

fn command(toolchain: &Toolchain, package: &Path, bpf_target_dir: &Path) -> Command {
    let mut command = toolchain.compiler.command(&toolchain.compiler.cargo);
    for (name, _) in std::env::vars_os() {
        if belongs_to_outer_build(&name) {
            command.env_remove(name);
        }
    }
    command
        .current_dir(package)
        .args(["build", "--release", "--locked", "-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .arg(bpf_target_dir)
        .env("RUSTC", &toolchain.compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&toolchain.linker))
        .stdin(Stdio::null())
        // A build script's stdout is read by cargo.
        .stdout(Stdio::null());
    command
}

/// Debug information is what bpf-linker makes BTF from. The separator is cargo's: paths may have spaces.
fn rustflags(linker: &Path) -> OsString {
    let mut flags = OsString::from("-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker=");
    flags.push(linker);
    flags
}

/// What cargo sets for build scripts, and what a user sets for the host's build.
fn belongs_to_outer_build(name: &OsString) -> bool {
    /// A user's word on where crates come from and how output looks: it holds for this build too.
    const KEPT: [&str; 6] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_SOURCE_", "CARGO_TERM_"];
    const CLEARED: [&str; 10] = [
        "CARGO",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "MAKEFLAGS",
        "MFLAGS",
        "OUT_DIR",
        "TARGET",
        "PROFILE",
    ];
    let name = name.to_string_lossy();
    let prefixed = name.starts_with("CARGO_") || name.starts_with("RUSTC_");
    CLEARED.contains(&name.as_ref()) || (prefixed && !KEPT.iter().any(|kept| name.starts_with(kept)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outer_build_variables_are_cleared_and_network_settings_kept() {
        for name in [
            "CARGO",
            "CARGO_TARGET_DIR",
            "CARGO_MAKEFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_PROFILE_RELEASE_LTO",
            "CARGO_FEATURE_USER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTFLAGS",
        ] {
            assert!(belongs_to_outer_build(&name.into()), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_REGISTRIES_X_INDEX", "PATH", "HOME"] {
            assert!(!belongs_to_outer_build(&name.into()), "{name}");
        }
    }

    #[test]
    fn linker_with_spaces_stays_one_flag() {
        let flags = rustflags(Path::new("/a b/bpf-linker")).into_string().unwrap();
        assert_eq!(flags.split('\x1f').next_back(), Some("-Clinker=/a b/bpf-linker"));
    }
}
