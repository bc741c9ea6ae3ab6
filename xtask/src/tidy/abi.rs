//! The ABI snapshot: a change of a layout or a constant that the kernel side and user space share needs a new ABI_VERSION.
//!
//! mesh-common/abi.txt records the version and, for each file of mesh-common/src, a hash of the declarations that make up
//! the ABI: `#[repr(…)]` items, their declaring macros' calls, and constants. Comments, functions and tests can change
//! freely. The hash finds accidents, it proves nothing.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

const SNAPSHOT: &str = "mesh-common/abi.txt";
const SOURCES: &str = "mesh-common/src";

/// The version, and a hash of the declarations of each file that has some.
#[derive(Debug, PartialEq)]
struct Abi {
    version: String,
    files: BTreeMap<String, String>,
}

/// Records the ABI as it is.
pub(super) fn bless(root: &Path) -> Result<()> {
    let Some(abi) = declared(root)? else { bail!("{SOURCES} declares no ABI_VERSION") };
    std::fs::write(root.join(SNAPSHOT), abi.to_text()).with_context(|| format!("writing {SNAPSHOT}"))?;
    println!("tidy: {SNAPSHOT} records ABI version {}", abi.version);
    Ok(())
}

/// What differs between the snapshot and the sources.
pub(super) fn violations(root: &Path) -> Result<Vec<String>> {
    let Some(abi) = declared(root)? else {
        return Ok(vec![format!("{SOURCES}: declares no ABI_VERSION")]);
    };
    let recorded = std::fs::read_to_string(root.join(SNAPSHOT)).unwrap_or_default();
    Ok(difference(&Abi::from_text(&recorded), &abi).into_iter().collect())
}

fn difference(recorded: &Abi, declared: &Abi) -> Option<String> {
    if recorded == declared {
        return None;
    }
    if recorded.version != declared.version {
        return Some(format!("{SNAPSHOT}: is of another ABI version: cargo xtask tidy --bless"));
    }
    let names = recorded.files.keys().chain(declared.files.keys());
    let mut changed: Vec<&str> = names
        .filter(|name| recorded.files.get(*name) != declared.files.get(*name))
        .map(String::as_str)
        .collect();
    changed.sort_unstable();
    changed.dedup();
    Some(format!(
        "{SOURCES}: declarations changed in {} and ABI_VERSION did not: raise it, then cargo xtask tidy --bless \
         (if no layout and no value changed, --bless alone)",
        changed.join(", ")
    ))
}

impl Abi {
    fn to_text(&self) -> String {
        let version = std::iter::once(format!("version {}\n", self.version));
        version.chain(self.files.iter().map(|(file, hash)| format!("{file} {hash}\n"))).collect()
    }

    fn from_text(text: &str) -> Self {
        let mut pairs: BTreeMap<String, String> = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let version = pairs.remove("version").unwrap_or_default();
        Self { version, files: pairs }
    }
}

/// The ABI of the sources; None where they declare no version.
fn declared(root: &Path) -> Result<Option<Abi>> {
    let mut version = None;
    let mut files = BTreeMap::new();
    let mut folders = vec![root.join(SOURCES)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let declarations = declarations(&text);
            version = version.or_else(|| version_in(&declarations));
            if !declarations.is_empty() {
                let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
                files.insert(name, format!("{:016x}", fnv1a(declarations.concat().as_bytes())));
            }
        }
    }
    Ok(version.map(|version| Abi { version, files }))
}

/// The declarations in `text` that both sides of the ABI read, without comments and blanks.
fn declarations(text: &str) -> Vec<String> {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let mut found = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default().trim();
        if open.is_none() && starts_declaration(code) {
            open = Some(String::new());
        }
        if let Some(declaration) = &mut open {
            declaration.extend(code.chars().filter(|c| !c.is_whitespace()));
            if is_whole(declaration) {
                found.extend(open.take());
            }
        }
    }
    found
}

/// A `const fn` is code, not a value; its results are what tests pin down.
fn starts_declaration(code: &str) -> bool {
    let visible = code.strip_prefix("pub ").unwrap_or(code);
    let constant =
        visible.starts_with("const ") && !visible.starts_with("const fn") && !visible.starts_with("const _");
    // `abi_struct! { … }`: a macro that declares types is called at the start of a line, with braces.
    let declaring_macro =
        code.split_once("! {").is_some_and(|(name, _)| name.chars().all(|c| c.is_lowercase() || c == '_'));
    constant || declaring_macro || code.starts_with("#[repr(")
}

/// Whether brackets balance and the item has ended: by `;`, or by a closing brace.
fn is_whole(declaration: &str) -> bool {
    let depth = declaration.chars().fold(0_i32, |depth, c| match c {
        '{' | '(' | '[' => depth + 1,
        '}' | ')' | ']' => depth - 1,
        _ => depth,
    });
    depth <= 0 && (declaration.ends_with(';') || declaration.ends_with('}'))
}

fn version_in(declarations: &[String]) -> Option<String> {
    let value = declarations.iter().find_map(|declaration| declaration.split_once("constABI_VERSION:"))?.1;
    Some(value.split_once('=')?.1.trim_end_matches(';').to_owned())
}

/// FNV-1a, 64 bits: std's hasher may differ between releases.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "//! a\n/// v\npub const ABI_VERSION: u32 = 3;\n#[repr(C)]\npub struct Key {\n    a: u32, // why\n}\n\
                          impl Key { fn f(&self) -> u32 { 1 } }\n#[repr(transparent)]\nstruct One(u32);\n\
                          #[cfg(test)]\nmod tests { const X: u32 = 1; }\n";

    #[test]
    fn declarations_are_constants_and_repr_items() {
        let expected = [
            "pubconstABI_VERSION:u32=3;",
            "#[repr(C)]pubstructKey{a:u32,}",
            "#[repr(transparent)]structOne(u32);",
        ];
        assert_eq!(declarations(SOURCE), expected);
        assert_eq!(version_in(&declarations(SOURCE)).as_deref(), Some("3"));
    }

    #[test]
    fn comments_and_functions_are_not_the_abi_but_fields_are() {
        assert_eq!(
            declarations(SOURCE),
            declarations(&SOURCE.replace("// why", "// because").replace("{ 1 }", "{ 2 }"))
        );
        assert_ne!(declarations(SOURCE), declarations(&SOURCE.replace("a: u32", "a: u64")));
    }

    #[test]
    fn changed_layout_without_a_version_bump_is_refused() {
        let file = |hash: &str| BTreeMap::from([("mesh-common/src/lib.rs".to_owned(), hash.to_owned())]);
        let abi = |version: &str, hash: &str| Abi { version: version.to_owned(), files: file(hash) };
        assert_eq!(difference(&abi("3", "aa"), &abi("3", "aa")), None);
        assert!(difference(&abi("3", "aa"), &abi("3", "bb")).is_some_and(|text| text.contains("raise it")));
        assert!(difference(&abi("3", "aa"), &abi("4", "bb")).is_some_and(|text| text.contains("--bless")));
        assert_eq!(Abi::from_text(&abi("3", "aa").to_text()), abi("3", "aa"));
    }
}
