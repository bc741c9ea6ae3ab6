//! What each source file keeps to: size, opening words, where unsafe lives, no loose ends, no paths of a machine.

use std::path::Path;

use anyhow::{Context, Result};

const LINES_MAX: usize = 700;

/// The only places with `unsafe`, as prefixes of paths: `sys` covers sys.rs and sys/. map.rs says of its types that they
/// are plain bytes (`aya::Pod`), which only the crate that declares them can say.
const UNSAFE_HOMES: [&str; 6] = [
    "control/src/raft/tests/sys",
    "mesh-ebpf/bpf/src/",
    "mesh-agent/src/sys",
    "mesh-common/src/map.rs",
    "tests/src/sys",
    "xtask/src/sys",
];

/// Words for unfinished work: each names an issue, as in `(#12)`.
const LOOSE_ENDS: [&str; 3] = ["TODO", "FIXME", "XXX"];

/// Folders where only somebody's own machine keeps a file. Split, so that this file passes.
const MACHINE_PATHS: [&str; 3] = [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/ro", "ot/")];

const READ_EXTENSIONS: [&str; 7] = ["rs", "toml", "md", "sh", "yml", "yaml", "py"];
const SKIPPED_FOLDERS: [&str; 3] = ["target", ".git", "seeds"];

/// Violations in all text files below `root`.
pub(super) fn violations(root: &Path) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() && !path.is_symlink() && !SKIPPED_FOLDERS.contains(&name.as_ref()) {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| READ_EXTENSIONS.iter().any(|read| ext == *read)) {
                let text =
                    std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                let relative = path.strip_prefix(root).unwrap_or(&path);
                violations.extend(in_file(&relative.to_string_lossy(), &text));
            }
        }
    }
    violations.sort();
    Ok(violations)
}

fn in_file(path: &str, text: &str) -> Vec<String> {
    let mut violations = Vec::new();
    let is_rust = Path::new(path).extension().is_some_and(|extension| extension == "rs");
    if is_rust {
        let lines = text.lines().count();
        if lines > LINES_MAX {
            violations.push(format!("{path}: {lines} lines, at most {LINES_MAX}: it is two files"));
        }
        if !text.starts_with("//!") {
            violations.push(format!("{path}: does not open with `//!` and what it is for"));
        }
    }
    let may_be_unsafe = UNSAFE_HOMES.iter().any(|home| path.starts_with(home));
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(machine) = MACHINE_PATHS.iter().find(|machine| line.contains(*machine)) {
            violations.push(format!("{path}:{number}: a path of a machine ({machine}…)"));
        }
        if !is_rust {
            continue;
        }
        let (code, comment) = line.split_once("//").unwrap_or((line, ""));
        if !may_be_unsafe && is_unsafe(code) {
            violations.push(format!("{path}:{number}: unsafe outside {}", UNSAFE_HOMES.join(", ")));
        }
        if let Some(word) = LOOSE_ENDS.iter().find(|word| comment.contains(*word) && !names_an_issue(comment))
        {
            violations.push(format!("{path}:{number}: {word} without an issue's number: {word} (#12)"));
        }
    }
    violations
}

/// Whether a line of code opens something unsafe; the word within a name or a text is not that.
fn is_unsafe(code: &str) -> bool {
    const OPENED: [&str; 7] = ["{", "(", "fn ", "impl ", "impl<", "extern ", "trait "];
    code.match_indices("unsafe").any(|(at, word)| {
        let in_a_text = code[..at].replace("\\\"", "").matches('"').count() % 2 == 1;
        let in_a_name = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let after = &code[at + word.len()..];
        let opens = after.is_empty() || OPENED.iter().any(|opened| after.trim_start().starts_with(opened));
        opens && !in_a_text && !in_a_name
    })
}

fn names_an_issue(comment: &str) -> bool {
    comment.split('#').skip(1).any(|after| after.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_unsafe_is_seen_and_the_bare_word_is_not() {
        for code in [
            "unsafe { x() }",
            "pub unsafe fn f() {",
            "unsafe impl<T> Send for X {}",
            "#[unsafe(no_mangle)]",
            "    unsafe",
        ] {
            assert!(is_unsafe(code), "{code}");
        }
        for code in [
            "#![forbid(unsafe_code)]",
            "unsafe_op_in_unsafe_fn",
            "let text = \"unsafe { x() }\";",
            "let text = \"not unsafe at all\";",
        ] {
            assert!(!is_unsafe(code), "{code}");
        }
    }

    #[test]
    fn rules_name_file_and_line() {
        let marker = LOOSE_ENDS[0];
        let cases = [
            ("a.rs", "fn f() {}\n".to_owned(), "a.rs: does not open"),
            ("a.rs", format!("//! a\n{}", "\n".repeat(LINES_MAX)), "a.rs: 701 lines"),
            ("a.rs", format!("//! a\n// {marker}: later\n"), "a.rs:2: "),
            ("a.rs", "//! a\nunsafe { f() }\n".to_owned(), "a.rs:2: unsafe outside"),
            ("a.md", format!("see {}x\n", MACHINE_PATHS[0]), "a.md:1: a path of a machine"),
        ];
        for (path, text, expected) in cases {
            let found = in_file(path, &text);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{expected}: {found:?}");
        }
    }

    #[test]
    fn allowed_forms_pass() {
        let marker = LOOSE_ENDS[0];
        assert_eq!(in_file("a.rs", &format!("//! a\n// {marker}(#7): later\n")), Vec::<String>::new());
        assert_eq!(in_file("mesh-agent/src/sys/bpf.rs", "//! a\nunsafe { f() }\n"), Vec::<String>::new());
    }
}
