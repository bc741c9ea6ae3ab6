//! What each manager knows that is not in the replicated state, asked of all of them by one.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use super::members::Member;
use super::message::{Call, Request, Response};
use super::replica::Replica;
use crate::session::Report;

/// How long a manager may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Says what a manager knows, while it can.
#[derive(Clone)]
pub struct Reporter(Arc<dyn Fn() -> Option<Report> + Send + Sync>);

impl Reporter {
    /// By `say`.
    pub fn new(say: impl Fn() -> Option<Report> + Send + Sync + 'static) -> Self {
        Self(Arc::new(say))
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reporter(…)")
    }
}

impl Replica {
    /// Has `reporter` say what this manager knows.
    pub fn report_by(&self, reporter: Reporter) {
        *self.inner.reporter.lock().unwrap_or_else(PoisonError::into_inner) = Some(reporter);
    }

    /// What this manager knows.
    pub(super) fn report(&self) -> Option<Report> {
        let reporter = self.inner.reporter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (reporter?.0)()
    }

    /// What each manager knows; `None` of those that don't answer.
    pub async fn reports(&self) -> Vec<(Member, Option<Report>)> {
        let asked = self.managers().into_iter().map(async |member| {
            let report =
                if member.id == self.inner.id { self.report() } else { self.report_of(&member).await };
            (member, report)
        });
        futures::future::join_all(asked).await
    }

    async fn report_of(&self, member: &Member) -> Option<Report> {
        let request = Request { from: self.inner.id, to: member.id, call: Call::Report };
        let called = timeout(PATIENCE, self.inner.transport.call(&member.manager, request)).await;
        match called {
            Ok(Ok(Response::Report(report))) => Some(*report),
            _ => None,
        }
    }
}
