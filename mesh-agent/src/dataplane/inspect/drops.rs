//! How packets ended: counts, how fast they grow, the last packet of each kind, and packets as they are dropped.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant, SystemTime};

use aya::maps::{MapData, RingBuf};
use mesh_common::counter::Counter;
use mesh_common::map::Example;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use zerocopy::FromBytes as _;

use super::decode::Decoded;
use super::{InspectError, Live, interface_name};
use crate::dataplane::counters::read_counters;
use crate::dataplane::error::DataplaneError;
use crate::dataplane::map::open_ring;
use crate::dataplane::pins::version_folder;
use crate::links::{Loss, losses};
use crate::sys::clock;

/// The ring of events, under its pin.
const EVENTS: &str = "shoal_events";
/// UDP port of VXLAN where the agent has not said another.
const VXLAN_PORT: u16 = 4789;

/// How late the programs' clock may be.
const TICK: Duration = Duration::from_millis(10);

/// A packet that was dropped, or ended otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// When, by the system's clock, as far as that did not jump since; ms since the epoch in JSON.
    #[serde(serialize_with = "as_ms")]
    pub time: SystemTime,
    /// How long ago, ms.
    pub age_ms: u64,
    /// How it ended.
    pub reason: &'static str,
    /// The interface that it came in by.
    pub interface: String,
    /// What it was.
    pub packet: Decoded,
}

pub(crate) fn as_ms<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    serializer.serialize_u64(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// One way that packets ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ended {
    /// Its name.
    pub name: &'static str,
    /// One sentence for people.
    pub description: &'static str,
    /// Whether the packets are lost.
    pub drop: bool,
    /// How many, since the dataplane was set up; of what the host's own stack dropped, see [`losses`].
    pub packets: u64,
    /// How many a second, since the look before.
    pub rate: f64,
    /// The last one of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub example: Option<Event>,
}

/// Counts at one moment.
#[derive(Debug, Clone)]
pub struct Counts {
    at: Instant,
    counted: Vec<(Counter, u64)>,
    /// What the host's own stack dropped.
    lost: Vec<(Loss, u64)>,
}

impl Counts {
    /// The counts now. Of what the host's own stack dropped there are none where the calling thread is in another network
    /// namespace than the node.
    pub fn now(live: &Live) -> Result<Self, InspectError> {
        let at = Instant::now();
        let lost = if live.is_here() { losses()? } else { Vec::new() };
        Ok(Self { at, counted: read_counters(live.pin_dir())?, lost })
    }

    /// The packets of each way to end, and how many more there are a second than at `before`; those that nothing ended by
    /// are left out.
    pub fn since(&self, before: &Self, live: &Live) -> Result<Vec<Ended>, DataplaneError> {
        let period_s = self.at.duration_since(before.at).as_secs_f64();
        let clock = Clocks::now(live)?;
        let counted = self.counted.iter().zip(&before.counted).filter(|((_, packets), _)| *packets > 0);
        let by_programs = counted.map(|((counter, packets), (_, before))| {
            Ok(Ended {
                name: counter.name(),
                description: counter.description(),
                drop: counter.is_drop(),
                packets: *packets,
                rate: rate(packets.saturating_sub(*before), period_s),
                example: live.example(*counter, &clock)?,
            })
        });
        let by_host = self.lost.iter().filter(|(_, packets)| *packets > 0).map(|(loss, packets)| {
            let former =
                before.lost.iter().find(|(former, _)| former == loss).map_or(0, |(_, packets)| *packets);
            Ok(Ended {
                name: loss.name(),
                description: loss.description(),
                drop: true,
                packets: *packets,
                rate: rate(packets.saturating_sub(former), period_s),
                example: None,
            })
        });
        by_programs.chain(by_host).collect()
    }
}

/// So many in so many seconds, a second.
#[expect(clippy::cast_precision_loss, reason = "a rate is for people")]
fn rate(packets: u64, period_s: f64) -> f64 {
    if period_s > 0.0 { packets as f64 / period_s } else { 0.0 }
}

/// What turns an example's time into that of the system's clock.
#[derive(Debug)]
struct Clocks {
    monotonic: Duration,
    system: SystemTime,
    vxlan_port: u16,
}

