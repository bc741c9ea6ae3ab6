//! `shoal explain`: what this node does with a packet, and why.

use anyhow::{Result, bail};
use mesh_agent::dataplane::inspect::Live;
use mesh_agent::dataplane::inspect::explain::{
    Decided, Explained, Explanation, Question, RunOutcome, Segment, explain,
};
use mesh_agent::dataplane::inspect::status::{WhichNode, which_node};

use crate::args::{ExplainArgs, Protocol};
use crate::print;

/// Explains a packet on this node.
pub(crate) fn run(args: &ExplainArgs) -> Result<()> {
    let question = question(args)?;
    let live = Live::open(&args.pins.bpffs)?;
    if let Some(node) = &args.node {
        is_here(args, &live, node)?;
    }
    let explanation = explain(&live, &question)?;
    let text = if args.json { serde_json::to_string_pretty(&explanation)? } else { told(&explanation) };
    print::line(&text)?;
    Ok(())
}

fn question(args: &ExplainArgs) -> Result<Question> {
    let ExplainArgs { pins: _, state: _, from, to, proto, syn, ack, at, node: _, json: _ } = args;
    let segment = match proto {
        Protocol::Udp if *syn || *ack => bail!("--syn and --ack are TCP's: give --proto tcp, or neither"),
        Protocol::Udp => Segment::Datagram,
        Protocol::Tcp if *ack => Segment::Ack,
        Protocol::Tcp => Segment::Syn,
    };
    Ok(Question { from: *from, to: *to, segment, at: at.clone() })
}

/// A node's maps and programs are its own: those of another are not here.
fn is_here(args: &ExplainArgs, live: &Live, node: &str) -> Result<()> {
    let again = format!("shoal explain {}", words(args));
    match which_node(&args.state.state_dir, live, node)? {
        WhichNode::This => Ok(()),
        WhichNode::Other(addr) => {
            bail!(
                "{node} is another node, and its tables and programs are there: run this on it ({addr}): {again}"
            )
        }
        WhichNode::Unknown => bail!(
            "--node {node}: this node knows none of that host name, id or address; `docker node ls` on a manager lists \
             them, and a packet is explained on the node itself: {again}"
        ),
    }
}

fn words(args: &ExplainArgs) -> String {
    let proto = match args.proto {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let ack = if args.ack { " --ack" } else { "" };
    format!("--from {} --to {} --proto {proto}{ack} --at {}", args.from, args.to, args.at)
}

fn told(explanation: &Explanation) -> String {
    let Explanation { packet, interface, programs, put_back } = explanation;
    let mut lines = vec![format!("{packet}, by {interface}")];
    for program in programs {
        lines.push(String::new());
        lines.extend(program_lines(program));
    }
    if !put_back.is_empty() {
        lines.push(String::new());
        lines.push("put back in the tables of flows, as nothing was sent:".to_owned());
        lines.extend(put_back.iter().map(|entry| format!("    {entry}")));
    }
    lines.join("\n")
}

fn program_lines(program: &Explained) -> Vec<String> {
    let Explained { program, decided, ran, differences } = program;
    let mut lines = vec![program.to_string()];
    if let Some(Decided { steps, verdict, counters, packet }) = decided {
        lines.push("  by the maps:".to_owned());
        let width = steps.iter().map(|step| step.table.len()).max().unwrap_or_default();
        lines.extend(steps.iter().map(|step| format!("    {:<width$}  {}", step.table, step.words)));
        lines.push(format!("    => {verdict}"));
        if !counters.is_empty() {
            lines.push(format!("       counted as {}", counters.join(", ")));
        }
        lines.push(format!("       {packet}"));
    }
    if let Some(RunOutcome { program_id, code: _, returned, packet, counted, note }) = ran {
        lines.push(format!("  by the attached program, id {program_id}:"));
        lines.push(format!("    => {returned}"));
        if !counted.is_empty() {
            let counted: Vec<&str> = counted.iter().map(|(name, _)| *name).collect();
            lines.push(format!("       counted as {}", counted.join(", ")));
        }
        lines.push(format!("       {packet}"));
        lines.extend(note.map(|note| format!("       ({note})")));
    }
    if differences.is_empty() {
        lines.push("  they agree".to_owned());
    } else {
        lines.extend(differences.iter().map(|difference| format!("  DIFFERENCE: {difference}")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use mesh_agent::dataplane::inspect::decode::Decoded;
    use mesh_agent::dataplane::inspect::explain::Step;

    use super::*;
    use crate::args::{Args, Command};

    fn args(line: &str) -> ExplainArgs {
        let line = format!("shoal explain --from 192.0.2.7:4000 --to 192.0.2.1:80 {line}");
        match Args::parse_from(line.split(' ')).command {
            Command::Explain(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_tcp_packet_opens_a_connection_unless_it_is_said_to_be_amid_one() {
        let segment = |line| question(&args(line)).map(|question| question.segment);
        assert_eq!(segment("--proto tcp").unwrap(), Segment::Syn);
        assert_eq!(segment("--proto tcp --syn").unwrap(), Segment::Syn);
        assert_eq!(segment("--proto tcp --ack").unwrap(), Segment::Ack);
        assert_eq!(segment("--proto udp").unwrap(), Segment::Datagram);
        assert!(segment("--proto udp --ack").unwrap_err().to_string().contains("--proto tcp"));
    }

    #[test]
    fn the_line_to_run_elsewhere_is_the_same_question() {
        let line = "--from 192.0.2.7:4000 --to 192.0.2.1:80 --proto tcp --ack --at task:10.0.0.5";
        assert_eq!(words(&args("--proto tcp --ack --at task:10.0.0.5 --node n2")), line);
    }

    #[test]
    fn decision_run_and_difference_are_told() {
        let steps = vec![Step { table: "ports", words: "port 80/tcp is not published on IPv4".to_owned() }];
        let packet = Decoded::default();
        let (verdict, counters) = ("left to the host's stack".to_owned(), vec!["passed"]);
        let decided = Some(Decided { steps, verdict, counters, packet: packet.clone() });
        let ran = Some(RunOutcome {
            program_id: 7,
            code: 2,
            returned: "TC_ACT_SHOT: dropped",
            packet: packet.clone(),
            counted: vec![("drop_malformed", 1)],
            note: None,
        });
        let program = Explained {
            program: "uplink_ingress",
            decided,
            ran,
            differences: vec!["the program dropped it".to_owned()],
        };
        let put_back = vec!["opening: a flow".to_owned()];
        let explanation =
            Explanation { packet, interface: "eth0".to_owned(), programs: vec![program], put_back };
        let expected = "frame, 0 bytes, by eth0\n\n\
            uplink_ingress\n\
            \x20 by the maps:\n\
            \x20   ports  port 80/tcp is not published on IPv4\n\
            \x20   => left to the host's stack\n\
            \x20      counted as passed\n\
            \x20      frame, 0 bytes\n\
            \x20 by the attached program, id 7:\n\
            \x20   => TC_ACT_SHOT: dropped\n\
            \x20      counted as drop_malformed\n\
            \x20      frame, 0 bytes\n\
            \x20 DIFFERENCE: the program dropped it\n\n\
            put back in the tables of flows, as nothing was sent:\n\
            \x20   opening: a flow";
        assert_eq!(told(&explanation), expected);
        assert!(!explanation.agrees());
    }
}
