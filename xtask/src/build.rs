//! `cargo xtask build`: the `shoal` binary with the BPF object in it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::{run, setup, workspace};

/// Which build.
#[derive(Args)]
pub(crate) struct Options {
    /// What is published: optimised, thin LTO
    #[arg(long, conflicts_with = "profile")]
    release: bool,
    /// A profile of the workspace's Cargo.toml
    #[arg(long, default_value = "dev")]
    profile: String,
}

/// `cargo xtask build`.
pub(crate) fn run(options: &Options) -> Result<()> {
    let profile = if options.release { "release" } else { &options.profile };
    println!("{}", shoal(profile)?.display());
    Ok(())
}

/// Builds the binary, and gives its path.
pub(crate) fn shoal(profile: &str) -> Result<PathBuf> {
    setup::ensure_toolchain()?;
    run::inherit(workspace::cargo().args(["build", "--package", "shoal", "--profile", profile]))?;
    // The dev profile's folder is the one that is not named after its profile.
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(workspace::target_dir().join(folder).join("shoal"))
}
