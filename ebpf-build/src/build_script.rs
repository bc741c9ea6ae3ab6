//! What build scripts do: put a binary of the BPF package into `OUT_DIR` as `shoal.bpf.o`.
//!
//! A machine without a BPF toolchain must still run `cargo check`, clippy and editors, so there it writes an empty
//! object, sets `cfg(shoal_bpf_stub)` and warns; the agent then refuses to start. A toolchain that fails is an error.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::{BPF_PACKAGE, OBJECT_NAME, OBJECT_VAR, PRODUCT, RUSTC_VAR, SKIP_VAR, compile, toolchain};

/// Sources that the object is made from, from the workspace's root.
const INPUTS: [&str; 7] = [
    "mesh-ebpf/bpf/src",
    "mesh-ebpf/bpf/Cargo.toml",
    "mesh-ebpf/bpf/Cargo.lock",
    "mesh-ebpf/src",
    "mesh-ebpf/Cargo.toml",
    "mesh-common/src",
    "mesh-common/Cargo.toml",
];

type Error = Box<dyn std::error::Error>;

/// Builds, copies or stubs the object of `binary`. Only for build scripts of packages that lie directly under the workspace's root.
pub fn run(binary: &str) -> Result<(), Error> {
    println!("cargo::rustc-check-cfg=cfg(shoal_bpf_stub)");
    for variable in [OBJECT_VAR, SKIP_VAR, RUSTC_VAR] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out_dir = path_from_env("OUT_DIR")?;
    let manifest_dir = path_from_env("CARGO_MANIFEST_DIR")?;
    let workspace = manifest_dir.parent().ok_or("the package has no parent folder")?;
    let object = out_dir.join(OBJECT_NAME);

    if let Some(prebuilt) = std::env::var_os(OBJECT_VAR).filter(|_| binary == PRODUCT) {
        println!("cargo::rerun-if-changed={}", Path::new(&prebuilt).display());
        return copy(Path::new(&prebuilt), &object);
    }
    if crate::is_skipped() {
        return stub(&object);
    }
    build(workspace, &out_dir, &object, binary)
}

fn build(workspace: &Path, out_dir: &Path, object: &Path, binary: &str) -> Result<(), Error> {
    for input in INPUTS {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    if !workspace.join(BPF_PACKAGE).join("Cargo.toml").is_file() {
        println!(
            "cargo::warning={BPF_PACKAGE} is not in this tree: the agent is built without its dataplane"
        );
        return stub(object);
    }
    let target_dir = crate::target_dir(workspace, out_dir);
    match toolchain::find(&target_dir) {
        Ok(toolchain) => copy(&compile::build_object(&toolchain, workspace, &target_dir, binary)?, object),
        Err(none) => {
            for line in none.to_string().lines() {
                println!("cargo::warning={line}");
            }
            println!("cargo::warning=The agent is built without its dataplane and will not start.");
            rerun_after_setup(&toolchain::stamp(&target_dir))?;
            stub(object)
        }
    }
}

/// Cargo reruns a build script, and recompiles the agent, each time that a listed path is missing or is younger than the
/// script's last start: so the stamp is made here, empty and old, and setup writes it anew.
fn rerun_after_setup(stamp: &Path) -> Result<(), Error> {
    if !stamp.exists() {
        std::fs::create_dir_all(stamp.parent().ok_or("the stamp has no folder")?)?;
        std::fs::File::create(stamp)?.set_modified(SystemTime::UNIX_EPOCH)?;
    }
    println!("cargo::rerun-if-changed={}", stamp.display());
    Ok(())
}

fn stub(object: &Path) -> Result<(), Error> {
    println!("cargo::rustc-cfg=shoal_bpf_stub");
    Ok(std::fs::write(object, [])?)
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    std::fs::copy(from, to)
        .map_err(|error| format!("copying {} to {}: {error}", from.display(), to.display()))?;
    Ok(())
}

fn path_from_env(variable: &str) -> Result<PathBuf, Error> {
    let value =
        std::env::var_os(variable).ok_or_else(|| format!("{variable} is not set: not a build script?"))?;
    Ok(value.into())
}
