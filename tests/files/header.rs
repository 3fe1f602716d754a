//! Hostile safetensors files.

use std::fs;

use lora_core::{Error, adapter::AdapterWeights};
use serde_json::json;

use crate::support::*;

/// A file of a header and numbers.
fn file(header: &str, numbers: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + numbers, 0);
    bytes
}

#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG), config(json!({})).to_string()).unwrap();
    fs::write(dir.path().join(WEIGHTS), bytes).unwrap();
    let error = AdapterWeights::read(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    assert_says(&error.to_string(), parts);
}

const A: &str = "base_model.model.q.lora_A.weight";
const B: &str = "base_model.model.q.lora_B.weight";

fn tensor(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn truncated_files_are_refused_wherever_they_end() {
    let dir = tempfile::tempdir().unwrap();
    plain()
        .write(dir.path(), lora_core::adapter::Profile::Peft)
        .unwrap();
    let whole = fs::read(dir.path().join(WEIGHTS)).unwrap();
    for len in (0..whole.len()).step_by(7) {
        refused(&whole[..len], &[WEIGHTS]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    refused(&longer, &["after its last tensor"]);
}

#[test]
fn a_huge_header_is_refused_before_it_is_read() {
    for claim in [u64::MAX, 1 << 40, 100_000_001] {
        let mut bytes = claim.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        refused(&bytes, &["claims a header"]);
    }
    refused(&1000_u64.to_le_bytes(), &["truncated"]);
}

#[test]
fn ten_gigabytes_in_a_small_file_are_refused() {
    let gigabytes = 10_u64 << 30;
    let shape = format!("[2,{}]", gigabytes / 8);
    let header = format!("{{{}}}", tensor(A, "F32", &shape, 0, gigabytes));
    refused(&file(&header, 1000), &[A, "truncated"]);
}

#[test]
fn a_small_file_cant_stand_for_many_tensors() {
    let both = [
        tensor(A, "F32", "[2,6]", 0, 48),
        tensor(B, "F32", "[4,2]", 16, 48),
    ];
    refused(
        &file(&format!("{{{}}}", both.join(",")), 48),
        &[B, "overlaps"],
    );
    let gap = [
        tensor(A, "F32", "[2,6]", 0, 48),
        tensor(B, "F32", "[4,2]", 56, 88),
    ];
    refused(&file(&format!("{{{}}}", gap.join(",")), 88), &[B, "gap"]);
}

#[test]
fn sizes_that_overflow_or_contradict_their_place_are_refused() {
    let max = u64::MAX;
    for (shape, start, end) in [
        ("[2,6]", 0, 47),
        ("[2,6]", 48, 0),
        ("[18446744073709551615,18446744073709551615]", 0, 48),
        ("[4294967296,4294967296,4294967296]", 0, 48),
        ("[2,6]", max - 47, max),
        ("[0,18446744073709551615]", 0, 0),
        ("[0,6]", 0, 0),
        ("[]", 0, 4),
    ] {
        // With a good B behind it, nothing but the sizes of A is wrong.
        let b = tensor(B, "F32", "[4,2]", 48, 80);
        let header = format!("{{{},{b}}}", tensor(A, "F32", shape, start, end));
        refused(&file(&header, 80), &[]);
    }
}

#[test]
fn a_header_that_isnt_one_is_refused() {
    let many_axes = format!("[{}]", ["1"; 9].join(","));
    for (header, part) in [
        (String::new(), "broken"),
        ("[]".into(), "broken"),
        ("{".into(), "broken"),
        ("{\"x\":1}".into(), "broken"),
        ("\u{0}\u{1}".into(), "broken"),
        (
            format!("{{{}}}", tensor(A, "F4", "[2,6]", 0, 48)),
            "not supported",
        ),
        (
            format!("{{{}}}", tensor(A, "F32", "[2,-6]", 0, 48)),
            "broken",
        ),
        (
            format!("{{{}}}", tensor(A, "F32", "[2,6.5]", 0, 48)),
            "broken",
        ),
        (
            format!("{{{}}}", tensor(A, "F32", &many_axes, 0, 4)),
            "broken",
        ),
        (
            format!(r#"{{"{A}":{{"dtype":"F32","shape":[2,6],"data_offsets":[0,48],"x":1}}}}"#),
            "unknown field",
        ),
        (
            format!(r#"{{"{A}":{{"dtype":"F32","shape":[2,6]}}}}"#),
            "missing field",
        ),
        (r#"{"__metadata__":{"a":1}}"#.into(), "broken"),
    ] {
        refused(&file(&header, 48), &[part]);
    }
}

#[test]
fn names_that_stand_twice_are_refused() {
    let one = tensor(A, "F32", "[2,6]", 0, 48);
    refused(&file(&format!("{{{one},{one}}}"), 48), &[A, "twice"]);
    refused(
        &file(
            &format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},{one}}}"#),
            48,
        ),
        &["twice"],
    );
    refused(
        &file(
            &format!(r#"{{"__metadata__":{{"a":"","a":""}},{one}}}"#),
            48,
        ),
        &["twice"],
    );
}

#[test]
fn a_file_without_tensors_is_no_adapter() {
    refused(&file("{}", 0), &["holds no `lora_A`"]);
}
