//! Attachments, asked for over a session.

use mesh_api::session::{AttachRefused, AttachRefusedReason, AttachmentSpec};
use mesh_api::table::{EndpointMode, ServiceRecord, TaskRecord};

use super::*;

impl FakeAgent {
    /// Asks for an attachment, and answers what the manager says.
    async fn attach(&mut self, id: &str, network: &str) -> Option<AttachRefused> {
        let (network, name, aliases) = (network.to_owned(), "db".to_owned(), vec!["store".to_owned()]);
        let spec = AttachmentSpec { network, name, aliases, addr: None };
        self.say(AgentMessage::Attach { id: id.into(), spec }).await;
        loop {
            match self.hear().await.expect("the session is up") {
                ManagerMessage::Attached { id: answered, refused } => {
                    assert_eq!(answered.as_str(), id);
                    return refused;
                }
                ManagerMessage::Snapshot { table } => self.table = Some(*table),
                ManagerMessage::Delta { delta } => self.table.as_mut().unwrap().apply(delta).unwrap(),
                _ => {}
            }
        }
    }

    fn record(&self, id: &str) -> Option<&TaskRecord> {
        self.table.as_ref()?.tasks.get(&id.into())
    }

    fn names(&self, id: &str) -> Option<&ServiceRecord> {
        self.table.as_ref()?.services.get(&id.into())
    }
}

#[tokio::test]
async fn a_node_asks_for_an_attachment_and_everybody_knows_its_names() {
    let mut world = World::new(&[]);
    world.create_attachable_network("front");
    let (_dir, server) = server_in_memory(&world).await;
    tokio::spawn(run(server.cluster.clone()));
    let mut asker = FakeAgent::join(&server, "n1").await;
    let mut other = FakeAgent::join(&server, "n2").await;
    let refused = asker.attach("a1", "nowhere").await.unwrap();
    assert_eq!(refused.reason, AttachRefusedReason::NotFound);
    assert!(refused.message.contains("nowhere"), "{refused}");

    assert_eq!(asker.attach("a1", "front").await, None);
    let refused = asker.attach("a2", "front").await.unwrap();
    assert_eq!(refused.reason, AttachRefusedReason::Conflict);
    asker.until(|agent| agent.record("a1").is_some()).await;
    other.until(|agent| agent.record("a1").is_some()).await;
    let record = asker.record("a1").unwrap();
    assert!(record.spec.as_ref().unwrap().is_attachment());
    assert_eq!((&*record.name, record.service.as_str(), &record.node), ("db", "a1", &asker.node.node));
    assert!(other.record("a1").unwrap().spec.is_none(), "only its node is to know what it is");
    let names = other.names("a1").unwrap();
    assert_eq!((names.name.as_str(), names.endpoint_mode), ("db", EndpointMode::Dnsrr));
    assert_eq!((names.vips[0].addr, names.vips[0].aliases.as_slice()), (None, &["store".to_owned()][..]));
    // Who comes later is told the same.
    let mut late = FakeAgent::join(&server, "n3").await;
    late.until(|agent| agent.table.is_some()).await;
    assert_eq!(late.names("a1"), Some(names));

    asker.say(AgentMessage::Tasks { statuses: vec![status("a1", TaskState::Complete)] }).await;
    for agent in [&mut asker, &mut other, &mut late] {
        agent.until(|agent| agent.record("a1").is_none() && agent.names("a1").is_none()).await;
    }
}
