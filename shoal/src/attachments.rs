//! Attachments between the API's words and the agent's.

use control::docker::{AttachError, AttachRequest, AttachTarget, Attachment};
use mesh_agent::runtime::guest::{self, GuestError, Target};
use mesh_agent::{Agent, DetachError};
use mesh_api::error::chain;
use mesh_api::session::AttachRefusedReason;

/// What is attached on this host.
pub(crate) fn list(agent: &Agent) -> Result<Vec<Attachment>, AttachError> {
    let found = agent.attachments().map_err(|error| AttachError::Host(chain(&error)))?;
    Ok(found.into_iter().map(shown).collect())
}

/// The attachment of an id, the beginning of one, or a name.
pub(crate) fn find(agent: &Agent, wanted: &str) -> Result<Attachment, AttachError> {
    agent.attachment(wanted).map(shown).map_err(|error| detach_error(&error))
}

/// Attaches what runs on this host.
pub(crate) async fn attach(agent: &Agent, request: AttachRequest) -> Result<Attachment, AttachError> {
    let AttachRequest { network, name, aliases, addr, target, interface } = request;
    let target = match target {
        AttachTarget::Process(pid) => Target::Process(pid),
        AttachTarget::Netns(path) => Target::Netns(path),
    };
    let request = mesh_agent::AttachRequest { network, name, aliases, addr, target, interface };
    agent.attach(request).await.map(shown).map_err(|error| attach_error(&error))
}

/// Ends the attachment of an id, the beginning of one, or a name.
pub(crate) async fn detach(agent: &Agent, wanted: &str) -> Result<(), AttachError> {
    agent.detach(wanted).await.map_err(|error| detach_error(&error))
}

fn shown(attachment: guest::Attachment) -> Attachment {
    let guest::Attachment {
        id,
        target,
        network,
        network_name,
        name,
        aliases,
        interface,
        addresses,
        gateways,
        name_server,
        mac,
        mtu,
        since_ns,
    } = attachment;
    let target = match target {
        Target::Process(pid) => AttachTarget::Process(pid),
        Target::Netns(path) => AttachTarget::Netns(path),
    };
    Attachment {
        id,
        network,
        network_name,
        name,
        aliases,
        target,
        interface,
        addresses,
        gateways,
        name_server,
        mac,
        mtu,
        since_ns,
    }
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