impl Clocks {
    fn now(live: &Live) -> Result<Self, DataplaneError> {
        let vxlan_port = live.config()?.map_or(VXLAN_PORT, |config| config.vxlan_port.get());
        Ok(Self { monotonic: clock::monotonic(), system: SystemTime::now(), vxlan_port })
    }

    fn event(&self, example: &Example) -> Option<Event> {
        let Example { time_ns, counter, ifindex, len, head_len, head } = example;
        let counter = Counter::ALL.iter().find(|known| **known as u32 == *counter)?;
        let age = self.monotonic.saturating_sub(Duration::from_nanos(*time_ns));
        let bytes = head.as_flattened();
        let bytes = &bytes[..bytes.len().min(*head_len as usize)];
        Some(Event {
            time: self.system - age,
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
            reason: counter.name(),
            interface: interface_name(*ifindex),
            packet: Decoded::read(bytes, *len, self.vxlan_port),
        })
    }
}

impl Live {
    /// The last packet that was counted by a counter, if the programs kept one.
    fn example(&self, counter: Counter, clocks: &Clocks) -> Result<Option<Event>, DataplaneError> {
        let example: Option<Example> = self.examples.get(&(counter as u32))?;
        Ok(example.filter(|example| example.time_ns > 0).and_then(|example| clocks.event(&example)))
    }
}

/// Packets as they are dropped. The programs tell of some of them only: at most ten a second of each kind and node.
/// There is one ring, so what one reader has taken another does not see.
pub struct Events<'l> {
    live: &'l Live,
    ring: RingBuf<MapData>,
    /// What was there before is old news.
    since: Duration,
}

impl std::fmt::Debug for Events<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("since", &self.since).finish_non_exhaustive()
    }
}

impl<'l> Events<'l> {
    /// Those from now on.
    pub fn follow(live: &'l Live) -> Result<Self, InspectError> {
        let ring = open_ring(&live.pin_dir().join(version_folder()), EVENTS)?;
        Ok(Self { live, ring, since: clock::monotonic().saturating_sub(TICK) })
    }

    /// The next ones, once there is one; none if none came within `patience`.
    pub fn next(&mut self, patience: Duration) -> Result<Vec<Event>, InspectError> {
        let deadline = Instant::now() + patience;
        loop {
            let clocks = Clocks::now(self.live)?;
            let mut events = Vec::new();
            while let Some(item) = self.ring.next() {
                let Ok((example, _)) = Example::read_from_prefix(&item) else { continue };
                if Duration::from_nanos(example.time_ns) >= self.since {
                    events.extend(clocks.event(&example));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !events.is_empty() || left.is_zero() {
                return Ok(events);
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(InspectError::Events(error.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{Segment, build};
    use super::*;

    fn clocks() -> Clocks {
        Clocks { monotonic: Duration::from_secs(100), system: SystemTime::now(), vxlan_port: VXLAN_PORT }
    }

    #[test]
    fn an_example_is_told_with_its_headers_and_its_age() {
        let (from, to) = ("198.51.100.7:4000".parse().unwrap(), "192.0.2.1:8082".parse().unwrap());
        let bytes = build(from, to, Segment::Syn, [2; 6], [4; 6]).unwrap();
        let mut example = Example {
            time_ns: 98_500_000_000,
            counter: Counter::DropNoBackend as u32,
            ifindex: 1,
            len: 1514,
            head_len: bytes.len() as u32,
            ..Example::default()
        };
        example.head.as_flattened_mut()[..bytes.len()].copy_from_slice(&bytes);
        let event = clocks().event(&example).unwrap();
        assert_eq!((event.reason, event.age_ms, &*event.interface), ("drop_no_backend", 1500, "lo"));
        assert_eq!(event.packet.to_string(), "tcp 198.51.100.7:4000 > 192.0.2.1:8082 SYN, 1514 bytes");
    }

    #[test]
    fn an_example_of_another_version_is_none_and_one_that_lies_about_its_length_is_cut() {
        let example = Example { counter: 127, time_ns: 1, ..Example::default() };
        assert_eq!(clocks().event(&example), None);
        let example = Example { counter: 50, time_ns: 1, head_len: u32::MAX, ..Example::default() };
        assert!(clocks().event(&example).is_some());
    }

    #[test]
    fn rates_are_by_the_second() {
        assert!((rate(30, 2.0) - 15.0).abs() < f64::EPSILON);
        assert!(rate(30, 0.0).abs() < f64::EPSILON);
    }
}
