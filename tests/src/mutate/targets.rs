//! What a guided fuzzer is given to try: functions of bytes that panic on what must not be, and the bytes to begin with.

use mesh_datapath::bytes::Bytes;
use mesh_datapath::header::IP_OFFSET;
use mesh_datapath::parse::{Fragment, Parsed, Unparsed, parse_ipv4, parse_ipv6};

use super::layout::Layout;
use super::rounds::run_checked;
use super::starts::Starts;
use crate::packet::family::Family;
use crate::packet::host::Node;
use crate::packet::world::World;
use crate::packet::{Hook, fixtures};

/// A function that panics on what must not be.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const ALL: [(&str, Target); 3] = [("parse", parse), ("hooks", hooks), ("decapsulate", decapsulate)];
/// Most files of a target's corpus.
const CORPUS_MAX: usize = 40;
/// Longest of them, bytes.
const FILE_MAX: usize = 256;

/// Both families' parsers on a frame, whatever type it says it is of: they read what other code reads.
///
/// # Panics
///
/// If they don't.
pub fn parse(data: &[u8]) {
    let mut frame = data.to_vec();
    for (family, ethertype) in [(Family::V4, [0x08, 0]), (Family::V6, [0x86, 0xdd])] {
        if let Some(place) = frame.get_mut(12..14) {
            place.copy_from_slice(&ethertype);
        }
        let layout = Layout::read(&frame, 0);
        let packet = Bytes::new(frame.clone());
        let read = match family {
            Family::V4 => parse_ipv4(&packet, IP_OFFSET).map(|parsed| facts(&parsed)),
            Family::V6 => parse_ipv6(&packet, IP_OFFSET).map(|parsed| facts(&parsed)),
        };
        let expected = layout.map(|layout| (layout.l4, layout.protocol, layout.is_fragment, layout.is_later));
        assert_eq!(read.map_err(|Unparsed::Malformed| ()).ok(), expected, "{}", family.name());
    }
}

fn facts<A>(parsed: &Parsed<A>) -> (usize, u8, bool, bool) {
    let Parsed { l4_offset, protocol, fragment, .. } = *parsed;
    (l4_offset, protocol, fragment != Fragment::Whole, fragment == Fragment::Later)
}

/// Any hook of any of the fixtures' worlds, which the first two bytes choose, on the frame behind them.
pub fn hooks(data: &[u8]) {
    thread_local! {
        static STARTS: Starts = Starts::of_fixtures();
    }
    let Some((number, frame)) = data.split_first_chunk() else { return };
    STARTS.with(|starts| {
        let stand = starts.stand(usize::from(u16::from_le_bytes(*number)));
        let node = Node::new(stand.world, stand.hook);
        // Twice: the second packet meets what the first one left in the tables.
        for _ in 0..2 {
            run(&node, stand.segment_len, frame);
        }
    });
}

/// XDP on an uplink of IPv4 and of IPv6, where VXLAN is unpacked.
pub fn decapsulate(data: &[u8]) {
    for underlay in Family::BOTH {
        let node = Node::new(&World::default().on(underlay), Hook::UplinkXdp);
        run(&node, 0, data);
    }
}

fn run(node: &Node, segment_len: u32, frame: &[u8]) {
    if let Err((what, output)) = run_checked(node, segment_len, frame) {
        panic!("{what}: {frame:02x?} became {output:02x?}");
    }
}

/// What to begin with: the fixtures' frames, evenly chosen.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let all = match target {
        "hooks" => {
            let starts = Starts::of_fixtures();
            let numbered = (0..starts.len()).map(|number| {
                let frame = starts.stand(number).own()[0].clone();
                [(number as u16).to_le_bytes().to_vec(), frame].concat()
            });
            numbered.collect()
        }
        "decapsulate" => {
            let fixtures = fixtures::all().into_iter();
            fixtures.filter(|fixture| fixture.hook == Hook::UplinkXdp).map(|fixture| fixture.input).collect()
        }
        _ => Starts::of_fixtures().frames().to_vec(),
    };
    let small: Vec<Vec<u8>> = all.into_iter().filter(|data| data.len() <= FILE_MAX).collect();
    let step = small.len().div_ceil(CORPUS_MAX).max(1);
    small.into_iter().step_by(step).collect()
}
