//! Clients that create, change, remove and read services through any manager, and remember what they were told.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use mesh_api::id::ServiceId;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::{Managers, Mutant};
use crate::clock::simulated;
use crate::cluster::{Cluster, ProposeError};
use crate::command::{self, Command};
use crate::model::{ServiceSpec, State};
use crate::raft::tests::history::{Action, Answer, Held, Operation, is_linearizable};
use crate::refusal::Refusal;
use crate::testing::{ingress_port, network, service};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const VALUE: &str = "com.example.value";
/// Operations on a name that a history may have.
const HISTORY_MAX: usize = 120;

/// What all clients together know.
#[derive(Default)]
struct Known {
    /// Counts calls and returns.
    time: Cell<u64>,
    /// Numbers for ids and values.
    number: Cell<u64>,
    histories: RefCell<BTreeMap<&'static str, Vec<Operation>>>,
    /// Names of networks whose making was acknowledged.
    networks: RefCell<Vec<String>>,
    /// Rotations of the keys that were acknowledged, and those of which nobody knows.
    rotated: Cell<u64>,
    perhaps_rotated: Cell<u64>,
    until: Cell<Option<Instant>>,
}

impl Known {
    fn tick(&self) -> u64 {
        self.time.set(self.time.get() + 1);
        self.time.get()
    }

    fn number(&self) -> u64 {
        self.number.set(self.number.get() + 1);
        self.number.get()
    }

    /// Notes a call; the second part is where its answer goes.
    fn call(&self, name: &'static str, action: Action) -> Option<usize> {
        let called = self.tick();
        let mut histories = self.histories.borrow_mut();
        let history = histories.entry(name).or_default();
        if history.len() >= HISTORY_MAX {
            return None;
        }
        history.push(Operation { called, answered: None, action });
        Some(history.len() - 1)
    }

    fn answer(&self, name: &'static str, at: usize, answer: Answer) {
        let time = self.tick();
        self.histories.borrow_mut().get_mut(name).unwrap()[at].answered = Some((time, answer));
    }
}

/// The clients.
pub(super) struct Clients {
    known: Rc<Known>,
    running: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Clients that are so many times slower than the fastest.
    pub(super) fn start(
        count: usize,
        seed: u64,
        managers: &Managers,
        pace: u64,
        mutant: Option<Mutant>,
    ) -> Self {
        let known = Rc::<Known>::default();
        let client = |at: usize| {
            let rng = StdRng::seed_from_u64(seed.wrapping_mul(1009) + at as u64);
            let client =
                Client { rng, known: Rc::clone(&known), managers: Rc::clone(managers), pace, mutant };
            tokio::task::spawn_local(client.run())
        };
        Self { running: (0..count).map(client).collect(), known }
    }

