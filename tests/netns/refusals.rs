//! What is wrong with a request is told in Docker's form, names the field, and hurts nothing.

use anyhow::{Context, Result, ensure};

use crate::engine::{self, call, docker_ok};
use crate::figure;
use crate::lab::Lab;

/// A docker command that must fail, and words that its message must have.
struct Refused {
    arguments: &'static [&'static str],
    words: &'static [&'static str],
}

const BY_MANAGER: &[Refused] = &[
    Refused {
        arguments: &[
            "service",
            "create",
            "--detach",
            "--name",
            "second",
            "--publish",
            "8080:80",
            "shoal/whoami",
        ],
        words: &["port '8080' is already in use by service 'web'"],
    },
    Refused {
        arguments: &["service", "create", "--detach", "--name", "web", "shoal/whoami"],
        words: &["name conflicts with an existing object", "web"],
    },
    Refused {
        arguments: &["service", "create", "--detach", "--network", "nosuchnet", "shoal/whoami"],
        words: &["network nosuchnet not found"],
    },
    Refused {
        arguments: &["service", "create", "--detach", "--constraint", "node.hostname~n1", "shoal/whoami"],
        words: &["Constraints", "node.hostname~n1"],
    },
    Refused {
        arguments: &[
            "service",
            "create",
            "--detach",
            "--endpoint-mode",
            "dnsrr",
            "--publish",
            "81:80",
            "shoal/whoami",
        ],
        words: &["ingress mode can't be used with dnsrr mode"],
    },
    Refused {
        arguments: &["service", "create", "--detach", "--name", "not_a.name!", "shoal/whoami"],
        words: &["name must be valid as a DNS name component"],
    },
    Refused {
        arguments: &[
            "service",
            "create",
            "--detach",
            "--mount",
            "type=volume,source=v,target=/v",
            "shoal/whoami",
        ],
        words: &["ContainerSpec.Mounts"],
    },
    Refused {
        arguments: &["service", "create", "--detach", "--limit-cpu", "1", "shoal/whoami"],
        words: &["Resources"],
    },
    Refused { arguments: &["service", "inspect", "nosuch"], words: &["nosuch"] },
    Refused { arguments: &["service", "rm", "nosuch"], words: &["service nosuch not found"] },
    Refused { arguments: &["service", "scale", "--detach", "nosuch=2"], words: &["nosuch"] },
    Refused {
        arguments: &["network", "create", "-d", "overlay", "--subnet", "10.0.0.0/24", "overlapping"],
        words: &["overlaps", "10.0.0.0/24"],
    },
    Refused {
        arguments: &["network", "create", "-d", "overlay", "--subnet", "banana", "fruit"],
        words: &["banana"],
    },
    Refused { arguments: &["network", "create", "-d", "bridge", "local"], words: &["bridge"] },
    Refused { arguments: &["network", "rm", "nosuchnet"], words: &["network nosuchnet not found"] },
    Refused { arguments: &["node", "rm", "n2"], words: &["is not down"] },
    Refused { arguments: &["node", "update", "--availability", "asleep", "n2"], words: &["asleep"] },
    Refused { arguments: &["node", "inspect", "n9"], words: &["n9"] },
    Refused { arguments: &["swarm", "init"], words: &["already part of a swarm"] },
    Refused { arguments: &["swarm", "leave"], words: &["--force"] },
    Refused { arguments: &["run", "alpine"], words: &["Shoal"] },
];

/// What a worker may not, as Docker words it.
const BY_WORKER: &[&[&str]] = &[
    &["node", "ls"],
    &["service", "ls"],
    &["service", "create", "--detach", "shoal/whoami"],
    &["swarm", "join-token", "worker"],
    &["network", "create", "-d", "overlay", "blue"],
];

pub(crate) fn docker_says_what_is_wrong(lab: &Lab) -> Result<()> {
    engine::create(lab, "web", 1, &["--publish", "8080:80", "shoal/whoami"])?;
    let mut wrong = Vec::new();
    for Refused { arguments, words } in BY_MANAGER {
        let ended = engine::docker(lab.manager(), arguments)?;
        let said = format!("{}{}", ended.stdout, ended.stderr);
        if ended.status.success() || !words.iter().all(|word| said.contains(word)) {
            wrong.push(format!(
                "docker {}: expected {words:?}, got {}: {said}",
                arguments.join(" "),
                ended.status
            ));
        }
    }
    for arguments in BY_WORKER {
        let ended = engine::docker(&lab.nodes[1], arguments)?;
        if ended.status.success()
            || !ended.stderr.contains("This node is not a swarm manager. Worker nodes can't be used")
        {
            wrong.push(format!("on a worker, docker {}: {}", arguments.join(" "), ended.stderr));
        }
    }
    figure!("{} wrong commands, {} on a worker", BY_MANAGER.len(), BY_WORKER.len());
    ensure!(wrong.is_empty(), "{}", wrong.join("\n    "));
    unharmed(lab)
}

