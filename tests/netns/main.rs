//! The netns suite: a lab of hosts in network namespaces with the real agents, the real `docker` and real clients.
//!
//! `cargo xtask test` brings the lab up, as often as there are ways to attach the dataplane, and runs this on each: all cases with
//! XDP, and without it those that it makes a difference to. A case may assume a swarm of three without services, and is judged by
//! what it leaves behind as well.

mod attach;
mod capture;
mod chance;
mod churn;
mod cleartext;
mod client;
mod commands;
mod curl;
mod dial;
mod dns;
mod egress;
mod encryption;
mod engine;
mod errors;
mod failures;
mod features;
mod flood;
mod forgery;
mod fragments;
mod gone;
mod harness;
mod intruders;
mod iperf3;
mod isolation;
mod lab;
mod load;
mod local;
mod managers;
mod matrix;
mod members;
mod mesh;
mod mtu;
mod names;
mod overlay;
mod overlay6;
mod paths;
mod peers;
mod quorum;
mod raw;
mod receiver;
mod recovery;
mod refusals;
mod relay;
mod restarts;
mod rivals;
mod rotation;
mod silent;
mod stale;
mod steady;
mod underlay;
mod undo;
mod watch;
mod ways;
mod wire;
mod writes;

use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};

fn main() -> ExitCode {
    if let Some(ended) = receiver::main() {
        return ended;
    }
    // Or the end of a child that one thread has just started interrupts what another waits for: a signal goes to any
    // thread that does not block it, and std blocks all of them while it starts a child.
    #[expect(clippy::expect_used, reason = "every kernel knows the signal")]
    SigSet::from(Signal::SIGCHLD).thread_block().expect("the signal exists");
    // Sets the kernel as a whole, and takes modules that few kernels have.
    let on_request = cases![flood::full_table_of_tracked_connections_stops_others_and_not_the_mesh];
    let everywhere = cases![
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
        egress::tasks_with_fixed_addresses_send_under_no_other,
        egress::flows_that_no_port_is_left_for_are_counted,
        isolation::tasks_reach_exactly_those_on_their_networks,
        isolation::tasks_reach_exactly_those_on_their_encrypted_networks,
        isolation::forged_frames_reach_nobody_and_are_counted,
        isolation::forged_frames_reach_nobody_on_encrypted_networks,
        isolation::forged_frames_reach_nobody_while_agents_and_networks_change,
        churn::addresses_used_again_get_nothing_of_their_former_tasks,
        churn::addresses_used_again_get_nothing_on_an_encrypted_network,
        stale::node_cut_off_from_managers_learns_which_tasks_are_gone,
        stale::node_cut_off_from_managers_serves_all_the_time_and_catches_up,
        names::every_kind_of_record_is_answered,
        names::every_kind_of_record_is_answered_on_an_encrypted_network,
        names::a_thousand_questions_a_second_are_answered,
        names::dead_resolver_delays_no_name_of_the_cluster,
        attach::process_is_on_its_network_until_it_ends,
        attach::namespaces_and_programs_are_attached_and_refusals_say_why,
        overlay6::names_lead_to_every_task,
        overlay6::vip_tasks_and_gateway_answer_ping,
        overlay6::big_transfers_between_tasks_on_different_nodes,
        matrix::requests_reach_every_task_by_every_node_with_the_clients_address,
        matrix::routed_client_is_served_on_every_way,
        matrix::downloads_are_intact_and_take_the_way_that_the_service_says,
        matrix::iperf3_runs_up_and_down_on_every_way,
        matrix::fragmented_datagrams_pass_on_every_way,
        features::dig_gets_an_answer_of_4_kb,
        paths::nodes_answer_ping_beside_their_published_ports,
        paths::traces_arrive_on_every_way,
        paths::narrow_path_to_the_client_is_found,
        paths::narrower_link_to_the_client_is_told_to_tasks,
        paths::narrower_underlay_is_found_at_run_time,
        paths::segments_that_do_not_fit_are_refused_and_sent_anew,
        mtu::tasks_talk_whatever_the_underlay_carries,
        mtu::tasks_talk_encrypted_whatever_the_underlay_carries,
        mtu::transfers_go_on_when_the_underlay_narrows,
        mtu::encrypted_transfers_go_on_when_the_underlay_narrows,
        local::processes_of_a_node_reach_its_ports_by_every_address,
        local::curl_on_a_node_sees_whom_it_dialled,
        local::tasks_reach_the_ports_of_every_node,
        features::client_with_affinity_stays_with_one_task,
        features::rules_let_in_and_keep_out,
        features::ports_answer_on_the_addresses_and_nodes_that_were_chosen,
        features::host_mode_answers_on_the_tasks_node_alone,
        features::light_node_gets_less,
        features::share_of_a_new_task_grows,
        gone::service_without_tasks_refuses_at_once,
        gone::connection_of_a_dead_task_is_reset_at_its_next_segment,
        gone::datagrams_of_a_dead_task_go_to_another,
        chance::connections_go_on_when_their_route_moves_to_another_node,
        chance::scaling_and_moving_breaks_no_connection_whose_task_lives,
        chance::lost_ingress_node_breaks_no_connection_to_others,
        restarts::node_without_an_agent_loses_no_connection,
        restarts::restarts_and_upgrades_break_no_connection,
        restarts::damaged_maps_are_repaired,
        restarts::removed_rules_come_back_and_whole_ones_are_left,
        flood::flood_of_syns_breaks_no_established_connection,
        flood::connections_come_about_during_a_flood,
        intruders::scan_finds_what_is_published_and_nothing_else,
        intruders::node_local_addresses_are_out_of_reach,
        intruders::tasks_own_addresses_are_out_of_reach,
        intruders::loopback_is_out_of_reach,
        intruders::forged_requests_do_not_go_in_circles,
        relay::tunnel_is_no_open_relay,
        relay::nodes_that_point_at_each_other_end_what_comes,
        encryption::change_of_keys_loses_no_packet,
        encryption::what_comes_in_cleartext_reaches_no_task,
        underlay::nothing_of_an_encrypted_network_is_seen,
        underlay::packets_sent_again_reach_no_task,
        errors::errors_about_nobodys_flow_reach_no_task,
        errors::forged_path_mtu_of_a_flow_stays_above_the_floor,
        errors::forged_path_mtu_between_nodes_cuts_nobody_off,
        fragments::fragments_without_end_keep_no_others_out,
        failures::scaling_under_load_fails_no_request,
        failures::rolling_update_under_load_fails_no_request,
        failures::killed_task_is_replaced,
        failures::killed_agent_leaves_connections_and_ports_alone,
        failures::restarted_agent_still_manages_the_tasks_it_found,
        failures::killed_manager_comes_back_with_everything,
        failures::deleted_devices_come_back_and_serve,
        failures::node_cut_off_loses_its_tasks_to_the_others,
        silent::node_cut_off_gets_no_new_flows_within_a_second_and_does_again_once_it_is_back,
        silent::node_whose_agent_is_dead_goes_on_getting_new_flows,
    ];
    // How the dataplane is attached makes no difference to these.
    let once = cases![
        commands::nodes_and_versions_are_shown,
        commands::commands_of_the_notes_work,
        commands::create_and_update_wait_until_it_is_done,
        commands::networks_are_made_shown_and_removed,
        commands::placement_follows_mode_and_constraints,
        commands::drained_node_gives_its_tasks_away,
        commands::failing_tasks_are_restarted_and_say_why,
        commands::removed_service_leaves_nothing,
        commands::node_leaves_and_joins_again,
        managers::nodes_become_managers_and_cease_to_be,
        managers::leaders_that_die_lose_no_write,
        quorum::without_a_majority_traffic_goes_on,
        quorum::forced_new_cluster_goes_on_with_all_it_had,
        quorum::manager_leaves_by_force_and_the_others_go_on,
        recovery::workers_follow_the_restored_swarm,
        recovery::former_managers_are_workers_of_the_restored_swarm,
        recovery::locked_manager_is_unlocked_and_votes_again,
        recovery::disks_hold_what_was_acknowledged,
        rotation::roots_and_tokens_are_replaced_under_load_without_a_failed_request,
        refusals::docker_says_what_is_wrong,
        refusals::wrong_tokens_and_managers_are_refused,
        refusals::api_answers_broken_requests_in_dockers_form,
    ];
    harness::main(&harness::Cases { everywhere, once, on_request })
}
