//! Numbers for things that BPF maps refer to by index, and ranges of the Maglev array.
//!
//! Both remember: a thing keeps its number as long as it is there, since flows refer to it, and a number that came
//! free is used again only when it is needed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

/// Everything in the table is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exhausted;

/// Numbers from 1 to a maximum, by key.
#[derive(Debug)]
pub struct Slots<K> {
    by_key: HashMap<K, u32>,
    free: BTreeSet<u32>,
    next: u32,
    end: u32,
}

impl<K: Hash + Eq + Clone> Slots<K> {
    /// Numbers from 1 up to, not including, `end`.
    pub fn new(end: u32) -> Self {
        Self { by_key: HashMap::new(), free: BTreeSet::new(), next: 1, end }
    }

    /// Binds `key` to `slot`, as found in the kernel; ignored if either is taken.
    pub fn adopt(&mut self, key: K, slot: u32) {
        if slot == 0 || slot >= self.end || self.by_key.contains_key(&key) {
            return;
        }
        if slot >= self.next {
            self.free.extend(self.next..slot);
            self.next = slot + 1;
        } else if !self.free.remove(&slot) {
            return;
        }
        self.by_key.insert(key, slot);
    }

    /// The number of `key`, a new one if it has none.
    pub fn assign(&mut self, key: &K) -> Result<u32, Exhausted> {
        if let Some(&slot) = self.by_key.get(key) {
            return Ok(slot);
        }
        let slot = if self.next < self.end {
            self.next += 1;
            self.next - 1
        } else {
            self.free.pop_first().ok_or(Exhausted)?
        };
        self.by_key.insert(key.clone(), slot);
        Ok(slot)
    }

    /// The number of `key`, if it has one.
    pub fn get(&self, key: &K) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Frees the numbers of all keys that `keep` doesn't want.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        let free = &mut self.free;
        self.by_key.retain(|key, slot| {
            let kept = keep(key);
            if !kept {
                free.insert(*slot);
            }
            kept
        });
    }
}

/// Ranges of an array.
#[derive(Debug)]
pub struct Ranges {
    used: BTreeMap<u32, u32>,
    cursor: u32,
    end: u32,
}

impl Ranges {
    /// Ranges of an array of `end` elements.
    pub fn new(end: u32) -> Self {
        Self { used: BTreeMap::new(), cursor: 0, end }
    }

    /// Marks a range as used, as found in the kernel; ignored if it is empty or beyond the array.
    pub fn adopt(&mut self, start: u32, len: u32) {
        if len > 0 && start.checked_add(len).is_some_and(|end| end <= self.end) {
            self.used.insert(start, len);
        }
    }

    /// A free range of `len` elements; looks on from the last one first, so that a freed range rests for a while.
    pub fn allocate(&mut self, len: u32) -> Result<u32, Exhausted> {
        let start = self.find(self.cursor, len).or_else(|| self.find(0, len)).ok_or(Exhausted)?;
        self.used.insert(start, len);
        self.cursor = start + len;
        Ok(start)
    }

    /// Frees the range that starts at `start`.
    pub fn free(&mut self, start: u32) {
        self.used.remove(&start);
    }

    fn find(&self, from: u32, len: u32) -> Option<u32> {
        let mut start = match self.used.range(..=from).next_back() {
            Some((used, used_len)) => from.max(used + used_len),
            None => from,
        };
        for (used, used_len) in self.used.range(start..) {
            if used - start >= len {
                return Some(start);
            }
            start = used + used_len;
        }
        (self.end.saturating_sub(start) >= len).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_keeps_its_slot_and_a_freed_one_comes_back_last() {
        let mut slots = Slots::new(4);
        assert_eq!([slots.assign(&'a'), slots.assign(&'b'), slots.assign(&'a')], [Ok(1), Ok(2), Ok(1)]);
        slots.retain(|key| *key != 'a');
        assert_eq!(
            [slots.assign(&'c'), slots.assign(&'d'), slots.assign(&'e')],
            [Ok(3), Ok(1), Err(Exhausted)]
        );
    }

    #[test]
    fn adopted_slots_are_not_given_to_others() {
        let mut slots = Slots::new(10);
        slots.adopt('x', 3);
        slots.adopt('y', 3);
        slots.adopt('z', 1);
        assert_eq!([slots.get(&'x'), slots.get(&'y'), slots.get(&'z')], [Some(3), None, Some(1)]);
        assert_eq!(slots.assign(&'y'), Ok(4));
    }

    proptest! {
        #[test]
        fn ranges_never_overlap(steps in proptest::collection::vec((1_u32..40, any::<bool>()), 1..80)) {
            let mut ranges = Ranges::new(400);
            let mut live: Vec<(u32, u32)> = Vec::new();
            for (len, free) in steps {
                if free && !live.is_empty() {
                    let (start, _) = live.remove(len as usize % live.len());
                    ranges.free(start);
                } else if let Ok(start) = ranges.allocate(len) {
                    prop_assert!(start + len <= 400);
                    prop_assert!(live.iter().all(|(s, l)| start + len <= *s || s + l <= start));
                    live.push((start, len));
                }
            }
        }

        #[test]
        fn an_empty_array_always_has_room(len in 1_u32..=400) {
            prop_assert_eq!(Ranges::new(400).allocate(len), Ok(0));
        }
    }
}
