//! The last states of a member, one for each entry of the log that changed something: where who follows the state may
//! begin, or go on after a while.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::model::State;

/// States kept.
const MOMENTS_MAX: usize = 500;
/// Objects that differ between one kept state and the next, all together: what is kept beside the present state.
const CHANGES_MAX: usize = 10_000;

/// A state, and when it came to be.
#[derive(Debug, Clone)]
pub struct Moment {
    /// The state; its index is the moment's.
    pub state: State,
    /// By whoever proposed what led to it, ns since the epoch.
    pub at_ns: u64,
}

/// What follows a state.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "it is taken apart as soon as it is there")]
pub enum Next {
    /// The state of the next change.
    Moment(Moment),
    /// Nothing yet.
    UpToDate,
    /// It is kept no longer.
    Forgotten,
}

#[derive(Debug, Default)]
struct Kept {
    /// With how much each differs from the one before.
    moments: VecDeque<(Moment, usize)>,
    changes: usize,
}

impl Kept {
    fn push(&mut self, moment: Moment) {
        let changes = self.moments.back().map_or(0, |(last, _)| changes(&last.state, &moment.state));
        self.changes += changes;
        self.moments.push_back((moment, changes));
        while self.moments.len() > 1 && (self.moments.len() > MOMENTS_MAX || self.changes > CHANGES_MAX) {
            self.moments.pop_front();
            // What the oldest differs from is kept no longer.
            if let Some((_, changes)) = self.moments.front_mut() {
                self.changes -= std::mem::take(changes);
            }
        }
    }

    /// How many come before `index` or are at it.
    fn up_to(&self, index: u64) -> usize {
        self.moments.partition_point(|(moment, _)| moment.state.index <= index)
    }

    fn get(&self, place: usize) -> Option<Moment> {
        self.moments.get(place).map(|(moment, _)| moment.clone())
    }
}

/// How many objects differ.
fn changes(old: &State, new: &State) -> usize {
    old.nodes.diff(&new.nodes).count()
        + old.networks.diff(&new.networks).count()
        + old.services.diff(&new.services).count()
        + old.tasks.diff(&new.tasks).count()
}

