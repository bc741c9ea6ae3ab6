//! Names as a task asks for them: every kind of record, many questions, and resolvers that are dead.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::dns::{self, A, AAAA, NO_ERROR, PTR};
use crate::engine::{self, Task};
use crate::figure;
use crate::lab::{self, Lab, as_host, command_in, until, within};
use crate::overlay::{ENCRYPTED, create_idle, create_network};
use crate::undo::Undo;

const SUBNET: &str = "10.93.0.0/24";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 93, 0, 1);
const SUBNET6: &str = "fd00:93::/64";
const PREFIX6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x93, 0, 0, 0, 0, 0, 0);
/// Too many for an answer of 512 bytes.
const MANY: usize = 35;
/// Questions a second.
const RATE: u32 = 1000;
/// For how long, s, unless `SHOAL_DNS_S` says so.
const DURATION_S: u64 = 5;
/// A question without an answer for this long has failed, as resolvers take it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Shorter than any time that is given to a resolver before the next one is asked.
const SLOWEST: Duration = Duration::from_millis(400);

/// A record as dig prints it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Record {
    ttl: u32,
    kind: String,
    data: String,
}

/// What dig printed.
#[derive(Clone, Debug)]
struct Dug {
    status: String,
    /// Records by section: `ANSWER`, `AUTHORITY`, `ADDITIONAL`.
    sections: BTreeMap<String, Vec<Record>>,
    printed: String,
}

impl Dug {
    fn data(&self, section: &str) -> BTreeSet<String> {
        self.sections.get(section).into_iter().flatten().map(|record| record.data.clone()).collect()
    }
}

fn dig(task: &Task, words: &[&str]) -> Result<Dug> {
    let printed = lab::output(task.command("dig").args(["+time=2", "+tries=2"]).args(words))?;
    let status = printed.split_once("status: ").and_then(|(_, rest)| rest.split(',').next());
    let status = status.with_context(|| printed.clone())?.to_owned();
    let mut sections: BTreeMap<String, Vec<Record>> = BTreeMap::new();
    let mut section = None;
    for line in printed.lines() {
        if let Some(name) = line.strip_prefix(";; ").and_then(|line| line.strip_suffix(" SECTION:")) {
            section = Some(name.to_owned());
        } else if line.is_empty() {
            section = None;
        } else if let Some(section) = section.as_ref().filter(|_| !line.starts_with(';')) {
            let mut words = line.split_whitespace();
            let ttl = words.nth(1).and_then(|ttl| ttl.parse().ok()).with_context(|| line.to_owned())?;
            let kind = words.nth(1).context("a record without a type")?.to_owned();
            let data = words.collect::<Vec<_>>().join(" ");
            sections.entry(section.clone()).or_default().push(Record { ttl, kind, data });
        }
    }
    Ok(Dug { status, sections, printed })
}

fn v6(v4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(PREFIX6.to_bits() | u128::from(v4.to_bits()))
}

/// Asks, and compares the answer's records.
fn expect(task: &Task, words: &[&str], expected: &BTreeSet<String>) -> Result<Dug> {
    let what = words.join(" ");
    let dug = dig(task, words)?;
    ensure!(dug.status == "NOERROR", "dig {what}: {}", dug.printed);
    ensure!(dug.data("ANSWER") == *expected, "dig {what}: expected {expected:?}: {}", dug.printed);
    let all = dug.sections.values().flatten();
    let wrong = all.filter(|record| record.ttl != 5).count();
    ensure!(wrong == 0, "dig {what}: {wrong} records without a time to live of 5 s: {}", dug.printed);
    Ok(dug)
}

/// Both types of addresses.
fn expect_addresses(task: &Task, name: &str, addresses: &[Ipv4Addr]) -> Result<()> {
    expect(task, &[name, "A"], &addresses.iter().map(Ipv4Addr::to_string).collect())?;
    let all6 = addresses.iter().map(|address| v6(*address).to_string()).collect();
    expect(task, &[name, "AAAA"], &all6).map(drop)
}

fn set<const N: usize>(texts: [&str; N]) -> BTreeSet<String> {
    texts.map(str::to_owned).into()
}

/// What the cases ask for.
struct World {
    asker: Task,
    web: Vec<Task>,
    rr: Vec<Task>,
    vip: Ipv4Addr,
}

