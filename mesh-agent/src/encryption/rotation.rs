//! When a change of keys goes on: a state machine without clock, table or devices.
//!
//! A second identity is described behind the one in use. Once every live node knows it, the two change places, and the node
//! sends from the second. Once every live node knows that as well, and what was sent before has come or is lost, the first
//! goes. Either is listened to all the while.

use std::time::Duration;

use tokio::time::Instant;

/// How long an identity that nobody sends to any more is still listened to.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// How far a change of keys has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// One identity, or none yet.
    Steady,
    /// The second is described behind the first.
    Introduced,
    /// The second is described first, and sent from.
    Switched,
}

/// What is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Make a second identity.
    Introduce,
    /// Describe the second first, and send from it.
    Switch,
    /// Give the first up.
    Retire,
}

/// What is known when the question is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) phase: Phase,
    /// Whether the identity in use is to be replaced.
    pub(super) due: bool,
    /// The table's index, where the table shows the node's identities as it describes them.
    pub(super) shown: Option<u64>,
    /// The table index that every live node has applied.
    pub(super) settled: u64,
    pub(super) now: Instant,
}

/// What is to be remembered between the questions. To be asked anew after each step.
#[derive(Debug, Default)]
pub(super) struct Rotation {
    /// The first index of a table that shows the identities as described.
    shown_at: Option<u64>,
    /// When every live node knew it.
    settled_at: Option<Instant>,
}

impl Rotation {
    /// What is to be done now.
    pub(super) fn step(&mut self, seen: &Seen) -> Option<Step> {
        let step = self.next(seen);
        if step.is_some() || seen.phase == Phase::Steady || seen.shown.is_none() {
            *self = Self::default();
        }
        step
    }

    fn next(&mut self, seen: &Seen) -> Option<Step> {
        match seen.phase {
            Phase::Steady => seen.due.then_some(Step::Introduce),
            Phase::Introduced => self.is_known(seen).then_some(Step::Switch),
            Phase::Switched => {
                if !self.is_known(seen) {
                    return None;
                }
                let settled_at = *self.settled_at.get_or_insert(seen.now);
                (seen.now.duration_since(settled_at) >= GRACE).then_some(Step::Retire)
            }
        }
    }

    /// Whether every live node has applied a table that shows the identities as described.
    fn is_known(&mut self, seen: &Seen) -> bool {
        seen.shown.is_some_and(|index| *self.shown_at.get_or_insert(index) <= seen.settled)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(phase: Phase, shown: Option<u64>, settled: u64, now: Instant) -> Seen {
        Seen { phase, due: true, shown, settled, now }
    }

    #[test]
    fn each_step_waits_for_every_live_node() {
        let now = Instant::now();
        let mut rotation = Rotation::default();
        let idle = Seen { due: false, ..seen(Phase::Steady, Some(5), 9, now) };
        assert_eq!(rotation.step(&idle), None);
        assert_eq!(rotation.step(&seen(Phase::Steady, None, 0, now)), Some(Step::Introduce));

        // The table does not show the second identity yet, then does, then everybody has it.
        assert_eq!(rotation.step(&seen(Phase::Introduced, None, 9, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Introduced, Some(12), 9, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Introduced, Some(15), 11, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Introduced, Some(16), 12, now)), Some(Step::Switch));

        // The same for the change of places, and then some time for what is on its way.
        assert_eq!(rotation.step(&seen(Phase::Switched, None, 30, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Switched, Some(20), 19, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Switched, Some(20), 20, now)), None);
        let nearly = now + GRACE - Duration::from_millis(1);
        assert_eq!(rotation.step(&seen(Phase::Switched, Some(21), 20, nearly)), None);
        assert_eq!(rotation.step(&seen(Phase::Switched, Some(21), 20, now + GRACE)), Some(Step::Retire));
    }

    #[test]
    fn a_table_that_shows_something_else_meanwhile_starts_the_wait_anew() {
        let now = Instant::now();
        let mut rotation = Rotation::default();
        assert_eq!(rotation.step(&seen(Phase::Introduced, Some(3), 2, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Introduced, None, 3, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Introduced, Some(7), 6, now)), None);
        assert_eq!(rotation.step(&seen(Phase::Introduced, Some(7), 7, now)), Some(Step::Switch));
    }

    proptest! {
        /// Whatever the order of words, no step is taken before all have applied a table that shows what it follows from.
        #[test]
        fn nobody_is_left_behind(words in prop::collection::vec((prop::option::of(0_u64..9), 0_u64..9, 0_u64..20), 1..60)) {
            let start = Instant::now();
            let (mut rotation, mut phase, mut now) = (Rotation::default(), Phase::Steady, start);
            let mut shown_since = None;
            for (shown, settled, seconds) in words {
                now += Duration::from_secs(seconds);
                shown_since = shown.map(|index| shown_since.unwrap_or(index));
                let step = rotation.step(&seen(phase, shown, settled, now));
                if let Some(Step::Switch | Step::Retire) = step {
                    prop_assert!(shown_since.is_some_and(|since| settled >= since));
                }
                let next = match step {
                    Some(Step::Introduce) => Phase::Introduced,
                    Some(Step::Switch) => Phase::Switched,
                    Some(Step::Retire) => Phase::Steady,
                    None => continue,
                };
                prop_assert_ne!(phase, next);
                (phase, shown_since) = (next, None);
            }
        }
    }
}
