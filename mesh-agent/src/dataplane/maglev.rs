//! Building Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", section 3.4).
//!
//! Every node builds the same table from the same backends: the order of preference comes from the backends'
//! incarnations, which are unique in the cluster, and not from anything local such as slots. So are their weights.

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
    /// Its share of the places beside the others', from 1 up.
    pub weight: u8,
}

/// Where a candidate is on its way through the table.
struct Turn {
    slot: u32,
    weight: u32,
    /// What it has saved up: a place costs the greatest weight.
    credit: u32,
    position: u32,
    skip: u32,
}

/// The size of the table for so many backends.
pub fn table_len(backends: usize) -> u32 {
    let wanted = backends * PLACES_PER_BACKEND_MIN;
    SIZES.into_iter().find(|&size| size as usize >= wanted).unwrap_or(SIZES[SIZES.len() - 1])
}

/// The table for `candidates`; empty without any.
///
/// Candidates take turns at choosing places. One of a lower weight than the greatest passes some of its turns, but not
/// its first, so that each has a place.
pub fn build(candidates: &[Candidate]) -> Vec<u32> {
    let mut candidates = candidates.to_vec();
    candidates.sort_unstable_by_key(|candidate| candidate.incarnation);
    let len = table_len(candidates.len());
    let Some(price) = candidates.iter().map(|candidate| u32::from(candidate.weight.max(1))).max() else {
        return Vec::new();
    };
    let turn = |candidate: &Candidate| {
        let Candidate { incarnation, slot, weight } = *candidate;
        let weight = u32::from(weight.max(1));
        let (position, skip) = permutation(incarnation, len);
        Turn { slot, weight, credit: price - weight, position, skip }
    };
    let mut turns: Vec<Turn> = candidates.iter().map(turn).collect();
    let mut table = vec![0; len as usize];
    let mut filled = 0;
    loop {
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < price {
                continue;
            }
            turn.credit -= price;
            // A prime length and a skip below it visit every place, so a free one is found.
            while table[turn.position as usize] != 0 {
                turn.position += turn.skip;
                if turn.position >= len {
                    turn.position -= len;
                }
            }
            table[turn.position as usize] = turn.slot;
            filled += 1;
            if filled == len {
                return table;
            }
        }
    }
}

/// A candidate's first place, and the step to its next ones.
fn permutation(incarnation: u32, len: u32) -> (u32, u32) {
    let (identity, len) = (u64::from(incarnation), u64::from(len));
    ((mix(identity ^ OFFSET_SALT) % len) as u32, (mix(identity ^ SKIP_SALT) % (len - 1) + 1) as u32)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn candidates(incarnations: impl IntoIterator<Item = u32>) -> Vec<Candidate> {
        incarnations
            .into_iter()
            .map(|incarnation| Candidate { incarnation, slot: incarnation, weight: 100 })
            .collect()
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

    fn weighted(weights: &[u8]) -> Vec<Candidate> {
        let mut candidates = candidates(1..=weights.len() as u32);
        for (candidate, weight) in candidates.iter_mut().zip(weights) {
            candidate.weight = *weight;
        }
        candidates
    }

    /// The table as it was built before there were weights, which other nodes may still build it like.
    fn unweighted(candidates: &[Candidate]) -> Vec<u32> {
        let len = table_len(candidates.len());
        let mut next: Vec<_> =
            candidates.iter().map(|candidate| permutation(candidate.incarnation, len)).collect();
        let mut table = vec![0; len as usize];
        let turns = (0..candidates.len()).cycle();
        for turn in turns.take(len as usize) {
            let (position, skip) = &mut next[turn];
            while table[*position as usize] != 0 {
                *position = (*position + *skip) % len;
            }
            table[*position as usize] = candidates[turn].slot;
        }
        table
    }

    #[test]
    fn equal_weights_make_the_table_of_no_weights() {
        let plain = unweighted(&weighted(&[100; 7]));
        for weight in [1, 40, 100] {
            assert_eq!(build(&weighted(&[weight; 7])), plain);
        }
    }

    #[test]
    fn shares_follow_the_weights() {
        for weights in [vec![25, 50, 100], [25, 50, 100].repeat(20)] {
            let table = build(&weighted(&weights));
            let total: usize = weights.iter().map(|weight| usize::from(*weight)).sum();
            let counts = counts(&table);
            for weight in [25_u8, 50, 100] {
                let slots = || weights.iter().zip(1..).filter(|(other, _)| **other == weight);
                let got = slots().map(|(_, slot)| counts[&slot]).sum::<usize>() * total;
                let due = slots().count() * usize::from(weight) * table.len();
                assert!(got.abs_diff(due) * 100 <= due * 5, "weight {weight}: {got} instead of {due}");
            }
        }
    }

    #[test]
    fn the_least_weight_still_has_a_place() {
        let counts = counts(&build(&weighted(&[1, 100, 100, 100, 100, 100, 100, 100, 100, 100])));
        assert!(counts[&1] >= 1, "{counts:?}");
    }

    #[test]
    fn another_weight_of_one_moves_few_of_the_others_places() {
        let before = build(&weighted(&[100; 10]));
        let after = build(&weighted(&[100, 100, 100, 50, 100, 100, 100, 100, 100, 100]));
        let kept = before.iter().zip(&after).filter(|(a, b)| **a != 4 && a == b).count();
        let others = before.iter().filter(|slot| **slot != 4).count();
        assert!(kept * 100 >= others * 90, "{kept} of {others}");
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
