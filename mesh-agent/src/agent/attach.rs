//! Attachments: what runs on the node without Shoal gets an endpoint on an attachable network.

use std::time::Duration;

use mesh_api::attachment::{AttachRequest, AttachTarget, Attachment};
use mesh_api::error::chain;
use mesh_api::id::TaskId;
use mesh_api::session::{AttachRefused, AttachmentSpec};
use mesh_api::table::{Table, TaskState};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Agent;
use crate::links::{LinkError, Links};
use crate::node::attach::{Attachments, Expected};
use crate::runtime::guest::{AttachmentFile, Guest, GuestError};
use crate::runtime::{RuntimeError, SHORT_ID_LEN};
use crate::session::{AttachCall, SessionState};

/// How long the managers may take to answer, and then the node to attach.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the cluster may take to know of it: a node that lags is not waited for any longer, here as elsewhere.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an attachment may take to be gone.
const DETACH_TIMEOUT: Duration = Duration::from_secs(10);
/// Interfaces that are tried where none is named: `eth0`, `eth1`…
const INTERFACES_MAX: usize = 100;
/// Longest name of an interface, bytes.
const INTERFACE_LEN_MAX: usize = 15;

/// Why something was not attached. Texts of what is wrong with the request name its field.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The host is in no cluster.
    #[error("This node is not part of a swarm: `docker swarm init` or `docker swarm join` make it one")]
    NotMember,
    /// The managers can't be asked.
    #[error("no manager can be asked: {0}. Try again once one is there")]
    NoManager(String),
    /// What is to be attached.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The interface's name can't be.
    #[error(
        "interface: '{0}' is no name that an interface can have: 1 to {INTERFACE_LEN_MAX} bytes without spaces, slashes and colons"
    )]
    InterfaceName(String),
    /// The interface is there already.
    #[error("interface: {target} has an interface {interface} already: choose another name")]
    InterfaceTaken {
        /// What is to be attached.
        target: AttachTarget,
        /// The interface.
        interface: String,
    },
    /// The managers refuse it.
    #[error(transparent)]
    Refused(#[from] AttachRefused),
    /// Its namespace can't be looked into.
    #[error("can't look into {target}")]
    Look {
        /// What is to be attached.
        target: AttachTarget,
        /// Why.
        source: LinkError,
    },
    /// The node failed to.
    #[error("{target} can't be attached: {why}")]
    Failed {
        /// What was to be attached.
        target: AttachTarget,
        /// Why.
        why: String,
    },
}

/// Why an attachment was not ended.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// There is none of that name.
    #[error("there is no attachment {0} on this node: `shoal attachments` shows those that there are")]
    NotFound(String),
    /// There are several.
    #[error("{name} is the name of several attachments: name one by its id, of {}", ids.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Which there are.
        ids: Vec<String>,
    },
    /// The files of attachments can't be read.
    #[error(transparent)]
    Files(#[from] RuntimeError),
    /// It goes on ending.
    #[error("the attachment {0} is not gone yet: `shoal attachments` shows it for as long as it is there")]
    Slow(TaskId),
}

