//! `shoal watch`: what happens to the cluster's objects, as a manager tells it.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::Value;

use crate::api;
use crate::args::WatchArgs;
use crate::print;

/// Prints each change, until the stream ends or nobody reads any more.
pub(crate) fn run(args: &WatchArgs) -> Result<()> {
    let mut is_read = true;
    api::follow(&args.socket.run_dir, &path(args), |line| {
        let value = serde_json::from_str(line).context("the agent's answer does not decode")?;
        let told = if args.json { Some(line.to_owned()) } else { told(&value)? };
        if let Some(told) = told {
            is_read = print::line(&told)?;
        }
        if let Some(message) = ending(&value) {
            bail!(message);
        }
        Ok(is_read)
    })?;
    if is_read {
        bail!("the agent ended the stream without a word");
    }
    Ok(())
}

fn path(args: &WatchArgs) -> String {
    let since = args.since.map(|index| format!("since={index}"));
    let kinds = args.kinds.iter().filter_map(ValueEnum::to_possible_value);
    let kinds = kinds.map(|kind| format!("kind={}", kind.get_name()));
    let parameters: Vec<String> = since.into_iter().chain(kinds).collect();
    format!("/shoal/v1/watch?{}", parameters.join("&"))
}

/// Why the stream ends with this line, if it does.
fn ending(line: &Value) -> Option<String> {
    (line["Kind"] == "end").then(|| word(&line["Message"]))
}

/// A line for people; `None` where it is not about a change.
fn told(line: &Value) -> Result<Option<String>> {
    let index = line["Index"].as_u64().context("the agent's answer has no Index")?;
    let kind = word(&line["Kind"]);
    match kind.as_str() {
        "begin" => return Ok(Some(format!("from index {index} on"))),
        "heartbeat" | "end" => return Ok(None),
        _ => {}
    }
    let time = print::parsed(&word(&line["Time"])).map_or_else(|| word(&line["Time"]), print::time);
    let [action, name, id] = ["Action", "Name", "ID"].map(|field| word(&line[field]));
    let details = if action == "remove" { String::new() } else { details(&kind, &line["Object"]) };
    let text = format!("{time}  {index:>8}  {action:<6}  {kind:<10}  {name} ({id}){details}");
    Ok(Some(text))
}

/// What is to be said of an object at once.
fn details(kind: &str, object: &Value) -> String {
    match kind {
        "node" => {
            let (spec, state) = (&object["Spec"], word(&object["Status"]["State"]));
            format!(": {}, {state}, {}", word(&spec["Role"]), word(&spec["Availability"]))
        }
        "service" => {
            let spec = &object["Spec"];
            let image = word(&spec["TaskTemplate"]["ContainerSpec"]["Image"]);
            match spec["Mode"]["Replicated"]["Replicas"].as_u64() {
                Some(replicas) => format!(": {replicas} of {image}"),
                None => format!(": {image} on every node"),
            }
        }
        "task" | "attachment" => {
            let (status, desired) = (&object["Status"], word(&object["DesiredState"]));
            let (state, error) = (word(&status["State"]), word(&status["Err"]));
            let node = word(&object["NodeID"]);
            let on = if node.is_empty() { node } else { format!(" on {node}") };
            let error = if error.is_empty() { error } else { format!(": {error}") };
            format!(": {state}, to be {desired}{on}{error}")
        }
        "network" => {
            let subnets = object["IPAM"]["Config"].as_array().into_iter().flatten();
            let subnets: Vec<String> = subnets.map(|config| word(&config["Subnet"])).collect();
            format!(": {}", subnets.join(", "))
        }
        _ => String::new(),
    }
}

/// A text as it is, without what is not for a terminal.
fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().chars().filter(|char| !char.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command};

    fn watch(line: &str) -> WatchArgs {
        let Command::Watch(args) = Args::parse_from(line.split(' ')).command else { panic!("not watch") };
        args
    }

    fn parsed(line: &str) -> Value {
        serde_json::from_str(line).unwrap()
    }

    #[test]
    fn what_is_asked_for_is_in_the_path() {
        assert_eq!(path(&watch("shoal watch")), "/shoal/v1/watch?");
        let args = watch("shoal watch --kind task --kind attachment --since 41 --json");
        assert_eq!(path(&args), "/shoal/v1/watch?since=41&kind=task&kind=attachment");
        assert!(args.json);
        let error = Args::try_parse_from("shoal watch --kind volume".split(' ')).unwrap_err().to_string();
        assert!(
            error.contains("volume") && error.contains("cluster, network, node, service, task"),
            "{error}"
        );
    }

    #[test]
    fn changes_are_told_on_one_line_each() {
        for (line, expected) in [
            (r#"{"Index":41,"Kind":"begin"}"#, Some("from index 41 on")),
            (r#"{"Index":41,"Kind":"heartbeat"}"#, None),
            (r#"{"Index":41,"Kind":"end","Message":"gone"}"#, None),
            (
                r#"{"Index":42,"Kind":"service","Action":"create","ID":"s1","Name":"web","Time":"2026-11-23T02:07:00.12Z",
                "Object":{"Spec":{"Mode":{"Replicated":{"Replicas":3}},"TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami"}}}}}"#,
                Some("2026-11-23T02:07:00.120Z        42  create  service     web (s1): 3 of shoal/whoami"),
            ),
            (
                r#"{"Index":43,"Kind":"task","Action":"update","ID":"t1","Name":"web.1.t1","Time":"2026-11-23T02:07:00Z",
                "Object":{"NodeID":"n2","DesiredState":"running","Status":{"State":"failed","Err":"no\nroom"}}}"#,
                Some(
                    "2026-11-23T02:07:00.000Z        43  update  task        web.1.t1 (t1): failed, to be running on n2: noroom",
                ),
            ),
            (
                r#"{"Index":44,"Kind":"node","Action":"update","ID":"n2","Name":"host2","Time":"2026-11-23T02:07:00Z",
                "Object":{"Spec":{"Role":"worker","Availability":"drain"},"Status":{"State":"down"}}}"#,
                Some(
                    "2026-11-23T02:07:00.000Z        44  update  node        host2 (n2): worker, down, drain",
                ),
            ),
            (
                r#"{"Index":45,"Kind":"network","Action":"create","ID":"x","Name":"front","Time":"2026-11-23T02:07:00Z",
                "Object":{"IPAM":{"Config":[{"Subnet":"10.0.1.0/24"},{"Subnet":"fd00:1::/64"}]}}}"#,
                Some(
                    "2026-11-23T02:07:00.000Z        45  create  network     front (x): 10.0.1.0/24, fd00:1::/64",
                ),
            ),
            (
                r#"{"Index":46,"Kind":"network","Action":"remove","ID":"x","Name":"front","Time":"2026-11-23T02:07:00Z","Object":{}}"#,
                Some("2026-11-23T02:07:00.000Z        46  remove  network     front (x)"),
            ),
        ] {
            assert_eq!(told(&parsed(line)).unwrap().as_deref(), expected, "{line}");
        }
        assert!(told(&parsed("{}")).is_err());
        assert_eq!(ending(&parsed(r#"{"Index":41,"Kind":"end","Message":"gone"}"#)).as_deref(), Some("gone"));
        assert_eq!(ending(&parsed(r#"{"Index":41,"Kind":"begin"}"#)), None);
    }
}
