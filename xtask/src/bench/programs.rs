//! What the packet harness of `shoal-tests` measures, by its program `bench`: the programs alone, without a lab.

use std::time::Duration;

use anyhow::{Context, Result};

use super::figures::{Case, Goal, show, show_goals};
use crate::{bounded, lab, workspace};

const BUILD_LIMIT: Duration = Duration::from_mins(25);
const LIMIT: Duration = Duration::from_mins(10);

/// ns per packet of the XDP program.
pub(super) fn dataplane() -> Result<Vec<Case>> {
    println!(
        "dataplane: BPF_PROG_TEST_RUN, 500,000 packets a run, the cases in turns; forward_* undo the encapsulation after \
         each packet, which floor_adjust measures alone"
    );
    // The profile of the lab and the tests: the kernel measures, and the programs are built alike in all of them.
    let mut cases = measure("dataplane", lab::PROFILE, None, LIMIT)?;
    show(&cases);
    let find = |name: &str| cases.iter().find(|case| case.name == name).with_context(|| format!("no {name}"));
    let floor = find("floor_tx")?;
    let mut ratios = Vec::new();
    let mut goals = Vec::new();
    for case in cases.iter().filter(|case| case.name.starts_with("forward_")) {
        let net = case.less(find("floor_adjust")?, format!("{}_net", case.name));
        let of_floor = net.over(floor, format!("{}_net_of_floor_tx", case.name));
        if case.name.starts_with("forward_hit_v") {
            goals.push((of_floor.clone(), Goal::AtMost(3.5)));
        }
        ratios.extend([net, of_floor]);
    }
    let net = |name: &str| {
        let name = format!("{name}_net");
        ratios.iter().find(|case| case.name == name).with_context(|| format!("no {name}"))
    };
    for (case, other, name, goal) in [
        ("forward_hit_v6", "forward_hit_v4", "forward_hit_v6_of_v4", Goal::AtMost(1.15)),
        ("forward_wset_v6", "forward_wset_v4", "forward_wset_v6_of_v4", Goal::AtMost(1.15)),
        ("forward_new_v6", "forward_new_v4", "forward_new_v6_of_v4", Goal::AtMost(1.15)),
        (
            "forward_hit_10000_services",
            "forward_hit_v4",
            "forward_hit_10000_services_of_1",
            Goal::AtMost(1.1),
        ),
        (
            "forward_new_10000_services",
            "forward_new_v4",
            "forward_new_10000_services_of_1",
            Goal::AtMost(1.1),
        ),
    ] {
        goals.push((net(case)?.over(net(other)?, name.to_owned()), goal));
    }
    show(&ratios);
    show_goals(&goals);
    cases.extend(ratios);
    cases.extend(goals.into_iter().map(|(case, _)| case).filter(|case| !case.name.ends_with("floor_tx")));
    Ok(cases)
}

/// What a large table costs.
pub(super) fn churn() -> Result<Vec<Case>> {
    println!(
        "churn: 10,000 services of 10 tasks each, each published, written by the agent's dataplane in a network \
         namespace and on a BPF file system of its own; CPU is user and system time of the process"
    );
    let cases = measure("churn", "release", None, LIMIT)?;
    show(&cases);
    let goals = [
        ("churn_install_cpu", Goal::AtMost(2000.0)),
        ("churn_change_cpu", Goal::AtMost(1.0)),
        ("churn_rss", Goal::AtMost(100.0)),
    ];
    let found = goals.into_iter().map(|(name, goal)| {
        let case = cases.iter().find(|case| case.name == name).with_context(|| format!("no {name}"))?;
        Ok((case.clone(), goal))
    });
    show_goals(&found.collect::<Result<Vec<_>>>()?);
    Ok(cases)
}

/// Runs a benchmark of `shoal-tests`, with a second argument where it takes one, for so long at most without the build.
pub(super) fn measure(
    benchmark: &str,
    profile: &str,
    detail: Option<&str>,
    limit: Duration,
) -> Result<Vec<Case>> {
    let cargo = |action: &str| {
        let mut command = workspace::cargo();
        command.args([action, "--quiet", "--profile", profile, "--package", "shoal-tests", "--bin", "bench"]);
        command
    };
    bounded::output(&mut cargo("build"), BUILD_LIMIT)?;
    let mut command = cargo("run");
    let printed = bounded::output(command.args(["--", benchmark]).args(detail), limit)?;
    serde_json::from_str(printed.trim()).context("the benchmark's output")
}
