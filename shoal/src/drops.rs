//! `shoal drops`: what the dataplane counted, and what packets those were.

use std::io::{self, IsTerminal as _};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use mesh_agent::dataplane::inspect::Live;
use mesh_agent::dataplane::inspect::drops::{Counts, Ended, Event, Events};

use crate::args::DropsArgs;
use crate::print;

/// What rates are measured over.
const PERIOD: Duration = Duration::from_secs(1);
/// Puts the cursor of a terminal in the corner, and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Prints the counters that aren't zero, once or again and again; or packets as they are dropped.
pub(crate) fn run(args: &DropsArgs) -> Result<()> {
    let live = Live::open(&args.pins.bpffs)?;
    if args.follow {
        return follow(&live, args.json);
    }
    let mut before = Counts::now(&live)?;
    loop {
        sleep(PERIOD);
        let now = Counts::now(&live)?;
        let mut ended = now.since(&before, &live)?;
        ended.retain(|ended| args.all || ended.drop);
        let text = if args.json { json(&ended)? } else { table(&ended, args.all) };
        let clear = args.watch && !args.json && io::stdout().is_terminal();
        let goes_on = print::line(&if clear { format!("{CLEAR}{text}") } else { text })?;
        if !args.watch || !goes_on {
            return Ok(());
        }
        before = now;
    }
}

fn follow(live: &Live, as_json: bool) -> Result<()> {
    let mut events = Events::follow(live)?;
    loop {
        for event in events.next(PERIOD)? {
            let text = if as_json { serde_json::to_string(&event)? } else { told(&event) };
            if !print::line(&text)? {
                return Ok(());
            }
        }
    }
}

fn told(event: &Event) -> String {
    format!("{} {} {}: {}", print::time(event.time), event.reason, event.interface, event.packet)
}

fn json(ended: &[Ended]) -> Result<String> {
    let by_name = |ended: &Ended| Ok((ended.name.to_owned(), serde_json::to_value(ended)?));
    let object: serde_json::Map<_, _> = ended.iter().map(by_name).collect::<Result<_>>()?;
    Ok(serde_json::to_string(&object)?)
}

fn table(ended: &[Ended], all: bool) -> String {
    if ended.is_empty() {
        return if all { "nothing was counted" } else { "nothing was dropped" }.to_owned();
    }
    let mut lines = vec![format!("{:>14}  {:>10}  {:<24}  MEANING", "PACKETS", "PER SECOND", "REASON")];
    for Ended { name, description, packets, rate, example, .. } in ended {
        lines.push(format!("{packets:>14}  {rate:>10.1}  {name:<24}  {description}"));
        lines.extend(example.as_ref().map(|example| {
            let age = print::duration(Duration::from_millis(example.age_ms));
            format!("{:>28}last {age} ago, by {}: {}", "", example.interface, example.packet)
        }));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use mesh_agent::dataplane::inspect::decode::Decoded;

    use super::*;

    fn ended(example: Option<Event>) -> Ended {
        Ended {
            name: "drop_no_backend",
            description: "The service has no running task.",
            drop: true,
            packets: 7,
            rate: 2.0,
            example,
        }
    }

    fn event() -> Event {
        let packet = Decoded { len: 60, protocol: Some("arp".to_owned()), ..Decoded::default() };
        let (time, interface) = (SystemTime::UNIX_EPOCH, "eth0".to_owned());
        Event { time, age_ms: 3000, reason: "drop_no_backend", interface, packet }
    }

    #[test]
    fn counts_are_shown_with_their_rate_their_meaning_and_an_example() {
        let table = table(&[ended(Some(event()))], false);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[1],
            "             7         2.0  drop_no_backend           The service has no running task."
        );
        assert_eq!(lines[2].trim(), "last 3 s ago, by eth0: arp, 60 bytes");
        assert_eq!(super::table(&[], false), "nothing was dropped");
    }

    #[test]
    fn json_has_each_reason_by_its_name() {
        let json: serde_json::Value = serde_json::from_str(&json(&[ended(None)]).unwrap()).unwrap();
        assert_eq!(json["drop_no_backend"]["packets"], 7);
        assert_eq!(json["drop_no_backend"]["example"], serde_json::Value::Null);
    }

    #[test]
    fn a_packet_that_is_dropped_is_a_line() {
        assert_eq!(told(&event()), "1970-01-01T00:00:00.000Z drop_no_backend eth0: arp, 60 bytes");
    }
}
