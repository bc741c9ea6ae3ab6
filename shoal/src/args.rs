//! The command line.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use mesh_agent::XdpMode;
use mesh_agent::dataplane::inspect::explain::At;
use mesh_agent::dataplane::inspect::flows::{FlowEnd, FlowStage};

/// A routing mesh and overlay network for Docker Swarm's commands, with its dataplane in eBPF.
#[derive(Debug, Parser)]
#[command(name = "shoal", version = crate::facts::VERSION)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the agent: one on every host, managers and workers alike.
    Agent(Box<AgentArgs>),
    /// Shows this node: its place in the cluster, how its dataplane is attached, what is in it, what goes wrong.
    Status(StatusArgs),
    /// Shows what happens to the swarm's nodes, networks, services, tasks and attachments, as it happens: on a manager.
    Watch(WatchArgs),
    /// Shows the flows that this node knows.
    Flows(FlowsArgs),
    /// Shows how many packets this node dropped, why, and the last of each kind.
    Drops(DropsArgs),
    /// Shows what this node does with a packet, and why. Sends nothing.
    Explain(ExplainArgs),
    /// What managers do with networks beyond the `docker` command line.
    Network(NetworkArgs),
    /// Join tokens that hold for a time, and for so many nodes: on a manager.
    Token(TokenArgs),
    /// What managers do with nodes beyond the `docker` command line.
    Node(NodeArgs),
    /// Writes the swarm's state to a file: on a manager.
    Backup(BackupArgs),
    /// Makes this host the only manager of a swarm whose managers are lost, with what a backup holds.
    Restore(RestoreArgs),
    /// Gives a process or a network namespace of this node an interface on an attachable network.
    Attach(AttachArgs),
    /// Takes such an interface away again.
    Detach(DetachArgs),
    /// Shows what is attached on this node.
    Attachments(AttachmentsArgs),
    /// Shows the version.
    Version,
}

/// Where a node's dataplane is looked for.
#[derive(Debug, clap::Args)]
pub(crate) struct PinsArgs {
    /// The agent's folder on a BPF file system.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/shoal", env = "SHOAL_BPFFS")]
    pub(crate) bpffs: PathBuf,
}

/// Where a node's state is looked for.
#[derive(Debug, clap::Args)]
pub(crate) struct StateArgs {
    /// The agent's state folder.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shoal", env = "SHOAL_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
}

/// Where the agent is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct SocketArgs {
    /// The folder of the agent's socket.
    #[arg(long, value_name = "DIR", default_value = "/run/shoal", env = "SHOAL_RUN_DIR")]
    pub(crate) run_dir: PathBuf,
}

/// What to do with networks.
#[derive(Debug, clap::Args)]
pub(crate) struct NetworkArgs {
    #[command(subcommand)]
    pub(crate) command: NetworkCommand,
}

/// What to do with networks.
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Has every node replace the keys that encrypted networks are encrypted with. On a manager; loses no packet.
    RotateKeys(SocketArgs),
}

/// What to do with join tokens.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    pub(crate) command: TokenCommand,
}

/// What to do with join tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a token, and shows the command that a host joins by.
    Create(TokenCreateArgs),
    /// Shows the tokens, without their secrets.
    Ls(TokenListArgs),
    /// Removes tokens: no host joins by them any longer. Nodes that did stay.
    Rm(TokenRemoveArgs),
}

/// What token to make.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenCreateArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// What hosts become that join by it: worker or manager.
    #[arg(long, value_name = "ROLE")]
    pub(crate) role: String,
    /// How long it holds: 1m to 8760h.
    #[arg(long, value_name = "TIME", default_value = "24h")]
    pub(crate) expires: String,
    /// For how many nodes it holds; any number where not given.
    #[arg(long, value_name = "N")]
    pub(crate) uses: Option<u32>,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How to show tokens.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenListArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which tokens to remove.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenRemoveArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Tokens, each by its id or the beginning of one.
    #[arg(value_name = "ID", required = true)]
    pub(crate) tokens: Vec<String>,
}

