//! Which nodes are silent: a pure function of when each was asked, when it answered, and when that was looked at.
//!
//! A node is asked every [`PERIOD`], each at its own time. It is silent once [`MISSED`] requests in a row are unanswered,
//! the last of them for [`WAIT`], and is heard again at the third answer in a row. One that has never answered [`TRUSTED`] requests in a row
//! is not judged: something on the way drops them, or lets a few a second pass.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How often a node is asked.
pub(super) const PERIOD: Duration = Duration::from_millis(200);
/// How many requests in a row go unanswered before a node is silent: the loss of one packet, or of two, is none.
const MISSED: u32 = 3;
/// How long the last of them is waited for.
const WAIT: Duration = Duration::from_millis(100);
/// How many answers in a row make a silent node one that is heard.
const HEARD_AGAIN: u32 = 3;
/// How many answers in a row make a node one that answers at all. Many a host answers a few echoes a second, whoever
/// asks.
const TRUSTED: u32 = 10;
/// Times are rounded to this, so that many nodes don't take as many wake-ups.
const GRAIN: Duration = Duration::from_millis(10);

/// What is known of each node, by the address that it is asked at.
#[derive(Debug, Default)]
pub(super) struct Judge {
    nodes: BTreeMap<IpAddr, Node>,
    woken: Option<Instant>,
}

#[derive(Debug)]
struct Node {
    ask_at: Instant,
    /// Requests since the last answer.
    unanswered: u32,
    /// When these became too many, if they have.
    missed: Option<Instant>,
    /// Answers in a row; no more than count.
    answers: u32,
    standing: Standing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It may never answer.
    Unknown,
    Heard,
    Silent,
}

impl Judge {
    /// Takes up nodes that are new, and forgets those that are not among `nodes`.
    pub(super) fn follow(&mut self, nodes: &BTreeSet<IpAddr>, now: Instant) {
        self.nodes.retain(|addr, _| nodes.contains(addr));
        let new: Vec<_> = nodes.iter().filter(|addr| !self.nodes.contains_key(addr)).collect();
        let standing = Standing::Unknown;
        for (addr, ask_at) in new.iter().zip(spread(new.len(), now)) {
            let node = Node { ask_at, unanswered: 0, missed: None, answers: 0, standing };
            self.nodes.insert(**addr, node);
        }
    }

    /// To be called first whenever there is time to ask or to listen. Who was late knows nothing of the time between:
    /// nobody was asked then.
    pub(super) fn wake(&mut self, now: Instant) {
        let late = self.woken.is_some_and(|woken| now.saturating_duration_since(woken) > PERIOD + WAIT);
        self.woken = Some(now);
        if !late {
            return;
        }
        let times = spread(self.nodes.len(), now);
        for (node, ask_at) in self.nodes.values_mut().zip(times) {
            (node.ask_at, node.unanswered, node.missed) = (ask_at, 0, None);
        }
    }

    /// Notes an answer. What is not asked for says nothing: it may have waited on the way, with others.
    pub(super) fn heard(&mut self, addr: IpAddr) {
        let Some(node) = self.nodes.get_mut(&addr).filter(|node| node.unanswered > 0) else { return };
        (node.unanswered, node.missed) = (0, None);
        node.answers = node.answers.saturating_add(1).min(TRUSTED);
        node.standing = match node.standing {
            Standing::Unknown if node.answers >= TRUSTED => Standing::Heard,
            Standing::Silent if node.answers >= HEARD_AGAIN => Standing::Heard,
            standing => standing,
        };
    }

    /// Whom to ask at this moment; each comes once.
    pub(super) fn due(&mut self, now: Instant) -> Vec<IpAddr> {
        let due = self.nodes.iter_mut().filter(|(_, node)| node.ask_at <= now);
        let due = due.map(|(addr, node)| {
            node.ask_at += PERIOD;
            if node.ask_at <= now {
                node.ask_at += PERIOD;
            }
            *addr
        });
        due.collect()
    }

    /// Notes that a node has been asked.
    pub(super) fn asked(&mut self, addr: IpAddr, now: Instant) {
        let Some(node) = self.nodes.get_mut(&addr) else { return };
        node.unanswered = node.unanswered.saturating_add(1);
        if node.unanswered >= MISSED {
            node.answers = 0;
            node.missed.get_or_insert(now);
        }
    }

