//! What a node finds out of others that don't answer reaches the dataplane.

use mesh_api::table::{NodeRecord, NodeState};

use super::*;
use crate::node::silent::recorded;

/// A node whose address is this host's own for as long as it answers.
const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

fn node(id: &str, vtep: IpAddr) -> NodeRecord {
    NodeRecord {
        id: id.into(),
        hostname: id.to_owned(),
        role: Role::Worker,
        vtep,
        state: NodeState::Ready,
        wireguard: Vec::new(),
        manager: None,
    }
}

#[test]
fn a_node_that_does_not_answer_is_left_out_until_it_does() {
    in_netns(|| async {
        let mut there = task(T1, "shoal/whoami", &[], &["front"]);
        there.node = "there".into();
        let mut table = with([there.clone()]);
        // The last one never answers.
        let vteps = [("here", UPLINK), ("there", THERE.into()), ("far", Ipv4Addr::new(192, 0, 2, 9).into())];
        table.nodes.extend(vteps.map(|(id, vtep)| (id.into(), node(id, vtep))));
        let host = Host::new(table);
        run(&format!("ip address add {THERE}/32 dev lo"));
        let running = host.start().await.unwrap();
        let silent = || host.notes().local.unwrap().silent;
        let names = |touched: &Touched| touched.tasks.get(&there.service)?.get(&there.id).copied();
        let touched = || host.notes().touched.iter().filter_map(names).count();
        let applied = *host.applied.borrow();
        // Until it is trusted to answer.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!((silent(), touched()), (Vteps::new(), 0));

        let only = Vteps::from([THERE.into()]);
        for turn in 1..=2 {
            run(&format!("ip address del {THERE}/32 dev lo"));
            until("it is silent", || silent() == only).await;
            until("that is recorded", || recorded(host.folder.path()).unwrap() == only).await;
            assert_eq!(touched(), 2 * turn - 1);
            run(&format!("ip address add {THERE}/32 dev lo"));
            until("it is heard again", || silent().is_empty()).await;
            until("that is recorded", || recorded(host.folder.path()).unwrap().is_empty()).await;
            assert_eq!(touched(), 2 * turn);
        }
        assert_eq!(*host.applied.borrow(), applied, "the table is the same");
        assert_eq!(host.notes().local.unwrap().answering, only);

        run(&format!("ip address del {THERE}/32 dev lo"));
        until("it is silent", || silent() == only).await;
        assert_eq!(running.tear_down().await, Vec::<String>::new());
        assert_eq!(recorded(host.folder.path()).unwrap(), Vteps::new());
    });
}

#[test]
fn a_node_that_the_managers_lost_is_looked_at_again_once_it_is_known_to_answer() {
    in_netns(|| async {
        let mut there = task(T1, "shoal/whoami", &[], &["front"]);
        there.node = "there".into();
        let mut table = with([there.clone()]);
        let record = NodeRecord { state: NodeState::Down, ..node("there", THERE.into()) };
        table.nodes.extend([("here".into(), node("here", UPLINK)), ("there".into(), record)]);
        let host = Host::new(table);
        run(&format!("ip address add {THERE}/32 dev lo"));
        let running = host.start().await.unwrap();
        let is_touched = |touched: &Touched| touched.has_task(&there.id);
        let touched =
            || host.notes().touched.iter().filter(|touched| !touched.all && is_touched(touched)).count();
        until("it is known to answer", || {
            host.notes().local.is_some_and(|local| local.answering == Vteps::from([THERE.into()]))
        })
        .await;
        assert_eq!(touched(), 1);
        assert_eq!(running.tear_down().await, Vec::<String>::new());
    });
}
