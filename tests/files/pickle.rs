//! Hostile files of `torch.save`.

use std::fs;

use lora_core::adapter::AdapterWeights;
use serde_json::json;

use crate::{archive::archive, support::*};

const A: &str = "base_model.model.q_proj.lora_A.weight";
const B: &str = "base_model.model.q_proj.lora_B.weight";

/// What reading a file with this pickle, and 48 and 32 bytes of numbers, says.
fn read_pickle(pickle: &[u8]) -> Result<AdapterWeights, String> {
    let numbers = 1f32.to_le_bytes().repeat(12);
    read_archive(&archive(&[
        ("x/data.pkl", pickle),
        ("x/byteorder", b"little"),
        ("x/data/0", &numbers),
        ("x/data/1", &numbers[..32]),
    ]))
}

fn read_archive(bytes: &[u8]) -> Result<AdapterWeights, String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG), config(json!({})).to_string()).unwrap();
    fs::write(dir.path().join("adapter_model.bin"), bytes).unwrap();
    AdapterWeights::read(dir.path()).map_err(|error| error.to_string())
}

#[track_caller]
fn refused(pickle: &[u8], parts: &[&str]) {
    assert_says(&read_pickle(pickle).unwrap_err(), parts);
}

fn text(text: &str) -> Vec<u8> {
    let mut code = vec![b'X'];
    code.extend((text.len() as u32).to_le_bytes());
    code.extend(text.as_bytes());
    code
}

fn number(value: i32) -> Vec<u8> {
    let mut code = vec![b'J'];
    code.extend(value.to_le_bytes());
    code
}

fn tuple(values: &[i32]) -> Vec<u8> {
    let mut code = vec![b'('];
    values.iter().for_each(|value| code.extend(number(*value)));
    code.push(b't');
    code
}

/// `_rebuild_tensor_v2(('storage', FloatStorage, key, 'cpu', len), offset, shape, strides, ..)`
fn tensor(key: &str, len: i32, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let mut code = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    code.extend(text("storage"));
    code.extend(b"ctorch\nFloatStorage\n");
    code.extend([text(key), text("cpu"), number(len)].concat());
    code.extend(b"tQ");
    code.extend([number(offset), tuple(shape), tuple(strides)].concat());
    code.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    code
}

fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut code = b"\x80\x02}q\x00(".to_vec();
    for (key, value) in entries {
        code.extend(text(key));
        code.extend(value);
    }
    code.extend(b"u.");
    code
}

fn good() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (A, tensor("0", 12, 0, &[2, 6], &[6, 1])),
        (B, tensor("1", 8, 0, &[4, 2], &[2, 1])),
    ]
}

#[test]
fn the_archive_of_these_tests_is_readable() {
    let adapter = read_pickle(&dict(&good())).unwrap();
    assert_eq!(adapter.layers["q_proj"].rank(), 2);
}

#[test]
fn code_is_refused_by_name_and_never_run() {
    let flag = std::env::temp_dir().join(format!("lora-core-ran-{}", std::process::id()));
    let command = format!("touch {}", flag.display());
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
    ] {
        let mut code = b"\x80\x02c".to_vec();
        code.extend(format!("{module}\n{name}\n").as_bytes());
        code.extend(text(&command));
        code.extend(b"\x85R.");
        refused(
            &code,
            &[&format!("`{module}.{name}`"), "nothing of it was run"],
        );
    }
    assert!(!flag.exists());
}

#[test]
fn instructions_that_tensors_never_need_are_refused_by_number() {
    // INST, OBJ, NEWOBJ, STACK_GLOBAL, EXT1, PERSID, DUP, POP, FRAME
    for code in [b'i', b'o', 0x81, 0x93, 0x82, b'P', b'2', b'0', 0x95] {
        refused(&[0x80, 2, code, 0, 0], &[&format!("{code:#04x}")]);
    }
    refused(b"\x80\x04.", &["protocol 4"]);
}

#[test]
fn calls_with_other_arguments_are_refused() {
    refused(
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        &["OrderedDict", "other arguments"],
    );
    refused(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        &["other arguments"],
    );
    refused(b"\x80\x02K\x01)R.", &["calls a number"]);
    refused(b"\x80\x02K\x01Q.", &["no tensor's storage"]);
    refused(b"\x80\x02K\x01}b.", &["attributes"]);
}

#[test]
fn a_pickle_that_takes_what_it_hasnt_made_is_refused() {
    for code in [
        &b"."[..],
        b"R.",
        b"\x85.",
        b"t.",
        b"u.",
        b"s.",
        b"a.",
        b"e.",
        b"q\x00.",
        b"h\x07.",
        b"(.",
        b"Q.",
        b"b.",
    ] {
        refused(&[b"\x80\x02", code].concat(), &["the pickle"]);
    }
    refused(b"", &["truncated"]);
    refused(b"\x80", &["truncated"]);
    refused(b"X\xff\xff\xff\xffabc", &["truncated"]);
    refused(b"\x8a\xff", &["truncated"]);
    refused(b"cos", &["truncated"]);
}