    /// The nodes that are silent, all that has come having been noted.
    pub(super) fn silent(&mut self, now: Instant) -> BTreeSet<IpAddr> {
        for node in self.nodes.values_mut() {
            if node.verdict_at().is_some_and(|at| at <= now) {
                node.standing = Standing::Silent;
            }
        }
        self.standing(Standing::Silent)
    }

    /// The nodes that answer, as far as [`Judge::silent`] has looked.
    pub(super) fn answering(&self) -> BTreeSet<IpAddr> {
        self.standing(Standing::Heard)
    }

    fn standing(&self, standing: Standing) -> BTreeSet<IpAddr> {
        let nodes = self.nodes.iter().filter(|(_, node)| node.standing == standing);
        nodes.map(|(addr, _)| *addr).collect()
    }

    /// When there is something to do next; never without nodes.
    pub(super) fn next(&self) -> Option<Instant> {
        let times =
            self.nodes.values().map(|node| node.verdict_at().map_or(node.ask_at, |at| at.min(node.ask_at)));
        times.min()
    }
}

impl Node {
    /// When it becomes silent unless it answers.
    fn verdict_at(&self) -> Option<Instant> {
        self.missed.filter(|_| self.standing == Standing::Heard).map(|missed| missed + WAIT)
    }
}

