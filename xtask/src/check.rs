//! `cargo xtask check` and `cargo xtask fix`: format, lints and tidy.

use anyhow::Result;
use ebpf_build::BPF_PACKAGE;

use crate::{run, tidy, workspace};

const CLIPPY: [&str; 4] = ["clippy", "--workspace", "--all-targets", "--locked"];

/// Changes nothing and needs no root.
pub(crate) fn run() -> Result<()> {
    format(&["--check"])?;
    run::inherit(workspace::cargo().args(CLIPPY).args(["--", "--deny", "warnings"]))?;
    tidy::run(&tidy::Options::default())
}

/// Changes sources: what clippy is sure of, then the format.
pub(crate) fn fix() -> Result<()> {
    run::inherit(workspace::cargo().args(CLIPPY).args(["--fix", "--allow-dirty", "--allow-staged"]))?;
    format(&[])
}

/// The BPF package is a workspace of its own, which `--all` does not reach.
fn format(options: &[&str]) -> Result<()> {
    run::inherit(workspace::cargo().args(["fmt", "--all"]).args(options))?;
    let manifest = workspace::root().join(BPF_PACKAGE).join("Cargo.toml");
    if manifest.is_file() {
        run::inherit(workspace::cargo().args(["fmt", "--manifest-path"]).arg(manifest).args(options))?;
    }
    Ok(())
}
