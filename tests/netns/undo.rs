//! What a case changed of the lab, to be changed back however the case ends.

use std::process::Command;

use crate::lab;

/// A command that runs when this is dropped.
#[must_use = "it is undone when this is dropped"]
pub(crate) struct Undo(Command);

impl Undo {
    pub(crate) fn new(command: Command) -> Self {
        Self(command)
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Err(error) = lab::output(&mut self.0) {
            println!("    not undone: {error:#}");
        }
    }
}
