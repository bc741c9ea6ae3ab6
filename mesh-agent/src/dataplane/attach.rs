//! Attaching programs so that they outlive the agent, and replacing them without a gap.
//!
//! Where the kernel has TCX (6.6), and for XDP, an attachment is a link pinned as `links/<program>-<ifindex>`; a later
//! agent swaps the program in it atomically. Below 6.6, TC programs hang on a `clsact` qdisc under a fixed priority
//! and handle, by which they are found and replaced.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::xdp::{XdpLink, XdpMode as AyaXdpMode};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, Xdp};
use aya::util::KernelVersion;
use nix::net::if_::if_indextoname;

use super::error::DataplaneError;
use crate::sys::link;

/// Priority and handle of TC programs on a `clsact` qdisc.
const CLASSIC_PRIORITY: u16 = 50;
const CLASSIC_HANDLE: TcHandle = TcHandle::new(0, 1);

/// How long an interface is waited for that another link has just left: the kernel lets go of one a moment after its
/// last pin.
const RELEASE: Duration = Duration::from_millis(500);

/// How TC programs are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcHook {
    /// By TCX links, kernel 6.6 and later.
    Tcx,
    /// By filters on a `clsact` qdisc.
    Classic,
}

impl TcHook {
    /// The best that the running kernel has.
    pub fn of_this_kernel() -> Self {
        match KernelVersion::current() {
            Ok(version) if version < KernelVersion::new(6, 6, 0) => Self::Classic,
            _ => Self::Tcx,
        }
    }
}

/// The folder of pinned links.
#[derive(Debug)]
pub struct Links {
    folder: PathBuf,
    hook: TcHook,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Links {
    /// Uses `folder`, and makes it if need be.
    pub fn open(folder: PathBuf, hook: TcHook) -> Result<Self, DataplaneError> {
        fs::create_dir_all(&folder)
            .map_err(|source| DataplaneError::PinFolder { path: folder.clone(), source })?;
        Ok(Self { folder, hook })
    }

    /// Attaches a TC program to the ingress of an interface, or replaces what a former agent attached.
    pub fn attach_tc(
        &self,
        name: &'static str,
        program: &mut SchedClassifier,
        ifindex: u32,
    ) -> Result<(), DataplaneError> {
        let attached = match self.hook {
            TcHook::Tcx => attach_tcx(&self.pin(name, ifindex), program, ifindex),
            TcHook::Classic => attach_classic(program, ifindex),
        };
        attached.map_err(|source| DataplaneError::Attach { name, ifindex, hint: "", source })
    }

    /// Attaches an XDP program to an interface, or replaces what a former agent attached in the same mode.
    pub fn attach_xdp(
        &self,
        name: &'static str,
        program: &mut Xdp,
        ifindex: u32,
        mode: AyaXdpMode,
    ) -> Result<(), DataplaneError> {
        let pin = self.pin(xdp_pin_name(mode), ifindex);
        self.attach_xdp_at(&pin, program, ifindex, mode).map_err(|source| {
            let hint = ": its driver may lack native XDP, or hold another program; try --xdp off";
            DataplaneError::Attach { name, ifindex, hint, source }
        })
    }

    fn attach_xdp_at(
        &self,
        pin: &Path,
        program: &mut Xdp,
        ifindex: u32,
        mode: AyaXdpMode,
    ) -> Result<(), BoxError> {
        let replaced = pinned(pin)
            .and_then(|link| XdpLink::try_from(link).ok())
            .and_then(|link| program.attach_to_link(link).ok());
        if let Some(id) = replaced {
            drop(program.take_link(id)?);
            return Ok(());
        }
        let mut deadline = Instant::now();
        for other in [AyaXdpMode::Driver, AyaXdpMode::Skb].map(|mode| self.pin(xdp_pin_name(mode), ifindex)) {
            if other.exists() {
                unpin(&other)?;
                deadline = Instant::now() + RELEASE;
            }
        }
        let id = loop {
            match program.attach_to_if_index(ifindex, mode) {
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
                attached => break attached?,
            }
        };
        // aya falls back to netlink where the kernel refuses a link; such an attachment would end with the agent.
        FdLink::try_from(program.take_link(id)?)?.pin(pin)?;
        Ok(())
    }

    /// How XDP is attached to an interface, if it is.
    pub fn xdp_mode(&self, ifindex: u32) -> Option<AyaXdpMode> {
        let modes = [AyaXdpMode::Driver, AyaXdpMode::Skb];
        modes.into_iter().find(|mode| self.pin(xdp_pin_name(*mode), ifindex).exists())
    }

    /// Whether anything is attached.
    pub fn is_empty(&self) -> bool {
        fs::read_dir(&self.folder).map_or(true, |mut entries| entries.next().is_none())
    }

    /// Detaches a TC program from an interface; nothing if it isn't attached.
    pub fn detach_tc(&self, name: &'static str, ifindex: u32) -> io::Result<()> {
        match self.hook {
            TcHook::Tcx => unpin(&self.pin(name, ifindex)),
            // The filter goes with its interface; that of an interface that stays is removed by name.
            TcHook::Classic => match interface_name(ifindex) {
                Ok(interface) => match tc::qdisc_detach_program(&interface, TcAttachType::Ingress, name) {
                    Ok(()) => Ok(()),
                    Err(error) => Err(io::Error::other(error)),
                },
                Err(_) => Ok(()),
            },
        }
    }

    /// Removes the pins of attachments that `wanted` (by program and interface) doesn't name.
    pub fn retain(&self, wanted: impl Fn(&str, u32) -> bool) -> Vec<io::Error> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) => return vec![error],
        };
        let mut errors = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let parsed = name.to_str().and_then(|name| {
                let (program, ifindex) = name.rsplit_once('-')?;
                Some((program, ifindex.parse().ok()?))
            });
            if !parsed.is_some_and(|(program, ifindex)| wanted(program, ifindex)) {
                errors.extend(unpin(&entry.path()).err());
            }
        }
        errors
    }

    /// Where an attachment is pinned; bpffs refuses names with dots.
    fn pin(&self, program: &str, ifindex: u32) -> PathBuf {
        self.folder.join(format!("{program}-{ifindex}"))
    }
}

