//! What other nodes say of their tasks reaches the dataplane.

use std::collections::BTreeSet;

use super::*;

#[test]
fn a_task_that_is_not_there_is_left_out_until_the_table_says_something_new() {
    in_netns(|| async {
        let mut there = task(T1, "shoal/whoami", &[], &["front"]);
        there.node = "there".into();
        let host = Host::new(with([there.clone()]));
        let _node = host.start().await.unwrap();
        let key = AttachmentKey { incarnation: there.incarnation, vni: 4097 };
        let absent = || host.notes().local.unwrap().absent;
        assert_eq!(absent(), BTreeSet::new());
        let nacks = host.notes().nacks.unwrap();
        nacks.send(key).await.unwrap();
        until("it is left out", || absent() == BTreeSet::from([key])).await;
        let names = |touched: &Touched| touched.tasks.get(&there.service)?.get(&there.id).copied();
        assert_eq!(host.notes().touched.iter().filter_map(names).collect::<Vec<_>>(), [there.incarnation]);

        host.change(|table| table.tasks.get_mut(&there.id).unwrap().observed = TaskState::Running);
        until("it is back", || absent().is_empty()).await;
        nacks.send(key).await.unwrap();
        until("it is left out again", || absent() == BTreeSet::from([key])).await;
        host.change(|table| drop(table.tasks.remove(&there.id)));
        until("it is forgotten", || absent().is_empty()).await;
    });
}
