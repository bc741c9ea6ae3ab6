//! Tasks that are not where the table has them, by the word of the nodes that they should be on.
//!
//! A node that is told so sends such a task nothing, and balances nothing to it, until the table says something new of
//! the task, or for a while: the word may have been early, or the table late.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::dataplane::{AttachmentKey, Touched};

/// How long a node's word counts. A task that is not there after that costs one more packet.
pub(super) const ABSENT_FOR: Duration = Duration::from_secs(10);
/// Most tasks that are kept at a time: no more than one node has.
const ABSENT_MAX: usize = 16_384;

/// The tasks' attachments, and until when each counts as not there.
#[derive(Debug, Default)]
pub(super) struct Absent {
    until: BTreeMap<AttachmentKey, Instant>,
}

impl Absent {
    /// Notes a node's word; false if it is not news.
    pub(super) fn note(&mut self, key: AttachmentKey, now: Instant) -> bool {
        if self.until.contains_key(&key) || self.until.len() >= ABSENT_MAX {
            return false;
        }
        self.until.insert(key, now + ABSENT_FOR);
        true
    }

    /// Takes out those of which the table says something new.
    pub(super) fn forget(&mut self, touched: &Touched) {
        if touched.all {
            self.until.clear();
        }
        let touched: BTreeSet<u32> = touched.tasks.values().flat_map(BTreeMap::values).copied().collect();
        self.until.retain(|key, _| !touched.contains(&key.incarnation));
    }

    /// Takes out those whose time is over, and returns their incarnations.
    pub(super) fn expire(&mut self, now: Instant) -> BTreeSet<u32> {
        let over = self.until.extract_if(.., |_, until| *until <= now);
        over.map(|(key, _)| key.incarnation).collect()
    }

    /// When the first one's time is over.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.until.values().min().copied()
    }

    /// All of them.
    pub(super) fn keys(&self) -> BTreeSet<AttachmentKey> {
        self.until.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: AttachmentKey = AttachmentKey { incarnation: 7, vni: 4096 };

    fn touching(incarnation: u32) -> Touched {
        let tasks = BTreeMap::from([("t".into(), incarnation)]);
        Touched { tasks: BTreeMap::from([("s".into(), tasks)]), ..Touched::default() }
    }

    #[test]
    fn word_of_a_node_counts_until_its_time_is_over() {
        let (mut absent, now) = (Absent::default(), Instant::now());
        assert!(absent.note(KEY, now));
        assert!(!absent.note(KEY, now + ABSENT_FOR / 2));
        assert_eq!(absent.keys(), BTreeSet::from([KEY]));
        assert_eq!(absent.next_expiry(), Some(now + ABSENT_FOR));
        assert_eq!(absent.expire(now + ABSENT_FOR / 2), BTreeSet::new());
        assert_eq!(absent.expire(now + ABSENT_FOR), BTreeSet::from([7]));
        assert_eq!((absent.keys(), absent.next_expiry()), (BTreeSet::new(), None));
    }

    #[test]
    fn word_of_a_node_counts_until_the_table_says_something_new() {
        let (mut absent, now) = (Absent::default(), Instant::now());
        absent.note(KEY, now);
        absent.forget(&touching(8));
        assert_eq!(absent.keys(), BTreeSet::from([KEY]));
        absent.forget(&touching(7));
        assert_eq!(absent.keys(), BTreeSet::new());
        absent.note(KEY, now);
        absent.forget(&Touched::all());
        assert_eq!(absent.keys(), BTreeSet::new());
    }

    #[test]
    fn more_than_a_node_can_have_are_not_kept() {
        let (mut absent, now) = (Absent::default(), Instant::now());
        let noted =
            (0..20_000).filter(|number| absent.note(AttachmentKey { incarnation: *number, vni: 1 }, now));
        assert_eq!(noted.count(), ABSENT_MAX);
    }
}
