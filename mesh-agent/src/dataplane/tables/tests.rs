//! Tables on maps in the kernel, without programs: what is there in the end, whatever was there before.

mod following;

use std::io::Write as _;
use std::path::Path;

use aya::Pod;
use aya::maps::{Array, HashMap, LpmTrie, MapData};
use mesh_api::id::TaskId;
use mesh_api::table::{SourceRule, TaskState};
use mesh_common::addr::{Address, Ip6};
use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, BACKENDS_MAX, Backend, ENDPOINTS_MAX, Endpoint, IFACES_MAX, Iface, LOCALS_MAX, PEERS_MAX,
    PLACES_MAX, PORTS_MAX, Peer, Port, PortKey, RULES_MAX, RuleKey, SERVICES_MAX, Service, TaskKey,
    TaskSlots, VIPS_MAX,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::super::contents::Damage;
use super::super::maps::{NAMES4, NAMES6};
use super::super::places::Places;
use super::super::plan::tests::{local, node, table, task};
use super::*;

/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: u32 = 1;

/// Runs a test with a folder on a BPF file system of its own; without root, says that it is skipped.
pub(crate) fn on_bpffs(test: impl FnOnce(&Path) + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        // Not by a print macro, whose output libtest keeps to itself: `cargo xtask test` counts this line.
        let _ = std::io::stdout().write_all(b"\nSKIP: needs root\n");
        return;
    }
    let thread = std::thread::spawn(move || {
        let folder = tempfile::tempdir().unwrap();
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
        make_maps(folder.path());
        test(folder.path());
        nix::mount::umount(folder.path()).unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The maps that the agent writes, empty.
fn make_maps(folder: &Path) {
    fn array<V: Pod>(folder: &Path, name: &str, max: u32) {
        Array::<MapData, V>::create(max, 0).unwrap().pin(folder.join(name)).unwrap();
    }
    fn hash<K: Pod, V: Pod>(folder: &Path, name: &str, max: u32) {
        HashMap::<MapData, K, V>::create(max, NO_PREALLOC).unwrap().pin(folder.join(name)).unwrap();
    }
    fn family<A: Address + Pod>(folder: &Path, names: [&str; 8]) {
        let [locals, rules, vips, backends, tasks, endpoints, ifaces, aliases] = names;
        hash::<A, u32>(folder, locals, LOCALS_MAX);
        let trie = LpmTrie::<MapData, RuleKey<A>, u32>::create(RULES_MAX, NO_PREALLOC).unwrap();
        trie.pin(folder.join(rules)).unwrap();
        hash::<AddrKey<A>, u32>(folder, vips, VIPS_MAX);
        array::<Backend<A>>(folder, backends, BACKENDS_MAX);
        hash::<TaskKey, TaskSlots>(folder, tasks, BACKENDS_MAX);
        hash::<AddrKey<A>, Endpoint>(folder, endpoints, ENDPOINTS_MAX);
        hash::<u32, Iface<A>>(folder, ifaces, IFACES_MAX);
        hash::<A, Alias<A>>(folder, aliases, IFACES_MAX);
    }
    array::<Config>(folder, "shoal_config", 1);
    family::<Be32>(folder, NAMES4);
    family::<Ip6>(folder, NAMES6);
    hash::<PortKey, Port>(folder, "shoal_ports", PORTS_MAX);
    array::<Service>(folder, "shoal_services", SERVICES_MAX);
    array::<u32>(folder, "shoal_places", PLACES_MAX);
    hash::<Ip6, u32>(folder, "shoal_members", PEERS_MAX);
    hash::<u32, u32>(folder, "shoal_tags", PEERS_MAX);
    array::<Peer>(folder, "shoal_peers", PEERS_MAX);
}

fn config() -> Config {
    Config { vtep: Ip6::mapped(Be32::ipv4(198, 18, 0, 11)), ..Config::default() }
}

/// The layout's table, with rules, so that no map is empty.
fn full_table() -> Table {
    let mut table = table();
    table.nodes.insert("n3".into(), node("n3", 13));
    let balancing = &mut table.services.get_mut(&"web".into()).unwrap().balancing;
    balancing.sources = vec![SourceRule { net: "192.0.2.0/24".parse().unwrap(), allow: false }];
    table
}

impl Tables {
    /// Whether the maps hold the layout, and places that lead to the right tasks.
    #[track_caller]
    fn assert_right(&self, table: &Table) {
        let held = self.maps.read().unwrap();
        assert_eq!(held, self.layout.contents());
        let places = self.maps.read_places(&held.common.services).unwrap();
        for service in held.common.services.values().filter(|service| service.len > 0) {
            let (slots, nodes) = places.get(service.start).unwrap().split_at(service.len as usize);
            for slot in slots {
                let backend = held.v4.backends[slot];
                assert_eq!(backend.vni, service.vni);
                assert!(table.tasks.values().any(|task| task.incarnation == backend.incarnation));
            }
            assert!(nodes.iter().all(|slot| *slot == 0 || held.common.peers.contains_key(slot)));
        }
    }
}

#[test]
fn what_befell_any_map_is_repaired_by_the_next_agent() {
    on_bpffs(|folder| {
        let table = full_table();
        let mut first = Tables::open(folder).unwrap();
        assert!(!first.are_filled().unwrap());
        first.apply(&table, &local(), &config()).unwrap();
        first.assert_right(&table);
        for damage in [Damage::Deleted, Damage::Changed, Damage::Added] {
            let held = first.maps.read().unwrap();
            let mut damaged = held.clone();
            damaged.damage(damage);
            first.maps.write(&Changes::between(held.clone(), damaged), &Places::default()).unwrap();
            assert_ne!(first.maps.read().unwrap(), held, "{damage:?}");
            let mut next = Tables::open(folder).unwrap();
            next.apply(&table, &local(), &config()).unwrap();
            next.assert_right(&table);
            first = next;
        }
    });
}

#[test]
fn damaged_places_and_configuration_are_repaired_by_the_next_agent() {
    on_bpffs(|folder| {
        let table = full_table();
        let mut first = Tables::open(folder).unwrap();
        first.apply(&table, &local(), &config()).unwrap();
        let services = first.maps.read().unwrap().common.services;
        let garbage = services.values().map(|service| (service.start, vec![7777; 20])).collect();
        first.maps.write(&Changes::default(), &garbage).unwrap();
        first.maps.configure(&Config { hash_seed: 99, ..config() }).unwrap();
        let mut next = Tables::open(folder).unwrap();
        next.apply(&table, &local(), &config()).unwrap();
        next.assert_right(&table);
        assert_eq!(next.maps.config().unwrap(), Some(config()));
    });
}

#[test]
fn an_agent_that_takes_over_writes_nothing_where_nothing_changed() {
    on_bpffs(|folder| {
        let table = full_table();
        let mut first = Tables::open(folder).unwrap();
        first.apply(&table, &local(), &config()).unwrap();
        let held = first.maps.read().unwrap();
        let mut next = Tables::open(folder).unwrap();
        assert!(next.are_filled().unwrap());
        next.apply(&table, &local(), &config()).unwrap();
        assert_eq!(next.maps.read().unwrap(), held);
    });
}

#[test]
fn changes_lead_where_the_whole_table_leads() {
    on_bpffs(|folder| {
        let mut table = full_table();
        let mut tables = Tables::open(folder).unwrap();
        // The first is all of it, whatever is touched.
        tables.change(&table, &Touched::default(), &local(), &config()).unwrap();
        tables.assert_right(&table);
        let steps: [fn(&mut Table); 7] = [
            |table| table.tasks.get_mut(&"t2".into()).unwrap().desired = TaskState::Shutdown,
            |table| drop(table.tasks.remove(&"t3".into())),
            |table| drop(table.tasks.insert("t4".into(), task(4, "n2", TaskState::Running))),
            |table| table.tasks.get_mut(&"t1".into()).unwrap().observed = TaskState::Failed,
            |table| table.services.get_mut(&"web".into()).unwrap().ports.clear(),
            |table| drop(table.services.remove(&"web".into())),
            |table| table.tasks.clear(),
        ];
        for (number, step) in steps.into_iter().enumerate() {
            let before = table.clone();
            step(&mut table);
            let mut touched = Touched::default();
            let ids: Vec<&TaskId> = before.tasks.keys().chain(table.tasks.keys()).collect();
            for id in ids.into_iter().filter(|id| before.tasks.get(id) != table.tasks.get(id)) {
                before
                    .tasks
                    .get(id)
                    .or(table.tasks.get(id))
                    .into_iter()
                    .for_each(|task| touched.note_task(task));
            }
            if before.services != table.services {
                touched.services.insert("web".into());
            }
            tables.change(&table, &touched, &local(), &config()).unwrap();
            tables.assert_right(&table);
            let whole = plan(&table, &local());
            let fragment = tables.layout.fragment(&"web".into()).cloned();
            assert_eq!(fragment.as_ref(), whole.fragments.get(&"web".into()), "step {number}");
        }
    });
}

#[test]
fn a_link_that_came_or_went_is_a_change_without_one_of_the_table() {
    on_bpffs(|folder| {
        let table = full_table();
        let mut tables = Tables::open(folder).unwrap();
        let bare = Local { endpoints: vec![], ..local() };
        for local in [&bare, &local(), &bare] {
            tables.change(&table, &Touched::default(), local, &config()).unwrap();
            tables.assert_right(&table);
            let held = tables.maps.read().unwrap();
            assert_eq!(held.v4.ifaces.len(), local.endpoints.len());
            assert_eq!(held.v4.tasks.len(), 4 + local.endpoints.len());
        }
    });
}

#[test]
fn a_node_that_is_heard_again_gets_the_very_places_that_it_had() {
    on_bpffs(|folder| {
        let table = full_table();
        let mut tables = Tables::open(folder).unwrap();
        let mut touched = Touched::default();
        table.tasks.values().filter(|task| task.node == "n2".into()).for_each(|task| touched.note_task(task));
        let deaf = Local { silent: [std::net::Ipv4Addr::new(198, 18, 0, 12).into()].into(), ..local() };
        let look = |tables: &Tables| {
            let held = tables.maps.read().unwrap();
            let places = tables.maps.read_places(&held.common.services).unwrap();
            let services = held.common.services.iter();
            let of_services: Vec<_> = services
                .map(|(slot, service)| (*slot, service.len, places.get(service.start).unwrap().to_vec()))
                .collect();
            (of_services, held.v4.backends)
        };
        tables.change(&table, &touched, &local(), &config()).unwrap();
        let before = look(&tables);
        let own = before.1.iter().filter(|(_, backend)| backend.peer == 0).map(|(slot, _)| *slot);
        let own: Vec<u32> = own.collect();
        for _ in 0..3 {
            tables.change(&table, &touched, &deaf, &config()).unwrap();
            tables.assert_right(&table);
            let (services, backends) = look(&tables);
            for (_, len, places) in services {
                assert!(places[..len as usize].iter().all(|slot| own.contains(slot)));
                assert_eq!(places[len as usize..], [0], "only this node is searched");
            }
            assert_eq!(backends, before.1, "connections keep their backends");
            let avoided: Vec<u32> = tables.avoided().iter().map(|avoided| avoided.incarnation).collect();
            assert!(avoided.len() == 4 && avoided.iter().all(|incarnation| [2, 3].contains(incarnation)));

            tables.change(&table, &touched, &local(), &config()).unwrap();
            tables.assert_right(&table);
            assert_eq!((look(&tables), tables.avoided().len()), (before.clone(), 0));
        }
    });
}

#[test]
fn a_map_of_another_layout_is_refused() {
    on_bpffs(|folder| {
        std::fs::remove_file(folder.join("shoal_ports")).unwrap();
        HashMap::<MapData, u32, u32>::create(8, 0).unwrap().pin(folder.join("shoal_ports")).unwrap();
        let error = Tables::open(folder).unwrap_err();
        assert!(error.to_string().contains("keys of 4 and values of 4 bytes"), "{error}");
    });
}
