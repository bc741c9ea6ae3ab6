//! `cargo xtask tidy`: the rules of this repository that a program can check.
//!
//! Each rule gives its violations as lines that name a place and the way out; all are shown, not only the first.

mod abi;
mod crates;
mod sources;

use anyhow::{Result, bail};
use clap::Args;

use crate::workspace;

/// How to check.
#[derive(Args, Default)]
pub(crate) struct Options {
    /// Record the ABI as it is in mesh-common/abi.txt, after ABI_VERSION was raised
    #[arg(long)]
    bless: bool,
}

/// `cargo xtask tidy`.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = workspace::root();
    if options.bless {
        abi::bless(root)?;
    }
    let mut violations = crates::violations(root)?;
    violations.extend(sources::violations(root)?);
    violations.extend(abi::violations(root)?);
    for document in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        if !root.join(document).is_file() {
            violations.push(format!("{document}: missing"));
        }
    }
    if violations.is_empty() {
        println!("tidy: no violations");
        return Ok(());
    }
    for violation in &violations {
        eprintln!("{violation}");
    }
    bail!("tidy: {} violations", violations.len())
}