fn create(lab: &Lab, options: &[&str]) -> Result<World> {
    create_network(lab, "front", &[&["--ipv6", "--subnet", SUBNET, "--subnet", SUBNET6], options].concat())?;
    let web =
        ["--replicas", "3", "--network", "name=front,alias=api", "--publish", "8080:80", "shoal/whoami"];
    let web = engine::create(lab, "web", 3, &web)?;
    let rr = ["--replicas", "2", "--endpoint-mode", "dnsrr", "--network", "front"];
    let rr = [&rr[..], &["--publish", "mode=host,target=80,published=8085", "shoal/whoami"]].concat();
    let rr = engine::create(lab, "rr", 2, &rr)?;
    let asker = create_idle(lab, "asker", &["--network", "front"])?;
    let vips = engine::vips(lab, "web")?;
    let vip = vips.into_iter().find(|vip| vip.octets()[..2] == GATEWAY.octets()[..2]).context("no VIP")?;
    // The last ones may have come after the asker's node got to know of them.
    until("all tasks have names", Duration::from_secs(5), || {
        let found = dig(&asker, &["tasks.web", "A"])?.data("ANSWER").len();
        let found = found + dig(&asker, &["rr", "A"])?.data("ANSWER").len();
        Ok((found == web.len() + rr.len()).then_some(()))
    })?;
    Ok(World { asker, web, rr, vip })
}

fn addresses(tasks: &[Task]) -> Result<Vec<Ipv4Addr>> {
    tasks.iter().map(Task::address).collect()
}

pub(crate) fn every_kind_of_record_is_answered(lab: &Lab) -> Result<()> {
    records(lab, &[])
}

pub(crate) fn every_kind_of_record_is_answered_on_an_encrypted_network(lab: &Lab) -> Result<()> {
    records(lab, ENCRYPTED)
}

/// Every row of docs/dns.md, on networks with these options.
fn records(lab: &Lab, options: &[&str]) -> Result<()> {
    let World { asker, web, rr, vip } = create(lab, options)?;
    let asker = &asker;
    let tasks = addresses(&web)?;
    for name in ["web", "WEB", "api", "web.front", "api.front"] {
        expect_addresses(asker, name, &[vip])?;
    }
    for name in ["tasks.web", "tasks.api", "tasks.web.front", "Tasks.Web"] {
        expect_addresses(asker, name, &tasks)?;
    }
    expect_addresses(asker, "rr", &addresses(&rr)?)?;
    figure!(
        "A and AAAA: VIP, tasks., alias, tasks. of an alias, with the network's name, in capitals, dnsrr"
    );
    for (slot, task) in (1..).zip(&web) {
        let (name, short) = (format!("web.{slot}.{}", task.id), &task.id[..12]);
        for name in [&name[..], &format!("{name}.front"), &task.id, short] {
            expect_addresses(asker, name, &[task.address()?])?;
        }
        reverse(asker, task.address()?, &format!("{name}.front."))?;
    }
    reverse(asker, vip, "web.front.")?;
    figure!(
        "A and AAAA of each task by its name, its id and its host name; PTR of tasks and of the VIP, both families"
    );
    let firsts: BTreeSet<String> = (0..40)
        .map(|_| Ok(dig(asker, &["rr", "A"])?.sections["ANSWER"][0].data.clone()))
        .collect::<Result<_>>()?;
    ensure!(firsts.len() == 2, "40 answers begin with {firsts:?}");
    services(lab, asker, &web, &rr, vip)?;
    nothing(lab, asker)?;
    transports(lab, asker, vip)
}

fn reverse(asker: &Task, address: Ipv4Addr, name: &str) -> Result<()> {
    for address in [address.into(), IpAddr::from(v6(address))] {
        expect(asker, &["-x", &address.to_string()], &set([name]))?;
    }
    Ok(())
}

