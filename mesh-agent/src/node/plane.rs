//! The dataplane as the node's loop uses it: the real one, and a fake that the loop's tests look into.

use std::error::Error;
use std::path::Path;

use mesh_api::table::Table;
use tokio::sync::mpsc;

use crate::dataplane::{AttachmentKey, Dataplane, DataplaneConfig, DataplaneError, Local, Touched};

/// Programs and maps of a node. Calls block, for milliseconds; [`Plane::open`] for as long as the kernel checks programs, which
/// can be seconds.
pub(crate) trait Plane: Sized + Send + 'static {
    /// What can go wrong.
    type Error: Error + Send + Sync + 'static;

    /// Loads and attaches what is of the node, taking over what is pinned already.
    fn open(config: DataplaneConfig) -> Result<Self, Self::Error>;
    /// Attaches to the interfaces of `config`, which says nothing else than the one before.
    fn reattach(&mut self, config: DataplaneConfig) -> Result<(), Self::Error>;
    /// Makes the maps hold what follows from the table, given that they did before what `touched` names changed of it;
    /// looks at all of it the first time, and after a failure.
    fn change(&mut self, table: &Table, touched: &Touched, local: &Local) -> Result<(), Self::Error>;
    /// Attaches the host's side of a task's link; one that is attached already is no error.
    fn attach_endpoint(&mut self, ifindex: u32) -> Result<(), Self::Error>;
    /// Forgets the host's side of a task's link, which may be gone.
    fn detach_endpoint(&mut self, ifindex: u32);
    /// What other nodes say of tasks that are not there, from now on.
    fn nacks(&self) -> Result<mpsc::Receiver<AttachmentKey>, Self::Error>;
    /// How each uplink is attached: its name, and a word.
    fn modes(&self) -> Vec<(String, &'static str)>;
    /// Removes everything, going on past failures.
    fn uninstall(self) -> Result<(), Vec<Self::Error>>;
    /// Removes what there is under `pin_dir` without opening it first, going on past failures.
    fn clear_away(pin_dir: &Path) -> Result<(), Vec<Self::Error>>;
}

impl Plane for Dataplane {
    type Error = DataplaneError;

    fn open(config: DataplaneConfig) -> Result<Self, DataplaneError> {
        Self::open(config)
    }

    fn reattach(&mut self, config: DataplaneConfig) -> Result<(), DataplaneError> {
        self.reattach(config)
    }

    fn change(&mut self, table: &Table, touched: &Touched, local: &Local) -> Result<(), DataplaneError> {
        self.change(table, touched, local)
    }

    fn attach_endpoint(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        self.attach_endpoint(ifindex)
    }

    fn detach_endpoint(&mut self, ifindex: u32) {
        self.detach_endpoint(ifindex);
    }

    fn nacks(&self) -> Result<mpsc::Receiver<AttachmentKey>, DataplaneError> {
        self.nacks()
    }

    fn modes(&self) -> Vec<(String, &'static str)> {
        self.modes()
    }

    fn uninstall(self) -> Result<(), Vec<DataplaneError>> {
        self.uninstall()
    }

    fn clear_away(pin_dir: &Path) -> Result<(), Vec<DataplaneError>> {
        Self::clear_away(pin_dir)
    }
}