/// What an XDP attachment's pin is called: one of another mode is another attachment.
pub fn xdp_pin_name(mode: AyaXdpMode) -> &'static str {
    match mode {
        AyaXdpMode::Skb => "uplink_xdp_generic",
        _ => "uplink_xdp_native",
    }
}

fn attach_tcx(pin: &Path, program: &mut SchedClassifier, ifindex: u32) -> Result<(), BoxError> {
    let replaced = pinned(pin)
        .and_then(|link| SchedClassifierLink::try_from(link).ok())
        .and_then(|link| program.attach_to_link(link).ok());
    if let Some(id) = replaced {
        // The pin holds the link; this handle of it may go.
        drop(program.take_link(id)?);
        return Ok(());
    }
    unpin(pin)?;
    let interface = interface_name(ifindex)?;
    let order = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(&interface, TcAttachType::Ingress, order)?;
    FdLink::try_from(program.take_link(id)?)?.pin(pin)?;
    Ok(())
}

fn attach_classic(program: &mut SchedClassifier, ifindex: u32) -> Result<(), BoxError> {
    let interface = interface_name(ifindex)?;
    // It may be there: ours from before, or somebody else's.
    let _ = tc::qdisc_add_clsact(&interface);
    let attached = SchedClassifierLink::attached(
        &interface,
        TcAttachType::Ingress,
        CLASSIC_PRIORITY,
        CLASSIC_HANDLE,
        None,
    )?;
    let id = match program.attach_to_link(attached) {
        Ok(id) => id,
        Err(_) => program.attach_with_options(&interface, TcAttachType::Ingress, classic_options())?,
    };
    // A netlink attachment ends with its handle; this one is to stay, and is found by priority and handle.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes programs from every interface that they hang on by filters.
pub fn detach_classic_everywhere(names: &[&str]) {
    let interfaces = nix::net::if_::if_nameindex();
    for interface in interfaces.iter().flat_map(|interfaces| interfaces.iter()) {
        let interface = interface.name().to_string_lossy();
        for name in names {
            // Most have no such filter, which is an error.
            let _ = tc::qdisc_detach_program(&interface, TcAttachType::Ingress, name);
        }
    }
}

fn classic_options() -> TcAttachOptions {
    TcAttachOptions::Netlink(NlOptions { priority: CLASSIC_PRIORITY, handle: CLASSIC_HANDLE, classid: None })
}

fn pinned(pin: &Path) -> Option<FdLink> {
    PinnedLink::from_pin(pin).ok().map(FdLink::from)
}

/// Detaches at once what is pinned, and removes the pin.
fn unpin(pin: &Path) -> io::Result<()> {
    // The interface may be gone, or the kind of link not to be detached but by its last descriptor.
    let _ = link::detach_pinned(pin);
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn interface_name(ifindex: u32) -> Result<String, ProgramError> {
    let name = if_indextoname(ifindex).ok().and_then(|name| name.into_string().ok());
    name.ok_or_else(|| ProgramError::UnknownInterface { name: format!("index {ifindex}") })
}
