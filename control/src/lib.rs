//! The cluster, as a manager keeps it: the replicated state and the pure `apply` that is the only way to change it,
//! raft, which has the managers agree on its changes, the orchestrator and scheduler, the agents' sessions, the Docker API.
//!
//! This crate knows neither the dataplane nor how a task runs; agents do, and they meet in `mesh-api`.

pub mod apply;
pub mod backup;
pub mod clock;
pub mod cluster;
pub mod command;
pub mod docker;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod leader;
pub mod managers;
pub mod model;
pub mod orchestrator;
mod patient;
pub mod pki;
pub mod raft;
pub mod refusal;
pub mod session;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