    /// Lets them go on for a while, and waits for their last answers.
    pub(super) async fn go_on_until(&self, end: Instant) {
        self.known.until.set(Some(end));
        for client in &self.running {
            while !client.is_finished() {
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Whether what they were told can be, given what is there at the end.
    pub(super) fn check(self, last: &State) {
        // A client that failed says so.
        for client in self.running {
            if let Some(Err(failed)) = futures::FutureExt::now_or_never(client) {
                std::panic::resume_unwind(failed.into_panic());
            }
        }
        for (name, history) in &mut *self.known.histories.borrow_mut() {
            let time = self.known.tick();
            let saw = (self.known.tick(), Answer::Saw(held(last, name)));
            history.push(Operation { called: time, answered: Some(saw), action: Action::Read });
            assert!(is_linearizable(history), "what was seen of service {name} can't be: {history:#?}");
        }
        for name in &*self.known.networks.borrow() {
            assert!(last.network_by_name(name).is_some(), "network {name} was acknowledged, and is gone");
        }
        let (sure, perhaps) = (self.known.rotated.get(), self.known.perhaps_rotated.get());
        let rotated = last.cluster.as_ref().unwrap().key_epoch;
        assert!(
            (sure..=sure + perhaps).contains(&rotated),
            "{rotated} rotations of {sure} and perhaps {perhaps}"
        );
    }
}

/// What a state has under a name.
fn held(state: &State, name: &str) -> Held {
    let service = state.service_by_name(name)?;
    let id = service.id.as_str().parse().unwrap();
    Some((id, service.spec.labels[VALUE].parse().unwrap()))
}

fn spec(name: &str, value: u64) -> ServiceSpec {
    let mut spec = service(name, 1 + value % 2);
    spec.labels.insert(VALUE.to_owned(), value.to_string());
    // Another command now and then, which replaces the tasks.
    spec.task.container.args = vec![(value / 8).to_string()];
    spec.update.monitor_ns = 1_000_000_000;
    spec.task.restart.delay_ns = 1_000_000_000;
    spec.endpoint.ports = vec![ingress_port(0, 80)];
    spec
}

fn id(number: u64) -> ServiceId {
    ServiceId::from(number.to_string())
}

struct Client {
    rng: StdRng,
    known: Rc<Known>,
    managers: Managers,
    pace: u64,
    mutant: Option<Mutant>,
}

impl Client {
    async fn run(mut self) {
        while self.known.until.get().is_none_or(|until| Instant::now() < until) {
            let pause = Duration::from_millis(self.rng.random_range(1..120) * self.pace);
            sleep(pause).await;
            if self.mutant == Some(Mutant::NoRest) {
                self.propose(command::Action::Acknowledge { index: u64::MAX }).await;
            }
            match self.rng.random_range(0..10) {
                0 => self.make_network().await,
                1 => self.rotate().await,
                _ => self.use_service().await,
            }
        }
    }

    /// Any manager, and how far its clock is ahead; another may be asked each time.
    fn manager(&mut self) -> Option<(Cluster, i64)> {
        let managers = self.managers.borrow();
        let count = managers.len();
        let at = (count > 0).then(|| self.rng.random_range(0..count))?;
        managers.values().nth(at).map(|manager| (manager.cluster.clone(), manager.ahead_ns.get()))
    }

    /// What was answered; `None` where nobody knows whether it was done.
    async fn propose(&mut self, action: command::Action) -> Option<Answer> {
        let (manager, ahead_ns) = self.manager()?;
        let at_ns = simulated::true_ns().unwrap().saturating_add_signed(ahead_ns);
        match manager.propose(Command { at_ns, action }).await {
            Ok(_) => Some(Answer::Done),
            Err(ProposeError::Refused(Refusal::IdTaken(id))) => panic!("{id} took effect twice"),
            // The orchestrator makes versions, too.
            Err(ProposeError::Refused(Refusal::OutOfSequence)) => Some(Answer::Nothing),
            Err(ProposeError::Refused(Refusal::NameTaken { .. } | Refusal::ServiceNotFound(_))) => {
                Some(Answer::Refused)
            }
            // A manager that is about to join knows no cluster.
            Err(ProposeError::Refused(refusal)) => panic!("{refusal}"),
            Err(ProposeError::NoLeader | ProposeError::Storage(_) | ProposeError::Stopped) => None,
        }
    }

    async fn make_network(&mut self) {
        let name = format!("n{}", self.known.number());
        let action = command::Action::CreateNetwork { id: name.as_str().into(), spec: network(&name) };
        if self.propose(action).await == Some(Answer::Done) {
            self.known.networks.borrow_mut().push(name);
        }
    }

    async fn rotate(&mut self) {
        let count = match self.propose(command::Action::RotateKeys).await {
            Some(Answer::Done) => &self.known.rotated,
            Some(answer) => panic!("nothing speaks against it: {answer:?}"),
            None => &self.known.perhaps_rotated,
        };
        count.set(count.get() + 1);
    }

    /// Reads a service, then does something about it.
    async fn use_service(&mut self) {
        let name = NAMES[self.rng.random_range(0..NAMES.len())];
        let Some((manager, _)) = self.manager() else { return };
        let Some(read) = self.known.call(name, Action::Read) else { return };
        let state = if self.mutant == Some(Mutant::StaleReads) {
            Ok(manager.state())
        } else {
            manager.linearizable().await
        };
        let Ok(state) = state else { return };
        let held = held(&state, name);
        self.known.answer(name, read, Answer::Saw(held));
        sleep(Duration::from_millis(self.rng.random_range(0..40))).await;

        let value = self.known.number();
        let (action, command) = match held {
            None => {
                let create = Action::Create { id: value, value };
                let spec = Box::new(spec(name, value));
                (create, command::Action::CreateService { id: id(value), spec })
            }
            Some((number, _)) if self.rng.random_bool(0.3) => {
                (Action::Remove { id: number }, command::Action::RemoveService { id: id(number) })
            }
            Some((number, from)) => {
                let version = state.services[&id(number)].meta.version;
                let spec = Box::new(spec(name, value));
                let update = command::Action::UpdateService { id: id(number), version, spec };
                (Action::Update { id: number, from, to: value }, update)
            }
        };
        let Some(at) = self.known.call(name, action) else { return };
        if let Some(answer) = self.propose(command).await {
            self.known.answer(name, at, answer);
        }
    }
}
