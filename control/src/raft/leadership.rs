//! Who leads, as this member sees it.

use std::sync::Weak;
use std::time::Duration;

use openraft::ServerState;
use openraft::error::Fatal;
use tokio::sync::watch;
use tokio::time::Instant;

use super::replica::{Inner, Replica};
use super::{Manager, Metrics, RaftId, Vote};

/// A leader whom no majority has answered for this many election timeouts leads nobody.
const DEAF: u32 = 3;
/// A change of the membership that stands half done for this long was begun by a leader that is gone.
const HALF_DONE: Duration = Duration::from_secs(3);

/// Who leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader, as far as this member knows.
    pub leader: Option<(RaftId, Manager)>,
    /// This member leads, has lately been answered by a majority, and has applied all that was committed before its term.
    pub is_leader: bool,
    /// Raft's term.
    pub term: u64,
}

/// What a member remembers of its own leadership.
#[derive(Debug, Default)]
struct Led {
    vote: Vote,
    /// The last entry when it began.
    barrier: u64,
}

impl Led {
    fn see(&mut self, metrics: &Metrics, deaf: Duration) -> Leadership {
        let term = metrics.current_term;
        let membership = metrics.membership_config.membership();
        let leads = metrics.running_state.is_ok() && metrics.state == ServerState::Leader;
        let silence = metrics.millis_since_quorum_ack.map(Duration::from_millis);
        let is_alone = membership.voter_ids().all(|id| id == metrics.id);
        let mut is_leader = false;
        if leads {
            if self.vote != metrics.vote {
                *self = Self { vote: metrics.vote, barrier: metrics.last_log_index.unwrap_or(0) };
            }
            let is_heard = is_alone || silence.is_some_and(|silence| silence < deaf);
            is_leader = is_heard && metrics.last_applied.is_some_and(|last| last.index >= self.barrier);
        }
        let is_deaf = leads && !is_alone && silence.is_some_and(|silence| silence >= deaf);
        let leader = metrics.current_leader.filter(|_| metrics.running_state.is_ok() && !is_deaf);
        let leader = leader.and_then(|id| Some((id, membership.get_node(&id)?.clone())));
        Leadership { leader, is_leader, term }
    }
}

/// Follows raft's metrics until the member stops.
pub(super) async fn follow(
    mut metrics: watch::Receiver<Metrics>,
    election: Duration,
    publish: watch::Sender<Leadership>,
    member: Weak<Inner>,
) {
    let mut led = Led::default();
    let mut half_done: Option<Instant> = None;
    loop {
        let seen = metrics.borrow_and_update().clone();
        let leadership = led.see(&seen, election * DEAF);
        publish.send_if_modified(|published| {
            let is_news = *published != leadership;
            if is_news {
                tracing::info!(
                    term = leadership.term,
                    leader = leadership.leader.as_ref().map(|(_, manager)| manager.node.as_str()),
                    here = leadership.is_leader,
                    "leadership"
                );
                *published = leadership.clone();
            }
            is_news
        });
        match &seen.running_state {
            Ok(()) => {}
            Err(Fatal::Stopped) => break,
            Err(fatal) => {
                tracing::error!(
                    error = fatal as &dyn std::error::Error,
                    "the store failed: this manager takes no part any longer; restart it"
                );
                break;
            }
        }
        let is_joint = seen.membership_config.membership().get_joint_config().len() > 1;
        if !(is_joint && leadership.is_leader) {
            half_done = None;
        } else if half_done.get_or_insert_with(Instant::now).elapsed() >= HALF_DONE {
            half_done = None;
            let Some(member) = member.upgrade() else { break };
            let member = Replica { inner: member };
            tokio::spawn(async move {
                if let Err(error) = member.finish_change().await {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "a change of the managers stays half done"
                    );
                }
            });
        }
        if metrics.changed().await.is_err() {
            break;
        }
    }
    publish
        .send_modify(|published| *published = Leadership { term: published.term, ..Leadership::default() });
}
