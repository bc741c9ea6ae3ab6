//! Runs a benchmark, named by the first argument, and prints its measurements as JSON. Some need a second argument.

use anyhow::{Context as _, Result, bail};
use shoal_tests::bench;

fn main() -> Result<()> {
    let (name, detail) = (std::env::args().nth(1), std::env::args().nth(2));
    let detail = detail.context("what to measure is to be said in a second argument");
    let cases = match name.as_deref() {
        Some("dataplane") => bench::dataplane::run()?,
        Some("churn") => bench::churn::run()?,
        Some("control") => bench::control::run(&detail?)?,
        // The processes of that one.
        Some("control-manager") => return bench::control::manager::run(&detail?),
        Some("control-agent") => return bench::control::agent::run(&detail?),
        other => bail!("which benchmark? dataplane, churn or control, not {}", other.unwrap_or("nothing")),
    };
    println!("{}", serde_json::to_string(&cases)?);
    Ok(())
}
