//! The netns suite: a lab of hosts in network namespaces with the real agents, the real `docker` and real clients.
//!
//! `cargo xtask test` brings the lab up, as often as there are ways to attach the dataplane, and runs this on each. A
//! case may assume a swarm of three without services, and is judged by what it leaves behind as well.

mod capture;
mod client;
mod commands;
mod engine;
mod failures;
mod harness;
mod lab;
mod load;
mod mesh;
mod overlay;
mod refusals;

use std::process::ExitCode;

fn main() -> ExitCode {
    harness::main(cases![
        commands::nodes_and_versions_are_shown,
        mesh::http_reaches_every_task_by_every_node_with_the_clients_address,
        mesh::udp_reaches_every_task_by_every_node_with_the_clients_address,
        mesh::client_behind_a_router_is_served_and_seen,
        mesh::one_source_port_dials_the_nodes_in_turn,
        mesh::one_socket_asks_the_nodes_in_turn,
        mesh::datagrams_of_every_size_come_back_unchanged,
        mesh::download_by_a_node_without_the_task_is_intact,
        mesh::upload_by_a_node_without_the_task_is_intact,
        mesh::captures_show_the_client_and_the_dialled_address,
        mesh::underlay_carries_the_clients_packet_unchanged,
        mesh::unpublished_port_is_the_hosts_own,
        overlay::names_resolve_to_the_vip_and_to_the_tasks,
        overlay::names_resolve_by_udp_and_tcp,
        overlay::service_name_leads_to_every_task,
        overlay::task_reaches_every_task_of_its_service_itself_included,
        overlay::vip_and_gateway_answer_ping,
        overlay::big_transfers_between_tasks_on_different_nodes,
        overlay::networks_are_kept_apart,
        overlay::tasks_reach_the_outside_under_their_nodes_address,
        failures::scaling_under_load_fails_no_request,
        failures::rolling_update_under_load_fails_no_request,
        failures::killed_task_is_replaced,
        failures::killed_agent_leaves_connections_and_ports_alone,
        failures::restarted_agent_still_manages_the_tasks_it_found,
        failures::killed_manager_comes_back_with_everything,
        failures::node_cut_off_loses_its_tasks_to_the_others,
        commands::commands_of_the_notes_work,
        commands::create_and_update_wait_until_it_is_done,
        commands::networks_are_made_shown_and_removed,
        commands::placement_follows_mode_and_constraints,
        commands::drained_node_gives_its_tasks_away,
        commands::failing_tasks_are_restarted_and_say_why,
        commands::removed_service_leaves_nothing,
        commands::node_leaves_and_joins_again,
        refusals::docker_says_what_is_wrong,
        refusals::wrong_tokens_and_managers_are_refused,
        refusals::api_answers_broken_requests_in_dockers_form,
    ])
}