/// SRV, with the addresses that come along.
fn services(lab: &Lab, asker: &Task, web: &[Task], rr: &[Task], vip: Ipv4Addr) -> Result<()> {
    let named = json!({
        "Name": "named",
        "TaskTemplate": { "ContainerSpec": { "Image": "shoal/whoami" }, "Networks": [{ "Target": "front" }] },
        "EndpointSpec": { "Ports": [{ "Name": "http", "TargetPort": 80, "PublishedPort": 8090 }] },
    });
    let answer = engine::call(lab.manager(), "POST", "/services/create", &named.to_string())?;
    ensure!(answer.status == 201, "{}", answer.body);
    engine::until_running(lab, "named", 1)?;
    let of = |name: &str, tasks: &[Task]| -> Result<(BTreeSet<String>, BTreeSet<String>)> {
        let target = |(slot, task): (usize, &Task)| format!("{name}.{}.{}.front.", slot + 1, task.id);
        let along = addresses(tasks)?;
        let along = along.into_iter().flat_map(|v4| [v4.to_string(), v6(v4).to_string()]).collect();
        Ok((tasks.iter().enumerate().map(target).collect(), along))
    };
    let vips = (set(["web.front."]), BTreeSet::from([vip.to_string(), v6(vip).to_string()]));
    for (name, (targets, along)) in
        [("_80._tcp.web", vips), ("_80._tcp.tasks.web", of("web", web)?), ("_80._tcp.rr", of("rr", rr)?)]
    {
        let dug = dig(asker, &[name, "SRV"])?;
        let records = dug.data("ANSWER");
        // Priority, weight, port and target.
        let seen: BTreeSet<String> = records
            .iter()
            .filter_map(|data| data.split_once(" 80 "))
            .map(|(_, target)| target.to_owned())
            .collect();
        ensure!(seen == targets && records.len() == targets.len(), "expected {targets:?}: {}", dug.printed);
        ensure!(dug.data("ADDITIONAL") == along, "expected {along:?}: {}", dug.printed);
    }
    let dug = dig(asker, &["_http._tcp.named", "SRV"])?;
    ensure!(dug.data("ANSWER").iter().any(|data| data.ends_with(" 80 named.front.")), "{}", dug.printed);
    figure!("SRV by number and by name, of VIPs, tasks and dnsrr, with the addresses along");
    Ok(())
}

/// What has no records of a type, and what there is not.
fn nothing(lab: &Lab, asker: &Task) -> Result<()> {
    create_network(lab, "back", &["--subnet", "10.94.0.0/24"])?;
    engine::create(lab, "stranger", 1, &["--network", "back", "shoal/whoami"])?;
    let both = create_idle(lab, "both", &["--network", "front", "--network", "back"])?;
    let no_data: [(&Task, [&str; 2]); 4] = [
        (asker, ["web", "MX"]),
        (asker, ["tasks.web", "TXT"]),
        (&both, ["stranger", "AAAA"]),
        (&both, ["tasks.stranger", "AAAA"]),
    ];
    for (task, words) in no_data {
        let dug = dig(task, &words)?;
        let soa = dug.sections.get("AUTHORITY").is_some_and(|records| records[0].kind == "SOA");
        ensure!(dug.status == "NOERROR" && dug.data("ANSWER").is_empty() && soa, "{}", dug.printed);
    }
    let unused = ["-x", "10.93.0.200"];
    for words in [&["stranger", "A"][..], &["tasks.stranger", "A"], &["tasks.nosuch", "AAAA"], &unused] {
        let dug = dig(asker, words)?;
        let soa = dug.sections.get("AUTHORITY").is_some_and(|records| records[0].kind == "SOA");
        ensure!(dug.status == "NXDOMAIN" && soa, "dig {}: {}", words.join(" "), dug.printed);
    }
    ensure!(dig(&both, &["stranger", "A"])?.data("ANSWER").len() == 1, "a task on both networks");
    figure!("NODATA and NXDOMAIN, each with its SOA; a service of another network is none");
    Ok(())
}

