//! Whether the host is a manager, and how one that was started locked becomes one.

use control::docker::SwarmError;
use mesh_agent::{Agent, Sealing};
use mesh_api::error::chain;
use mesh_api::seal::UnlockKey;

use super::{Host, Stopping, locked, manager_error};
use crate::manager::{self, Manager};

/// The host's part in deciding.
pub(crate) enum Part {
    /// None.
    None,
    /// It has a manager's state, which is to be unlocked.
    Locked,
    /// It is a manager.
    Manager(Manager),
}

impl Part {
    pub(super) fn manager(&self) -> Option<&Manager> {
        match self {
            Self::Manager(manager) => Some(manager),
            Self::None | Self::Locked => None,
        }
    }

    /// Leaves none behind, where it was one.
    pub(super) fn take_manager(&mut self) -> Option<Manager> {
        match std::mem::replace(self, Self::None) {
            Self::Manager(manager) => Some(manager),
            other => {
                *self = other;
                None
            }
        }
    }
}

impl Host {
    /// Takes up the manager that was started locked, and lets the node ask for its session.
    pub(super) async fn unlock(&self, key: UnlockKey) -> Result<(), SwarmError> {
        let _changing = self.changing.lock().await;
        let agent = self.agent().ok_or(Stopping)?;
        if !matches!(*locked(&self.part), Part::Locked) {
            return Err(SwarmError::NotLocked);
        }
        let seal = match manager::sealing(&self.state_dir, Some(&key)).map_err(manager_error)? {
            Sealing::With(seal) => seal,
            Sealing::None | Sealing::Locked => return Err(SwarmError::InvalidUnlockKey),
        };
        let host = |error| SwarmError::Host(chain(&error));
        let credential = Agent::credential(&self.state_dir, Some(&seal)).map_err(host)?;
        agent.shared().set(credential);
        let opened = Manager::open(&self.state_dir, agent.shared().clone(), Some(key)).await;
        let opened = opened.map_err(manager_error).and_then(|opened| opened.ok_or(SwarmError::NotLocked));
        let manager = opened.inspect_err(|_| agent.shared().set(None))?;
        agent.set_manager(Some(manager.description()));
        if let Err(error) = agent.unlock(manager.seal().unwrap_or(seal)) {
            // It stays locked, to be unlocked again.
            agent.set_manager(None);
            agent.shared().set(None);
            manager.stop().await;
            return Err(host(error));
        }
        *locked(&self.part) = Part::Manager(manager);
        tracing::info!("the manager is unlocked");
        Ok(())
    }
}

/// Has what seals the manager's state seal the node's key as well. One that it can't be told is tried again.
pub(super) fn follow_seal(agent: &Agent, manager: &Manager) {
    if let Err(error) = agent.set_seal(manager.seal()) {
        tracing::error!(error = chain(&error), "the node's key can't be sealed anew");
    }
}
