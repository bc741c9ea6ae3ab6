//! How the node is, by its own word: what its managers show of it when they are asked.

use std::time::{SystemTime, UNIX_EPOCH};

use mesh_api::health::{NodeHealth, Problem, UPLINKS_MAX, UplinkHealth, WireguardHealth};
use tokio::sync::watch;

/// How the node is, as whoever knows of a part of it says. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Health {
    told: watch::Sender<NodeHealth>,
}

impl Health {
    /// Notes what went wrong just now: for people, on one line.
    pub fn note_problem(&self, text: &str) {
        let problem = Problem::new(text, ns_since_epoch(SystemTime::now()));
        self.told.send_modify(|told| told.problem = Some(problem));
    }

    /// What went wrong last.
    pub fn last_problem(&self) -> Option<String> {
        self.told.borrow().problem.as_ref().map(|problem| problem.text.clone())
    }

    /// Sets the uplinks: `modes` has each one's name and how it is attached, `mtu_of` says its MTU, bytes.
    pub(crate) fn set_uplinks(&self, modes: &[(String, &str)], mtu_of: impl Fn(&str) -> u32) {
        let uplink = |(name, mode): &(String, &str)| UplinkHealth {
            name: name.clone(),
            mode: (*mode).to_owned(),
            mtu: mtu_of(name),
        };
        let uplinks = modes.iter().take(UPLINKS_MAX).map(uplink).collect();
        self.set(|told| &mut told.uplinks, uplinks);
    }

    /// Sets what the node encrypts with.
    pub(crate) fn set_wireguard(&self, wireguard: Option<WireguardHealth>) {
        self.set(|told| &mut told.wireguard, wireguard);
    }

    /// The host is no node any longer; what went wrong last stays.
    pub(crate) fn clear(&self) {
        self.set_uplinks(&[], |_| 0);
        self.set_wireguard(None);
    }

    /// Tells how the node is, and of changes.
    pub(crate) fn watch(&self) -> watch::Receiver<NodeHealth> {
        self.told.subscribe()
    }

    fn set<T: PartialEq>(&self, field: impl FnOnce(&mut NodeHealth) -> &mut T, value: T) {
        self.told.send_if_modified(|told| {
            let former = field(told);
            let changed = *former != value;
            *former = value;
            changed
        });
    }
}

/// A time as the managers are told it, ns since the epoch.
pub(crate) fn ns_since_epoch(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_api::health::WireguardKind;

    use super::*;

    #[test]
    fn what_is_as_it_was_is_no_news() {
        let health = Health::default();
        let mut told = health.watch();
        let modes = [("eth0".to_owned(), "xdp-native"), ("eth1".to_owned(), "tc")];
        let mtu_of = |name: &str| if name == "eth0" { 9000 } else { 1500 };
        let wireguard = Some(WireguardHealth { kind: WireguardKind::Kernel, key_made_ns: 7 });
        for is_news in [true, false] {
            health.set_uplinks(&modes, mtu_of);
            health.set_wireguard(wireguard);
            assert_eq!(told.has_changed().unwrap(), is_news);
            told.mark_unchanged();
        }
        let uplink = |name: &str, mode: &str, mtu| UplinkHealth { name: name.into(), mode: mode.into(), mtu };
        let uplinks = vec![uplink("eth0", "xdp-native", 9000), uplink("eth1", "tc", 1500)];
        assert_eq!(*told.borrow(), NodeHealth { uplinks, wireguard, problem: None });

        let before = ns_since_epoch(SystemTime::now());
        health.note_problem("the uplink is gone");
        health.clear();
        let NodeHealth { uplinks, wireguard, problem } = told.borrow_and_update().clone();
        let problem = problem.unwrap();
        assert_eq!((uplinks, wireguard, problem.text.as_str()), (vec![], None, "the uplink is gone"));
        assert!(problem.at_ns >= before && problem.at_ns - before < 60_000_000_000);
    }

    #[test]
    fn times_are_ns_since_the_epoch() {
        assert_eq!(ns_since_epoch(UNIX_EPOCH + Duration::from_millis(7)), 7_000_000);
        assert_eq!(ns_since_epoch(UNIX_EPOCH - Duration::from_millis(7)), 0);
    }
}