#[test]
fn nesting_and_sharing_take_no_memory() {
    // Each tuple holds the one before it twice: 2^60 values, if they were copied.
    let mut doubled = b"\x80\x02)q\x00".to_vec();
    for _ in 0..60 {
        doubled.extend(b"h\x00\x86q\x00h\x00");
    }
    doubled.push(b'.');
    refused(&doubled, &["deep"]);
    let deep = [
        b"\x80\x02)".to_vec(),
        b"\x85".repeat(100_000),
        b".".to_vec(),
    ]
    .concat();
    refused(&deep, &["deep"]);
    let deep = [
        b"\x80\x02".to_vec(),
        b"]".repeat(100_000),
        b"a".repeat(99_999),
        b".".to_vec(),
    ]
    .concat();
    refused(&deep, &["deep"]);
    refused(b"\x80\x02]q\x00h\x00a.", &["shares"]);
}

#[test]
fn what_is_no_dict_of_tensors_is_refused() {
    refused(b"\x80\x02].", &["holds a list, not a dict"]);
    refused(&dict(&[("epoch", number(3))]), &["maps a text to a number"]);
    refused(b"\x80\x02}K\x01K\x02s.", &["maps a number"]);
    let mut nested = good();
    nested.push(("state", b"}".to_vec()));
    refused(&dict(&nested), &["maps a text to a dict"]);
}

#[test]
fn tensors_beyond_their_storage_are_refused() {
    let with_a = |a: Vec<u8>| dict(&[(A, a), good()[1].clone()]);
    for (a, part) in [
        (tensor("0", 12, 1, &[2, 6], &[6, 1]), "beyond its storage"),
        (tensor("0", 12, 0, &[2, 6], &[7, 1]), "beyond its storage"),
        (tensor("0", 12, 0, &[2, 7], &[7, 1]), "beyond its storage"),
        (
            tensor("0", 12, 0, &[2, i32::MAX], &[i32::MAX, i32::MAX]),
            "beyond its storage",
        ),
        (
            tensor("0", 13, 0, &[2, 6], &[6, 1]),
            "storage of 13 numbers, but that has 48 bytes",
        ),
        (tensor("7", 12, 0, &[2, 6], &[6, 1]), "x/data/7 is missing"),
        (tensor("../0", 12, 0, &[2, 6], &[6, 1]), "is missing"),
        (
            tensor("0", 12, -1, &[2, 6], &[6, 1]),
            "no shape and strides",
        ),
        (
            tensor("0", 12, 0, &[2, -6], &[6, 1]),
            "no shape and strides",
        ),
        (tensor("0", 12, 0, &[2, 6], &[6]), "no shape and strides"),
        (tensor("0", 12, 0, &[1; 9], &[1; 9]), "no shape and strides"),
    ] {
        refused(&with_a(a), &[part]);
    }
}

#[test]
fn ten_gigabytes_of_one_number_are_refused() {
    // Strides of zero: one number stands for all.
    let a = tensor("0", 12, 0, &[2, 1_250_000_000], &[0, 0]);
    refused(
        &dict(&[(A, a), good()[1].clone()]),
        &["claims tensors of 10000000032 bytes"],
    );
    let a = tensor(
        "0",
        12,
        0,
        &[2, i32::MAX, i32::MAX, i32::MAX],
        &[0, 0, 0, 0],
    );
    refused(&dict(&[(A, a), good()[1].clone()]), &["claims tensors"]);
}

#[test]
fn names_that_stand_twice_are_refused() {
    let mut twice = good();
    twice.push(twice[0].clone());
    refused(&dict(&twice), &[A, "twice"]);
}

#[test]
fn truncated_archives_are_refused_wherever_they_end() {
    let whole = fs::read(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/files/fixtures/plain_bin/adapter_model.bin"
    ))
    .unwrap();
    for len in (0..whole.len() - 1).step_by(13) {
        assert_says(
            &read_archive(&whole[..len]).unwrap_err(),
            &["adapter_model.bin"],
        );
    }
}

#[test]
fn archives_that_are_none_of_torchs_are_refused() {
    let pickle = dict(&good());
    let numbers = [0; 48];
    let refused = |members: &[(&str, &[u8])], part: &str| {
        assert_says(&read_archive(&archive(members)).unwrap_err(), &[part]);
    };
    refused(&[], "not exactly one `data.pkl`");
    refused(
        &[("x/data.pkl", &pickle), ("y/data.pkl", &pickle)],
        "not exactly one `data.pkl`",
    );
    refused(&[("x/data.pkl", &pickle), ("x/data.pkl", &pickle)], "twice");
    refused(
        &[("x/data.pkl", &pickle), ("x/byteorder", b"big")],
        "byte order",
    );
    refused(
        &[("x/data.pkl", &pickle), ("x/data/0", &numbers)],
        "x/data/1 is missing",
    );
    // A compressed member.
    let mut packed = archive(&[("x/data.pkl", &pickle)]);
    let directory = packed
        .windows(4)
        .position(|bytes| bytes == b"PK\x01\x02")
        .unwrap();
    packed[directory + 10] = 8;
    assert_says(&read_archive(&packed).unwrap_err(), &["is compressed"]);
    // The form of torch before 1.6: a bare pickle.
    assert_says(&read_archive(&pickle).unwrap_err(), &["torch 1.6"]);
}
