//! Who asks for what isn't there is told so at once.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client;
use crate::engine;
use crate::figure;
use crate::lab::{self, Lab, as_client, until};
use crate::steady::Connection;
use crate::ways::{self, Way};

/// What is at once: well before the first retransmission.
const AT_ONCE: Duration = Duration::from_millis(500);

/// How a first datagram is answered.
fn udp_error(to: SocketAddr) -> Result<(Option<ErrorKind>, Duration)> {
    let socket = UdpSocket::bind(client::anywhere(to))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(client::LIMIT))?;
    let started = Instant::now();
    socket.send(b"anybody?")?;
    let error = socket.recv(&mut [0; 64]).err().map(|error| error.kind());
    Ok((error, started.elapsed()))
}

pub(crate) fn service_without_tasks_refuses_at_once(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &[])?;
    for back in ways::Back::ALL {
        engine::docker_ok(lab.manager(), &["service", "scale", "--detach", &format!("{back}=0")])?;
    }
    for back in ways::Back::ALL {
        engine::until_running(lab, &back.to_string(), 0)?;
    }
    for way in Way::all() {
        let mut slowest = Duration::ZERO;
        for to in way.targets(lab) {
            as_client(|| {
                let started = Instant::now();
                let error = client::connect_from(client::anywhere(to), to).err();
                let text = error.map(|error| format!("{error:#}")).unwrap_or_default();
                ensure!(text.contains("refused"), "{to} over TCP: {text:?}");
                ensure!(started.elapsed() < AT_ONCE, "{to} took {:?} to refuse", started.elapsed());
                let (error, elapsed) = udp_error(to)?;
                ensure!(error == Some(ErrorKind::ConnectionRefused), "{to} over UDP: {error:?}");
                ensure!(elapsed < AT_ONCE, "{to} took {elapsed:?} to refuse");
                slowest = slowest.max(started.elapsed());
                Ok(())
            })?;
        }
        figure!(
            "{way}: TCP and UDP refused by every node, both within {:.1} ms",
            slowest.as_secs_f32() * 1e3
        );
    }
    Ok(())
}

/// The task's own stack can't say that it is gone: its cable is pulled first.
pub(crate) fn connection_of_a_dead_task_is_reset_at_its_next_segment(lab: &Lab) -> Result<()> {
    for way in Way::all() {
        let tasks =
            ways::create_web(lab, 1, &["--constraint", "node.hostname==n1", "--restart-condition=none"])?;
        let mut connections = Vec::new();
        for node in &lab.nodes[..2] {
            let to = way.to(node);
            connections.push((to, as_client(|| Connection::open(to))?.0));
        }
        let service = way.back.to_string();
        let task =
            tasks.iter().find(|task| engine::running(lab, &service).is_ok_and(|of| of[0].id == task.id));
        let task = task.context("no task")?;
        lab::output(task.command("ip").args(["link", "set", "eth0", "down"]))?;
        kill(Pid::from_raw(task.pid.try_into()?), Signal::SIGKILL)?;
        engine::until_running(lab, &service, 0)?;
        until("no node knows it any more", Duration::from_secs(5), || {
            let refused = |to| as_client(|| client::connect_from(client::anywhere(to), to).map(drop)).err();
            let errors: Vec<_> = way.targets(lab).into_iter().map(refused).collect();
            let all = errors.iter().flatten().all(|error| format!("{error:#}").contains("refused"));
            Ok((all && errors.iter().all(Option::is_some)).then_some(()))
        })?;
        let mut times = Vec::new();
        for (to, connection) in &mut connections {
            let started = Instant::now();
            let error = connection.ask().err().map(|error| format!("{error:#}")).unwrap_or_default();
            ensure!(error.contains("reset"), "{way} by {to}: {error:?}");
            ensure!(started.elapsed() < AT_ONCE, "{way} by {to}: only after {:?}", started.elapsed());
            times.push(format!("{:.1} ms", started.elapsed().as_secs_f32() * 1e3));
        }
        figure!("{way}: reset after {times:?}, by the task's node and by another");
        lab.reset()?;
    }
    Ok(())
}

/// UDP has no connection to lose: the next datagram goes to a task that lives.
pub(crate) fn datagrams_of_a_dead_task_go_to_another(lab: &Lab) -> Result<()> {
    let tasks = ways::create_web(lab, 3, &["--restart-condition=none"])?;
    for way in Way::all().filter(|way| way.back == ways::Back::Tunnel || way.family == ways::Family::V6) {
        let to = way.to(&lab.nodes[1]);
        let source = SocketAddr::new(way.family.client(), 23_950);
        let first = as_client(|| client::udp(source, to, b"first"))?;
        let Some(task) = tasks.iter().find(|task| first.task.ends_with(&task.id)) else { continue };
        kill(Pid::from_raw(task.pid.try_into()?), Signal::SIGKILL)?;
        let began = Instant::now();
        let next = until("another task answers", Duration::from_secs(5), || {
            let answer = as_client(|| client::udp_within(source, to, b"next", Duration::from_millis(50)));
            Ok(answer.ok().filter(|answer| answer.task != first.task))
        })?;
        let milliseconds = began.elapsed().as_millis();
        figure!("{way}: {} after {} was killed, {milliseconds} ms later", next.task, first.task);
        ensure!(milliseconds < 2000, "only after {milliseconds} ms");
    }
    Ok(())
}