/// TCP, EDNS, and answers that do not fit.
fn transports(lab: &Lab, asker: &Task, vip: Ipv4Addr) -> Result<()> {
    let expected = set([&vip.to_string()[..]]);
    for words in [&["+tcp"][..], &["+edns=0"], &["+noedns"], &["+tcp", "+noedns"]] {
        let dug = expect(asker, &[&["web", "A"], words].concat(), &expected)?;
        let has_edns = dug.printed.contains("; EDNS: version: 0");
        ensure!(has_edns != words.contains(&"+noedns"), "{}", dug.printed);
    }
    let dug = dig(asker, &["web", "A", "+edns=1", "+noednsnegotiation"])?;
    ensure!(dug.status == "BADVERS", "{}", dug.printed);
    let count = MANY.to_string();
    let many = ["--replicas", &count, "--endpoint-mode", "dnsrr", "--network", "front"];
    let many = engine::create(lab, "many", MANY, &[&many[..], &["shoal/exec", "sleep", "1000000"]].concat())?;
    let all: BTreeSet<String> = addresses(&many)?.iter().map(Ipv4Addr::to_string).collect();
    until("all tasks have names", Duration::from_secs(5), || {
        Ok((dig(asker, &["many", "A", "+tcp"])?.data("ANSWER") == all).then_some(()))
    })?;
    let cut = dig(asker, &["many", "A", "+noedns", "+ignore"])?;
    let flags = cut.printed.split_once("flags: ").and_then(|(_, rest)| rest.split(';').next());
    ensure!(flags.is_some_and(|flags| flags.split(' ').any(|flag| flag == "tc")), "not cut: {}", cut.printed);
    // dig asks again by TCP, or takes a larger answer.
    for words in [&["+noedns"][..], &["+bufsize=4096", "+ignore"]] {
        expect(asker, &[&["many", "A"], words].concat(), &all)?;
    }
    figure!("UDP, TCP and EDNS; {MANY} addresses come cut by UDP, whole by TCP and EDNS");
    Ok(())
}

/// How many questions were answered how fast.
struct Load {
    asked: usize,
    /// Those without an answer, or with a wrong one.
    failed: Vec<String>,
    /// Of the others, ascending.
    times: Vec<Duration>,
}

impl Load {
    fn share(&self, percent: usize) -> Duration {
        self.times
            .get((self.times.len() * percent / 100).min(self.times.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    }

    fn tell(&self, what: &str) -> Result<()> {
        figure!(
            "{what}: {} questions, {} failed; half within {:.2?}, 99 % within {:.2?}, all within {:.2?}",
            self.asked,
            self.failed.len(),
            self.share(50),
            self.share(99),
            self.share(100)
        );
        ensure!(self.failed.is_empty(), "{}", self.failed[..self.failed.len().min(5)].join("\n    "));
        Ok(())
    }
}

/// Questions, and how many records the answer to each has.
fn questions(world: &World) -> Vec<(String, u16, usize)> {
    let task = &world.web[0];
    vec![
        ("web".to_owned(), A, 1),
        ("tasks.web".to_owned(), A, 3),
        ("api".to_owned(), AAAA, 1),
        ("rr".to_owned(), A, 2),
        (format!("web.1.{}", task.id), A, 1),
        (dns::reverse(world.vip.into()), PTR, 1),
    ]
}

/// Asks from inside a task, [`RATE`] times a second.
fn ask_much(task: &Task, questions: &[(String, u16, usize)], duration: Duration) -> Result<Load> {
    let namespace = PathBuf::from(format!("/proc/{}/ns/net", task.pid));
    within(&namespace, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(SocketAddr::new(GATEWAY.into(), dns::PORT))?;
        socket.set_nonblocking(true)?;
        let count = u32::try_from(duration.as_millis())? * RATE / 1000;
        let mut load = Load { asked: count as usize, failed: Vec::new(), times: Vec::new() };
        let mut out: HashMap<u16, (Instant, &(String, u16, usize))> = HashMap::new();
        let started = Instant::now();
        let mut next = 0;
        while next < count || !out.is_empty() {
            while next < count && started.elapsed() >= Duration::from_secs(1) / RATE * next {
                let asked = &questions[next as usize % questions.len()];
                let question = dns::question(next as u16, &asked.0, asked.1);
                out.insert(next as u16, (Instant::now(), asked));
                socket.send(&question)?;
                next += 1;
            }
            let mut message = [0; 4096];
            while let Ok(len) = socket.recv(&mut message) {
                let answer = dns::read(&message[..len])?;
                let (sent, asked) = out.remove(&answer.id).context("an answer to no question")?;
                if answer.code == NO_ERROR && answer.records.len() == asked.2 {
                    load.times.push(sent.elapsed());
                } else {
                    load.failed.push(format!("{}: {answer:?}", asked.0));
                }
            }
            out.retain(|_, (sent, asked)| {
                let late = sent.elapsed() > PATIENCE;
                load.failed.extend(late.then(|| format!("{}: no answer", asked.0)));
                !late
            });
            std::thread::sleep(Duration::from_micros(200));
        }
        load.times.sort_unstable();
        Ok(load)
    })
}

fn duration() -> Result<Duration> {
    match std::env::var("SHOAL_DNS_S") {
        Ok(text) => Ok(Duration::from_secs(text.parse().context("SHOAL_DNS_S")?)),
        Err(_) => Ok(Duration::from_secs(DURATION_S)),
    }
}

pub(crate) fn a_thousand_questions_a_second_are_answered(lab: &Lab) -> Result<()> {
    let world = create(lab, &[])?;
    let duration = duration()?;
    let load = ask_much(&world.asker, &questions(&world), duration)?;
    load.tell(&format!("{RATE} a second for {} s", duration.as_secs()))
}

/// The host's resolvers, in a lab that has none: addresses where nobody answers.
struct DeadResolvers {
    sockets: Vec<UdpSocket>,
    /// What gave the switch their addresses.
    undo: Vec<Undo>,
}

impl DeadResolvers {
    /// For `task`'s node.
    fn start(task: &Task) -> Result<Self> {
        let text = std::fs::read_to_string("/etc/resolv.conf")?;
        let named =
            text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok());
        let mut dead = Self { sockets: Vec::new(), undo: Vec::new() };
        for address in named.take(3) {
            let address: IpAddr = address;
            let host = if address.is_loopback() { task.node.name.as_str() } else { "sw" };
            if !address.is_loopback() {
                let ip = |action: &str| {
                    let mut ip = command_in(host, "ip");
                    ip.args(["address", action, &address.to_string(), "dev", "lo"]);
                    ip
                };
                lab::output(&mut ip("add"))?;
                dead.undo.push(Undo::new(ip("del")));
            }
            let socket = as_host(host, || Ok(UdpSocket::bind((address, dns::PORT))?))?;
            socket.set_nonblocking(true)?;
            dead.sockets.push(socket);
        }
        ensure!(!dead.sockets.is_empty(), "this machine's resolv.conf names no resolver");
        Ok(dead)
    }

