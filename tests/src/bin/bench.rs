//! Runs the dataplane benchmark and prints its cases as JSON.

fn main() -> anyhow::Result<()> {
    let cases = shoal_tests::bench::dataplane::run()?;
    println!("{}", serde_json::to_string(&cases)?);
    Ok(())
}