pub(crate) fn wrong_tokens_and_managers_are_refused(lab: &Lab) -> Result<()> {
    let node = &lab.nodes[2];
    docker_ok(node, &["swarm", "leave"])?;
    let good = docker_ok(lab.manager(), &["swarm", "join-token", "--quiet", "worker"])?;
    let good = good.trim();
    let (start, secret) = good.rsplit_once('-').context("a token without dashes")?;
    let forged: String = secret.chars().rev().collect();
    let manager = format!("{}:2377", lab.manager().address);
    let nobody = format!("{}:2377", lab.nodes[1].address);
    let cases = [
        ("not-a-token", &manager, "invalid join token"),
        (&format!("{start}-{forged}"), &manager, "token"),
        (good, &nobody, "no manager answers"),
    ];
    let mut wrong = Vec::new();
    for (token, address, word) in cases {
        let ended = engine::docker(node, &["swarm", "join", "--token", token, address])?;
        figure!("join {address}: {}", ended.stderr.trim());
        if ended.status.success() || !ended.stderr.contains(word) {
            wrong.push(format!("expected {word:?}: {}", ended.stderr));
        }
    }
    let joined = engine::docker(node, &["swarm", "join", "--token", good, &manager])?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n    "));
    ensure!(joined.status.success(), "{}", joined.stderr);
    // The node has a new id; the old one's record goes.
    let down = engine::names(lab.manager(), &["node", "ls", "--format", "{{.ID}} {{.Status}}"])?;
    for id in down.iter().filter_map(|line| line.strip_suffix(" Down")) {
        docker_ok(lab.manager(), &["node", "rm", "--force", id])?;
    }
    lab.until_ready(lab.nodes.len())
}

/// A raw request, and the status and the words of its answer.
const RAW: &[(&str, &str, &str, u16, &str)] = &[
    ("POST", "/v1.50/services/create", "{", 400, "JSON"),
    ("POST", "/v1.50/services/create", "", 400, "JSON"),
    ("POST", "/v1.50/services/create", "[]", 400, "JSON"),
    ("POST", "/v1.50/services/create", "{}", 400, "TaskTemplate"),
    ("POST", "/v1.50/services/create", r#"{"Name":7}"#, 400, "Name"),
    (
        "POST",
        "/v1.50/services/create",
        r#"{"Name":"x","TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami"}},"Mode":{"Replicated":{"Replicas":-1}}}"#,
        400,
        "Replicas",
    ),
    (
        "POST",
        "/v1.50/services/create",
        r#"{"Name":"x","TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami"}},"EndpointSpec":{"Ports":[{"TargetPort":70000}]}}"#,
        400,
        "TargetPort",
    ),
    ("POST", "/v1.50/networks/create", r#"{"Driver":"overlay"}"#, 400, "name"),
    ("POST", "/v1.50/swarm/join", r#"{"RemoteAddrs":"x"}"#, 400, "RemoteAddrs"),
    (
        "POST",
        "/v1.50/nodes/nosuch/update?version=1",
        r#"{"Role":"worker","Availability":"active"}"#,
        404,
        "nosuch",
    ),
    ("POST", "/v1.50/services/web/update", r#"{"Name":"web"}"#, 400, "version"),
    // By the command line, docker asks the user first.
    ("DELETE", "/v1.50/networks/ingress", "", 400, "ingress"),
    ("GET", "/v1.50/services?filters=banana", "", 400, "filter"),
    ("GET", "/v1.50/tasks?filters={%22desired-state%22:[%22asleep%22]}", "", 400, "asleep"),
    ("GET", "/v1.50/services/nosuch", "", 404, "nosuch"),
    ("GET", "/v9.99/info", "", 400, "9.99"),
    ("GET", "/v1.50/nosuchpath", "", 404, "not found"),
];

pub(crate) fn api_answers_broken_requests_in_dockers_form(lab: &Lab) -> Result<()> {
    engine::create(lab, "web", 1, &["shoal/whoami"])?;
    let mut wrong = Vec::new();
    for (method, path, body, status, word) in RAW {
        let answer = call(lab.manager(), method, path, body)?;
        let message = answer.message().unwrap_or_else(|error| format!("{error:#}"));
        if answer.status != *status || !message.contains(word) {
            let got = answer.status;
            wrong.push(format!(
                "{method} {path} {body}: expected {status} with {word:?}, got {got}: {message}"
            ));
        }
    }
    figure!("{} broken requests", RAW.len());
    ensure!(wrong.is_empty(), "{}", wrong.join("\n    "));
    unharmed(lab)
}

/// All agents answer, and the swarm has what it had.
fn unharmed(lab: &Lab) -> Result<()> {
    for node in &lab.nodes {
        engine::get(node, "/_ping").with_context(|| format!("{node} does not answer any more"))?;
    }
    ensure!(
        engine::names(lab.manager(), &["service", "ls", "--format", "{{.Name}}"])? == ["web"],
        "other services"
    );
    lab.until_ready(lab.nodes.len())
}
