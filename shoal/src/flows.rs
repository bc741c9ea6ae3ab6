//! `shoal flows`: the flows that this node knows.

use anyhow::Result;
use mesh_agent::dataplane::inspect::Live;
use mesh_agent::dataplane::inspect::flows::{self, FlowFilter, FlowRow};

use crate::args::{FlowsArgs, Protocol};
use crate::print;

/// Prints the entries that match.
pub(crate) fn run(args: &FlowsArgs) -> Result<()> {
    let live = Live::open(&args.pins.bpffs)?;
    let filter = filter(args);
    let mut rows = Vec::new();
    let seen = live.flows(&filter, args.limit, |row| rows.push(row))?;
    rows.sort_by_key(|row| (row.client, row.dialled, row.stage, row.kind));
    if args.json {
        let lines = rows.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        print::line(&format!("[{}]", lines.join(",\n")))?;
    } else {
        print::line(&table(&rows))?;
    }
    if seen.shown < seen.matching {
        eprintln!("{} of {} entries; --limit shows more", seen.shown, seen.matching);
    }
    Ok(())
}

fn filter(args: &FlowsArgs) -> FlowFilter {
    let FlowsArgs { pins: _, protocol, client, dialled, task, vni, stage, limit: _, json: _ } = args;
    let protocol = protocol.map(|protocol| match protocol {
        Protocol::Tcp => flows::TCP,
        Protocol::Udp => flows::UDP,
    });
    FlowFilter { protocol, client: *client, dialled: *dialled, task: *task, vni: *vni, stage: *stage }
}

fn table(rows: &[FlowRow]) -> String {
    if rows.is_empty() {
        return "no flows".to_owned();
    }
    let rows: Vec<_> = rows.iter().map(row).collect();
    print::table(["PROTO", "CLIENT", "DIALLED", "TASK", "ON", "NETWORK", "STAGE", "ENTRY", "REMARKS"], &rows)
}

fn row(row: &FlowRow) -> [String; 9] {
    let or = |value: Option<String>, other: &str| value.unwrap_or_else(|| other.to_owned());
    [
        row.protocol.clone(),
        row.client.to_string(),
        row.dialled.to_string(),
        or(row.task.map(|task| task.to_string()), "gone"),
        or(row.node.map(|node| node.to_string()), if row.void { "-" } else { "this node" }),
        if row.vni == 1 { "published".to_owned() } else { row.vni.to_string() },
        row.stage.name().to_owned(),
        row.kind.name().to_owned(),
        remarks(row),
    ]
}

fn remarks(row: &FlowRow) -> String {
    let flags = [(row.closed, "closed"), (row.direct, "direct"), (row.teach, "teach"), (row.void, "void")];
    let mut remarks: Vec<String> =
        flags.iter().filter(|(set, _)| *set).map(|(_, name)| (*name).to_owned()).collect();
    remarks.extend(row.ingress.map(|ingress| format!("by {ingress}")));
    remarks.extend(row.seen_port.map(|port| format!("seen from port {port}")));
    remarks.extend(row.idle_s.map(|idle| format!("idle {idle} s")));
    remarks.join(", ")
}

#[cfg(test)]
mod tests {
    use mesh_agent::dataplane::inspect::flows::{FlowStage, Kind};

    use super::*;

    fn example() -> FlowRow {
        FlowRow {
            protocol: "udp".to_owned(),
            vni: 1,
            stage: FlowStage::Opening,
            kind: Kind::REQUEST,
            client: "198.51.100.7:40000".parse().unwrap(),
            dialled: "192.0.2.1:53".parse().unwrap(),
            task: None,
            node: None,
            ingress: Some("198.18.0.12".parse().unwrap()),
            seen_port: Some(1234),
            closed: false,
            direct: true,
            teach: false,
            void: true,
            idle_s: Some(3),
        }
    }

    #[test]
    fn a_flow_is_a_line_that_says_who_talks_to_whom() {
        let table = table(&[example()]);
        let words: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            words.join(" "),
            "udp 198.51.100.7:40000 192.0.2.1:53 gone - published opening request direct, void, by 198.18.0.12, seen \
             from port 1234, idle 3 s"
        );
        assert_eq!(super::table(&[]), "no flows");
    }
}