/// What to do with nodes.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    pub(crate) command: NodeCommand,
}

/// What to do with nodes.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Shows the nodes, and which of them ask to come back because their certificates have expired.
    Ls(NodeListArgs),
    /// Lets a node whose certificate has expired have another, once and within an hour.
    Approve(NodeApproveArgs),
}

/// How to show nodes.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeListArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which node comes back.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeApproveArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// The node, by its id, its host name or the beginning of its id.
    #[arg(value_name = "NODE")]
    pub(crate) node: String,
}

/// What to back up, and where to.
#[derive(Debug, clap::Args)]
pub(crate) struct BackupArgs {
    /// The file to make; `-` for standard output.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Replaces the file if it exists.
    #[arg(long)]
    pub(crate) force: bool,
    /// Reads what a manager left in the state folder, whose agent does not run.
    #[arg(long)]
    pub(crate) offline: bool,
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    #[command(flatten)]
    pub(crate) state: StateArgs,
    /// With --offline, where autolock is on: a file with what `docker swarm unlock-key` shows; `-` for standard input.
    #[arg(long, value_name = "FILE", requires = "offline")]
    pub(crate) unlock_key_file: Option<PathBuf>,
}

/// What to restore, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// The backup; `-` for standard input.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The address by which the other nodes reach this one, or the interface that has it: best that of a former manager. A node
    /// of the swarm keeps its own.
    #[arg(long, value_name = "ADDRESS|INTERFACE[:PORT]")]
    pub(crate) advertise_addr: Option<String>,
    /// Where the manager listens; 0.0.0.0:2377 where not given.
    #[arg(long, value_name = "ADDRESS|INTERFACE[:PORT]")]
    pub(crate) listen_addr: Option<String>,
    /// The address for the traffic between nodes; the advertised one where not given.
    #[arg(long, value_name = "ADDRESS|INTERFACE")]
    pub(crate) data_path_addr: Option<String>,
    /// Even if managers of the swarm answer.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
}

/// What to attach, and to what.
#[derive(Debug, clap::Args)]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// The network, by its name or id: one that was made with --attachable.
    #[arg(long, value_name = "NETWORK")]
    pub(crate) network: String,
    /// What the network's other members call it; the beginning of its id where not given.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// A further name, which it may share with others. May be repeated.
    #[arg(long = "alias", value_name = "NAME")]
    pub(crate) aliases: Vec<String>,
    /// Its IPv4 address; any free one where not given.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ip: Option<Ipv4Addr>,
    /// The interface that it gets; the first free of eth0, eth1… where not given.
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: Option<String>,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Prints JSON.
    #[arg(long, conflicts_with = "command")]
    pub(crate) json: bool,
}

/// What to attach.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct TargetArgs {
    /// A process of this node, in a network namespace of its own; it is attached until it ends.
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// A network namespace, by the file that it is mounted on; it is attached until that is gone.
    #[arg(long, value_name = "PATH")]
    pub(crate) netns: Option<PathBuf>,
    /// A program with its arguments, to be run with the network's names in a network namespace of its own.
    #[arg(value_name = "COMMAND", last = true)]
    pub(crate) command: Vec<String>,
}

/// What to detach.
#[derive(Debug, clap::Args)]
pub(crate) struct DetachArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Attachments of this node, each by its id, the beginning of one, or its name.
    #[arg(value_name = "ATTACHMENT", required = true)]
    pub(crate) attachments: Vec<String>,
}

