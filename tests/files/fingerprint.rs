//! The fingerprint of a base.

use std::fs;

use candle_core::{DType, Device, Tensor};
use lora_core::adapter::{AdapterWeights, Fingerprint, Profile};
use lora_tests::randn;

use crate::support::*;

fn of(path: &str, weight: &Tensor) -> Fingerprint {
    Fingerprint::of([(path, weight)]).unwrap()
}

#[test]
fn it_tells_bases_apart_by_path_shape_and_numbers() {
    let weight = randn(1, (40, 30), DType::F32);
    let one = of("q", &weight);
    assert_eq!(one, of("q", &weight.copy().unwrap()));
    assert_ne!(one, of("k", &weight));
    assert_ne!(one, of("q", &randn(2, (40, 30), DType::F32)));
    assert_ne!(one, of("q", &weight.reshape((30, 40)).unwrap()));
    assert_ne!(one, of("q", &weight.narrow(0, 0, 39).unwrap()));
    let last = weight.slice_assign(
        &[39..40, 0..1],
        &Tensor::full(9f32, (1, 1), &Device::Cpu).unwrap(),
    );
    assert_ne!(one, of("q", &last.unwrap()));
}

#[test]
fn it_is_the_same_in_the_types_that_a_base_is_loaded_in() {
    let weight = randn(1, (5, 70), DType::BF16);
    let one = of("q", &weight);
    for dtype in [DType::F32, DType::F64] {
        assert_eq!(one, of("q", &weight.to_dtype(dtype).unwrap()));
    }
    let rounded = randn(1, (5, 70), DType::F32);
    assert_eq!(
        of("q", &rounded),
        of("q", &rounded.to_dtype(DType::BF16).unwrap())
    );
}

#[test]
fn the_order_of_weights_is_of_no_account() {
    let (q, k) = (randn(1, (3, 4), DType::F32), randn(2, (3, 4), DType::F32));
    let both = Fingerprint::of([("q", &q), ("k", &k)]).unwrap();
    assert_eq!(both, Fingerprint::of([("k", &k), ("q", &q)]).unwrap());
    assert_ne!(both, Fingerprint::of([("k", &q), ("q", &k)]).unwrap());
}

#[test]
fn it_stands_in_the_file_and_a_foreign_one_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = plain();
    let print = of("q", &randn(1, (3, 4), DType::F32));
    adapter.origin.fingerprint = Some(print.clone());
    adapter.write(dir.path(), Profile::Peft).unwrap();
    assert_eq!(
        AdapterWeights::read(dir.path()).unwrap().origin.fingerprint,
        Some(print.clone())
    );
    let file = dir.path().join(WEIGHTS);
    let text = String::from_utf8_lossy(&fs::read(&file).unwrap()).into_owned();
    assert_says(&text, &["\"format\":\"pt\"", &print.to_string()]);
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.windows(3).position(|three| three == b"v1:").unwrap();
    bytes[at + 1] = b'9';
    fs::write(&file, bytes).unwrap();
    let read = AdapterWeights::read(dir.path()).unwrap();
    assert_eq!(read.origin.fingerprint, None);
    assert_says(&read.notes.join("; "), &["fingerprint", "v9:"]);
    assert!("v1:xyz".parse::<Fingerprint>().is_err());
}
