//! How much one task, and all of them, may have under way at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_api::id::TaskId;

/// Counts what is under way.
#[derive(Debug)]
pub(super) struct Turns {
    each_max: usize,
    all_max: usize,
    under_way: Mutex<UnderWay>,
}

#[derive(Debug, Default)]
struct UnderWay {
    all: usize,
    by_task: HashMap<TaskId, usize>,
}

/// One thing that is under way; over when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    task: TaskId,
}

impl Turns {
    /// At most `each_max` for one task, and `all_max` for all.
    pub(super) fn new(each_max: usize, all_max: usize) -> Arc<Self> {
        Arc::new(Self { each_max, all_max, under_way: Mutex::default() })
    }

    /// `None` when there is as much under way as may be.
    pub(super) fn take(self: &Arc<Self>, task: TaskId) -> Option<Turn> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let of_task = under_way.by_task.get(&task).copied().unwrap_or_default();
        if under_way.all >= self.all_max || of_task >= self.each_max {
            return None;
        }
        under_way.all += 1;
        under_way.by_task.insert(task.clone(), of_task + 1);
        Some(Turn { turns: Arc::clone(self), task })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut under_way = self.turns.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.all -= 1;
        if let Some(of_task) = under_way.by_task.get_mut(&self.task) {
            *of_task -= 1;
            if *of_task == 0 {
                under_way.by_task.remove(&self.task);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_can_not_take_all_turns_and_a_turn_that_is_over_is_free_again() {
        let turns = Turns::new(2, 3);
        let take = |task: &str| turns.take(task.into());
        let mut greedy: Vec<_> = (0..2).map(|_| take("greedy").unwrap()).collect();
        assert!(take("greedy").is_none());
        let other = take("other").unwrap();
        assert!(take("third").is_none(), "all are taken");
        greedy.pop();
        let third = take("third").unwrap();
        drop((greedy, other, third));
        assert!(turns.under_way.lock().unwrap().by_task.is_empty());
        assert!(take("greedy").is_some());
    }
}
