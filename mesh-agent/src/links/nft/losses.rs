//! What the host's own stack dropped of what was to leave it, as the kernel counted it.

use std::fs;
use std::process::Command;

use super::rules::{NO_ADDRESS, UNTRANSLATED};
use super::{families, not_run};
use crate::links::LinkError;

/// The connection tracker's own counts, of the namespace of whoever reads them; a line for each processor.
const CONNTRACK: &str = "/proc/self/net/stat/nf_conntrack";
/// The column of flows that could not be entered.
const INSERT_FAILED: &str = "insert_failed";

/// A reason for which the host's own stack drops what is to leave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// See [`Loss::description`].
    NoAddress,
    /// See [`Loss::description`].
    Untranslated,
    /// See [`Loss::description`].
    NoPort,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::NoAddress, Self::Untranslated, Self::NoPort];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoAddress => NO_ADDRESS,
            Self::Untranslated => UNTRANSLATED,
            Self::NoPort => "egress_no_port",
        }
    }

    /// One sentence for people.
    pub fn description(self) -> &'static str {
        match self {
            Self::NoAddress => {
                "Of a task with fixed egress addresses (shoal.egress), none of which this node has in the packet's family."
            }
            Self::Untranslated => "To the outside, of a task, and of no flow that netfilter translates.",
            Self::NoPort => {
                "First of a flow that the host's connection tracker couldn't enter: no port was free for it. Tasks' and the \
                 host's own."
            }
        }
    }
}

/// How many packets of the calling thread's namespace were lost, by reason; of a reason that can't be told of, there is none.
/// What the tables counted begins anew when somebody removes them, what the tracker counted when the host starts.
pub fn losses() -> Result<Vec<(Loss, u64)>, LinkError> {
    let mut tables = Vec::new();
    for family in families() {
        // Where there is no table, nft fails and prints nothing.
        let listed = Command::new("nft").arg(family.list_command()).output().map_err(not_run)?;
        tables.push(String::from_utf8_lossy(&listed.stdout).into_owned());
    }
    let count =
        |name| tables.iter().filter_map(|table| counted(table, name)).reduce(|sum, count| sum + count);
    let mut losses = Vec::new();
    for loss in Loss::ALL {
        let packets = match loss {
            Loss::NoAddress | Loss::Untranslated => count(loss.name()),
            Loss::NoPort => fs::read_to_string(CONNTRACK).ok().as_deref().and_then(not_entered),
        };
        losses.extend(packets.map(|packets| (loss, packets)));
    }
    Ok(losses)
}

/// What a counter of a listed table counted.
fn counted(table: &str, name: &str) -> Option<u64> {
    let (_, rest) = table.split_once(&format!("\tcounter {name} {{"))?;
    let mut words = rest.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    words.next()?.parse().ok()
}

/// What [`CONNTRACK`] says of flows that were not entered, of all processors; hexadecimal.
fn not_entered(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    let column = lines.next()?.split_whitespace().position(|name| name == INSERT_FAILED)?;
    let count = |line: &str| u64::from_str_radix(line.split_whitespace().nth(column)?, 16).ok();
    lines.map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_read_as_nft_lists_it() {
        let table = "table ip shoal {\n\tcounter egress_no_address {\n\t\tpackets 12 bytes 340\n\t}\n\n\
                     \tchain departure {\n\t\tcounter name \"egress_untranslated\" drop\n\t}\n}\n";
        assert_eq!(counted(table, NO_ADDRESS), Some(12));
        assert_eq!((counted(table, UNTRANSLATED), counted("", NO_ADDRESS)), (None, None));
    }

    #[test]
    fn flows_that_were_not_entered_are_summed_over_the_processors() {
        let text = "entries  clashres found insert insert_failed drop\n\
                    0000fc00  00000000 00000000 00000000 000091ad 000091ad\n\
                    0000fc00  00000000 00000000 00000000 00006a53 00006a53\n";
        assert_eq!(not_entered(text), Some(64_512));
        assert_eq!((not_entered("entries found\n00 00\n"), not_entered("")), (None, None));
    }
}
