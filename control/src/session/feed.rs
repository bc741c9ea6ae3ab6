//! The changes of the table as the sessions under way are sent them: each is found and encoded once, for all nodes.
//!
//! A feed goes from state to state as its readers ask for news, by steps that it keeps for those who come later. Who falls
//! behind further than they reach is served as one that was away.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use mesh_api::id::NodeId;
use mesh_api::session::EncodedDelta;
use mesh_api::table::Change;
use serde_json::value::{RawValue, to_raw_value};

use super::journal::Part;
use super::view;
use crate::model::State;

/// What the steps may take that are kept, bytes. A session that is being sent some holds those until its agent has taken them.
const BYTES_MAX: usize = 16 << 20;
/// What a change takes beside its encoding, bytes: more than half of them, where tasks' states change.
const ITEM_BYTES: usize = size_of::<Item>() + 64;

/// What the sessions are sent.
#[derive(Debug)]
pub(super) struct Feed {
    /// The state that the last step leads to.
    state: State,
    /// The steps that are kept lead from the state at this index to that one.
    since: u64,
    steps: VecDeque<Arc<Step>>,
    bytes: usize,
    bytes_max: usize,
}

/// The changes between two states.
#[derive(Debug)]
struct Step {
    /// The index of the second.
    to: u64,
    items: Vec<Item>,
    bytes: usize,
}

/// A change, encoded.
#[derive(Debug)]
struct Item {
    /// What it is of.
    part: Part,
    /// As all nodes are told it.
    change: Box<RawValue>,
    /// As the node is told it whose task it is of.
    own: Option<(NodeId, Box<RawValue>)>,
}

impl Feed {
    /// A feed that begins with `state`.
    pub(super) fn new(state: State) -> Self {
        Self::bounded(state, BYTES_MAX)
    }

    /// A feed whose steps never take more than `bytes_max`.
    pub(super) fn bounded(state: State, bytes_max: usize) -> Self {
        Self { since: state.index, state, steps: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Goes on to `state`, unless it is further already, and returns the state that it is at.
    pub(super) fn advance(&mut self, state: &State) -> serde_json::Result<State> {
        if state.index > self.state.index {
            let changes = view::changes(&self.state, state);
            let items = changes.into_iter().map(Item::new).collect::<Result<Vec<_>, _>>()?;
            let bytes = items.iter().map(Item::bytes).sum();
            self.state = state.clone();
            self.keep(Step { to: state.index, items, bytes });
        }
        Ok(self.state.clone())
    }

    fn keep(&mut self, step: Step) {
        if step.items.is_empty() {
            return;
        }
        self.bytes += step.bytes;
        self.steps.push_back(Arc::new(step));
        while self.bytes > self.bytes_max
            && let Some(step) = self.steps.pop_front()
        {
            self.bytes -= step.bytes;
            self.since = step.to;
        }
    }

    /// What has changed since the state at `index`, which is one that [`Feed::advance`] returned; `None` where that is out of
    /// reach.
    pub(super) fn since(&self, index: u64) -> Option<News> {
        let is_within = (self.since..=self.state.index).contains(&index);
        let is_later = |step: &&Arc<Step>| step.to > index;
        is_within.then(|| News(self.steps.iter().rev().take_while(is_later).cloned().collect()))
    }
}

impl Item {
    fn new(change: Change) -> serde_json::Result<Self> {
        let part = Part::of(&change);
        let (own, change) = match change {
            Change::Task(mut record) => {
                let own = match &record.spec {
                    Some(_) => Some((record.node.clone(), to_raw_value(&Change::Task(record.clone()))?)),
                    None => None,
                };
                record.spec = None;
                (own, Change::Task(record))
            }
            change => (None, change),
        };
        Ok(Self { part, change: to_raw_value(&change)?, own })
    }

    fn bytes(&self) -> usize {
        let own = self.own.as_ref().map_or(0, |(_, own)| own.get().len());
        ITEM_BYTES + self.change.get().len() + own
    }

    /// As `node` is told it.
    fn told(&self, node: &NodeId) -> &RawValue {
        match &self.own {
            Some((of, own)) if of == node => own,
            _ => &self.change,
        }
    }
}

/// Steps, the last one first.
#[derive(Debug)]
pub(super) struct News(Vec<Arc<Step>>);

impl News {
    /// What brings `node`'s copy of the table from index `from` to `to`; `None` if there is nothing to tell. What changed
    /// several times is told once.
    pub(super) fn delta(
        &self,
        node: &NodeId,
        from: u64,
        to: u64,
    ) -> serde_json::Result<Option<EncodedDelta<'_>>> {
        let mut changes: Vec<&RawValue> = Vec::new();
        if let [step] = &self.0[..] {
            changes.extend(step.items.iter().map(|item| item.told(node)));
        } else {
            let mut told = BTreeSet::new();
            let items = self.0.iter().flat_map(|step| &step.items);
            changes.extend(items.filter(|item| told.insert(&item.part)).map(|item| item.told(node)));
        }
        if changes.is_empty() { Ok(None) } else { EncodedDelta::new(from, to, changes).map(Some) }
    }
}
