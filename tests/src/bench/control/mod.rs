//! What managers do with many agents: how long a change of a service takes to the last agent's maps, and what it costs.
//!
//! Managers and agents are processes of this machine that talk by TLS over a loopback of their own, with certificates that
//! the agents got by joining. Managers keep their stores on the disk, agents theirs in memory: as many hosts don't share
//! one disk; and agents give way to managers, where both want the processor. Of the product, agents lack the kernel: their
//! maps are in memory, and tasks take no time to start.

pub mod agent;
mod board;
mod load;
pub mod manager;
mod processes;
mod words;

use std::io::PipeWriter;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use self::board::Board;
use self::load::{Load, PUBLISHED, SERVICES_MAX};
use self::processes::{Manager, Process, enter_namespaces, last_words, loopback_bytes};
use self::words::{AgentStart, Answer, Begin, Done, ManagerStart, News, Order, Stands, Told, now_ns};
use super::{Case, Unit, milliseconds};

pub use self::words::Scale;

/// Agents that join at once.
const JOIN_AT_ONCE: usize = 20;
/// How long agents may take to join, and managers to become members.
const JOIN_LIMIT: Duration = Duration::from_mins(1);
/// Tasks that come at once while the cluster is filled: all agents have to take each of them, with the processors of one
/// machine, before managers take them for dead.
const FILLED_AT_ONCE: u32 = 2_000;
/// How long these may take to run.
const FILL_LIMIT: Duration = Duration::from_mins(2);
/// How long one change may take.
const CHANGE_LIMIT: Duration = Duration::from_secs(20);
/// How long agents may take to come back.
const RETURN_LIMIT: Duration = Duration::from_mins(2);
/// How often a manager is asked how the cluster stands.
const LOOK_PERIOD: Duration = Duration::from_millis(250);
/// Between changes: for what the managers still have to say of the last one.
const PAUSE: Duration = Duration::from_millis(50);

/// Measures all cases.
pub fn run(scale: &str) -> Result<Vec<Case>> {
    let scale: Scale = serde_json::from_str(scale).context("how much to measure")?;
    let Scale { managers, agents, services, tasks, changes, ref dir } = scale;
    if [managers, agents, services, tasks, changes].contains(&0) || services > u32::from(SERVICES_MAX) {
        bail!("at least one of each is to be measured, and at most {SERVICES_MAX} services");
    }
    enter_namespaces(&dir.join("agents"))?;
    measure(&scale).map_err(|error| anyhow!("{error:#}{}", last_words(dir)))
}

fn measure(scale: &Scale) -> Result<Vec<Case>> {
    let mut cluster = Cluster::begin(scale)?;
    let mut cases = vec![cluster.fill()?];
    cases.extend(cluster.change()?);
    cases.extend(cluster.lose_the_leader()?);
    Ok(cases)
}

/// All processes.
struct Cluster<'a> {
    scale: &'a Scale,
    managers: Vec<Manager>,
    agents: Vec<Process>,
    board: Board,
}

impl<'a> Cluster<'a> {
    fn begin(scale: &'a Scale) -> Result<Self> {
        let (board, told) = Board::new(scale.agents)?;
        let first = Manager::start(&manager(scale, 0, Begin::Found), &log(scale, "manager-0"))?;
        let mut cluster = Self { scale, managers: vec![first], agents: Vec::new(), board };
        for number in 1..scale.managers {
            cluster.add_manager(number)?;
        }
        cluster.add_agents(&told)?;
        Ok(cluster)
    }

    fn add_manager(&mut self, number: u32) -> Result<()> {
        let first = self.managers[0].ready.clone();
        let begin = Begin::Join { remote: first.addr, token: first.manager_token };
        let log = log(self.scale, &format!("manager-{number}"));
        let manager = Manager::start(&manager(self.scale, number, begin), &log)?;
        let ready = manager.ready.clone();
        self.managers.push(manager);
        let admit = Order::Admit { node: ready.node, raft: ready.raft, addr: ready.addr };
        self.managers[0].order(&admit)?;
        self.until("managers", JOIN_LIMIT, |stands| stands.voters > number)?;
        Ok(())
    }

    fn add_agents(&mut self, told: &PipeWriter) -> Result<()> {
        let remotes: Vec<_> = self.managers.iter().map(|manager| manager.ready.addr).collect();
        let token = self.managers[0].ready.worker_token.clone();
        let log = log(self.scale, "agents");
        for number in 0..self.scale.agents {
            let dir = self.scale.dir.join(format!("agents/{number}"));
            let start = AgentStart { dir, number, remotes: remotes.clone(), token: token.clone() };
            self.agents.push(Process::agent(&start, told, &log)?);
            if self.agents.len().is_multiple_of(JOIN_AT_ONCE) || number + 1 == self.scale.agents {
                let agents = &mut self.agents;
                self.board.connected(number + 1, JOIN_LIMIT, || check(agents))?;
            }
        }
        Ok(())
    }

