//! When the node asks for its next certificate: at a random moment of its present one's life, so that nodes that joined
//! together don't ask together; when its role is another; and when the managers say so.

use std::time::{Duration, SystemTime};

use mesh_api::session::AgentMessage;
use mesh_api::table::Role;
use mesh_api::tls::{KeyRequest, Peer};
use rand::RngExt as _;
use tokio::time::Instant;
use tracing::warn;

/// The share of a certificate's life after which the next one is asked for, as SwarmKit's.
const FRACTION: std::ops::Range<f64> = 0.5..0.8;
/// How long an answer may take before the managers are asked again; each time twice as long.
const RETRY_MIN: Duration = Duration::from_secs(30);
const RETRY_MAX: Duration = Duration::from_hours(1);

/// The next certificate.
#[derive(Debug)]
pub(super) struct Renewal {
    fraction: f64,
    /// The managers want it.
    wanted: bool,
    /// The key that a certificate was asked for.
    asked: Option<KeyRequest>,
    /// Not before then.
    again: Option<Instant>,
    retry: Duration,
}

impl Renewal {
    pub(super) fn new() -> Self {
        let fraction = rand::rng().random_range(FRACTION);
        Self { fraction, wanted: false, asked: None, again: None, retry: RETRY_MIN }
    }

    /// The managers want it: at once.
    pub(super) fn want(&mut self) {
        self.wanted = true;
        self.again = None;
    }

    /// Another session begins: what was asked in the last one is not answered any more.
    pub(super) fn start_over(&mut self) {
        self.asked = None;
        self.again = None;
    }

    /// What to say at `now`, for the present certificate and the role by the table, if that is known.
    pub(super) fn due(
        &mut self,
        own: &Peer,
        role: Option<Role>,
        now: (SystemTime, Instant),
    ) -> Option<AgentMessage> {
        let (now, at) = now;
        let is_old = now >= own.renewal(self.fraction);
        let is_other = role.is_some_and(|role| role != own.role);
        if !(self.wanted || is_old || is_other) || self.again.is_some_and(|again| at < again) {
            return None;
        }
        self.again = Some(at + self.retry);
        self.retry = (self.retry * 2).min(RETRY_MAX);
        match KeyRequest::new() {
            Ok(request) => {
                let csr = request.csr().to_owned();
                self.asked = Some(request);
                Some(AgentMessage::Renew { csr })
            }
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "the node's certificate can't be renewed");
                None
            }
        }
    }

    /// The key that an answer is for.
    pub(super) fn answered(&mut self) -> Option<KeyRequest> {
        self.asked.take()
    }

    /// The node has its next certificate.
    pub(super) fn done(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(life: Duration) -> Peer {
        let made = SystemTime::UNIX_EPOCH + Duration::from_hours(24);
        Peer {
            node: "n".into(),
            role: Role::Worker,
            cluster: "c".into(),
            issuer: mesh_api::tls::KeyId::default(),
            not_before: made - mesh_api::tls::BACKDATE,
            not_after: made + life,
        }
    }

    #[test]
    fn a_certificate_is_renewed_between_50_and_80_per_cent_of_its_life() {
        let life = Duration::from_hours(100);
        let own = peer(life);
        let made = own.not_after - life;
        let at = |hours| made + Duration::from_hours(hours);
        let due_after: Vec<u64> = (0..200)
            .map(|_| {
                let mut renewal = Renewal::new();
                (0..100)
                    .find(|hours| renewal.due(&own, None, (at(*hours), Instant::now())).is_some())
                    .unwrap()
            })
            .collect();
        assert!(due_after.iter().all(|hours| (50..=80).contains(hours)), "{due_after:?}");
        assert!(due_after.iter().any(|hours| *hours < 60) && due_after.iter().any(|hours| *hours > 70));
    }

    #[test]
    fn another_role_and_the_managers_wish_ask_at_once_and_silence_asks_again_more_slowly() {
        let own = peer(Duration::from_hours(100));
        let began = Instant::now();
        let at = |seconds| (own.not_before, began + Duration::from_secs(seconds));
        let mut renewal = Renewal::new();
        assert_eq!(renewal.due(&own, Some(Role::Worker), at(0)), None);
        let first = renewal.due(&own, Some(Role::Manager), at(0)).unwrap();
        let asks = |seconds: &u64| {
            let again = renewal.due(&own, Some(Role::Manager), at(*seconds));
            assert_ne!(again.as_ref(), Some(&first), "with another key");
            again.is_some()
        };
        assert_eq!((1..300).filter(asks).collect::<Vec<_>>(), [30, 90, 210]);
        renewal.want();
        assert!(renewal.due(&own, None, at(211)).is_some());
        assert!(renewal.answered().is_some() && renewal.answered().is_none());
        renewal.done();
        assert_eq!(renewal.due(&own, None, at(212)), None);
    }
}