fn locked(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    // A panic can leave it with a state too many or too few at worst.
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the state machine keeps its states.
#[derive(Debug)]
pub(super) struct Recorder {
    kept: Arc<Mutex<Kept>>,
    news: watch::Sender<u64>,
}

impl Recorder {
    /// Begins with a state that came to be at a time that is not known.
    pub(super) fn new(state: State) -> Self {
        let news = watch::Sender::new(state.index);
        let mut kept = Kept::default();
        kept.push(Moment { state, at_ns: 0 });
        Self { kept: Arc::new(Mutex::new(kept)), news }
    }

    /// Begins anew with a state: those before it are of another life of the swarm.
    pub(super) fn begin(&self, state: &State) {
        let mut kept = locked(&self.kept);
        *kept = Kept::default();
        kept.push(Moment { state: state.clone(), at_ns: 0 });
    }

    /// Keeps a state, if it is another than the last one.
    pub(super) fn record(&self, state: &State, at_ns: u64) {
        let mut kept = locked(&self.kept);
        if kept.moments.back().is_none_or(|(last, _)| last.state.index != state.index) {
            kept.push(Moment { state: state.clone(), at_ns });
        }
    }

    /// Tells those who follow.
    pub(super) fn publish(&self, index: u64) {
        self.news.send_if_modified(|known| std::mem::replace(known, index) != index);
    }

    pub(super) fn history(&self) -> History {
        History { kept: Arc::clone(&self.kept), news: self.news.subscribe() }
    }
}

/// The last states of a member.
#[derive(Debug, Clone)]
pub struct History {
    kept: Arc<Mutex<Kept>>,
    news: watch::Receiver<u64>,
}

impl History {
    /// The latest moment.
    pub fn newest(&self) -> Moment {
        let kept = locked(&self.kept);
        // There is always one.
        kept.get(kept.moments.len() - 1).unwrap_or_else(|| Moment { state: State::empty(), at_ns: 0 })
    }

    /// The index of the oldest moment.
    pub fn oldest_index(&self) -> u64 {
        locked(&self.kept).moments.front().map_or(0, |(moment, _)| moment.state.index)
    }

    /// The moment at `index`: the last one that is not after it.
    pub fn at(&self, index: u64) -> Option<Moment> {
        let kept = locked(&self.kept);
        kept.get(kept.up_to(index).checked_sub(1)?)
    }

    /// The last moment before a time, ns since the epoch; the oldest, if there is none.
    pub fn before(&self, at_ns: u64) -> Moment {
        let kept = locked(&self.kept);
        let first = kept.moments.iter().position(|(moment, _)| moment.at_ns >= at_ns);
        let place = first.unwrap_or(kept.moments.len()).saturating_sub(1);
        kept.get(place).unwrap_or_else(|| Moment { state: State::empty(), at_ns: 0 })
    }

    /// What follows the moment at `index`.
    pub fn after(&self, index: u64) -> Next {
        let kept = locked(&self.kept);
        match kept.up_to(index) {
            0 => Next::Forgotten,
            place => kept.get(place).map_or(Next::UpToDate, Next::Moment),
        }
    }

    /// Waits for another moment; false if there is to be none.
    pub async fn changed(&mut self) -> bool {
        self.news.changed().await.is_ok()
    }

    /// Waits until the state is at `index`; false if that is not to be.
    pub async fn reached(&mut self, index: u64) -> bool {
        self.news.wait_for(|known| *known >= index).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn state(index: u64, nodes: usize) -> State {
        let mut state = State::empty();
        state.index = index;
        for number in 0..nodes {
            let node = testing::node(&format!("{index}-{number}"));
            state.nodes.insert(node.id.clone(), Arc::new(node));
        }
        state
    }

    fn index_of(next: &Next) -> Option<u64> {
        match next {
            Next::Moment(moment) => Some(moment.state.index),
            Next::UpToDate | Next::Forgotten => None,
        }
    }

    #[tokio::test]
    async fn every_state_is_found_by_its_index_and_by_its_time() {
        let recorder = Recorder::new(state(3, 1));
        for (index, at_ns) in [(5, 50), (5, 51), (9, 90)] {
            recorder.record(&state(index, 1), at_ns);
        }
        recorder.publish(9);
        let mut history = recorder.history();
        assert_eq!((history.newest().state.index, history.oldest_index()), (9, 3));
        let at = |index| history.at(index).map(|moment| moment.state.index);
        assert_eq!(
            [2, 3, 4, 5, 8, 9, 99].map(at),
            [None, Some(3), Some(3), Some(5), Some(5), Some(9), Some(9)]
        );
        assert_eq!([3, 5].map(|index| index_of(&history.after(index))), [Some(5), Some(9)]);
        assert!(matches!(history.after(9), Next::UpToDate) && matches!(history.after(2), Next::Forgotten));
        let before = |at_ns| history.before(at_ns).state.index;
        assert_eq!([0, 50, 51, 90, 91].map(before), [3, 3, 5, 5, 9]);
        assert!(history.reached(9).await);
        history.news.mark_unchanged();
        recorder.record(&state(10, 1), 100);
        recorder.publish(10);
        assert!(history.changed().await);
        drop(recorder);
        assert!(!history.changed().await, "the member has stopped");
    }

    #[test]
    fn as_much_is_kept_as_there_is_room_for() {
        let recorder = Recorder::new(state(0, 0));
        let history = recorder.history();
        for index in 1..=2 * MOMENTS_MAX as u64 {
            recorder.record(&state(index, 1), index);
        }
        assert_eq!(history.oldest_index(), MOMENTS_MAX as u64 + 1);
        let last = 2 * MOMENTS_MAX as u64;
        recorder.record(&state(last + 1, CHANGES_MAX - 500), 0);
        assert!((last - 500..last + 1).contains(&history.oldest_index()), "much has changed at once");
        recorder.record(&state(last + 2, CHANGES_MAX), 0);
        assert_eq!((history.oldest_index(), locked(&history.kept).changes), (last + 2, 0));
        recorder.record(&state(last + 3, 0), 0);
        assert_eq!((history.oldest_index(), locked(&history.kept).changes), (last + 2, CHANGES_MAX));
    }
}
