//! `shoal drops`: what the dataplane counted.

use std::io::{self, Write as _};

use anyhow::Result;
use mesh_agent::dataplane::{Counter, read_counters};

use crate::args::DropsArgs;

/// Prints the counters that aren't zero.
pub(crate) fn run(args: &DropsArgs) -> Result<()> {
    let mut counted = read_counters(&args.bpffs)?;
    counted.retain(|(counter, packets)| *packets > 0 && (args.all || counter.is_drop()));
    let printed = if args.json { json(&counted)? } else { table(&counted) };
    match writeln!(io::stdout().lock(), "{printed}") {
        // Whoever read has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn json(counted: &[(Counter, u64)]) -> Result<String> {
    let object: serde_json::Map<_, _> =
        counted.iter().map(|(counter, packets)| (counter.name().to_owned(), (*packets).into())).collect();
    Ok(serde_json::to_string(&object)?)
}

fn table(counted: &[(Counter, u64)]) -> String {
    if counted.is_empty() {
        return "nothing was dropped".to_owned();
    }
    let mut lines = vec![format!("{:>14}  {:<24}  MEANING", "PACKETS", "REASON")];
    for (counter, packets) in counted {
        lines.push(format!("{packets:>14}  {:<24}  {}", counter.name(), counter.description()));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_shown_with_their_meaning() {
        let counted = [(Counter::DropNoBackend, 7), (Counter::DropInternal, 1_000_000)];
        let table = table(&counted);
        assert!(
            table.contains("             7  drop_no_backend           The service has no running task."),
            "{table}"
        );
        assert_eq!(json(&counted).unwrap(), r#"{"drop_internal":1000000,"drop_no_backend":7}"#);
        assert_eq!(super::table(&[]), "nothing was dropped");
    }
}
