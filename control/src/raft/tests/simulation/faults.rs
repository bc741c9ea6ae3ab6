//! What goes wrong.

use std::time::Duration;

use mesh_api::id::NodeId;
use mesh_api::table::Role;
use rand::RngExt as _;
use tokio::time::sleep;

use super::hosts::Simulation;
use crate::clock::simulated;
use crate::command::{Action, Command};
use crate::model::NodeSpec;
use crate::raft::tests::net::Weather;
use crate::raft::tests::platter::Fault;

const HOUR_NS: i64 = 3600 * 1_000_000_000;
/// There are no more managers, and no fewer, for faults to leave a majority now and then.
const MANAGERS: std::ops::RangeInclusive<usize> = 3..=5;

impl Simulation {
    /// One more thing goes wrong, or less.
    pub(super) async fn fault(&mut self) {
        let up = self.up();
        match self.rng.random_range(0..20) {
            0 => self.net.heal(),
            1 => {
                let (here, there): (Vec<NodeId>, Vec<NodeId>) =
                    up.into_iter().partition(|_| self.rng.random_bool(0.5));
                for one in here {
                    for other in &there {
                        self.net.part(&one, other);
                    }
                }
            }
            2 | 3 => {
                if let (Some(one), Some(other)) = (self.any(&up), self.any(&up)) {
                    self.net.cut(&one, &other);
                }
            }
            4 => {
                if let Some(leader) = self.leader() {
                    for other in &up {
                        self.net.part(&leader, other);
                    }
                }
            }
            5 | 6 => {
                if let Some(node) = self.leader_or_any(&up) {
                    self.kill(&node);
                }
            }
            7..=9 => self.restart(0.7).await,
            10 => {
                let weather = Weather {
                    delay_ms: self.rng.random_range(1..150),
                    loss: self.rng.random_range(0..20),
                    doubled: self.rng.random_range(0..20),
                };
                self.net.set_weather(weather);
            }
            11 | 12 => {
                let fault = if self.rng.random_bool(0.4) {
                    Fault::Full
                } else {
                    Fault::Sync { is_written: self.rng.random_bool(0.5) }
                };
                if let Some(node) = self.leader_or_any(&up) {
                    self.hosts[&node].manager.iter().for_each(|(_, disk)| disk.fail(fault));
                }
            }
            13 => self.flap(&up),
            14 | 15 => self.change_managers(),
            16 => {
                if let Some(node) = self.leader_or_any(&up) {
                    let ahead_ns = [-HOUR_NS, 0, HOUR_NS][self.rng.random_range(0..3)];
                    self.hosts[&node].ahead_ns.set(ahead_ns);
                }
            }
            17 => {
                if let Some(node) = self.any(&up) {
                    let loses_table = self.rng.random_bool(0.3);
                    self.restart_agent(&node, loses_table);
                }
            }
            18 => {
                // The room's power fails.
                for node in &up {
                    self.kill(node);
                }
                self.restart(0.7).await;
            }
            _ => self.change_leader_amid_resumes(&up).await,
        }
    }

    fn leader_or_any(&mut self, up: &[NodeId]) -> Option<NodeId> {
        let leader = self.leader().filter(|_| self.rng.random_bool(0.5));
        leader.or_else(|| self.any(up))
    }

    fn flap(&mut self, up: &[NodeId]) {
        let (Some(one), Some(other)) = (self.any(up), self.any(up)) else { return };
        let net = self.net.clone();
        let pause = Duration::from_millis(self.rng.random_range(20..300));
        self.flapping.push(tokio::spawn(async move {
            for _ in 0..5 {
                net.part(&one, &other);
                sleep(pause).await;
                net.heal();
                sleep(pause).await;
            }
        }));
    }

    /// Somebody promotes or demotes a node.
    fn change_managers(&mut self) {
        let asked: Vec<NodeId> = self.managers.borrow().keys().cloned().collect();
        let Some(cluster) = self.any(&asked).and_then(|node| self.cluster(&node)) else { return };
        let state = cluster.state();
        let of = |role: Role| -> Vec<NodeId> {
            let nodes = state.nodes.values().filter(|node| node.spec.role == role);
            nodes.map(|node| node.id.clone()).collect()
        };
        let (managers, workers) = (of(Role::Manager), of(Role::Worker));
        let may_grow = managers.len() < *MANAGERS.end() && !workers.is_empty();
        let may_shrink = managers.len() > *MANAGERS.start();
        let grows = may_grow && (!may_shrink || self.rng.random_bool(0.5));
        let (role, nodes) = if grows { (Role::Manager, workers) } else { (Role::Worker, managers) };
        let Some(node) = self.any(&nodes).filter(|_| grows || may_shrink) else { return };
        let node = &state.nodes[&node];
        let spec = NodeSpec { role, ..node.spec.clone() };
        let action = Action::UpdateNode { id: node.id.clone(), version: node.spec_version, spec };
        let at_ns = simulated::true_ns().unwrap();
        // Whether it comes about does not matter.
        tokio::spawn(async move { cluster.propose(Command { at_ns, action }).await.map(drop) });
    }

    /// Agents begin their sessions anew, and meanwhile the leader changes.
    async fn change_leader_amid_resumes(&mut self, up: &[NodeId]) {
        for node in up {
            if self.rng.random_bool(0.5) {
                self.restart_agent(node, false);
            }
        }
        sleep(Duration::from_millis(self.rng.random_range(0..60))).await;
        let Some(leader) = self.leader() else { return };
        if self.rng.random_bool(0.5) {
            self.kill(&leader);
        } else {
            for other in self.hosts.keys() {
                self.net.part(&leader, other);
            }
        }
    }
}