    /// Waits until the first manager says that the cluster stands so.
    fn until(&mut self, what: &str, limit: Duration, holds: impl Fn(&Stands) -> bool) -> Result<Stands> {
        let started = Instant::now();
        loop {
            let stands = look(&mut self.managers[0])?;
            if holds(&stands) {
                return Ok(stands);
            }
            if started.elapsed() > limit {
                bail!("{what}: not within {limit:?}, but {stands:?}");
            }
            check(&mut self.agents)?;
            sleep(LOOK_PERIOD);
        }
    }

    /// Makes the services, and waits until all agents know that all tasks run.
    fn fill(&mut self) -> Result<Case> {
        let Scale { services, tasks, agents, managers, .. } = *self.scale;
        let load = Load { services, tasks };
        let portions = tasks.div_ceil(FILLED_AT_ONCE).min(services);
        let ends =
            (1..=portions).map(|portion| u64::from(services) * u64::from(portion) / u64::from(portions));
        let began_ns = now_ns()?;
        let mut start = 0;
        for end in ends.map(u32::try_from) {
            let numbers = start..end?;
            start = numbers.end;
            done(self.managers[0].order(&Order::Fill { numbers, load })?)?;
            let running = load.tasks_of(start);
            let full = self.until("running tasks", FILL_LIMIT, |stands| stands.running == running)?;
            let all = &mut self.agents;
            self.board.settled(full.index, FILL_LIMIT, || check(all))?;
        }
        let mut case = Case::new("control_fill", Unit::Ms);
        case.samples.push(since(began_ns, now_ns()?));
        // The managers' own nodes, which have no agents, are given up meanwhile.
        let given_up = |stands: &Stands| (stands.ready, stands.down) == (agents, managers);
        let quiet = self.until("nodes", RETURN_LIMIT, given_up)?;
        let all = &mut self.agents;
        self.board.settled(quiet.index, RETURN_LIMIT, || check(all))?;
        Ok(case)
    }

    fn change(&mut self) -> Result<Vec<Case>> {
        let mut cases = ChangeCases::new();
        let count = self.scale.changes;
        let published = self.scale.services.div_ceil(PUBLISHED);
        self.board.take();
        let before = self.spent()?;
        for number in 0..count {
            let order = Order::Change { service: number % published * PUBLISHED };
            let done = done(self.managers[0].order(&order)?)?;
            let agents = &mut self.agents;
            self.board.applied(done.index, CHANGE_LIMIT, || check(agents))?;
            cases.note(&done, &self.board.take())?;
            sleep(PAUSE);
        }
        let after = self.spent()?;
        let changes = f64::from(count);
        let agents = f64::from(self.scale.agents);
        let cpu = |before: Duration, after: Duration| milliseconds(after.saturating_sub(before)) / changes;
        cases.manager_cpu.samples.push(cpu(before.managers, after.managers));
        cases.agent_cpu.samples.push(cpu(before.agents, after.agents) / agents);
        let bytes = u32::try_from(after.bytes - before.bytes)?;
        cases.wire.samples.push(f64::from(bytes) * 1e-3 / changes);
        for manager in &self.managers {
            cases.manager_rss.samples.push(manager.process.rss_mb()?);
        }
        for agent in &self.agents {
            cases.agent_rss.samples.push(agent.rss_mb()?);
        }
        Ok(cases.into_vec())
    }

    /// Kills the leader and starts it again; how long until each agent has a session again, and until the managers know
    /// that all have the latest table.
    fn lose_the_leader(&mut self) -> Result<[Case; 3]> {
        let mut leader = 0;
        for number in 0..self.managers.len() {
            if look(&mut self.managers[number])?.leads {
                leader = number;
            }
        }
        self.board.forget_sessions();
        self.board.take();
        let killed_ns = now_ns()?;
        drop(self.managers.remove(leader));
        let number = u32::try_from(leader)?;
        let start = manager(self.scale, number, Begin::Return);
        let returned = Manager::start(&start, &log(self.scale, &format!("manager-{number}")))?;
        let mut again = Case::new("control_restart", Unit::Ms);
        again.samples.push(since(killed_ns, now_ns()?));
        self.managers.push(returned);
        let (count, agents) = (self.scale.agents, &mut self.agents);
        self.board.connected(count, RETURN_LIMIT, || check(agents))?;
        let ready = self.until("nodes", RETURN_LIMIT, |stands| stands.ready == count)?;
        let agents = &mut self.agents;
        self.board.settled(ready.index, RETURN_LIMIT, || check(agents))?;
        let mut settled = Case::new("control_restart_to_settled", Unit::Ms);
        settled.samples.push(since(killed_ns, now_ns()?));
        let mut sessions = Case::new("control_restart_to_session", Unit::Ms);
        let told = self.board.take();
        let connected = told.iter().filter(|told| matches!(told.news, News::Connected));
        sessions.samples.extend(connected.map(|told| since(killed_ns, told.at_ns)));
        Ok([again, sessions, settled])
    }

