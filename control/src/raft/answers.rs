//! What has been answered to whom, so that a batch that is sent again takes effect once.
//!
//! A proposer has one batch under way at a time, so the last answer to each proposer is enough, however many batches it sends.

use std::sync::Arc;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::apply::Reply;
use crate::refusal::Refusal;

/// Proposers remembered. Each start of a manager is another, so the ones forgotten are long gone.
const PROPOSERS_MAX: usize = 1024;

/// What became of a log entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It was raft's own.
    Nothing,
    /// A batch: what became of each command.
    Done {
        /// The log index at which it was applied.
        index: u64,
        /// One for each command, in order.
        outcomes: Arc<Vec<Result<Reply, Refusal>>>,
    },
    /// A batch that came after a later one of its proposer, which therefore waits for it no longer. It has no effect here.
    Late,
}

/// The last answer to each proposer. Cloning is O(1).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    last: OrdMap<u64, Answered>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Answered {
    number: u64,
    index: u64,
    outcomes: Arc<Vec<Result<Reply, Refusal>>>,
}

impl Answers {
    /// What a batch was answered, if it or a later one has been applied.
    pub fn find(&self, proposer: u64, number: u64) -> Option<Answer> {
        let answered = self.last.get(&proposer)?;
        if number > answered.number {
            return None;
        }
        if number < answered.number {
            return Some(Answer::Late);
        }
        Some(Answer::Done { index: answered.index, outcomes: Arc::clone(&answered.outcomes) })
    }

    /// Notes an answer, and returns it.
    pub fn note(
        &mut self,
        proposer: u64,
        number: u64,
        index: u64,
        outcomes: Vec<Result<Reply, Refusal>>,
    ) -> Answer {
        let outcomes = Arc::new(outcomes);
        self.last.insert(proposer, Answered { number, index, outcomes: Arc::clone(&outcomes) });
        if self.last.len() > PROPOSERS_MAX {
            let oldest = self.last.iter().min_by_key(|(_, answered)| answered.index).map(|(id, _)| *id);
            oldest.and_then(|id| self.last.remove(&id));
        }
        Answer::Done { index, outcomes }
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer, Answers, PROPOSERS_MAX};

    #[test]
    fn the_last_batch_of_a_proposer_is_known_and_earlier_ones_are_late() {
        let mut answers = Answers::default();
        assert_eq!(answers.find(7, 1), None);
        let answer = answers.note(7, 1, 10, Vec::new());
        assert_eq!(answers.find(7, 1), Some(answer));
        assert_eq!((answers.find(7, 2), answers.find(8, 1)), (None, None));
        answers.note(7, 2, 11, Vec::new());
        assert_eq!(answers.find(7, 1), Some(Answer::Late));
    }

    #[test]
    fn the_longest_silent_proposer_is_forgotten_first() {
        let mut answers = Answers::default();
        for proposer in 0..=PROPOSERS_MAX as u64 {
            answers.note(proposer, 1, 100 + proposer, Vec::new());
        }
        assert_eq!(answers.last.len(), PROPOSERS_MAX);
        assert!(answers.find(0, 1).is_none() && answers.find(1, 1).is_some());
    }
}
