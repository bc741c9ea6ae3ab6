//! Building Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", section 3.4).
//!
//! Every node builds the same table from the same backends: the order of preference comes from the backends'
//! incarnations, which are unique in the cluster, and not from anything local such as slots.

use mesh_common::hash::mix;

/// Table sizes, all prime.
const SIZES: [u32; 6] = [251, 1021, 4093, 16_381, 65_521, 262_139];
/// Places a backend gets at least: what decides how much a change of the backends moves of the others' flows.
const PLACES_PER_BACKEND_MIN: usize = 25;

/// Separates the two hashes of an incarnation.
const OFFSET_SALT: u64 = 0x5348_4f41_4c5f_4f46;
const SKIP_SALT: u64 = 0x5348_4f41_4c5f_534b;

/// A backend as the table builder sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Unique in the cluster.
    pub incarnation: u32,
    /// What the table's places hold: the backend's slot on this node.
    pub slot: u32,
}

/// The size of the table for so many backends.
pub fn table_len(backends: usize) -> u32 {
    let wanted = backends * PLACES_PER_BACKEND_MIN;
    SIZES.into_iter().find(|&size| size as usize >= wanted).unwrap_or(SIZES[SIZES.len() - 1])
}

/// The table for `candidates`; empty without any.
pub fn build(candidates: &[Candidate]) -> Vec<u32> {
    if candidates.is_empty() {
        return Vec::new();
    }
    let mut candidates = candidates.to_vec();
    candidates.sort_unstable_by_key(|candidate| candidate.incarnation);
    let len = u64::from(table_len(candidates.len()));
    let mut next: Vec<(u64, u64)> = candidates.iter().map(|candidate| permutation(*candidate, len)).collect();
    let mut table = vec![0; len as usize];
    let mut filled = 0;
    loop {
        for (candidate, (position, skip)) in candidates.iter().zip(&mut next) {
            // A prime length and a skip below it visit every place, so a free one is found.
            while table[*position as usize] != 0 {
                *position = (*position + *skip) % len;
            }
            table[*position as usize] = candidate.slot;
            filled += 1;
            if filled == len {
                return table;
            }
        }
    }
}

/// A candidate's first place, and the step to its next ones.
fn permutation(candidate: Candidate, len: u64) -> (u64, u64) {
    let identity = u64::from(candidate.incarnation);
    (mix(identity ^ OFFSET_SALT) % len, mix(identity ^ SKIP_SALT) % (len - 1) + 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn candidates(incarnations: impl IntoIterator<Item = u32>) -> Vec<Candidate> {
        incarnations.into_iter().map(|incarnation| Candidate { incarnation, slot: incarnation }).collect()
    }

    fn counts(table: &[u32]) -> BTreeMap<u32, usize> {
        table.iter().fold(BTreeMap::new(), |mut counts, slot| {
            *counts.entry(*slot).or_default() += 1;
            counts
        })
    }

    #[test]
    fn the_sizes_are_prime_and_ascend() {
        let prime = |n: u32| (2..n).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
        assert!(SIZES.into_iter().all(prime));
        assert!(SIZES.is_sorted());
    }

    #[test]
    fn no_backends_make_no_table() {
        assert!(build(&[]).is_empty());
    }

    #[test]
    fn a_table_does_not_depend_on_the_order_of_its_backends() {
        let mut backends = candidates([9, 4, 7, 1]);
        let table = build(&backends);
        backends.reverse();
        assert_eq!(build(&backends), table);
    }

    #[test]
    fn losing_a_backend_moves_few_of_the_others_places() {
        let before = build(&candidates(1..=10));
        let after = build(&candidates((1..=10).filter(|n| *n != 4)));
        let kept = before.iter().zip(&after).filter(|(a, b)| **a != 4 && a == b).count();
        let others = before.iter().filter(|slot| **slot != 4).count();
        assert!(kept * 100 >= others * 85, "{kept} of {others}");
    }

    proptest! {
        #[test]
        fn places_are_shared_evenly(incarnations in proptest::collection::btree_set(1_u32.., 1..60)) {
            let table = build(&candidates(incarnations.iter().copied()));
            prop_assert_eq!(table.len(), table_len(incarnations.len()) as usize);
            let counts = counts(&table);
            prop_assert_eq!(counts.len(), incarnations.len());
            let (min, max) = (counts.values().min().unwrap(), counts.values().max().unwrap());
            prop_assert!(max - min <= 1);
        }
    }
}