/// How to show what is attached.
#[derive(Debug, clap::Args)]
pub(crate) struct AttachmentsArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What of this node to show, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// Shows all nodes as the managers know them, instead of this one: on a manager.
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) pins: PinsArgs,
    #[command(flatten)]
    pub(crate) state: StateArgs,
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to watch, and how to show it.
#[derive(Debug, clap::Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Only objects of this kind. May be repeated.
    #[arg(long = "kind", value_name = "KIND")]
    pub(crate) kinds: Vec<WatchKind>,
    /// Goes on after this index, as far back as the manager remembers.
    #[arg(long, value_name = "INDEX")]
    pub(crate) since: Option<u64>,
    /// Prints JSON: a line for each change with the whole object, and one now and then where nothing happens.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WatchKind {
    /// What `shoal attach` made.
    Attachment,
    /// The swarm's own settings.
    Cluster,
    /// Networks.
    Network,
    /// Nodes.
    Node,
    /// Services.
    Service,
    /// Tasks.
    Task,
}

/// Which flows to show, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct FlowsArgs {
    #[command(flatten)]
    pub(crate) pins: PinsArgs,
    /// Only flows of this protocol.
    #[arg(long, value_name = "PROTOCOL")]
    pub(crate) protocol: Option<Protocol>,
    /// Only flows of this client: an address, or an address and a port.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub(crate) client: Option<FlowEnd>,
    /// Only flows to what was dialled: an address, or an address and a port.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub(crate) dialled: Option<FlowEnd>,
    /// Only flows to this task: its address, or its address and a port.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub(crate) task: Option<FlowEnd>,
    /// Only flows in the network with this VXLAN identifier; 1 for published ports.
    #[arg(long, value_name = "VNI")]
    pub(crate) vni: Option<u32>,
    /// Only flows at this stage: opening, established or sent.
    #[arg(long, value_name = "STAGE")]
    pub(crate) stage: Option<FlowStage>,
    /// Shows at most so many.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) limit: u64,
    /// Prints JSON: an array with an object for each entry.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which counts to show, and how.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct DropsArgs {
    #[command(flatten)]
    pub(crate) pins: PinsArgs,
    /// Shows every way that a packet can end, not drops alone.
    #[arg(long)]
    pub(crate) all: bool,
    /// Shows them again every second, with what came since.
    #[arg(long, conflicts_with = "follow")]
    pub(crate) watch: bool,
    /// Shows packets as they are dropped, at most ten a second of each kind.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Prints JSON: an object with one for each reason, by its name; with --watch one such line a second, with --follow
    /// one line for each packet.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which packet to explain, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub(crate) pins: PinsArgs,
    #[command(flatten)]
    pub(crate) state: StateArgs,
    /// Who sends it.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) from: SocketAddr,
    /// What it is for.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) to: SocketAddr,
    /// TCP or UDP.
    #[arg(long, value_name = "PROTOCOL")]
    pub(crate) proto: Protocol,
    /// TCP: the first segment of a connection; so it is if nothing else is said.
    #[arg(long, conflicts_with = "ack")]
    pub(crate) syn: bool,
    /// TCP: a segment amid a connection.
    #[arg(long)]
    pub(crate) ack: bool,
    /// Where it comes in: uplink, uplink:INTERFACE, task:ADDRESS or task:INTERFACE.
    #[arg(long, value_name = "PLACE", default_value_t = At::Uplink(None))]
    pub(crate) at: At,
    /// The node that is meant: this one. For another one, says where to run it.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How the agent runs.