impl Agent {
    /// Attaches what runs on the node to a network; returns once it has its interface, and the nodes that the managers hear
    /// from know its address and its names. It ends with what is attached, or by [`Agent::detach`].
    pub async fn attach(&self, request: AttachRequest) -> Result<Attachment, AttachError> {
        let AttachRequest { network, name, aliases, addr, target, interface } = request;
        let ends = self.with(|active| {
            let (calls, state) = (active.session.calls.clone(), active.session.state.borrow().clone());
            (active.node.attachments(), calls, state, active.session.settled.clone(), active.tables.clone())
        });
        let (attachments, calls, state, mut settled, mut tables) = ends.ok_or(AttachError::NotMember)?;
        match state {
            SessionState::Connected => {}
            SessionState::Disconnected(why) | SessionState::Refused(_, why) => {
                return Err(AttachError::NoManager(why));
            }
        }
        let guest = Guest::find(&target)?;
        let interface = choose_interface(&guest, interface).await?;
        let id = TaskId::random(&mut rand::rng());
        let name = name.unwrap_or_else(|| id.as_str().chars().take(SHORT_ID_LEN).collect());
        let (attached, is_attached) = oneshot::channel();
        let expected = Expected { guest, interface, name: name.clone(), aliases: aliases.clone(), attached };
        if !attachments.expect(&id, expected).await {
            let why = "the node is not up: the agent's log says why".to_owned();
            return Err(AttachError::Failed { target, why });
        }
        let (answer, answered) = oneshot::channel();
        let call =
            AttachCall { id: id.clone(), spec: AttachmentSpec { network, name, aliases, addr }, answer };
        let asked = async {
            calls.send(call).await.ok()?;
            answered.await.ok()
        };
        let refused = match timeout(ATTACH_TIMEOUT, asked).await {
            Ok(Some(Ok(()))) => None,
            Ok(Some(Err(refused))) => Some(refused.into()),
            Ok(None) => Some(AttachError::NoManager("the session ended before an answer came".to_owned())),
            Err(_) => Some(AttachError::NoManager("none answers".to_owned())),
        };
        if let Some(error) = refused {
            // What the managers make of it all the same is ended, or comes unexpected, and then is.
            attachments.unexpect(&id).await;
            end(&attachments, &id).await;
            return Err(error);
        }
        let failed = |why: String| AttachError::Failed { target: target.clone(), why };
        match timeout(ATTACH_TIMEOUT, is_attached).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(why))) => return Err(failed(why)),
            Ok(Err(_)) => return Err(failed("the node left its swarm, or is not up".to_owned())),
            Err(_) => {
                attachments.unexpect(&id).await;
                end(&attachments, &id).await;
                return Err(failed(format!("it took longer than {} s", ATTACH_TIMEOUT.as_secs())));
            }
        }
        let known = async {
            let runs =
                |table: &Table| table.tasks.get(&id).is_none_or(|task| task.observed >= TaskState::Running);
            let index = {
                let table = tables.wait_for(|table| table.as_deref().is_some_and(runs)).await.ok()?;
                table.as_ref().map_or(0, |table| table.index)
            };
            settled.wait_for(|settled| *settled >= index).await.ok().map(drop)
        };
        // It is attached; who does not know it yet learns it a moment later.
        let _ = timeout(SETTLE_TIMEOUT, known).await;
        let files = self.runtime.guests().list().map_err(|error| failed(chain(&error)))?;
        let file = files.into_iter().find(|file| file.attachment.id == id);
        file.map(|file| file.attachment).ok_or_else(|| failed("it has ended".to_owned()))
    }

    /// What is attached on this node, in the order of the ids.
    pub fn attachments(&self) -> Result<Vec<Attachment>, RuntimeError> {
        let files = self.runtime.guests().list()?;
        Ok(files.into_iter().map(|AttachmentFile { attachment, .. }| attachment).collect())
    }

    /// The attachment of this node with an id, the beginning of one, or a name.
    pub fn attachment(&self, wanted: &str) -> Result<Attachment, DetachError> {
        let all = self.attachments()?;
        let by = |test: &dyn Fn(&Attachment) -> bool| -> Vec<Attachment> {
            all.iter().filter(|attachment| test(attachment)).cloned().collect()
        };
        let ways = [
            by(&|attachment| attachment.id.as_str() == wanted),
            by(&|attachment| attachment.name.eq_ignore_ascii_case(wanted)),
            by(&|attachment| !wanted.is_empty() && attachment.id.as_str().starts_with(wanted)),
        ];
        match ways.into_iter().find(|found| !found.is_empty()).as_deref() {
            None => Err(DetachError::NotFound(wanted.to_owned())),
            Some([attachment]) => Ok(attachment.clone()),
            Some(several) => {
                let ids = several.iter().map(|attachment| attachment.id.to_string()).collect();
                Err(DetachError::Ambiguous { name: wanted.to_owned(), ids })
            }
        }
    }

    /// Ends an attachment, by its id, the beginning of one, or its name; returns once its interface is gone. The managers
    /// learn of it as soon as they can.
    pub async fn detach(&self, wanted: &str) -> Result<(), DetachError> {
        let id = self.attachment(wanted)?.id;
        let attachments = self.with(|active| active.node.attachments());
        let attachments = attachments.ok_or_else(|| DetachError::NotFound(wanted.to_owned()))?;
        if end(&attachments, &id).await { Ok(()) } else { Err(DetachError::Slow(id)) }
    }
}

/// Whether the attachment is gone in time.
async fn end(attachments: &Attachments, id: &TaskId) -> bool {
    timeout(DETACH_TIMEOUT, attachments.detach(id)).await.is_ok()
}

/// The interface that an attachment gets: as asked for, or the first that is not there.
async fn choose_interface(guest: &Guest, asked: Option<String>) -> Result<String, AttachError> {
    let look = |source| AttachError::Look { target: guest.target().clone(), source };
    if let Some(name) = asked.as_deref().filter(|name| !is_interface_name(name)) {
        return Err(AttachError::InterfaceName(name.to_owned()));
    }
    let inside = Links::open_in(&guest.netns()?).map_err(look)?;
    let Some(interface) = asked else {
        for number in 0..INTERFACES_MAX {
            let name = format!("eth{number}");
            if inside.index(&name).await.map_err(look)?.is_none() {
                return Ok(name);
            }
        }
        return Err(AttachError::InterfaceTaken {
            target: guest.target().clone(),
            interface: format!("eth0 to eth{}", INTERFACES_MAX - 1),
        });
    };
    match inside.index(&interface).await.map_err(look)? {
        None => Ok(interface),
        Some(_) => Err(AttachError::InterfaceTaken { target: guest.target().clone(), interface }),
    }
}

/// The kernel's rule (`dev_valid_name`), and no names of rows of interfaces, which have a `%`.
fn is_interface_name(name: &str) -> bool {
    let is_wrong = |byte: u8| matches!(byte, b'/' | b':' | b'%') || byte.is_ascii_whitespace() || byte == 0;
    (1..=INTERFACE_LEN_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.bytes().any(is_wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_interfaces_are_the_kernels() {
        for name in ["eth0", "a", "a-b.c_d", "exactly15bytes_"] {
            assert!(is_interface_name(name), "{name}");
        }
        for name in ["", ".", "..", "a b", "a/b", "a:b", "eth%d", "sixteen_bytes_16", "tab\t"] {
            assert!(!is_interface_name(name), "{name}");
        }
    }
}
