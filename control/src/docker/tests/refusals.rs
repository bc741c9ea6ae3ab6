//! Bad input, and good input to the wrong node: every refusal has Docker's status, and names the field or the
//! remedy.

use axum::http::{Method, StatusCode};
use mesh_api::token::JoinToken;

use super::host::{Client, FakeHost};
use crate::docker::local::{Interface, LocalNode as _};

/// Asks each (method, path, body) and expects a status and a part of the message.
async fn refused(client: &Client, cases: &[(&str, &str, &str, u16, &str)]) {
    for (method, path, body, status, part) in cases {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let (answered, message) = client.ask(method.clone(), path, body).await;
        assert_eq!(answered.as_u16(), *status, "{method} {path} {body}: {message}");
        let message = message["message"].as_str().unwrap_or_default();
        assert!(message.contains(part), "{method} {path} {body}: {message:?} lacks {part:?}");
    }
}

#[tokio::test]
async fn a_host_outside_a_swarm_says_how_to_get_into_one() {
    let client = Client::of(FakeHost::new());
    let outside =
        "Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again.";
    let spec = r#"{"Name":"a","TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami"}}}"#;
    refused(
        &client,
        &[
            ("GET", "/nodes", "", 503, outside),
            ("GET", "/v1.41/services", "", 503, outside),
            ("GET", "/tasks", "", 503, outside),
            ("GET", "/swarm", "", 503, outside),
            ("GET", "/secrets", "", 503, outside),
            ("POST", "/services/create", spec, 503, outside),
            ("POST", "/networks/create", r#"{"Name":"a","Driver":"overlay"}"#, 503, outside),
            ("POST", "/shoal/v1/networks/rotate-keys", "", 503, outside),
            ("POST", "/swarm/leave", "", 503, "This node is not part of a swarm"),
            ("GET", "/networks/a", "", 404, "network a not found"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_worker_sends_to_a_manager() {
    let client = Client::of(FakeHost::worker());
    let worker = "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run \
                  this command on a manager node or promote the current node to a manager.";
    let again = "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm and join another one.";
    refused(
        &client,
        &[
            ("GET", "/nodes", "", 503, worker),
            ("GET", "/services", "", 503, worker),
            ("GET", "/swarm", "", 503, worker),
            ("POST", "/networks/create", r#"{"Name":"a","Driver":"overlay"}"#, 503, worker),
            ("POST", "/shoal/v1/networks/rotate-keys", "", 503, worker),
            ("POST", "/swarm/init", r#"{"ListenAddr":"0.0.0.0:2377"}"#, 503, again),
            ("POST", "/swarm/join", r#"{"RemoteAddrs":["192.0.2.1:2377"],"JoinToken":"x"}"#, 503, again),
        ],
    )
    .await;
    assert_eq!(client.get("/networks").await.0, StatusCode::OK);
    assert_eq!(client.post("/swarm/leave", "").await.0, StatusCode::OK);
}

#[tokio::test]
async fn init_names_the_flag_that_is_wrong() {
    let several = vec![
        Interface {
            name: "eth0".into(),
            up: true,
            addrs: vec!["192.0.2.7/24".parse().unwrap(), "fd00::7/64".parse().unwrap()],
        },
        Interface { name: "eth1".into(), up: true, addrs: vec!["198.51.100.7/24".parse().unwrap()] },
    ];
    let client = Client::of(FakeHost::with_interfaces(several));
    let init = "/swarm/init";
    refused(
        &client,
        &[
            ("POST", init, "{", 400, "invalid JSON"),
            ("POST", init, "", 400, "EOF"),
            ("POST", init, "{}", 400, "specify one with --advertise-addr"),
            ("POST", init, r#"{"AdvertiseAddr":"eth7"}"#, 400, "--advertise-addr: 'eth7'"),
            ("POST", init, r#"{"AdvertiseAddr":"0.0.0.0"}"#, 400, "--advertise-addr"),
            ("POST", init, r#"{"AdvertiseAddr":"203.0.113.9"}"#, 400, "not an address of this host"),
            ("POST", init, r#"{"AdvertiseAddr":"eth0","ListenAddr":"eth0:99999"}"#, 400, "--listen-addr"),
            ("POST", init, r#"{"AdvertiseAddr":"eth0","DataPathAddr":"eth9"}"#, 400, "--data-path-addr"),
            ("POST", init, r#"{"AdvertiseAddr":"eth0","DataPathPort":80}"#, 400, "DataPathPort"),
            ("POST", init, r#"{"AdvertiseAddr":"[fd00::7"}"#, 400, "--advertise-addr: '[fd00::7'"),
            ("POST", init, r#"{"AdvertiseAddr":"fe80::7"}"#, 400, "link-local"),
            ("POST", init, r#"{"AdvertiseAddr":"fd00::8"}"#, 400, "not an address of this host"),
            (
                "POST",
                init,
                r#"{"AdvertiseAddr":"fd00::7","ListenAddr":"192.0.2.7:2377"}"#,
                400,
                "listen on fd00::7",
            ),
            ("POST", init, r#"{"AdvertiseAddr":"eth1","DataPathAddr":"::"}"#, 400, "--data-path-addr: '::'"),
            (
                "POST",
                init,
                r#"{"AdvertiseAddr":"eth1","Spec":{"Labels":{"shoal.return":"no"}}}"#,
                400,
                "Spec.Labels: label shoal.return holds 'no'",
            ),
            (
                "POST",
                init,
                r#"{"AdvertiseAddr":"eth0","DefaultAddrPool":["10.0.0.0"]}"#,
                400,
                "DefaultAddrPool",
            ),
            (
                "POST",
                init,
                r#"{"AdvertiseAddr":"eth0","DefaultAddrPool":["10.0.0.0/28"]}"#,
                400,
                "smaller than one subnet",
            ),
            ("POST", init, r#"{"AdvertiseAddr":"eth0","DefaultAddrPool":["fd00::/48"]}"#, 400, "IPv4"),
            (
                "POST",
                init,
                r#"{"AdvertiseAddr":"eth0","DefaultAddrPool":["10.0.0.0/8","10.1.0.0/16"]}"#,
                400,
                "overlaps",
            ),
            ("POST", init, r#"{"AdvertiseAddr":"eth0","SubnetSize":31}"#, 400, "SubnetSize"),
            (
                "POST",
                init,
                r#"{"AdvertiseAddr":"eth0","Availability":"busy"}"#,
                400,
                "invalid Availability: \"busy\"",
            ),
            ("POST", init, r#"{"AdvertiseAddr":7}"#, 400, "AdvertiseAddr: invalid type: integer"),
        ],
    )
    .await;
    assert_eq!(client.post(init, r#"{"AdvertiseAddr":"eth1"}"#).await.0, StatusCode::OK);
}

#[tokio::test]
async fn join_names_what_is_wrong() {
    let client = Client::of(FakeHost::new());
    let join = "/swarm/join";
    let token = JoinToken::new(&[1; 32], &[2; 16]).to_string();
    let at = |addr: &str| format!(r#"{{"RemoteAddrs":["{addr}"],"JoinToken":"{token}"}}"#);
    let (refuses, nobody, manager, name, port) = (
        at("203.0.113.2:2377"),
        at("203.0.113.1:2377"),
        at("203.0.113.3"),
        at("no-such-host.invalid:2377"),
        at("192.0.2.1:http"),
    );
    let none = format!(r#"{{"RemoteAddrs":[],"JoinToken":"{token}"}}"#);
    let drained = format!(r#"{{"RemoteAddrs":["192.0.2.1"],"JoinToken":"{token}","Availability":"drain"}}"#);
    refused(
        &client,
        &[
            (
                "POST",
                join,
                r#"{"RemoteAddrs":["192.0.2.1:2377"],"JoinToken":"SWMTKN-1-x"}"#,
                400,
                "invalid join token",
            ),
            ("POST", join, r#"{"RemoteAddrs":["192.0.2.1:2377"]}"#, 400, "invalid join token"),
            ("POST", join, &none, 400, "RemoteAddrs"),
            ("POST", join, &refuses, 400, "invalid join token"),
            ("POST", join, &nobody, 503, "203.0.113.1:2377"),
            ("POST", join, &manager, 400, "the manager at 203.0.113.3:2377 refused this node: full"),
            ("POST", join, &name, 400, "RemoteAddrs"),
            ("POST", join, &port, 400, "RemoteAddrs"),
            ("POST", join, &drained, 501, "Availability"),
        ],
    )
    .await;
}

#[tokio::test]
async fn every_wrong_field_of_a_service_is_named() {
    let client = Client::manager().await;
    client.service("taken", r#","EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":8080}]}"#).await;
    // Each case is put into an otherwise good spec: at the top, into the template, or into the container.
    let top = [
        (r#""Name":"my web""#, 400, "Name 'my web'"),
        (r#""Name":"-web""#, 400, "Name '-web'"),
        (r#""Name":"taken""#, 409, "name conflicts with an existing object"),
        (r#""Mode":{"Replicated":{"Replicas":-1}}"#, 400, "Mode.Replicated.Replicas"),
        (r#""Mode":{"Replicated":{"Replicas":1000000000}}"#, 400, "Mode.Replicated.Replicas"),
        (r#""Mode":{"Replicated":{},"Global":{}}"#, 400, "must specify only one service mode"),
        (r#""Mode":{"ReplicatedJob":{}}"#, 501, "Mode.ReplicatedJob"),
        (r#""Mode":{"GlobalJob":{}}"#, 501, "Mode.GlobalJob"),
        (r#""UpdateConfig":{"Order":"last-first"}"#, 400, "UpdateConfig.Order"),
        (r#""UpdateConfig":{"FailureAction":"panic"}"#, 400, "UpdateConfig.FailureAction"),
        (r#""UpdateConfig":{"Delay":-1}"#, 400, "UpdateConfig.Delay"),
        (r#""UpdateConfig":{"MaxFailureRatio":1.5}"#, 400, "UpdateConfig.MaxFailureRatio"),
        (r#""RollbackConfig":{"FailureAction":"rollback"}"#, 400, "RollbackConfig.FailureAction"),
        (
            r#""Labels":{"shoal.return":"dirct"}"#,
            400,
            "label shoal.return holds 'dirct': expected direct or tunnel",
        ),
        (
            r#""Labels":{"shoal.affinity":"client"}"#,
            400,
            "label shoal.affinity holds 'client': expected client-ip or none",
        ),
        (r#""Labels":{"shoal.allow":"10.0.0.0/8,all"}"#, 400, "'all' is not a range"),
        (r#""Labels":{"shoal.deny":"10.0.0.1/8"}"#, 400, "10.0.0.1/8 should be 10.0.0.0/8"),
        (r#""Labels":{"shoal.publish.addresses":"eth0"}"#, 400, "label shoal.publish.addresses holds 'eth0'"),
        (r#""Labels":{"shoal.publish.nodes":"node.rolle==worker"}"#, 400, "key 'node.rolle' is invalid"),
        (
            r#""Labels":{"shoal.slow-start":"1d"}"#,
            400,
            "label shoal.slow-start holds '1d': expected a duration",
        ),
        (
            r#""Labels":{"shoal.afinity":"client-ip"}"#,
            400,
            "label shoal.afinity is none that a service can have",
        ),
        (r#""Labels":{"shoal.weight":"5"}"#, 400, "it belongs to a node"),
        (r#""Networks":[{"Target":"nowhere"}]"#, 404, "network nowhere not found"),
        (r#""Networks":[{"Target":"ingress"}]"#, 400, "ingress network"),
        (r#""EndpointSpec":{"Mode":"anycast"}"#, 400, "EndpointSpec.Mode"),
        (
            r#""EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":8080}]}"#,
            400,
            "port '8080' is already in use by service 'taken'",
        ),
        (
            r#""EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":70000}]}"#,
            400,
            "EndpointSpec.Ports[0].PublishedPort: 70000",
        ),
        (r#""EndpointSpec":{"Ports":[{"PublishedPort":81}]}"#, 400, "EndpointSpec.Ports[0].TargetPort: 0"),
        (r#""EndpointSpec":{"Ports":[{"TargetPort":-5}]}"#, 400, "EndpointSpec.Ports[0].TargetPort"),
        (
            r#""EndpointSpec":{"Ports":[{"TargetPort":80,"Protocol":"sctp"}]}"#,
            501,
            "EndpointSpec.Ports[0].Protocol: sctp",
        ),
        (
            r#""EndpointSpec":{"Ports":[{"TargetPort":80,"Protocol":"icmp"}]}"#,
            400,
            "EndpointSpec.Ports[0].Protocol",
        ),
        (
            r#""EndpointSpec":{"Ports":[{"TargetPort":80,"PublishMode":"all"}]}"#,
            400,
            "EndpointSpec.Ports[0].PublishMode",
        ),
        (
            r#""EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":81},{"TargetPort":8,"PublishedPort":81}]}"#,
            400,
            "duplicate published ports provided: 81",
        ),
        (
            r#""EndpointSpec":{"Mode":"dnsrr","Ports":[{"TargetPort":80,"PublishedPort":81}]}"#,
            400,
            "port published with ingress mode can't be used with dnsrr mode",
        ),
    ];
    let template = [
        (r#""RestartPolicy":{"Condition":"sometimes"}"#, 400, "RestartPolicy.Condition"),
        (r#""RestartPolicy":{"Delay":-1}"#, 400, "RestartPolicy.Delay"),
        (r#""Placement":{"Constraints":["node.role=worker"]}"#, 400, "Placement.Constraints"),
        (r#""Placement":{"Constraints":["node.rolle==worker"]}"#, 400, "node.rolle==worker"),
        (
            r#""Placement":{"Preferences":[{"Spread":{"SpreadDescriptor":"node.labels.a"}}]}"#,
            501,
            "Placement.Preferences",
        ),
        (r#""Resources":{"Limits":{"MemoryBytes":5000000}}"#, 501, "Resources.Limits.MemoryBytes"),
        (r#""Resources":{"Reservations":{"NanoCPUs":5000000}}"#, 501, "Resources.Reservations.NanoCPUs"),
        (r#""LogDriver":{"Name":"syslog"}"#, 501, "TaskTemplate.LogDriver"),
        (r#""Runtime":"plugin""#, 501, "TaskTemplate.Runtime"),
        (r#""ForceUpdate":"yes""#, 400, "TaskTemplate.ForceUpdate"),
    ];
    let container = [
        (r#""Image":"""#, 400, "image reference must be provided"),
        (r#""Image":"No Such Image""#, 400, "is not a valid repository/tag"),
        (r#""Image":7"#, 400, "TaskTemplate.ContainerSpec.Image: invalid type: integer"),
        (r#""Mounts":[{"Type":"bind","Source":"/a","Target":"/b"}]"#, 501, "ContainerSpec.Mounts"),
        (r#""Secrets":[{"SecretID":"x"}]"#, 501, "ContainerSpec.Secrets"),
        (r#""Configs":[{"ConfigID":"x"}]"#, 501, "ContainerSpec.Configs"),
        (r#""Healthcheck":{"Test":["CMD","true"]}"#, 501, "ContainerSpec.Healthcheck"),
        (r#""DNSConfig":{"Nameservers":["192.0.2.1"]}"#, 501, "ContainerSpec.DNSConfig"),
        (r#""Hosts":["192.0.2.1 a"]"#, 501, "ContainerSpec.Hosts"),
        (r#""ReadOnly":true"#, 501, "ContainerSpec.ReadOnly"),
        (r#""TTY":true"#, 501, "ContainerSpec.TTY"),
        (r#""CapabilityAdd":["CAP_NET_ADMIN"]"#, 501, "ContainerSpec.CapabilityAdd"),
        (r#""Env":["=x"]"#, 400, "ContainerSpec.Env"),
        (r#""Labels":{"shoal.return":"direct"}"#, 400, "ContainerSpec.Labels: label shoal.return is none"),
        (r#""Args":["a\u0000b"]"#, 400, "ContainerSpec.Args[0]"),
        (r#""Dir":"relative""#, 400, "ContainerSpec.Dir"),
        (r#""Hostname":"a b""#, 400, "ContainerSpec.Hostname"),
        (r#""StopSignal":"SIGNOPE""#, 400, "ContainerSpec.StopSignal"),
        (r#""StopGracePeriod":-1"#, 400, "ContainerSpec.StopGracePeriod"),
        (r#""Init":{}"#, 400, "TaskTemplate.ContainerSpec.Init"),
        (r#""Isolation":"hyperv""#, 400, "ContainerSpec.Isolation"),
    ];
    let good = r#""Image":"shoal/whoami""#;
    let mut bodies = Vec::new();
    for (field, status, part) in top {
        let name = if field.starts_with("\"Name\"") { "" } else { r#""Name":"other","# };
        bodies.push((
            format!(r#"{{{name}{field},"TaskTemplate":{{"ContainerSpec":{{{good}}}}}}}"#),
            status,
            part,
        ));
    }
    for (field, status, part) in template {
        bodies.push((format!(r#"{{"TaskTemplate":{{{field},"ContainerSpec":{{{good}}}}}}}"#), status, part));
    }
    for (field, status, part) in container {
        let image = if field.starts_with("\"Image\"") { String::new() } else { format!("{good},") };
        bodies.push((format!(r#"{{"TaskTemplate":{{"ContainerSpec":{{{image}{field}}}}}}}"#), status, part));
    }
    bodies.push((r"{".into(), 400, "invalid JSON"));
    bodies.push((r"[]".into(), 400, "invalid JSON"));
    bodies.push((r"{}".into(), 400, "TaskTemplate: missing"));
    bodies.push((r#"{"TaskTemplate":{}}"#.into(), 400, "TaskTemplate.ContainerSpec: missing"));
    for (body, status, part) in &bodies {
        refused(&client, &[("POST", "/services/create", body, *status, part)]).await;
    }
    let (_, services) = client.get("/services").await;
    assert_eq!(services.as_array().unwrap().len(), 1, "nothing was made of a refused spec");
}

#[tokio::test]
async fn every_wrong_field_of_a_network_is_named() {
    let client = Client::manager().await;
    let create = "/networks/create";
    for accepted in
        [r#"{"Name":"taken","Driver":"overlay"}"#, r#"{"Name":"shop.example","Driver":"overlay"}"#]
    {
        assert_eq!(client.post(create, accepted).await.0, StatusCode::CREATED, "{accepted}");
    }
    let ipam = |config: &str| format!(r#"{{"Name":"a","IPAM":{{"Config":[{config}]}}}}"#);
    let ipam6 = |config: &str| format!(r#"{{"Name":"a","EnableIPv6":true,"IPAM":{{"Config":[{config}]}}}}"#);
    let mtu =
        |text: &str| format!(r#"{{"Name":"a","Options":{{"com.docker.network.driver.mtu":"{text}"}}}}"#);
    let mtu6 = |text: &str| mtu(text).replace(r#""Name":"a""#, r#""Name":"a","EnableIPv6":true"#);
    let aux = |addr: &str| {
        ipam(&format!(r#"{{"Subnet":"10.9.0.0/24","AuxiliaryAddresses":{{"router":"{addr}"}}}}"#))
    };
    let six = r#"{"Name":"six","EnableIPv6":true,"IPAM":{"Config":[{"Subnet":"fd00:6::/64"}]}}"#;
    assert_eq!(client.post(create, six).await.0, StatusCode::CREATED);
    refused(
        &client,
        &[
            (
                "POST",
                create,
                r#"{"Name":"taken","Driver":"overlay"}"#,
                409,
                "network with name taken already exists",
            ),
            ("POST", create, r#"{"Driver":"overlay"}"#, 400, "Name"),
            ("POST", create, r#"{"Name":"a b"}"#, 400, "Name 'a b'"),
            ("POST", create, r#"{"Name":"a..b"}"#, 400, "Name 'a..b'"),
            ("POST", create, r#"{"Name":"host"}"#, 403, "pre-defined network"),
            ("POST", create, r#"{"Name":"a","Driver":"bridge"}"#, 501, "--driver overlay"),
            ("POST", create, r#"{"Name":"a","Scope":"local"}"#, 400, "Scope"),
            ("POST", create, r#"{"Name":"a","EnableIPv4":false,"EnableIPv6":true}"#, 501, "--ipv4=false"),
            (
                "POST",
                create,
                r#"{"Name":"a","Labels":{"shoal.return":"direct"}}"#,
                400,
                "label shoal.return is none",
            ),
            ("POST", create, r#"{"Name":"a","Ingress":true}"#, 409, "is already present"),
            (
                "POST",
                create,
                r#"{"Name":"a","Ingress":true,"Attachable":true}"#,
                400,
                "Attachable: ingress network",
            ),
            (
                "POST",
                create,
                r#"{"Name":"a","Ingress":true,"Internal":true}"#,
                400,
                "Internal: the ingress network",
            ),
            ("POST", create, &mtu("1e3"), 400, "Options.com.docker.network.driver.mtu: '1e3' is not an MTU"),
            ("POST", create, &mtu("575"), 400, "expected 576 to 65535"),
            ("POST", create, &mtu("65536"), 400, "expected 576 to 65535"),
            ("POST", create, &mtu6("1279"), 400, "expected 1280 to 65535"),
            ("POST", create, r#"{"Name":"a","ConfigOnly":true}"#, 501, "ConfigOnly"),
            (
                "POST",
                create,
                r#"{"Name":"a","Options":{"encrypted":"maybe"}}"#,
                400,
                "Options.encrypted: 'maybe' is neither true nor false",
            ),
            (
                "POST",
                create,
                r#"{"Name":"a","Options":{"com.docker.network.driver.overlay.encrypted":"yes"}}"#,
                400,
                "Options.com.docker.network.driver.overlay.encrypted: 'yes'",
            ),
            (
                "POST",
                create,
                r#"{"Name":"a","Options":{"com.docker.network.driver.overlay.vxlanid_list":"5000"}}"#,
                501,
                "identifiers are given by the managers",
            ),
            ("POST", create, r#"{"Name":"a","IPAM":{"Driver":"dhcp"}}"#, 501, "IPAM.Driver"),
            ("POST", create, &ipam(r#"{"Subnet":"10.9.0.0"}"#), 400, "IPAM.Config[0].Subnet"),
            ("POST", create, &ipam(r#"{"Subnet":"10.9.0.1/24"}"#), 400, "it should be 10.9.0.0/24"),
            ("POST", create, &ipam(r#"{"Subnet":"fd00::/64"}"#), 400, "add --ipv6"),
            ("POST", create, &ipam6(r#"{"Subnet":"fd00::1/64"}"#), 400, "it should be fd00::/64"),
            ("POST", create, &ipam6(r#"{"Subnet":"fd00::/97"}"#), 400, "the prefix must be /8 to /96"),
            ("POST", create, &ipam6(r#"{"Subnet":"fc00::/7"}"#), 400, "the prefix must be /8 to /96"),
            ("POST", create, &ipam6(r#"{"Subnet":"fe80::/64"}"#), 400, "reserved (link-local)"),
            ("POST", create, &ipam6(r#"{"Subnet":"ff0e::/64"}"#), 400, "reserved (multicast)"),
            ("POST", create, &ipam6(r#"{"Subnet":"::ffff:0:0/96"}"#), 400, "IPv4 addresses written as IPv6"),
            ("POST", create, &ipam6(r#"{"Subnet":"fd00:6::/80"}"#), 400, "fd00:6::/80 overlaps fd00:6::/64"),
            (
                "POST",
                create,
                &ipam6(r#"{"Subnet":"fd00:1::/64"},{"Subnet":"fd00:2::/64"}"#),
                400,
                "IPAM.Config[1].Subnet: fd00:2::/64 is a second IPv6 subnet",
            ),
            (
                "POST",
                create,
                &ipam6(r#"{"Subnet":"fd00::/64","Gateway":"10.8.0.1"}"#),
                400,
                "IPAM.Config[0].Gateway",
            ),
            (
                "POST",
                create,
                &ipam6(r#"{"Subnet":"fd00::/64","Gateway":"fd01::1"}"#),
                400,
                "IPAM.Config.Gateway",
            ),
            (
                "POST",
                create,
                &ipam6(r#"{"Subnet":"fd00::/64","IPRange":"fd00::/65"}"#),
                501,
                "IPAM.Config[0].IPRange",
            ),
            (
                "POST",
                create,
                &ipam6(r#"{"Subnet":"10.9.0.0/24","IPRange":"fd00::/65"}"#),
                400,
                "IPAM.Config[0].IPRange",
            ),
            (
                "POST",
                create,
                &ipam(r#"{"Subnet":"10.9.0.0/24","Gateway":"10.8.0.1"}"#),
                400,
                "IPAM.Config[0].Gateway",
            ),
            (
                "POST",
                create,
                &ipam(r#"{"Subnet":"10.9.0.0/24","IPRange":"10.8.0.0/25"}"#),
                400,
                "IPAM.Config[0].IPRange",
            ),
            ("POST", create, &ipam(r#"{"Gateway":"10.8.0.1"}"#), 400, "IPAM.Config[0].Subnet: missing"),
            (
                "POST",
                create,
                &ipam(r#"{"AuxiliaryAddresses":{"a":"10.8.0.1"}}"#),
                400,
                "IPAM.Config[0].Subnet: missing",
            ),
            (
                "POST",
                create,
                &aux("10.8.0.1"),
                400,
                "AuxiliaryAddresses: 10.8.0.1 (router) is not a host address",
            ),
            ("POST", create, &aux("10.9.0.1"), 400, "AuxiliaryAddresses: 10.9.0.1 (router) is the gateway"),
            (
                "POST",
                create,
                &aux("fd00::1"),
                400,
                "IPAM.Config[0].AuxiliaryAddresses: invalid address fd00::1",
            ),
            (
                "POST",
                create,
                &ipam(r#"{"Subnet":"10.9.0.0/24","IPRange":"10.9.0.1/32"}"#),
                400,
                "IPAM.Config[0].IPRange: no address is left for tasks",
            ),
            ("POST", create, &ipam(r#"{"Subnet":"10.9.0.0/31"}"#), 400, "the prefix must be /8 to /30"),
            (
                "POST",
                create,
                &ipam(r#"{"Subnet":"255.255.255.255/32"}"#),
                400,
                "the prefix must be /8 to /30",
            ),
            ("POST", create, &ipam(r#"{"Subnet":"10.0.0.0/24"}"#), 400, "overlaps"),
            ("DELETE", "/networks/nowhere", "", 404, "network nowhere not found"),
            ("GET", "/networks/nowhere", "", 404, "network nowhere not found"),
        ],
    )
    .await;
    client.service("user", r#","Networks":[{"Target":"taken"}]"#).await;
    client.service("plain", "").await;
    let subnets = "/shoal/v1/networks/taken/subnets";
    let prune = |until: &str| format!("/networks/prune?filters=%7B%22until%22%3A%5B{until}%5D%7D");
    refused(
        &client,
        &[
            ("DELETE", "/networks/taken", "", 400, "is in use by service"),
            ("DELETE", "/networks/ingress", "", 400, "ingress network cannot be removed because service"),
            (
                "POST",
                subnets,
                r#"{"Subnet":"10.9.0.1/24"}"#,
                400,
                "Subnet: invalid subnet 10.9.0.1/24: it should be",
            ),
            ("POST", subnets, r#"{"Subnet":"10.9.0.0/24","Gateway":"x"}"#, 400, "Gateway: invalid gateway x"),
            ("POST", subnets, r#"{"Gateway":"10.9.0.1"}"#, 400, "Subnet: missing"),
            ("POST", subnets, r#"{"Subnet":"fd00:9::/64"}"#, 400, "a network has one such subnet"),
            ("POST", subnets, r#"{"Subnet":"10.0.1.0/24"}"#, 400, "overlaps 10.0.1.0/24"),
            ("POST", "/shoal/v1/networks/nowhere/subnets", "{}", 404, "network nowhere not found"),
            ("POST", &prune("%22yesterday%22"), "", 400, "invalid filter 'until=yesterday'"),
            ("POST", &prune("%221h%22%2C%222h%22"), "", 400, "more than one until filter"),
        ],
    )
    .await;
}

#[tokio::test]
async fn updates_name_their_version_and_their_field() {
    let client = Client::manager().await;
    client.service("web", "").await;
    let (_, web) = client.get("/services/web").await;
    let version = web["Version"]["Index"].as_u64().unwrap();
    let spec = web["Spec"].to_string();
    let update = |version: u64| format!("/services/web/update?version={version}");
    let global = spec.replace(r#"{"Replicated":{"Replicas":1}}"#, r#"{"Global":{}}"#);
    let renamed = spec.replace(r#""Name":"web""#, r#""Name":"web2""#);
    let role = r#"{"Role":"boss","Availability":"active"}"#;
    let labelled =
        |labels: &str| format!(r#"{{"Role":"manager","Availability":"active","Labels":{{{labels}}}}}"#);
    let index = |object: &serde_json::Value| object["Version"]["Index"].as_u64().unwrap();
    let of_node = format!("/nodes/n1/update?version={}", index(&client.get("/nodes/n1").await.1));
    let of_swarm = format!("/swarm/update?version={}", index(&client.get("/swarm").await.1));
    refused(
        &client,
        &[
            ("POST", "/services/web/update", &spec, 400, "invalid service version ''"),
            ("POST", "/services/web/update?version=x", &spec, 400, "invalid service version 'x'"),
            ("POST", &update(version + 7), &spec, 500, "update out of sequence"),
            ("POST", &update(version), &global, 501, "service mode change is not allowed"),
            ("POST", &update(version), &renamed, 501, "renaming services is not supported"),
            (
                "POST",
                &format!("{}&rollback=previous", update(version)),
                &spec,
                400,
                "does not have a previous spec",
            ),
            (
                "POST",
                &format!("{}&rollback=next", update(version)),
                &spec,
                400,
                "unrecognized rollback option next",
            ),
            ("POST", "/services/nope/update?version=1", &spec, 404, "service nope not found"),
            ("DELETE", "/services/nope", "", 404, "service nope not found"),
            ("GET", "/tasks/nope", "", 404, "task nope not found"),
            ("GET", "/nodes/nope", "", 404, "node nope not found"),
            ("POST", "/nodes/n1/update?version=1", role, 400, "invalid Role: \"boss\""),
            ("POST", "/nodes/n1/update?version=1", r#"{"Role":"manager"}"#, 400, "Availability: missing"),
            ("POST", &of_node, &labelled(r#""shoal.weight":"200""#), 400, "from 1 to 100"),
            ("POST", &of_node, &labelled(r#""shoal.wieght":"2""#), 400, "expected shoal.weight"),
            ("DELETE", "/nodes/n1", "", 400, "is a cluster manager"),
            ("POST", "/swarm/update?version=1", r#"{"Name":"other"}"#, 400, "must be named \"default\""),
            ("POST", "/swarm/update?version=99", "{}", 500, "update out of sequence"),
            (
                "POST",
                &of_swarm,
                r#"{"Labels":{"shoal.return":"straight"}}"#,
                400,
                "expected direct or tunnel",
            ),
            ("POST", &of_swarm, r#"{"Labels":{"shoal.slow-start":"9s"}}"#, 400, "it belongs to a service"),
            ("POST", "/swarm/leave", "", 503, "Use `--force`"),
            (
                "GET",
                "/services?filters=%7B%22nope%22%3A%7B%22a%22%3Atrue%7D%7D",
                "",
                400,
                "invalid filter 'nope'",
            ),
            (
                "GET",
                "/tasks?filters=%7B%22service%22%3A%5B%22nope%22%5D%7D",
                "",
                404,
                "service nope not found",
            ),
            ("GET", "/tasks?filters=%7B%22desired-state%22%3A%5B%22odd%22%5D%7D", "", 400, "desired-state"),
            ("GET", "/tasks?filters=nonsense", "", 400, "invalid filters"),
        ],
    )
    .await;
}

#[tokio::test]
async fn what_belongs_to_an_engine_says_so() {
    let client = Client::manager().await;
    refused(
        &client,
        &[
            ("POST", "/v1.50/containers/create", "{}", 501, "docker service create"),
            ("POST", "/images/create?fromImage=a", "", 501, "docker service create"),
            ("POST", "/build", "", 501, "docker service create"),
            ("POST", "/secrets/create", "{}", 501, "--env"),
            ("GET", "/containers/abc/json", "", 404, "No such container: abc"),
            ("GET", "/images/shoal/whoami/json", "", 404, "No such image: shoal/whoami"),
            ("GET", "/volumes/v", "", 404, "no such volume"),
            ("GET", "/services/web/logs", "", 501, "docker service ps"),
            ("GET", "/distribution/nginx:latest/json", "", 404, "built in"),
            ("POST", "/networks/ingress/connect", "{}", 501, "docker service create --network"),
            ("GET", "/nope", "", 404, "page not found"),
            ("PUT", "/info", "", 404, "page not found"),
            ("GET", "/v1.51/info", "", 400, "Maximum supported API version is 1.50"),
            ("POST", "/swarm/unlock", "{}", 409, "swarm is not locked"),
        ],
    )
    .await;
    for path in
        ["/containers/json", "/images/json", "/volumes", "/plugins", "/secrets", "/configs", "/system/df"]
    {
        assert_eq!(client.get(path).await.0, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn what_is_accepted_reads_back_from_the_store_however_deep_it_was() {
    let client = Client::manager().await;
    let health = format!("{}null{}", r#"{"a":"#.repeat(122), "}".repeat(122));
    let spec =
        r#"{"Name":"deep","TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami","Healthcheck":HEALTH}}}"#;
    let (status, answer) = client.post("/services/create", &spec.replace("HEALTH", &health)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let state = client.host.cluster().unwrap().state();
    let stored = serde_json::to_vec(&state).unwrap();
    serde_json::from_slice::<crate::model::State>(&stored).unwrap();
}
