//! Runs a benchmark of the dataplane, named by the argument, and prints its measurements as JSON.

use anyhow::{Result, bail};
use shoal_tests::bench;

fn main() -> Result<()> {
    let cases = match std::env::args().nth(1).as_deref() {
        Some("dataplane") => bench::dataplane::run()?,
        Some("churn") => bench::churn::run()?,
        other => bail!("which benchmark? dataplane or churn, not {}", other.unwrap_or("nothing")),
    };
    println!("{}", serde_json::to_string(&cases)?);
    Ok(())
}
