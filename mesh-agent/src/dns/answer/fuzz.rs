//! What a fuzzer is given to try of the name server: questions of tasks, and answers of resolvers.

#[cfg(test)]
pub(crate) mod seeds;

use std::path::Path;
use std::sync::LazyLock;
use std::time::Instant;

use super::*;
use crate::dataplane::{LocalEndpoint, Touched};
use crate::dns::forward::fuzz as forward;

/// A service with a VIP and one without, on a network whose subnets are of both families.
const TABLE: &str = r#"{"index":1,"nodes":{},
    "cluster":{"id":"c","hash_seed":0,"data_path_port":4789,"return_path":"tunnel","key_epoch":0},
    "networks":{"front":{"id":"front","name":"front","vni":4097,"subnets":[{"cidr":"10.0.1.0/24","gateway":"10.0.1.1"}],
        "subnet6":{"cidr":"fd00:1::/64","gateway":"fd00:1::1"},"internal":false,"ingress":false}},
    "services":{
        "web":{"id":"web","name":"web","endpoint_mode":"vip","vips":[{"network":"front","addr":"10.0.1.2","aliases":["w"]}],
            "ports":[{"name":"http","protocol":"tcp","target":80,"published":8080,"mode":"ingress"}],
            "balancing":{"return_path":"tunnel","affinity":"none","sources":[],"publish_addresses":[],"publish_nodes":null}},
        "db":{"id":"db","name":"db","endpoint_mode":"dnsrr","vips":[{"network":"front","addr":null,"aliases":[]}],"ports":[],
            "balancing":{"return_path":"tunnel","affinity":"none","sources":[],"publish_addresses":[],"publish_nodes":null}}},
    "tasks":{
        "t1":{"id":"t1","name":"web.1.t1","service":"web","slot":1,"node":"n1","incarnation":1,"desired":"running",
            "observed":"running","weight":100,"endpoints":[{"network":"front","addr":"10.0.1.3"}],"spec":null},
        "t2":{"id":"t2","name":"db.1.t2","service":"db","slot":1,"node":"n1","incarnation":2,"desired":"running",
            "observed":"running","weight":100,"endpoints":[{"network":"front","addr":"10.0.1.4"}],"spec":null}}}"#;
/// Who asks.
const ASKER: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);

static ANSWERER: LazyLock<Arc<Answerer>> = LazyLock::new(|| {
    let table: Table = match serde_json::from_str(TABLE) {
        Ok(table) => table,
        Err(error) => panic!("the table here is none: {error}"),
    };
    let (addr, alias) = (Ipv4Addr::new(10, 0, 1, 3), ASKER);
    let asker = LocalEndpoint { task: "t1".into(), network: "front".into(), addr, ifindex: 1, alias };
    let mut zone = Zone::default();
    zone.update(&table, &Touched::all(), &[asker]);
    let tables = watch::channel(Some(Arc::new(table))).1;
    Arc::new(Answerer {
        zone: RwLock::new(zone),
        tables,
        forwarder: Forwarder::new(Path::new("/nonexistent")),
    })
});

/// A task's question: there is no answer, or a sound one to it that is no longer than may be.
///
/// # Panics
///
/// If not.
pub fn dns_question(data: &[u8]) -> bool {
    let mut is_sound = false;
    for transport in [Transport::Udp, Transport::Tcp] {
        match ANSWERER.take(ASKER.into(), data, transport) {
            Outcome::Ignored => {}
            Outcome::Forwarded(_) => is_sound = true,
            Outcome::Answered(answer) => is_sound |= is_sound_answer(data, &answer, transport),
        }
    }
    is_sound
}

fn is_sound_answer(asked: &[u8], answer: &[u8], transport: Transport) -> bool {
    assert!(
        transport == Transport::Tcp || answer.len() <= usize::from(UDP_BYTES_MAX),
        "{} bytes",
        answer.len()
    );
    let read = match Message::from_vec(answer) {
        Ok(read) => read,
        Err(error) => panic!("no message: {error}: {answer:02x?}"),
    };
    assert_eq!(asked.get(..2), answer.get(..2), "another id");
    assert_eq!(read.metadata.message_type, MessageType::Response);
    read.metadata.response_code == ResponseCode::NoError
}

/// A resolver's answer: what is taken of it goes to the task that asked, at once and from the cache.
///
/// # Panics
///
/// If that is no sound answer.
pub fn dns_answer(data: &[u8]) -> bool {
    let Some((asked, message)) = forward::decoded(data) else { return false };
    let Ok(bytes) = asked.to_vec() else { return false };
    let held = forward::held(&message, Instant::now());
    for transport in [Transport::Udp, Transport::Tcp] {
        let Ok(request) = Request::read(&bytes, transport) else { panic!("the question is sound") };
        for message in [Some(message.clone()), held.clone()].into_iter().flatten() {
            let answer = request.answer(Reply::forwarded(message));
            let _ = is_sound_answer(&bytes, &answer, transport);
        }
    }
    true
}
