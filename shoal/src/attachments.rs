//! Attachments, by the agent for the API: which of the API's failures is which of the agent's.

use control::docker::AttachError;
use mesh_agent::runtime::guest::GuestError;
use mesh_agent::{Agent, DetachError};
use mesh_api::attachment::{AttachRequest, Attachment};
use mesh_api::error::chain;
use mesh_api::session::AttachRefusedReason;

/// What is attached on this host.
pub(crate) fn list(agent: &Agent) -> Result<Vec<Attachment>, AttachError> {
    agent.attachments().map_err(|error| AttachError::Host(chain(&error)))
}

/// The attachment of an id, the beginning of one, or a name.
pub(crate) fn find(agent: &Agent, wanted: &str) -> Result<Attachment, AttachError> {
    agent.attachment(wanted).map_err(|error| detach_error(&error))
}

/// Attaches what runs on this host.
pub(crate) async fn attach(agent: &Agent, request: AttachRequest) -> Result<Attachment, AttachError> {
    agent.attach(request).await.map_err(|error| attach_error(&error))
}

/// Ends the attachment of an id, the beginning of one, or a name.
pub(crate) async fn detach(agent: &Agent, wanted: &str) -> Result<(), AttachError> {
    agent.detach(wanted).await.map_err(|error| detach_error(&error))
}

fn attach_error(error: &mesh_agent::AttachError) -> AttachError {
    use mesh_agent::AttachError as Error;
    let text = chain(error);
    match error {
        Error::NotMember | Error::NoManager(_) => AttachError::Unavailable(text),
        Error::Guest(GuestError::NoProcess(_) | GuestError::NoFile(_)) => AttachError::NotFound(text),
        Error::Guest(GuestError::NoNetns(_) | GuestError::Own { .. }) | Error::InterfaceName(_) => {
            AttachError::Invalid(text)
        }
        Error::InterfaceTaken { .. } => AttachError::Conflict(text),
        Error::Refused(refused) => match refused.reason {
            AttachRefusedReason::NotFound => AttachError::NotFound(text),
            AttachRefusedReason::Conflict => AttachError::Conflict(text),
            AttachRefusedReason::Invalid => AttachError::Invalid(text),
        },
        Error::Guest(GuestError::Look { .. }) | Error::Look { .. } | Error::Failed { .. } => {
            AttachError::Host(text)
        }
    }
}

fn detach_error(error: &DetachError) -> AttachError {
    let text = chain(error);
    match error {
        DetachError::NotFound(_) => AttachError::NotFound(text),
        DetachError::Ambiguous { .. } => AttachError::Conflict(text),
        DetachError::Files(_) | DetachError::Slow(_) => AttachError::Host(text),
    }
}
