//! Numbers for things that BPF maps refer to by index, and ranges of the array of places.
//!
//! A number or a range that came free is used again only when there is no other left, or as late as can be: programs
//! that have just looked it up, and flows, may still refer to it.

use std::collections::{BTreeMap, BTreeSet};

/// Everything in the table is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exhausted;

/// Numbers from 1 to a maximum.
#[derive(Debug)]
pub struct Numbers {
    free: BTreeSet<u32>,
    next: u32,
    end: u32,
}

impl Numbers {
    /// Numbers from 1 up to, not including, `end`.
    pub fn new(end: u32) -> Self {
        Self { free: BTreeSet::new(), next: 1, end }
    }

    /// Takes a certain number, as found in the kernel; false if it is taken, or none.
    pub fn reserve(&mut self, number: u32) -> bool {
        if number == 0 || number >= self.end {
            return false;
        }
        if number < self.next {
            return self.free.remove(&number);
        }
        self.free.extend(self.next..number);
        self.next = number + 1;
        true
    }

    /// Takes a number.
    pub fn take(&mut self) -> Result<u32, Exhausted> {
        if self.next < self.end {
            self.next += 1;
            return Ok(self.next - 1);
        }
        self.free.pop_first().ok_or(Exhausted)
    }

    /// Gives a number back.
    pub fn give_back(&mut self, number: u32) {
        self.free.insert(number);
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

    /// Takes a certain range, as found in the kernel; false if it is empty, beyond the array, or taken in part.
    pub fn adopt(&mut self, start: u32, len: u32) -> bool {
        let Some(end) = start.checked_add(len).filter(|end| *end <= self.end) else { return false };
        let before = self.used.range(..end).next_back().map_or(0, |(used, used_len)| used + used_len);
        let free = len > 0 && before <= start;
        if free {
            self.used.insert(start, len);
        }
        free
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
    fn a_number_that_came_free_is_given_last() {
        let mut numbers = Numbers::new(4);
        assert_eq!([numbers.take(), numbers.take()], [Ok(1), Ok(2)]);
        numbers.give_back(1);
        assert_eq!([numbers.take(), numbers.take(), numbers.take()], [Ok(3), Ok(1), Err(Exhausted)]);
    }

    #[test]
    fn reserved_numbers_are_not_given() {
        let mut numbers = Numbers::new(5);
        assert_eq!([3, 3, 1, 0, 5].map(|number| numbers.reserve(number)), [true, false, true, false, false]);
        assert_eq!([numbers.take(), numbers.take(), numbers.take()], [Ok(4), Ok(2), Err(Exhausted)]);
    }

    #[test]
    fn ranges_found_in_the_kernel_must_not_overlap() {
        let mut ranges = Ranges::new(100);
        assert!(ranges.adopt(10, 20));
        let others = [(10, 20), (5, 6), (29, 1), (0, 100), (90, 11), (50, 0), (u32::MAX, 2)];
        assert_eq!(others.map(|(start, len)| ranges.adopt(start, len)), [false; 7]);
        assert!(ranges.adopt(30, 5) && ranges.adopt(0, 10));
        assert_eq!(ranges.allocate(65), Ok(35));
        assert_eq!(ranges.allocate(1), Err(Exhausted));
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
