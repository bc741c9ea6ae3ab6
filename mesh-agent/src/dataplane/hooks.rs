//! Which program hangs where, and how XDP runs on each uplink.

use aya::programs::xdp::XdpMode as AyaXdpMode;

use super::attach::{Links, xdp_pin_name};
use super::error::DataplaneError;
use super::object::{self, Programs};
use super::{DataplaneConfig, Uplink, cgroup, pins};
use crate::config::XdpMode;

/// How an uplink without XDP is attached.
const TC: &str = "tc";

/// Attaches to everything but tasks' interfaces, and drops attachments to what is gone. The node's own processes are
/// served where that is possible.
pub(super) fn attach_all(
    config: &DataplaneConfig,
    programs: &mut Programs,
    links: &Links,
) -> Result<(), DataplaneError> {
    let mut xdp_pins = Vec::new();
    for uplink in &config.uplinks {
        let mode = attach_xdp(config.xdp, uplink, programs, links)?;
        xdp_pins.extend(mode.map(|mode| (xdp_pin_name(mode), uplink.ifindex)));
    }
    let fixed = [(object::FROM_OVERLAY, config.vxlan_ifindex), (object::FROM_HOST, config.host_peer_ifindex)];
    let uplinks = config.uplinks.iter().map(|uplink| (object::UPLINK_INGRESS, uplink.ifindex));
    let wanted: Vec<_> = fixed.into_iter().chain(uplinks).collect();
    for (name, ifindex) in &wanted {
        links.attach_tc(name, programs.classifier(name)?, *ifindex)?;
    }
    cgroup::serve(programs.ebpf(), &pins::links_folder(&config.pin_dir)?);
    let stale = links.retain(|program, ifindex| {
        let is = |(name, index): &(&str, u32)| *name == program && *index == ifindex;
        match program {
            object::FROM_TASK => nix::net::if_::if_indextoname(ifindex).is_ok(),
            _ if cgroup::PROGRAMS.contains(&program) => true,
            _ => wanted.iter().any(is) || xdp_pins.iter().any(is),
        }
    });
    for error in stale {
        tracing::warn!(%error, "can't remove a stale pin");
    }
    Ok(())
}

/// How each uplink is attached at the moment: its name, and `xdp-native`, `xdp-generic` or `tc`.
pub(super) fn modes(config: &DataplaneConfig, links: &Links) -> Vec<(String, &'static str)> {
    let mode = |uplink: &Uplink| match links.xdp_mode(uplink.ifindex) {
        Some(AyaXdpMode::Skb) => "xdp-generic",
        Some(_) => "xdp-native",
        None => TC,
    };
    config.uplinks.iter().map(|uplink| (uplink.name.clone(), mode(uplink))).collect()
}

/// Attaches XDP to one uplink as `mode` asks, and says how it runs, if it does.
fn attach_xdp(
    mode: XdpMode,
    uplink: &Uplink,
    programs: &mut Programs,
    links: &Links,
) -> Result<Option<AyaXdpMode>, DataplaneError> {
    // XDP on a VLAN would see packets that its parent has taken for the stack already.
    if uplink.is_vlan {
        return Ok(None);
    }
    let mut attach = |mode| {
        links.attach_xdp(object::UPLINK_XDP, programs.xdp()?, uplink.ifindex, mode)?;
        Ok(Some(mode))
    };
    match mode {
        XdpMode::Off => Ok(None),
        XdpMode::Native => attach(AyaXdpMode::Driver),
        XdpMode::Generic => attach(AyaXdpMode::Skb),
        XdpMode::Auto if uplink.is_veth => Ok(None),
        XdpMode::Auto => attach(AyaXdpMode::Driver).or_else(|error: DataplaneError| {
            tracing::info!(uplink = uplink.name, %error, "no native XDP; TC does all of it");
            Ok(None)
        }),
    }
}
