//! `tests/README.md` names tests that exist, for every behaviour and every feature of ours.

use std::{collections::BTreeSet, fs, path::PathBuf};

fn tests_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The behaviours that the table has to tell of.
fn behaviours() -> BTreeSet<u32> {
    [1..=20, 22..=23, 29..=33, 35..=50]
        .into_iter()
        .flatten()
        .collect()
}

/// The cells of the rows below a heading.
fn table<'a>(readme: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let (_, section) = readme.split_once(heading).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|'));
    rows.skip(2)
        .map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// The names of tests in a text.
fn tests(text: &str) -> Vec<&str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains("::")).collect()
}

/// Whether a name is that of a module of tests or of a test in one.
fn exists(name: &str) -> bool {
    let (root, path) = match name.strip_prefix("lora_core::") {
        Some(path) => (tests_folder().join("../lora-core/src"), path),
        None => (tests_folder(), name),
    };
    let file = |path: &str| -> Option<String> {
        let file: PathBuf = root.join(path.replace("::", "/")).with_extension("rs");
        fs::read_to_string(file).ok()
    };
    let Some((module, function)) = path.rsplit_once("::") else {
        return false;
    };
    let is_test = |source: String| {
        let lines: Vec<&str> = source.lines().map(str::trim).collect();
        let head = format!("fn {function}(");
        lines.iter().enumerate().any(|(i, line)| {
            let above = lines[..i].iter().rev();
            let mut above =
                above.take_while(|line| line.starts_with("#[") || line.starts_with("//"));
            line.starts_with(&head) && above.any(|line| *line == "#[test]")
        })
    };
    file(path).is_some() || file(module).is_some_and(is_test)
}

fn readme() -> String {
    fs::read_to_string(tests_folder().join("README.md")).unwrap()
}

#[test]
fn every_test_that_it_names_exists() {
    let readme = readme();
    let names = tests(&readme);
    assert!(names.len() > 100, "{}", names.len());
    let missing: Vec<_> = names.into_iter().filter(|name| !exists(name)).collect();
    assert_eq!(missing, [""; 0]);
    assert!(!exists("conformance::readme::behaviours"));
    assert!(!exists("conformance::nowhere"));
}

#[test]
fn every_behaviour_has_a_test_or_a_reason_why_it_is_not_ours() {
    let mut left = behaviours();
    let readme = readme();
    for row in table(&readme, "## Behaviours") {
        let [number, _, answer] = row[..] else {
            panic!("{row:?}");
        };
        if let Ok(number) = number.parse() {
            left.remove(&number);
            assert!(
                !tests(answer).is_empty() || answer.starts_with("Not ours: "),
                "{row:?}"
            );
        }
    }
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn every_feature_of_ours_has_a_test() {
    let readme = readme();
    let rows = table(&readme, "## Features");
    assert!(rows.len() > 20);
    for row in rows {
        let [_, _, _, ours] = row[..] else {
            panic!("{row:?}");
        };
        assert!(!tests(ours).is_empty(), "{row:?}");
    }
}
