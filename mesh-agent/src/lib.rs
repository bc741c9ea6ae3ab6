//! A node of a Shoal cluster: its dataplane, links, names, tasks, and its session with the managers.
//!
//! [`Agent`] is the whole of it for the `shoal` binary; [`runtime::task_init`] and [`runtime::whoami`] are what that
//! binary runs inside tasks. What the cluster should do is decided in `control`, which this crate does not know: the
//! two meet in `mesh-api`.

mod agent;
mod claim;
pub mod config;
pub mod dataplane;
pub mod dns;
mod encryption;
mod facts;
mod files;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod health;
pub mod links;
mod node;
pub mod runtime;
mod session;
#[cfg(feature = "simulated")]
pub mod simulated;
pub mod sys;
mod uninstall;

pub use agent::{Agent, AttachError, DetachError, JoinError, JoinRequest, LeaveError, Sealing, StartError};
pub use claim::ClaimError;
pub use config::{Config, XdpMode};
pub use encryption::{EncryptionError, EncryptionKind, KEY_ROTATION, KeyStatus, encryption_status};
pub use health::Health;
pub use node::NodeError;
pub use session::{ConnectError, Membership, SessionState};
pub use uninstall::{Item, Uninstalled, uninstall};
