//! Tasks as real processes with real links, in a network namespace of the test's own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, UdpSocket};

use super::*;
use crate::links::{DefaultRoute, EndpointLink, Links, TaskAddress, TaskNetwork, host_link_name};
use crate::sys::testing::{KillTasks, in_netns, program, run, until};

const TASK: &str = "0123456789abcdefghijklmno";
const ADDR: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

fn spec(image: &str, args: &[&str]) -> TaskSpec {
    TaskSpec {
        image: image.to_owned(),
        command: vec![],
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["GREETING=hello world".to_owned()],
        dir: String::new(),
        user: String::new(),
        hostname: String::new(),
        stop_grace_ns: 0,
        stop_signal: String::new(),
        service_name: "web".to_owned(),
        egress: Vec::new(),
    }
}

struct Fixture {
    runtime: Runtime,
    links: Links,
    // Dropped before the folder that it looks into.
    _tasks: KillTasks,
    _folder: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::new(folder.path().join("tasks"), program());
        Self {
            runtime,
            links: Links::open().unwrap(),
            _tasks: KillTasks(folder.path().join("tasks")),
            _folder: folder,
        }
    }

    async fn prepare(&self, spec: &TaskSpec) -> Result<Prepared, RuntimeError> {
        let names = TaskNames {
            task: "web.1.x".to_owned(),
            node: "here".to_owned(),
            resolv_conf: format!("nameserver {GATEWAY}\noptions ndots:0\n"),
            addresses: vec![ADDR],
        };
        let init = Runtime::plan(&TASK.into(), spec, &names)?;
        self.runtime.prepare(&TASK.into(), spec, &init, Vec::new()).await
    }

    async fn start(&self, spec: &TaskSpec) -> Result<Running, RuntimeError> {
        self.prepare(spec).await?.start().await
    }

    /// A task with a link, of which this namespace's side plays the gateway.
    async fn start_connected(&self, spec: &TaskSpec) -> Running {
        let prepared = self.prepare(spec).await.unwrap();
        let netns = prepared.netns().unwrap();
        let host_name = host_link_name(&TASK.into(), 0).unwrap();
        let link = EndpointLink {
            host_name: host_name.clone(),
            task_name: "eth0".to_owned(),
            addr: ADDR,
            mtu: 1450,
        };
        let index = self.links.add_endpoint(&netns, &link).await.unwrap();
        self.links.start_endpoint(index).await.unwrap();
        run(&format!("ip address add {GATEWAY}/24 dev {host_name}"));
        let network = TaskNetwork {
            addresses: vec![TaskAddress { link: "eth0".to_owned(), addr: ADDR.into(), prefix: 24 }],
            default_routes: vec![DefaultRoute { gateway: GATEWAY.into(), link: "eth0".to_owned() }],
            ..TaskNetwork::default()
        };
        Links::open_in(&netns).unwrap().configure_task(&netns, &network).await.unwrap();
        prepared.start().await.unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.runtime.dir(&TASK.into()).join("log")).unwrap_or_default()
    }

    async fn expect_exit(&self, spec: &TaskSpec) -> Exit {
        self.start(spec).await.unwrap().wait().await
    }
}

/// A connection to the task, once it listens.
async fn connect() -> TcpStream {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        match TcpStream::connect((ADDR, 80)).await {
            Ok(stream) => return stream,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn get(path: &str) -> (String, Vec<u8>, SocketAddr) {
    let mut stream = connect().await;
    let client = stream.local_addr().unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: task\r\nX-Test: yes\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end + 4..].to_vec(), client)
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn a_task_has_the_open_files_that_the_agent_was_started_with() {
    in_netns(|| async {
        let limit = || run("sh -c ulimit${IFS}-n");
        let before = limit();
        limits::raise_open_files().unwrap();
        assert_eq!(limit(), run("sh -c ulimit${IFS}-Hn"));
        let fixture = Fixture::new();
        fixture.expect_exit(&spec("shoal/exec", &["sh", "-c", "ulimit -n"])).await;
        assert_eq!(fixture.log(), before);
    });
}

#[test]
fn folders_are_the_same_from_any_working_directory() {
    let runtime = Runtime::new("tasks".into(), program());
    assert!(runtime.dir(&TASK.into()).is_absolute());
}

#[test]
fn a_programs_number_stays_its_own_until_its_first_process_has_ended() {
    in_netns(|| async {
        let fixture = Fixture::new();
        // What it leaves behind holds the pipe of its output, which the first process waits for a little.
        let script = "setsid sleep 1000 & exit 3";
        let running = fixture.start(&spec("shoal/exec", &["sh", "-c", script])).await.unwrap();
        let exit = fixture.runtime.dir(&TASK.into()).join("exit.json");
        let mut ended_before_the_shim = false;
        until("the program is a zombie, or all is over", || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", running.pid())).unwrap_or_default();
            ended_before_the_shim = stat.contains(") Z ");
            ended_before_the_shim || exit.exists()
        })
        .await;
        assert!(ended_before_the_shim);
        assert_eq!(running.wait().await.code, 3);
        assert!(!exists(running.pid()));
    });
}

