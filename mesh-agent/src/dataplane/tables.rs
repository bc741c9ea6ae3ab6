//! The maps, kept to what the cluster's table and this node ask for: plan, layout and writing together.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use mesh_api::id::ServiceId;
use mesh_api::table::Table;
use mesh_common::map::{Config, Service};

use super::contents::{Changes, Contents};
use super::error::DataplaneError;
use super::layout::{Avoided, Layout};
use super::maps::Maps;
use super::places::Places as Ranges;
use super::plan::{Fragment, Local, LocalEndpoint, Places, peers, plan, plan_local};
use super::touched::Touched;
use crate::sys::memory;

/// Maglev tables in a change whose memory is worth giving back.
const LARGE: usize = 256;

/// What holds the contents of the maps: the kernel, or in simulated agents this process.
pub trait Backing {
    /// See [`Maps::read`].
    fn read(&self) -> Result<Contents, DataplaneError>;
    /// See [`Maps::read_places`].
    fn read_places(&self, services: &BTreeMap<u32, Service>) -> Result<Ranges, DataplaneError>;
    /// See [`Maps::write`].
    fn write(&mut self, changes: &Changes, places: &Ranges) -> Result<(), DataplaneError>;
    /// See [`Maps::configure`].
    fn configure(&mut self, config: &Config) -> Result<(), DataplaneError>;
}

impl Backing for Maps {
    fn read(&self) -> Result<Contents, DataplaneError> {
        self.read()
    }

    fn read_places(&self, services: &BTreeMap<u32, Service>) -> Result<Ranges, DataplaneError> {
        self.read_places(services)
    }

    fn write(&mut self, changes: &Changes, places: &Ranges) -> Result<(), DataplaneError> {
        Self::write(self, changes, places)
    }

    fn configure(&mut self, config: &Config) -> Result<(), DataplaneError> {
        Self::configure(self, config)
    }
}

/// The maps that the agent writes, and what it has put into them.
#[derive(Debug)]
pub struct Tables<M = Maps> {
    maps: M,
    layout: Layout,
    /// The facts of the last plan; none before the first.
    local: Option<Local>,
    /// Whether the kernel holds the layout: not at the start, and not after a write that failed.
    in_step: bool,
    /// Whether all of the last table is laid out.
    complete: bool,
}

impl Tables {
    /// Opens the maps that are pinned in `folder`.
    pub fn open(folder: &Path) -> Result<Self, DataplaneError> {
        Ok(Self::over(Maps::open(folder)?))
    }

    /// Whether the maps have been filled before, by this agent or one before it.
    pub fn are_filled(&self) -> Result<bool, DataplaneError> {
        Ok(self.maps.config()?.is_some())
    }
}

impl<M: Backing> Tables<M> {
    /// On maps that hold whatever they do.
    pub fn over(maps: M) -> Self {
        Self { maps, layout: Layout::default(), local: None, in_step: false, complete: false }
    }

    /// Brings the maps to all of what `table` and `local` ask for. The first time, and after a failure, everything that
    /// the maps hold is read and put right.
    pub fn apply(&mut self, table: &Table, local: &Local, config: &Config) -> Result<(), DataplaneError> {
        let first = self.local.is_none();
        let held = if self.in_step { None } else { Some(self.maps.read()?) };
        if let Some(held) = held.as_ref().filter(|_| first) {
            self.layout.adopt(held, self.maps.read_places(&held.common.services)?);
        }
        self.local = Some(local.clone());
        self.complete = false;
        let mut changes = Changes::default();
        // What fits is written in any case: that may make room for the rest.
        let fits = self.layout.set_all(plan(table, local), held.is_none().then_some(&mut changes));
        if let Some(held) = held {
            changes = Changes::between(held, self.layout.contents());
        }
        // What was read and what was made: much at the start, and none of it stays.
        let large = first || self.layout.places().len() >= LARGE;
        self.write(&changes, config)?;
        drop(changes);
        if large {
            memory::trim();
        }
        fits?;
        self.complete = true;
        Ok(())
    }

    /// Brings the maps to what `touched` names of `table`, and to `local`, given that they hold all the rest.
    pub fn change(
        &mut self,
        table: &Table,
        touched: &Touched,
        local: &Local,
        config: &Config,
    ) -> Result<(), DataplaneError> {
        let former =
            self.local.as_ref().filter(|former| (&former.node, former.vtep) == (&local.node, local.vtep));
        let Some(former) = former.filter(|_| self.complete && self.in_step && !touched.all) else {
            return self.apply(table, local, config);
        };
        let touched = with_moved(touched, table, former, local);
        let mut changes = Changes::default();
        let mut ways_fit = Ok(());
        let mut ids = touched.service_ids();
        if touched.nodes {
            ways_fit = self.layout.set_peers(peers(table, local), Some(&mut changes));
            ids.extend(self.layout.displaced());
        }
        let places = Places::new(table, local);
        let none = Fragment::default();
        let planned = |id: &ServiceId| {
            let fragment = self.layout.fragment(id).unwrap_or(&none);
            (id.clone(), fragment.changed(table, local, &places, &touched, id))
        };
        let fragments: Vec<_> = ids.into_iter().map(planned).collect();
        let fits = self.layout.set_fragments(fragments, Some(&mut changes));
        let is_touched = |endpoint: &LocalEndpoint| touched.has_task(&endpoint.task);
        if former != local || touched.networks || local.endpoints.iter().any(is_touched) {
            self.layout.set_local(plan_local(table, local), Some(&mut changes));
            self.local = Some(local.clone());
        }
        self.complete = false;
        let large = self.layout.places().len() >= LARGE;
        self.write(&changes, config)?;
        drop(changes);
        if large {
            memory::trim();
        }
        ways_fit.and(fits)?;
        self.complete = true;
        Ok(())
    }

    /// The backends that get nothing new, because their nodes don't answer.
    pub fn avoided(&self) -> HashSet<Avoided> {
        if self.local.as_ref().is_none_or(|local| local.silent.is_empty()) {
            return HashSet::new();
        }
        self.layout.avoided()
    }

    fn write(&mut self, changes: &Changes, config: &Config) -> Result<(), DataplaneError> {
        self.in_step = false;
        self.maps.write(changes, self.layout.places())?;
        // Last, since it tells that the rest is there.
        self.maps.configure(config)?;
        self.layout.written();
        self.in_step = true;
        Ok(())
    }
}

/// What is touched by a change of the table, together with the tasks whose links came, went or changed on this node.
fn with_moved(touched: &Touched, table: &Table, former: &Local, local: &Local) -> Touched {
    let mut touched = touched.clone();
    if former.endpoints == local.endpoints {
        return touched;
    }
    let [former, local] = [former, local].map(|local| local.endpoints.iter().collect::<BTreeSet<_>>());
    for endpoint in former.symmetric_difference(&local) {
        // A task that the table lacks has nothing in the maps that could change.
        if let Some(task) = table.tasks.get(&endpoint.task) {
            touched.note_task(task);
        }
    }
    touched
}

#[cfg(test)]
pub(super) mod tests;