    /// How many questions have come since it was asked last.
    fn asked(&self) -> usize {
        let came = |socket: &UdpSocket| std::iter::from_fn(|| socket.recv(&mut [0; 512]).ok()).count();
        self.sockets.iter().map(came).sum()
    }
}

pub(crate) fn dead_resolver_delays_no_name_of_the_cluster(lab: &Lab) -> Result<()> {
    let world = create(lab, &[])?;
    let (asker, questions) = (&world.asker, questions(&world));
    ask_much(asker, &questions, Duration::from_secs(1))?.tell("before")?;
    let dead = DeadResolvers::start(asker)?;
    let ends = AtomicBool::new(false);
    let (load, outside) = std::thread::scope(|scope| {
        let outside = scope.spawn(|| ask_outside(asker, &ends));
        let load = ask_much(asker, &questions, duration()?.max(Duration::from_secs(5)));
        ends.store(true, Ordering::Relaxed);
        let outside = outside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        anyhow::Ok((load?, outside))
    })?;
    let came = dead.asked();
    figure!(
        "{outside} questions for names of the outside meanwhile; the dead resolver was asked {came} times"
    );
    ensure!(came >= 64, "the resolvers were not asked: this says nothing");
    load.tell("names of the cluster meanwhile")?;
    ensure!(load.share(100) < SLOWEST, "a name of the cluster took {:?}", load.share(100));
    Ok(())
}

/// Asks for another name of the outside every 5 ms: as many are out as a task may have.
fn ask_outside(task: &Task, ends: &AtomicBool) -> Result<u32> {
    within(&PathBuf::from(format!("/proc/{}/ns/net", task.pid)), || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let mut asked = 0;
        while !ends.load(Ordering::Relaxed) {
            let question = dns::question(asked as u16, &format!("x{asked}.example.com"), A);
            socket.send_to(&question, (GATEWAY, dns::PORT))?;
            asked += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(asked)
    })
}
