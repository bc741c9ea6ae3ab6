//! Whether what clients saw of an object can have happened: is there one order of the operations, each at some moment
//! between its call and its return, in which every answer is right? (Wing and Gong's search, with Lowe's memory of what was
//! tried.) An operation whose answer was lost may have happened at any later moment, once, or never.

use std::collections::HashSet;

/// What an object holds: the id it was made with, and what was last written to it.
pub(super) type Held = Option<(u64, u64)>;

/// What is asked of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Where there is none.
    Create {
        id: u64,
        value: u64,
    },
    /// Where it has this id and holds `from`.
    Update {
        id: u64,
        from: u64,
        to: u64,
    },
    /// Where it has this id.
    Remove {
        id: u64,
    },
    Read,
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Refused,
    /// It was refused for something that says nothing of what the object holds, and had no effect.
    Nothing,
    Saw(Held),
}

/// An operation; the times are any numbers that grow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    pub(super) called: u64,
    /// When which answer came, if one did.
    pub(super) answered: Option<(u64, Answer)>,
    pub(super) action: Action,
}

/// What an action does to an object, and its right answer.
fn effect(held: Held, action: Action) -> (Held, Answer) {
    match (action, held) {
        (Action::Read, _) => (held, Answer::Saw(held)),
        (Action::Create { id, value }, None) => (Some((id, value)), Answer::Done),
        (Action::Update { id, from, to }, Some(now)) if now == (id, from) => (Some((id, to)), Answer::Done),
        (Action::Remove { id }, Some((now, _))) if now == id => (None, Answer::Done),
        _ => (held, Answer::Refused),
    }
}

/// Whether the history of an object, which began as none, is linearizable. At most 128 operations.
pub(super) fn is_linearizable(history: &[Operation]) -> bool {
    assert!(history.len() <= 128);
    let answered = |at: &usize| history[*at].answered.is_some();
    let must: u128 = (0..history.len()).filter(answered).fold(0, |set, at| set | 1 << at);
    let mut tried: HashSet<(u128, Held)> = HashSet::new();
    let mut open: Vec<(u128, Held)> = vec![(0, None)];
    while let Some((done, held)) = open.pop() {
        if done & must == must {
            return true;
        }
        if !tried.insert((done, held)) {
            continue;
        }
        let left = || (0..history.len()).filter(|at| done & (1 << at) == 0);
        // Whatever returned before another was called comes before it.
        let bound =
            left().filter_map(|at| history[at].answered.map(|(time, _)| time)).min().unwrap_or(u64::MAX);
        let next: Vec<(usize, Held, bool)> = left()
            .filter(|at| history[*at].called < bound)
            .filter_map(|at| {
                let (next, right) = effect(held, history[at].action);
                match history[at].answered {
                    Some((_, Answer::Nothing)) => Some((at, held, true)),
                    Some((_, answer)) => (answer == right).then_some((at, next, next == held)),
                    // Without an effect, it may as well never have happened.
                    None => (next != held).then_some((at, next, false)),
                }
            })
            .collect();
        // What is right at this moment and changes nothing can come here, whatever follows.
        let idle = next.iter().find(|(_, _, is_idle)| *is_idle);
        for (at, next, _) in idle.map_or(&next[..], std::slice::from_ref) {
            open.push((done | 1 << at, *next));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::{Action, Answer, Operation, is_linearizable};

    const CREATE: Action = Action::Create { id: 1, value: 10 };
    const UPDATE: Action = Action::Update { id: 1, from: 10, to: 11 };

    fn done(called: u64, returned: u64, action: Action, answer: Answer) -> Operation {
        Operation { called, answered: Some((returned, answer)), action }
    }

    fn lost(called: u64, action: Action) -> Operation {
        Operation { called, answered: None, action }
    }

    fn saw(called: u64, returned: u64, value: u64) -> Operation {
        done(called, returned, Action::Read, Answer::Saw(Some((1, value))))
    }

    fn saw_none(called: u64, returned: u64) -> Operation {
        done(called, returned, Action::Read, Answer::Saw(None))
    }

    #[test]
    fn what_can_have_happened_is_accepted() {
        let histories = [
            vec![],
            vec![done(1, 2, CREATE, Answer::Done), saw(3, 4, 10)],
            // A read beside a write sees it or not; and a later one beside it too, if it comes before.
            vec![done(1, 9, CREATE, Answer::Done), saw_none(2, 3), saw(4, 5, 10)],
            // Two want the same: one gets it.
            vec![
                done(1, 5, CREATE, Answer::Refused),
                done(2, 6, Action::Create { id: 2, value: 20 }, Answer::Done),
            ],
            // A lost answer: it happened late, or never.
            vec![lost(1, CREATE), saw_none(2, 3), saw(4, 5, 10)],
            vec![lost(1, CREATE), saw_none(2, 3), saw_none(4, 5)],
            vec![
                done(1, 2, CREATE, Answer::Done),
                lost(3, Action::Remove { id: 1 }),
                saw(4, 5, 10),
                done(6, 7, Action::Create { id: 2, value: 20 }, Answer::Done),
            ],
            vec![
                done(1, 2, CREATE, Answer::Done),
                done(3, 4, UPDATE, Answer::Done),
                done(5, 6, UPDATE, Answer::Refused),
                done(7, 8, Action::Remove { id: 1 }, Answer::Done),
                saw_none(9, 10),
            ],
            vec![done(1, 2, CREATE, Answer::Done), done(3, 4, UPDATE, Answer::Nothing), saw(5, 6, 10)],
        ];
        for history in histories {
            assert!(is_linearizable(&history), "{history:?}");
        }
    }

    #[test]
    fn what_can_not_have_happened_is_found() {
        let histories = [
            // An acknowledged write is gone.
            vec![done(1, 2, CREATE, Answer::Done), saw_none(3, 4)],
            // A stale read after a newer one.
            vec![done(1, 9, CREATE, Answer::Done), saw(2, 3, 10), saw_none(4, 5)],
            // Seen before it was asked for.
            vec![saw(1, 2, 10), done(3, 4, CREATE, Answer::Done)],
            // Both got it.
            vec![
                done(1, 5, CREATE, Answer::Done),
                done(2, 6, Action::Create { id: 2, value: 20 }, Answer::Done),
            ],
            // It took effect twice: removed, and back without a cause.
            vec![
                lost(1, CREATE),
                saw(2, 3, 10),
                done(4, 5, Action::Remove { id: 1 }, Answer::Done),
                saw(6, 7, 10),
            ],
            // Two updates of the same version.
            vec![
                done(1, 2, CREATE, Answer::Done),
                done(3, 4, UPDATE, Answer::Done),
                done(5, 6, Action::Update { id: 1, from: 10, to: 12 }, Answer::Done),
            ],
            // Refused without a cause.
            vec![done(1, 2, CREATE, Answer::Refused), saw_none(3, 4)],
            // What was refused took effect.
            vec![done(1, 2, CREATE, Answer::Done), done(3, 4, UPDATE, Answer::Refused), saw(5, 6, 11)],
            vec![done(1, 2, CREATE, Answer::Done), done(3, 4, UPDATE, Answer::Nothing), saw(5, 6, 11)],
        ];
        for history in histories {
            assert!(!is_linearizable(&history), "{history:?}");
        }
    }
}
