//! The programs of a live dataplane: which hangs where, found by its pinned link.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use aya::maps::MapInfo;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{ProgramFd, ProgramInfo, loaded_programs};
use nix::net::if_::{if_indextoname, if_nametoindex};
use serde::Serialize;

use super::drops::as_ms;
use crate::dataplane::attach::{TcHook, xdp_pin_name};
use crate::dataplane::pins::version_folder;
use crate::dataplane::{cgroup, object};

/// The folder of pinned links in the agent's folder.
const LINKS: &str = "links";

/// An attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hook {
    /// The program's name.
    pub program: String,
    /// The interface; `None`: the root of cgroup v2, or an interface that is gone.
    pub interface: Option<String>,
    /// Its index; 0: the root of cgroup v2.
    pub ifindex: u32,
    /// `tcx`, `xdp-native`, `xdp-generic`, `cgroup`.
    pub by: &'static str,
    /// The program's id; `None` if nothing is attached: the pin says so, but the link is gone.
    pub program_id: Option<u32>,
    /// When that program was loaded, ms since the epoch in JSON.
    #[serde(serialize_with = "maybe_ms")]
    pub loaded: Option<SystemTime>,
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn maybe_ms<S: serde::Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => as_ms(time, serializer),
        None => serializer.serialize_none(),
    }
}

/// All attachments under the agent's folder, by program and interface. Where the kernel has no TCX, TC programs hang on
/// filters and are not among them.
pub fn hooks(pin_dir: &Path) -> Vec<Hook> {
    let entries = fs::read_dir(pin_dir.join(LINKS)).into_iter().flatten().flatten();
    let mut hooks: Vec<Hook> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let (pin, ifindex) = name.to_str()?.rsplit_once('-')?;
            Some(hook(&entry.path(), pin, ifindex.parse().ok()?))
        })
        .collect();
    hooks.sort_by(|a, b| (&a.program, a.ifindex).cmp(&(&b.program, b.ifindex)));
    hooks
}

fn hook(path: &Path, pin: &str, ifindex: u32) -> Hook {
    use aya::programs::xdp::XdpMode;
    let (program, by) = match pin {
        _ if pin == xdp_pin_name(XdpMode::Driver) => (object::UPLINK_XDP, "xdp-native"),
        _ if pin == xdp_pin_name(XdpMode::Skb) => (object::UPLINK_XDP, "xdp-generic"),
        _ if cgroup::PROGRAMS.contains(&pin) => (pin, "cgroup"),
        _ => (pin, "tcx"),
    };
    let interface = if_indextoname(ifindex).ok().and_then(|name| name.into_string().ok());
    let program_id = linked_program(path);
    let loaded = program_id.and_then(info_of).and_then(|info| info.loaded_at());
    Hook { program: program.to_owned(), interface, ifindex, by, program_id, loaded }
}

/// The program in a pinned link, by its id; `None` where the link is no more attached.
fn linked_program(pin: &Path) -> Option<u32> {
    let link = FdLink::from(PinnedLink::from_pin(pin).ok()?);
    link.info().ok().map(|info| info.program_id()).filter(|id| *id != 0)
}

fn info_of(id: u32) -> Option<ProgramInfo> {
    loaded_programs().filter_map(Result::ok).find(|info| info.id() == id)
}

/// A program that is attached to an interface, ready to be run.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) id: u32,
    pub(super) fd: ProgramFd,
}

/// The program of that name on an interface; where TC programs have no links, the one of that name that was loaded last and
/// uses these maps.
pub(super) fn attached(pin_dir: &Path, program: &str, ifindex: u32) -> Option<Attached> {
    let is_it = |hook: &Hook| hook.program == program && hook.ifindex == ifindex;
    let linked = hooks(pin_dir).into_iter().filter(is_it).find_map(|hook| hook.program_id);
    let info = match linked {
        Some(id) => info_of(id)?,
        None if program != object::UPLINK_XDP && TcHook::of_this_kernel() == TcHook::Classic => {
            last_loaded(pin_dir, program)?
        }
        None => return None,
    };
    Some(Attached { id: info.id(), fd: info.fd().ok()? })
}

fn last_loaded(pin_dir: &Path, program: &str) -> Option<ProgramInfo> {
    let map = MapInfo::from_pin(pin_dir.join(version_folder()).join("shoal_config")).ok()?.id();
    let uses_it = |info: &ProgramInfo| info.map_ids().ok().flatten().is_some_and(|ids| ids.contains(&map));
    let named = loaded_programs().filter_map(Result::ok).filter(|info| info.name_as_str() == Some(program));
    named.filter(uses_it).max_by_key(ProgramInfo::loaded_at)
}

/// The uplinks: interfaces with a program on their ingress. Empty where TC programs have no links.
pub(super) fn uplinks(pin_dir: &Path) -> Vec<(u32, String)> {
    let on_uplinks = hooks(pin_dir).into_iter().filter(|hook| hook.program == object::UPLINK_INGRESS);
    on_uplinks.filter_map(|hook| Some((hook.ifindex, hook.interface?))).collect()
}

/// The index of an interface.
pub(super) fn index_of(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}
