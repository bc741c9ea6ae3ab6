//! Attachments in the loop's hands: what runs on the node without Shoal gets a link as a task does, and is watched.
//!
//! The node asks the managers for each, and expects it in the table from before that: one that comes unexpected is of an
//! earlier run of the agent, and ended.

use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::attachment::Attachment;
use mesh_api::error::chain;
use mesh_api::id::TaskId;
use mesh_api::table::TaskState;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use super::assign::{Wiring, wire};
use super::driver::{BringUpError, Drivers, End, Event};
use super::plan::Phase;
use super::plane::Plane;
use super::setup::NodeError;
use super::tasks::LocalTask;
use super::{Command, Worker, status};
use crate::dataplane::LocalEndpoint;
use crate::links::{LinkError, TaskAddress, mac};
use crate::runtime::guest::{AttachmentFile, Guest};
use crate::runtime::layout::{EndpointFile, Exit, now_ns};
use crate::sys::netns::Netns;
use crate::sys::process;

/// Where a task's links lead.
#[derive(Debug, Clone)]
pub(super) enum Inside {
    /// Into the namespace of a task's process, as `eth0`, `eth1`…
    Process(u32),
    /// Into that of what is attached, as the interface of this name.
    Guest(Arc<Guest>, String),
}

impl Inside {
    pub(super) fn netns(&self) -> Result<Netns, BringUpError> {
        match self {
            Self::Process(pid) => {
                Ok(Netns::of_pid(*pid).map_err(|source| LinkError::Netns { pid: *pid, source })?)
            }
            Self::Guest(guest, _) => Ok(guest.netns()?),
        }
    }

    /// The one interface of what is attached.
    pub(super) fn interface(&self) -> Option<&str> {
        match self {
            Self::Process(_) => None,
            Self::Guest(_, interface) => Some(interface),
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::Process(pid) => Some(*pid),
            Self::Guest(guest, _) => guest.pid(),
        }
    }
}

/// What an attachment that is to come in the table is of.
#[derive(Debug)]
pub(crate) struct Expected {
    pub(crate) guest: Guest,
    /// The interface that it is to get.
    pub(crate) interface: String,
    pub(crate) name: String,
    pub(crate) aliases: Vec<String>,
    /// Told once it is attached, or why it is not.
    pub(crate) attached: oneshot::Sender<Result<(), String>>,
}

/// Who waits for a task: to be attached, and to have ended.
#[derive(Debug, Default)]
pub(super) struct Callers {
    attached: Option<oneshot::Sender<Result<(), String>>>,
    ended: Vec<oneshot::Sender<()>>,
}

impl Callers {
    /// Tells that it is attached. Who has gone away meanwhile need not know.
    pub(super) fn attached(&mut self) {
        if let Some(attached) = self.attached.take() {
            let _ = attached.send(Ok(()));
        }
    }

    /// Tells that it has ended.
    pub(super) fn ended(self, end: &End) {
        let Self { attached, ended } = self;
        if let Some(attached) = attached {
            let why = match end {
                End::NotStarted { err, .. } => err.clone(),
                End::Exited { .. } => "it ended before it was attached".to_owned(),
            };
            let _ = attached.send(Err(why));
        }
        for ended in ended {
            let _ = ended.send(());
        }
    }
}

/// Where the node's loop is told of attachments. What it does not answer to, it does not live to do.
#[derive(Debug, Clone)]
pub(crate) struct Attachments(pub(super) mpsc::Sender<Command>);

impl Attachments {
    /// Has the loop expect an attachment in the table; false if there is no loop.
    pub(crate) async fn expect(&self, id: &TaskId, expected: Expected) -> bool {
        let (done, noted) = oneshot::channel();
        let _ = self.0.send(Command::Expect(id.clone(), Box::new(expected), done)).await;
        noted.await.is_ok()
    }

    /// Has the loop expect it no longer.
    pub(crate) async fn unexpect(&self, id: &TaskId) {
        let _ = self.0.send(Command::Unexpect(id.clone())).await;
    }

    /// Ends an attachment, and waits until it is gone.
    pub(crate) async fn detach(&self, id: &TaskId) {
        let (done, ended) = oneshot::channel();
        let _ = self.0.send(Command::Detach(id.clone(), done)).await;
        let _ = ended.await;
    }
}

