//! Contents of `shoal_places` on their way to or from the kernel: Maglev tables, each with its nodes behind it.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges of places, by the first of each.
///
/// All lie in one allocation: thousands that come and go between what stays would leave their room behind.
#[derive(Debug, Clone, Default)]
pub struct Places {
    elements: Vec<u32>,
    ranges: BTreeMap<u32, Range<usize>>,
}

impl Places {
    /// Adds what is from `start` on; replaces what was.
    pub fn insert(&mut self, start: u32, places: &[u32]) {
        let begin = self.elements.len();
        self.elements.extend_from_slice(places);
        self.ranges.insert(start, begin..self.elements.len());
    }

    /// Forgets what is from `start` on.
    pub fn remove(&mut self, start: u32) {
        self.ranges.remove(&start);
        if self.ranges.is_empty() {
            self.elements = Vec::new();
        }
    }

    /// What is from `start` on.
    pub fn get(&self, start: u32) -> Option<&[u32]> {
        self.ranges.get(&start).map(|range| &self.elements[range.clone()])
    }

    /// All ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u32])> {
        self.ranges.iter().map(|(start, range)| (*start, &self.elements[range.clone()]))
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl<P: AsRef<[u32]>> FromIterator<(u32, P)> for Places {
    fn from_iter<I: IntoIterator<Item = (u32, P)>>(ranges: I) -> Self {
        let mut places = Self::default();
        for (start, range) in ranges {
            places.insert(start, range.as_ref());
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_that_was_put_to_a_place_counts() {
        let mut places: Places = [(10, vec![1, 2]), (4, vec![3]), (10, vec![5, 6, 7])].into_iter().collect();
        assert_eq!(places.iter().collect::<Vec<_>>(), [(4, &[3][..]), (10, &[5, 6, 7])]);
        places.remove(4);
        assert_eq!((places.get(4), places.get(10), places.len()), (None, Some(&[5, 6, 7][..]), 1));
        places.remove(10);
        assert!(places.is_empty() && places.elements.is_empty());
    }
}
