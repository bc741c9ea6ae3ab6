//! Which crate may depend on which, and that each one opts in to lints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{run, workspace};

/// What a crate never reaches, by whatever path: the agent and the control plane meet only in mesh-api.
const FORBIDDEN: [(&str, &[&str]); 6] = [
    ("mesh-common", &["mesh-datapath", "mesh-api", "mesh-agent", "control", "shoal"]),
    ("mesh-datapath", &["mesh-api", "mesh-agent", "control", "shoal"]),
    ("mesh-api", &["mesh-common", "mesh-datapath", "mesh-agent", "control", "shoal", "aya", "aya-obj"]),
    ("mesh-agent", &["control", "shoal", "openraft", "sled"]),
    ("control", &["mesh-common", "mesh-datapath", "mesh-agent", "shoal", "aya", "aya-obj"]),
    ("ebpf-build", &["mesh-common", "mesh-datapath", "mesh-api", "mesh-agent", "control", "shoal"]),
];

/// Every build of the agent waits for these, so they wait for nothing.
const WITHOUT_DEPENDENCIES: [&str; 1] = ["ebpf-build"];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    /// None is a normal dependency.
    kind: Option<String>,
}

impl Dependency {
    fn is_only_for_tests(&self) -> bool {
        self.dep_kinds.iter().all(|kind| kind.kind.as_deref() == Some("dev"))
    }
}

/// Violations of dependency direction and of lint tables.
pub(super) fn violations(root: &Path) -> Result<Vec<String>> {
    let json = run::output(workspace::cargo().args(["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Metadata = serde_json::from_str(&json).context("reading cargo metadata")?;
    let mut violations = direction(&metadata);
    violations.extend(lints(root, &metadata)?);
    Ok(violations)
}

fn direction(metadata: &Metadata) -> Vec<String> {
    let names: BTreeMap<&str, &str> =
        metadata.packages.iter().map(|package| (package.id.as_str(), package.name.as_str())).collect();
    let nodes: BTreeMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let mut violations = Vec::new();
    for id in &metadata.workspace_members {
        let name = names[id.as_str()];
        let reached: BTreeSet<&str> = reached(id, &nodes).into_iter().map(|id| names[id]).collect();
        let forbidden = FORBIDDEN.iter().filter(|(from, _)| *from == name).flat_map(|(_, to)| *to);
        for dependency in forbidden.filter(|to| reached.contains(*to)) {
            violations.push(format!(
                "{name}: reaches {dependency}; DESIGN forbids it (cargo tree -p {name} -i {dependency})"
            ));
        }
        if WITHOUT_DEPENDENCIES.contains(&name) && !reached.is_empty() {
            violations.push(format!("{name}: has dependencies, and is to have none: {reached:?}"));
        }
    }
    violations
}

/// All that `start` depends on. Its own tests count; those of its dependencies are not built with it.
fn reached<'a>(start: &'a str, nodes: &BTreeMap<&'a str, &'a Node>) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut queue = vec![start];
    while let Some(id) = queue.pop() {
        let dependencies = nodes.get(id).map_or(&[][..], |node| &node.deps);
        for dependency in
            dependencies.iter().filter(|dependency| id == start || !dependency.is_only_for_tests())
        {
            if reached.insert(dependency.pkg.as_str()) {
                queue.push(&dependency.pkg);
            }
        }
    }
    reached
}

/// Lints of a workspace apply only to crates that ask for them. The BPF package is a workspace of its own.
fn lints(root: &Path, metadata: &Metadata) -> Result<Vec<String>> {
    let members = metadata.packages.iter().filter(|package| metadata.workspace_members.contains(&package.id));
    let mut violations = Vec::new();
    for package in members {
        if !read(&package.manifest_path)?.contains("[lints]\nworkspace = true") {
            violations.push(format!("{}: lacks `[lints] workspace = true`", package.name));
        }
    }
    let bpf = root.join(ebpf_build::BPF_PACKAGE).join("Cargo.toml");
    if bpf.is_file() && !read(&bpf)?.contains("[lints.") {
        violations.push(format!("{}/Cargo.toml: lacks lints of its own", ebpf_build::BPF_PACKAGE));
    }
    Ok(violations)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(edges: &[(&str, &str, Option<&str>)]) -> Metadata {
        let names: BTreeSet<&str> = edges.iter().flat_map(|(from, to, _)| [*from, *to]).collect();
        let packages = names.iter().map(|name| Package {
            id: (*name).to_owned(),
            name: (*name).to_owned(),
            manifest_path: PathBuf::new(),
        });
        let dependencies = |name: &str| {
            let from_here = edges.iter().filter(|(from, ..)| *from == name);
            let dependency = from_here.map(|(_, to, kind)| Dependency {
                pkg: (*to).to_owned(),
                dep_kinds: vec![DependencyKind { kind: kind.map(str::to_owned) }],
            });
            dependency.collect()
        };
        let nodes =
            names.iter().map(|name| Node { id: (*name).to_owned(), deps: dependencies(name) }).collect();
        Metadata {
            packages: packages.collect(),
            workspace_members: names.iter().map(|name| (*name).to_owned()).collect(),
            resolve: Resolve { nodes },
        }
    }

    #[test]
    fn forbidden_dependency_is_found_through_another_crate() {
        let found = direction(&metadata(&[("control", "between", None), ("between", "aya", None)]));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("control: reaches aya"), "{found:?}");
    }

    #[test]
    fn tests_of_a_dependency_do_not_count_but_a_crates_own_do() {
        let edges = [("control", "between", None), ("between", "aya", Some("dev"))];
        assert!(direction(&metadata(&edges)).is_empty());
        assert_eq!(direction(&metadata(&[("control", "mesh-agent", Some("dev"))])).len(), 1);
    }

    #[test]
    fn any_dependency_of_the_build_helper_is_found() {
        assert_eq!(direction(&metadata(&[("ebpf-build", "cc", None)])).len(), 1);
    }
}