#[derive(Debug, clap::Args)]
pub(crate) struct AgentArgs {
    /// Where the node's place in the cluster is kept, and on a manager the cluster's state.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shoal", env = "SHOAL_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    /// Where the Docker-compatible socket is made: `docker.sock` in this folder.
    #[arg(long, value_name = "DIR", default_value = "/run/shoal", env = "SHOAL_RUN_DIR")]
    pub(crate) run_dir: PathBuf,
    /// A folder on a BPF file system, where the dataplane outlives the agent.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/shoal", env = "SHOAL_BPFFS")]
    pub(crate) bpffs: PathBuf,
    /// The node's name; the host's own where not given.
    #[arg(long, value_name = "NAME", env = "SHOAL_HOSTNAME")]
    pub(crate) hostname: Option<String>,
    /// How XDP runs on the uplinks: auto, native, generic or off.
    #[arg(long, value_name = "MODE", default_value_t = XdpMode::Auto, env = "SHOAL_XDP")]
    pub(crate) xdp: XdpMode,
    /// An interface to the other nodes and to clients; those with the advertised address and the data path's where not
    /// given. May be repeated.
    #[arg(long = "uplink", value_name = "IF", num_args = 1.., env = "SHOAL_UPLINK", value_delimiter = ',')]
    pub(crate) uplinks: Vec<String>,
    /// Flows that the dataplane remembers at once, about 100 bytes each.
    #[arg(long, value_name = "N", default_value_t = 262_144, env = "SHOAL_FLOWS_MAX",
          value_parser = clap::value_parser!(u32).range(1024..=67_108_864))]
    pub(crate) flows_max: u32,
    /// How long the node uses a key for encrypted networks before it makes another, hours.
    #[arg(long, value_name = "HOURS", default_value_t = 12, env = "SHOAL_KEY_ROTATION",
          value_parser = clap::value_parser!(u16).range(1..=8760))]
    pub(crate) key_rotation: u16,
    /// What to log on standard error: error, warn, info, debug or trace, also by module
    /// (`info,mesh_agent=debug`).
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "SHOAL_LOG")]
    pub(crate) log: String,
    /// Instead of running: removes all that agents with these folders left on this host (tasks, programs, interfaces,
    /// netfilter tables and state), and shows what that was.
    #[arg(long)]
    pub(crate) uninstall: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_are_read() {
        let line = "shoal agent --run-dir /run/shoal/n1 --xdp off --uplink a --uplink b --flows-max 4096 --hostname n1";
        let Command::Agent(args) = Args::parse_from(line.split(' ')).command else { panic!("not the agent") };
        assert_eq!(args.run_dir, PathBuf::from("/run/shoal/n1"));
        assert_eq!((args.xdp, args.flows_max), (XdpMode::Off, 4096));
        assert_eq!(args.uplinks, ["a", "b"]);
        assert_eq!(args.hostname.as_deref(), Some("n1"));
        assert!(!args.uninstall);
    }

    #[test]
    fn what_is_looked_for_is_read() {
        let line =
            "shoal flows --protocol udp --client 192.0.2.7 --dialled [2001:db8::1]:53 --stage sent --limit 5";
        let Command::Flows(flows) = Args::parse_from(line.split(' ')).command else { panic!("not flows") };
        assert_eq!((flows.protocol, flows.stage), (Some(Protocol::Udp), Some(FlowStage::Sent)));
        assert_eq!(flows.client.map(|client| client.to_string()).as_deref(), Some("192.0.2.7"));
        assert_eq!(flows.dialled.and_then(|dialled| dialled.port), Some(53));

        let line =
            "shoal explain --from 192.0.2.7:4000 --to 192.0.2.1:80 --proto tcp --ack --at task:10.0.0.5";
        let Command::Explain(explain) = Args::parse_from(line.split(' ')).command else {
            panic!("not explain")
        };
        assert_eq!((explain.syn, explain.ack), (false, true));
        assert_eq!(explain.at, At::Task("10.0.0.5".to_owned()));
    }

    #[test]
    fn the_agent_is_asked_in_its_run_folder() {
        let line = "shoal network rotate-keys --run-dir /run/shoal/n1";
        let Command::Network(args) = Args::parse_from(line.split(' ')).command else { panic!("not network") };
        let NetworkCommand::RotateKeys(args) = args.command;
        assert_eq!(args.run_dir, PathBuf::from("/run/shoal/n1"));
    }

    #[test]
    fn tokens_and_nodes_are_named() {
        let line = "shoal token create --role worker --uses 3";
        let Command::Token(args) = Args::parse_from(line.split(' ')).command else { panic!("not token") };
        let TokenCommand::Create(args) = args.command else { panic!("not create") };
        assert_eq!((args.role.as_str(), args.expires.as_str(), args.uses), ("worker", "24h", Some(3)));
        let line = "shoal token rm abc def";
        let Command::Token(args) = Args::parse_from(line.split(' ')).command else { panic!("not token") };
        let TokenCommand::Rm(args) = args.command else { panic!("not rm") };
        assert_eq!(args.tokens, ["abc", "def"]);
        let line = "shoal node approve n1 --run-dir /run/shoal/n2";
        let Command::Node(args) = Args::parse_from(line.split(' ')).command else { panic!("not node") };
        let NodeCommand::Approve(args) = args.command else { panic!("not approve") };
        assert_eq!((args.node.as_str(), args.socket.run_dir), ("n1", PathBuf::from("/run/shoal/n2")));
    }

    #[test]
    fn a_backup_and_its_restoration_are_read() {
        let line = "shoal backup x --offline --state-dir /mnt/shoal --unlock-key-file - --force";
        let Command::Backup(args) = Args::parse_from(line.split(' ')).command else { panic!("not backup") };
        assert_eq!((args.file, args.state.state_dir), (PathBuf::from("x"), PathBuf::from("/mnt/shoal")));
        assert!(args.offline && args.force && args.unlock_key_file == Some(PathBuf::from("-")));
        let line =
            "shoal restore - --advertise-addr eth1:2378 --listen-addr 0.0.0.0:2378 --run-dir /run/shoal/n1";
        let Command::Restore(args) = Args::parse_from(line.split(' ')).command else { panic!("not restore") };
        assert_eq!((args.file, args.advertise_addr.as_deref()), (PathBuf::from("-"), Some("eth1:2378")));
        assert_eq!((args.listen_addr.as_deref(), args.force), (Some("0.0.0.0:2378"), false));
    }

    #[test]
    fn one_thing_is_attached() {
        let line = "shoal attach --network front --alias a --alias b --ip 10.0.1.9 -- curl --silent web";
        let Command::Attach(args) = Args::parse_from(line.split(' ')).command else { panic!("not attach") };
        assert_eq!((args.network.as_str(), args.aliases.join(" ").as_str()), ("front", "a b"));
        assert_eq!(args.target.command, ["curl", "--silent", "web"]);
        let line = "shoal attach --network front --netns /run/netns/x --interface net1 --json";
        let Command::Attach(args) = Args::parse_from(line.split(' ')).command else { panic!("not attach") };
        assert_eq!(args.target.netns, Some(PathBuf::from("/run/netns/x")));
        assert!(args.json);
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (line, part) in [
            ("shoal flows --client web", "192.0.2.1:80"),
            ("shoal flows --stage half", "opening, established or sent"),
            ("shoal explain --from 192.0.2.7 --to 192.0.2.1:80 --proto tcp", "--from"),
            ("shoal explain --from 192.0.2.7:1 --to 192.0.2.1:80 --proto tcp --at host", "uplink:INTERFACE"),
            ("shoal explain --from 192.0.2.7:1 --to 192.0.2.1:80 --proto icmp", "tcp, udp"),
            ("shoal drops --watch --follow", "--follow"),
            ("shoal attach --pid 7", "--network"),
            ("shoal attach --network front", "--netns"),
            ("shoal attach --network front --pid 7 --netns /run/netns/x", "--netns"),
            ("shoal attach --network front --pid 7 -- true", "--pid"),
            ("shoal attach --network front --ip web --pid 7", "--ip"),
            ("shoal backup", "FILE"),
            ("shoal backup x --unlock-key-file y", "--offline"),
            ("shoal restore", "FILE"),
            ("shoal detach", "ATTACHMENT"),
            ("shoal token create", "--role"),
            ("shoal token create --role worker --uses many", "--uses"),
            ("shoal token rm", "ID"),
            ("shoal node approve", "NODE"),
            ("shoal agent --xdp sideways", "sideways"),
            ("shoal agent --flows-max 7", "1024"),
            ("shoal agent --key-rotation 0", "1..=8760"),
            ("shoal agent --state-dir", "--state-dir"),
        ] {
            let error = Args::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
