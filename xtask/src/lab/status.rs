//! `cargo xtask lab status`: a line for each node, with what it says of itself.

use serde_json::Value;

use super::layout::{Host, Lab};
use super::{engine, processes, topology};

const HEADINGS: [&str; 7] = ["NODE", "ADDRESS", "AGENT", "SWARM", "ROLE", "DATAPLANE", "SOCKET"];

/// The table, and how to go on.
pub(super) fn show(lab: &Lab) {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(lab.nodes().iter().map(row));
    print!("{}", table(&rows));
    let client = Host::client();
    let Lab { xdp, mtu, underlay, .. } = lab;
    println!(
        "\nclient {}, {} in namespace {}; xdp {xdp}, MTU {mtu}, underlay {underlay}",
        client.address,
        client.address6,
        client.netns()
    );
    println!("try: docker -H {} node ls", Host::node(1).docker_host());
}

fn row(node: &Host) -> [String; 7] {
    let agent = match (processes::agent(node), topology::is_cable_plugged(node)) {
        (None, _) => "stopped".to_owned(),
        (Some(agent), Some(false)) => format!("{}, cut off", agent.pid),
        (Some(agent), _) => agent.pid.to_string(),
    };
    let info = engine::info(node).unwrap_or_default();
    let swarm = word(&info["Swarm"]["LocalNodeState"]);
    let role = match (swarm.as_str(), info["Swarm"]["ControlAvailable"].as_bool()) {
        ("active", Some(true)) => "manager",
        ("active", _) => "worker",
        _ => "-",
    };
    [
        node.name.clone(),
        format!("{}, {}", node.address, node.address6),
        agent,
        swarm,
        role.to_owned(),
        dataplane(&info),
        node.socket().display().to_string(),
    ]
}

/// How the agent says that its dataplane is attached: a line of `docker info`.
fn dataplane(info: &Value) -> String {
    let lines = info["DriverStatus"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found =
        lines.iter().find(|line| line[0].as_str().is_some_and(|name| name.eq_ignore_ascii_case("dataplane")));
    found.map_or_else(|| "-".to_owned(), |line| word(&line[1]))
}

fn word(value: &Value) -> String {
    value.as_str().filter(|text| !text.is_empty()).unwrap_or("-").to_owned()
}

/// Lines up columns, two blanks apart.
pub(crate) fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_blanks_at_their_end() {
        let rows = [["a", "bb", ""], ["ccc", "d", "e"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a    bb\nccc  d   e\n");
    }
}