impl<P: Plane> Worker<P> {
    /// Attaches what is expected under this id.
    pub(super) fn start_attachment(&mut self, id: &TaskId) {
        let Some(expected) = self.expected.remove(id) else {
            let err = "the agent was restarted before it was attached".to_owned();
            return self.refuse(id, err, None);
        };
        let Expected { guest, interface, name, aliases, attached } = expected;
        let plan = self.setup.link_plan();
        let wired = self.with_table(|table| {
            let record = table.tasks.get(id)?;
            let network = table.networks.get(&record.endpoints.first()?.network)?.name.clone();
            Some((wire(table, record, plan, Some(&interface)), network))
        });
        let Some((wiring, network_name)) = wired.flatten() else {
            let err = "the managers sent no network of the attachment".to_owned();
            return self.refuse(id, err, Some(attached));
        };
        let alias = self.aliases.take();
        let file = match (&wiring, alias) {
            (Err(error), _) => Err(error.to_string()),
            (_, None) => Err("this node has no node-local address left for the attachment".to_owned()),
            (Ok(wiring), Some(alias)) => {
                let attachment = attachment(id, &guest, wiring, name, aliases, network_name);
                remember(attachment, &guest, wiring, alias).ok_or_else(|| "/proc can't be read".to_owned())
            }
        };
        let (wiring, file) = match (wiring, file) {
            (Ok(wiring), Ok(file)) => (wiring, file),
            (_, file) => {
                if let Some(alias) = alias {
                    self.aliases.release(alias);
                }
                return self.refuse(id, file.err().unwrap_or_default(), Some(attached));
            }
        };
        let (sender, stop) = watch::channel(false);
        let mut task = LocalTask::new(Phase::Starting, sender);
        task.wire(&wiring);
        task.aliases.push(file.endpoint.alias);
        task.callers.attached = Some(attached);
        self.tasks.insert(id.clone(), task);
        self.report(status(id, TaskState::Accepted, "accepted", String::new()));
        tokio::spawn(self.drivers.clone().attach(file, wiring, Arc::new(guest), stop));
    }

    fn refuse(&mut self, id: &TaskId, err: String, attached: Option<oneshot::Sender<Result<(), String>>>) {
        self.tasks.insert(id.clone(), LocalTask::ended());
        if let Some(attached) = attached {
            let _ = attached.send(Err(err.clone()));
        }
        self.report(status(id, TaskState::Failed, "preparing", err));
    }

    /// Ends an attachment; `done` hears of it, at once if there is none.
    pub(super) fn detach(&mut self, id: &TaskId, done: oneshot::Sender<()>) {
        if let Some(task) = self.tasks.get_mut(id).filter(|task| !task.has_ended()) {
            task.callers.ended.push(done);
            self.stop(id);
        }
    }

    /// Removes an attachment's file; of a task, there is none.
    pub(super) fn forget_attachment(&self, id: &TaskId) {
        if let Err(error) = self.runtime.guests().remove(id) {
            warn!(task = %id, error = &error as &dyn std::error::Error, "an attachment's file is left behind");
        }
    }

    /// Takes on what an earlier run of the agent attached, and clears away what is gone.
    pub(super) async fn adopt_attachments(&mut self) -> Result<(), NodeError> {
        for file in self.runtime.guests().list()? {
            let id = file.attachment.id.clone();
            let EndpointFile { network, addr, alias, link } = file.endpoint.clone();
            let Some(guest) = file.find() else {
                let exit = Exit { code: 0, since_ns: now_ns(), err: String::new() };
                self.tasks.insert(id.clone(), LocalTask::ended());
                self.forget_attachment(&id);
                self.report_end(&id, End::Exited { exit, told: false });
                continue;
            };
            info!(task = %id, target = %guest.target(), "found attached");
            self.aliases.adopt(alias);
            let (sender, stop) = watch::channel(false);
            let mut task = LocalTask::new(Phase::Running, sender);
            let guest = Arc::new(guest);
            let interface = file.attachment.interface.clone();
            task.inside = Some(Inside::Guest(Arc::clone(&guest), interface.clone()));
            task.aliases.push(alias);
            let ifindex = self.setup.links.index(&link).await?;
            if let Some(ifindex) = ifindex {
                task.attached.push(ifindex);
                task.endpoints.push(LocalEndpoint { task: id.clone(), network, addr, ifindex, alias });
            }
            self.tasks.insert(id.clone(), task);
            tokio::spawn(self.drivers.clone().watch_guest(file.attachment, guest, stop));
            if ifindex.is_none() {
                self.cut_off(&id);
            }
        }
        Ok(())
    }
}