/// Times within a period from `now` on, for so many nodes.
fn spread(count: usize, now: Instant) -> impl Iterator<Item = Instant> {
    let grains = (PERIOD.as_millis() / GRAIN.as_millis()) as usize;
    (0..count).map(move |number| now + GRAIN * (number * grains / count) as u32)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 12));

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A judge, and the time on its clock.
    struct World {
        judge: Judge,
        start: Instant,
        now: Instant,
        /// What was sent, and not lost.
        on_its_way: Vec<(Instant, IpAddr)>,
    }

    impl World {
        fn new(nodes: &[IpAddr]) -> Self {
            let (mut judge, now) = (Judge::default(), Instant::now());
            judge.follow(&nodes.iter().copied().collect(), now);
            Self { judge, start: now, now, on_its_way: Vec::new() }
        }

        /// Looks at what came by `now`, asks whom it is time to ask, and tells who is silent. An answer takes 1 ms, if
        /// `passes` lets a request through.
        fn step(&mut self, now: Instant, mut passes: impl FnMut(IpAddr) -> bool) -> BTreeSet<IpAddr> {
            self.now = now;
            self.judge.wake(now);
            self.on_its_way.retain(|(at, addr)| {
                if *at <= now {
                    self.judge.heard(*addr);
                }
                *at > now
            });
            let silent = self.judge.silent(now);
            for addr in self.judge.due(now) {
                self.judge.asked(addr, now);
                if passes(addr) {
                    self.on_its_way.push((now + ms(1), addr));
                }
            }
            silent
        }

        /// Goes on for so long, waking as it should; tells who is silent then, and when that last became otherwise.
        fn run(
            &mut self,
            time: Duration,
            mut passes: impl FnMut(IpAddr) -> bool,
        ) -> (BTreeSet<IpAddr>, Duration) {
            let (began, end) = (self.now, self.now + time);
            let (mut silent, mut changed) = (self.judge.silent(self.now), Duration::ZERO);
            while let Some(at) = self.judge.next().filter(|at| *at <= end) {
                let after = self.step(at, &mut passes);
                if after != silent {
                    (silent, changed) = (after, at - began);
                }
            }
            self.now = end;
            (silent, changed)
        }
    }

    fn only() -> BTreeSet<IpAddr> {
        BTreeSet::from([NODE])
    }

    #[test]
    fn a_node_that_stops_answering_is_silent_half_a_second_later_and_heard_at_its_third_answer() {
        for cut_ms in (0..200).step_by(10) {
            let mut world = World::new(&[NODE]);
            assert_eq!(world.run(ms(3000 + cut_ms), |_| true).0, BTreeSet::new());
            let (silent, after) = world.run(ms(2000), |_| false);
            assert_eq!(silent, only());
            assert!(ms(500) <= after && after <= ms(700), "{cut_ms}: {after:?}");
            let (silent, after) = world.run(ms(2000), |_| true);
            assert_eq!(silent, BTreeSet::new());
            assert!(ms(400) < after && after <= ms(800), "{cut_ms}: {after:?}");
        }
    }

    #[test]
    fn loss_of_two_packets_is_no_silence() {
        let mut world = World::new(&[NODE]);
        let mut asked = 0;
        let (silent, changed) = world.run(ms(60_000), |_| {
            asked += 1;
            asked < 20 || asked % 3 == 0
        });
        assert_eq!((silent, changed), (BTreeSet::new(), Duration::ZERO));
    }

    #[test]
    fn a_node_that_answers_now_and_then_is_not_judged_and_one_that_is_silent_stays_so() {
        let mut asked = 0;
        let mut sometimes = |_: IpAddr| {
            asked += 1;
            asked % 5 == 0
        };
        let mut world = World::new(&[NODE]);
        assert_eq!(world.run(ms(60_000), &mut sometimes), (BTreeSet::new(), Duration::ZERO));
        world.run(ms(3000), |_| true);
        world.run(ms(1000), |_| false);
        assert_eq!(world.run(ms(60_000), &mut sometimes), (only(), Duration::ZERO));
    }

    #[test]
    fn answers_that_waited_on_the_way_count_as_one() {
        let mut world = World::new(&[NODE]);
        world.run(ms(3000), |_| true);
        assert_eq!(world.run(ms(1000), |_| false).0, only());
        for _ in 0..5 {
            world.judge.heard(NODE);
        }
        assert_eq!(world.judge.silent(world.now), only());
    }

    #[test]
    fn a_node_that_left_is_forgotten_and_one_that_comes_is_new() {
        let mut world = World::new(&[NODE]);
        world.run(ms(3000), |_| true);
        assert_eq!(world.run(ms(1000), |_| false).0, only());
        world.judge.follow(&BTreeSet::new(), world.now);
        assert_eq!((world.judge.silent(world.now), world.judge.next()), (BTreeSet::new(), None));
        world.judge.follow(&only(), world.now);
        assert_eq!(world.run(ms(5000), |_| false).0, BTreeSet::new());
    }

    #[test]
    fn nodes_are_asked_at_times_of_their_own_and_each_five_times_a_second() {
        let nodes: Vec<IpAddr> = (1..=200).map(|last| Ipv4Addr::new(198, 18, 0, last).into()).collect();
        let mut world = World::new(&nodes);
        let (mut asked, mut most) = (0, 0);
        let end = world.start + ms(10_000);
        while let Some(at) = world.judge.next().filter(|at| *at < end) {
            let mut at_once = 0;
            world.step(at, |_| {
                at_once += 1;
                true
            });
            (asked, most) = (asked + at_once, most.max(at_once));
        }
        assert_eq!((asked, most), (200 * 5 * 10, 10));
    }

    /// One who sleeps for longer than this is late.
    const LATE: Duration = PERIOD.saturating_add(WAIT);

    proptest! {
        #[test]
        fn who_never_answered_is_never_judged(gaps in proptest::collection::vec(1_u64..1500, 1..200)) {
            let mut world = World::new(&[NODE]);
            for gap in gaps {
                let now = world.now + ms(gap);
                prop_assert_eq!(world.step(now, |_| false), BTreeSet::new());
            }
        }

        /// However the node's answers come and go.
        #[test]
        fn who_is_always_late_judges_nobody(
            gaps in proptest::collection::vec((301_u64..1500, any::<bool>()), 1..200),
        ) {
            let mut world = World::new(&[NODE]);
            world.run(ms(3000), |_| true);
            for (gap, passes) in gaps {
                let now = world.now + ms(gap);
                prop_assert_eq!(world.step(now, |_| passes), BTreeSet::new());
            }
        }

        #[test]
        fn nobody_is_judged_before_three_requests_in_a_row_were_lost(
            gaps in proptest::collection::vec((1_u64..600, 0_u8..10), 1..300),
        ) {
            let mut world = World::new(&[NODE]);
            world.run(ms(3000), |_| true);
            // When requests were lost, one after another, and none of them before the judge was late.
            let mut lost: Vec<Instant> = Vec::new();
            for (gap, luck) in gaps {
                let now = world.now + ms(gap);
                if now - world.now > LATE {
                    lost.clear();
                }
                let before = lost.clone();
                let silent = world.step(now, |_| {
                    let passes = luck < 4;
                    if passes { lost.clear() } else { lost.push(now) }
                    passes
                });
                if !silent.is_empty() {
                    prop_assert!(before.len() >= 3 && now - before[2] >= WAIT, "{:?}", before);
                    break;
                }
            }
        }
    }
}
