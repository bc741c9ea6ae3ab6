//! What the cluster and the host refuse, as answers of the API.

use mesh_api::error::chain;

use super::error::ApiError;
use super::local::SwarmError;
use crate::cluster::ProposeError;
use crate::refusal::{Code, Refusal};

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal.code() {
            Code::InvalidArgument | Code::FailedPrecondition => Self::invalid(message),
            Code::NotFound => Self::not_found(message),
            Code::AlreadyExists => Self::conflict(message),
            Code::Unknown => Self::internal(message),
            Code::Unimplemented => Self::unsupported(message),
        }
    }
}

impl From<ProposeError> for ApiError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Refused(refusal) => refusal.into(),
            ProposeError::Storage(_) => Self::internal(chain(&error)),
            ProposeError::NoLeader | ProposeError::Stopped => Self::unavailable(error.to_string()),
        }
    }
}

impl From<SwarmError> for ApiError {
    fn from(error: SwarmError) -> Self {
        let message = error.to_string();
        match error {
            SwarmError::AlreadyInSwarm
            | SwarmError::NotInSwarm
            | SwarmError::ManagerLeaves(_)
            | SwarmError::NotManager
            | SwarmError::Locked
            | SwarmError::LockedLeaves
            | SwarmError::Unreachable { .. } => Self::unavailable(message),
            SwarmError::InvalidToken(_) | SwarmError::Refused { .. } | SwarmError::Listen { .. } => {
                Self::invalid(message)
            }
            SwarmError::NotLocked => Self::conflict(message),
            SwarmError::InvalidUnlockKey => Self::unauthorized(message),
            SwarmError::Host(_) => Self::internal(message),
        }
    }
}