/// What the attachment comes to.
fn attachment(
    id: &TaskId,
    guest: &Guest,
    wiring: &Wiring,
    name: String,
    aliases: Vec<String>,
    network_name: String,
) -> Option<Attachment> {
    let Wiring { links, network, name_server } = wiring;
    let (network_id, link) = links.first()?;
    let net = |TaskAddress { addr, prefix, .. }: &TaskAddress| IpNet::new(*addr, *prefix).ok();
    Some(Attachment {
        id: id.clone(),
        target: guest.target().clone(),
        network: network_id.clone(),
        network_name,
        name,
        aliases,
        interface: link.task_name.clone(),
        addresses: network.addresses.iter().filter_map(net).collect(),
        gateways: network.default_routes.iter().map(|route| route.gateway).collect(),
        name_server: (*name_server)?,
        mac: mac(link.addr),
        mtu: link.mtu,
        since_ns: now_ns(),
    })
}

/// What the agent's next run is to know.
fn remember(
    attachment: Option<Attachment>,
    guest: &Guest,
    wiring: &Wiring,
    alias: Ipv4Addr,
) -> Option<AttachmentFile> {
    let (network, link) = wiring.links.first()?;
    Some(AttachmentFile {
        attachment: attachment?,
        boot_id: process::boot_id().ok()?,
        identity: guest.identity(),
        endpoint: EndpointFile {
            network: network.clone(),
            addr: link.addr,
            alias,
            link: link.host_name.clone(),
        },
    })
}

impl Drivers {
    /// Attaches what is there, and then watches it.
    pub(super) async fn attach(
        self,
        file: AttachmentFile,
        wiring: Wiring,
        guest: Arc<Guest>,
        stop: watch::Receiver<bool>,
    ) {
        match self.connect_guest(&file, &wiring, &guest).await {
            Ok(()) => self.watch_guest(file.attachment, guest, stop).await,
            // The loop is gone; the link goes with the agent's next run.
            Err(BringUpError::Agent) => {}
            Err(error) => {
                let (state, err) = (TaskState::Failed, chain(&error));
                self.end(file.attachment.id, End::NotStarted { state, err, exit_code: None }).await;
            }
        }
    }

    async fn connect_guest(
        &self,
        file: &AttachmentFile,
        wiring: &Wiring,
        guest: &Guest,
    ) -> Result<(), BringUpError> {
        let id = &file.attachment.id;
        self.progress(id, TaskState::Preparing, "preparing").await?;
        self.connect(id, wiring, &[file.endpoint.alias], &guest.netns()?).await?;
        // Last: what is remembered is whole.
        Ok(self.runtime.guests().save(file)?)
    }

    /// Watches what is attached until its end, or until it is to be detached.
    pub(super) async fn watch_guest(
        self,
        attachment: Attachment,
        guest: Arc<Guest>,
        mut stop: watch::Receiver<bool>,
    ) {
        let Attachment { id: task, interface, since_ns, .. } = attachment;
        let inside = Inside::Guest(Arc::clone(&guest), interface);
        if self.events.send(Event::Running { task: task.clone(), inside, since_ns }).await.is_err() {
            return;
        }
        let told = async { stop.wait_for(|stop| *stop).await.is_ok() };
        let told = tokio::select! {
            biased;
            () = guest.ended() => false,
            told = told => {
                // Without word, the agent stops, and what is attached stays so.
                if !told {
                    return;
                }
                // A namespace takes its links with it, which is noticed first.
                !guest.has_ended()
            }
        };
        let exit = Exit { code: 0, since_ns: now_ns(), err: String::new() };
        self.end(task, End::Exited { exit, told }).await;
    }
}