#[test]
fn whoami_answers_by_its_link_and_stops_when_told() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let running = fixture.start_connected(&spec("shoal/whoami:latest", &[])).await;

        let (head, body, client) = get("/any/path?x=1").await;
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        let body = String::from_utf8(body).unwrap();
        for line in [
            "task: web.1.x".to_owned(),
            format!("task-id: {TASK}"),
            "service: web".to_owned(),
            "node: here".to_owned(),
            format!("local: {ADDR}:80"),
            format!("client: {client}"),
            "method: GET".to_owned(),
            "path: /any/path?x=1".to_owned(),
            "x-test: yes".to_owned(),
        ] {
            assert!(body.lines().any(|have| have == line), "{line:?} in {body}");
        }
        let (head, body, _) = get("/bytes/1000003").await;
        assert!(head.contains("content-length: 1000003"), "{head}");
        assert!(body.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
        assert_eq!(body.len(), 1_000_003);
        assert!(get("/bytes/x").await.0.starts_with("HTTP/1.1 400"));

        let socket = UdpSocket::bind((GATEWAY, 0)).await.unwrap();
        socket.send_to(b"ping", (ADDR, 80)).await.unwrap();
        let mut buffer = [0; 256];
        let (len, _) = socket.recv_from(&mut buffer).await.unwrap();
        let expected = format!("task=web.1.x node=here client={}\nping", socket.local_addr().unwrap());
        assert_eq!(String::from_utf8_lossy(&buffer[..len]), expected);

        // A request in flight is finished, with the connection that it came by.
        let mut slow = connect().await;
        slow.write_all(b"GET /slow/300 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let pid = running.pid();
        let mut answer = String::new();
        let (exit, read) = tokio::join!(
            running.stop(Signal::SIGTERM, Duration::from_secs(5)),
            slow.read_to_string(&mut answer)
        );
        read.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert_eq!((exit.code, exit.err.as_str()), (0, ""));
        assert!(!exists(pid));
        // The pair goes with the task's namespace, which the kernel takes down in its own time.
        until("the link is gone", || !run("ip -o link").contains("sh0123456789")).await;
    });
}

#[test]
fn a_killed_program_ends_with_137_and_one_that_ignores_the_signal_is_killed() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let running = fixture.start(&spec("shoal/exec", &["sleep", "1000"])).await.unwrap();
        let command = fs::read(format!("/proc/{}/cmdline", running.pid())).unwrap();
        assert_eq!(command, b"sleep\x001000\0");
        run(&format!("kill -9 {}", running.pid()));
        assert_eq!(running.wait().await.code, 137);

        let stubborn = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"];
        let running = fixture.start(&spec("shoal/exec", &stubborn)).await.unwrap();
        until("the trap is set", || fixture.log().contains("ready")).await;
        let exit = running.stop(Signal::SIGTERM, Duration::from_millis(100)).await;
        assert_eq!(exit.code, 137);
    });
}

#[test]
fn a_task_outlives_its_agent_and_is_found_again() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let running = fixture.start(&spec("shoal/exec", &["sleep", "1000"])).await.unwrap();
        let (pid, since_ns) = (running.pid(), running.since_ns());
        drop(running);

        let found = fixture.runtime.find().unwrap().pop().unwrap();
        assert_eq!(found.file.task.as_str(), TASK);
        let running = found.state.unwrap();
        assert_eq!(running.pid(), pid);
        assert!(running.since_ns().abs_diff(since_ns) < 1_000_000_000);
        // sleep has no handler, and is not process 1: the signal ends it.
        assert_eq!(running.stop(Signal::SIGTERM, Duration::from_secs(5)).await.code, 128 + 15);

        let ended = fixture.runtime.find().unwrap().pop().unwrap().state.unwrap_err();
        assert_eq!(ended.code, 128 + 15);
        fixture.runtime.remove(&TASK.into()).unwrap();
        assert!(fixture.runtime.find().unwrap().is_empty());
    });
}