    fn spent(&self) -> Result<Spent> {
        let managers = self.managers.iter().map(|manager| manager.process.cpu()).sum::<Result<_>>()?;
        let agents = self.agents.iter().map(Process::cpu).sum::<Result<_>>()?;
        Ok(Spent { managers, agents, bytes: loopback_bytes()? })
    }
}

/// What was spent since the beginning.
struct Spent {
    /// CPU time of all managers.
    managers: Duration,
    /// CPU time of all agents.
    agents: Duration,
    /// Bytes over the loopback.
    bytes: u64,
}

/// What changes of a service show.
struct ChangeCases {
    commit: Case,
    to_maps: Case,
    to_maps_of_half: Case,
    to_settled: Case,
    apply: Case,
    manager_cpu: Case,
    agent_cpu: Case,
    wire: Case,
    manager_rss: Case,
    agent_rss: Case,
}

impl ChangeCases {
    fn new() -> Self {
        Self {
            commit: Case::new("control_commit", Unit::Ms),
            to_maps: Case::new("control_change_to_last_maps", Unit::Ms),
            to_maps_of_half: Case::new("control_change_to_half_of_maps", Unit::Ms),
            to_settled: Case::new("control_change_to_settled", Unit::Ms),
            apply: Case::new("control_apply", Unit::Ms),
            manager_cpu: Case::new("control_change_cpu_of_managers", Unit::Ms),
            agent_cpu: Case::new("control_change_cpu_of_an_agent", Unit::Ms),
            wire: Case::new("control_change_on_the_wire", Unit::Kb),
            manager_rss: Case::new("control_manager_rss", Unit::Mb),
            agent_rss: Case::new("control_agent_rss", Unit::Mb),
        }
    }

    /// Notes one change, and what was told until all agents had it.
    fn note(&mut self, done: &Done, told: &[Told]) -> Result<()> {
        self.commit.samples.push(since(done.proposed_ns, done.answered_ns));
        let mut reached = std::collections::BTreeMap::new();
        let mut settled = None;
        for Told { agent, at_ns, news } in told {
            match *news {
                News::Applied { index, took_ns } if index >= done.index => {
                    reached.entry(*agent).or_insert((*at_ns, took_ns));
                }
                News::Settled { index } if index >= done.index => _ = settled.get_or_insert(*at_ns),
                News::Applied { .. } | News::Settled { .. } | News::Connected | News::Disconnected => {}
            }
        }
        let mut times: Vec<u64> = reached.values().map(|(at_ns, _)| *at_ns).collect();
        times.sort_unstable();
        let (last, half) = (times.last().context("no agent")?, times[times.len() / 2]);
        self.to_maps.samples.push(since(done.answered_ns, *last));
        self.to_maps_of_half.samples.push(since(done.answered_ns, half));
        self.to_settled.samples.push(since(done.answered_ns, settled.context("nothing settled")?));
        self.apply.samples.extend(reached.values().map(|(_, took_ns)| since(0, *took_ns)));
        Ok(())
    }

    fn into_vec(self) -> Vec<Case> {
        vec![
            self.commit,
            self.to_maps,
            self.to_maps_of_half,
            self.to_settled,
            self.apply,
            self.manager_cpu,
            self.agent_cpu,
            self.wire,
            self.manager_rss,
            self.agent_rss,
        ]
    }
}

fn manager(scale: &Scale, number: u32, begin: Begin) -> ManagerStart {
    ManagerStart { dir: scale.dir.join(format!("manager-{number}")), number, begin }
}

fn log(scale: &Scale, of: &str) -> std::path::PathBuf {
    Path::new(&scale.dir).join(format!("{of}.log"))
}

fn look(manager: &mut Manager) -> Result<Stands> {
    match manager.order(&Order::Look)? {
        Answer::Stands(stands) => Ok(stands),
        other => bail!("a manager answers out of turn: {other:?}"),
    }
}

fn done(answer: Answer) -> Result<Done> {
    match answer {
        Answer::Done(done) => Ok(done),
        other => bail!("a manager answers out of turn: {other:?}"),
    }
}

fn check(agents: &mut [Process]) -> Result<()> {
    agents.iter_mut().try_for_each(Process::check)
}

/// Milliseconds from one time to another, negative if that was before.
fn since(from_ns: u64, to_ns: u64) -> f64 {
    let magnitude = milliseconds(Duration::from_nanos(to_ns.abs_diff(from_ns)));
    if to_ns < from_ns { -magnitude } else { magnitude }
}
