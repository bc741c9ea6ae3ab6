//! One user of the lab at a time: what brings it up, works with it and takes it down must not meet another that does.

use std::fs::File;

use anyhow::{Context, Result};

/// Holds others off for as long as it lives.
#[must_use = "others are held off only while this lives"]
#[derive(Debug)]
pub(crate) struct Claim(#[expect(dead_code, reason = "its lock is what counts")] File);

/// Claims the lab, and waits for whoever has it.
pub(crate) fn claim() -> Result<Claim> {
    // A lock on the folder itself leaves no file behind.
    let folder = File::open("/run").context("could not open /run")?;
    if folder.try_lock().is_err() {
        println!("lab: another cargo xtask uses it; waiting for that to end");
        folder.lock().context("could not lock /run")?;
    }
    Ok(Claim(folder))
}