#[test]
fn a_task_whose_file_is_spoilt_does_not_run_on_unknown_to_the_agent() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let running = fixture.start(&spec("shoal/exec", &["sleep", "1000"])).await.unwrap();
        fs::write(fixture.runtime.dir(&TASK.into()).join("task.json"), "{}").unwrap();
        assert!(fixture.runtime.find().unwrap().is_empty());
        assert_eq!(timeout(Duration::from_secs(5), running.wait()).await.unwrap().code, 137);
        assert!(!exists(running.pid()));
    });
}

#[test]
fn a_task_whose_agent_goes_before_the_start_goes_as_well() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let prepared = fixture.prepare(&spec("shoal/exec", &["sleep", "1000"])).await.unwrap();
        let shim = prepared.shim;
        drop(prepared);
        until("the shim is gone", || !exists(shim)).await;
        let ended = fixture.runtime.find().unwrap().pop().unwrap().state.unwrap_err();
        assert!(ended.err.contains("the agent went away"), "{ended:?}");
    });
}

#[test]
fn what_a_task_leaves_behind_dies_with_it() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let script = "setsid sleep 987654321 & setsid sleep 987654321 & echo started; exit 3";
        let exit = fixture.expect_exit(&spec("shoal/exec", &["sh", "-c", script])).await;
        assert_eq!(exit.code, 3);
        assert_eq!(fixture.log(), "started\n");
        let left = || {
            let listed = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
            let mut commands = listed.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
            commands.any(|command| command == b"sleep\x00987654321\0")
        };
        assert!(!left());
    });
}

#[test]
fn a_task_sees_its_own_names_processes_and_environment() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let script = "cat /etc/resolv.conf /etc/hosts /etc/hostname; hostname; echo $GREETING $SHOAL_TASK_ID; \
                      echo processes $(ls -d /proc/[0-9]* | wc -l); echo pid $$; echo oops >&2; id -u; pwd";
        let mut spec = spec("shoal/exec", &["sh", "-c", script]);
        spec.user = "nobody".to_owned();
        spec.dir = "/tmp".to_owned();
        spec.hostname = "box".to_owned();
        assert_eq!(fixture.expect_exit(&spec).await.code, 0);
        let log = fixture.log();
        assert!(log.starts_with("nameserver 10.0.1.1\noptions ndots:0\n127.0.0.1\tlocalhost\n"), "{log}");
        for line in ["10.0.1.5\tbox", &format!("hello world {TASK}"), "pid 2", "oops", "/tmp", "65534", "box"]
        {
            assert!(log.lines().any(|have| have == line), "{line:?} in {log}");
        }
        // The shim, the shell, ls and wc, and perhaps the substitution's own shell.
        let processes = log.lines().find_map(|line| line.strip_prefix("processes ")).unwrap();
        assert!(processes.parse::<u32>().unwrap() <= 5, "{log}");
    });
}

#[test]
fn a_program_that_can_not_be_started_is_an_error_that_names_it() {
    in_netns(|| async {
        let fixture = Fixture::new();
        let fails = async |spec: &TaskSpec| match fixture.start(spec).await {
            Err(RuntimeError::Start { code, text }) => (code, text),
            other => panic!("{other:?}"),
        };
        let (code, text) = fails(&spec("shoal/exec", &["no-such-program"])).await;
        assert_eq!(
            (code, text.as_str()),
            (127, "exec: \"no-such-program\": executable file not found in $PATH")
        );
        let (code, text) = fails(&spec("shoal/exec", &["/etc/passwd"])).await;
        assert!(code == 126 && text.contains("/etc/passwd") && text.contains("ermission"), "{text}");
        let mut elsewhere = spec("shoal/exec", &["true"]);
        elsewhere.dir = "/no/such/folder".to_owned();
        let (code, text) = fails(&elsewhere).await;
        assert!(code == 126 && text.contains("/no/such/folder"), "{text}");
        let mut somebody = spec("shoal/exec", &["true"]);
        somebody.user = "nobody-of-that-name".to_owned();
        let (code, text) = fails(&somebody).await;
        assert!(code == 126 && text.contains("nobody-of-that-name"), "{text}");
        let mut signal = spec("shoal/exec", &["true"]);
        signal.stop_signal = "SIGFOO".to_owned();
        let error = fixture.prepare(&signal).await.unwrap_err();
        assert!(error.to_string().contains("SIGFOO"), "{error}");
    });
}
