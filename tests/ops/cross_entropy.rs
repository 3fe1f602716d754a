//! `cross_entropy` and `causal_lm_loss`.

use candle_core::{DType, Device, Result, Tensor, Var};
use lora_core::nn::{IGNORE_INDEX, causal_lm_loss, cross_entropy};

use crate::oracle::{
    assert_close, assert_gradients, assert_half_types, assert_same, numbers, random, randoms,
    strided,
};

fn classes(rows: usize, classes: u32) -> Tensor {
    let classes: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + 3) % classes).collect();
    Tensor::from_vec(classes, rows, &Device::Cpu).unwrap()
}

#[test]
fn cross_entropy_equals_candles() {
    for (rows, n) in [(1, 1), (3, 7), (5, 65), (9, 5000)] {
        let target = classes(rows, n as u32);
        let fused = |args: &[Tensor]| cross_entropy(&args[0], &target);
        let slow = |args: &[Tensor]| candle_nn::loss::cross_entropy(&args[0], &target);
        let logits = [random(&[rows, n], 1)];
        assert_same(&fused, &slow, &logits, DType::F64, 1e-13);
        assert_same(&fused, &slow, &logits, DType::F32, 2e-6);
    }
}

#[test]
fn cross_entropy_gradients_are_central_differences() {
    let target = classes(4, 35);
    assert_gradients(
        &|args| cross_entropy(&args[0], &target),
        &[random(&[4, 35], 1)],
    );
}

#[test]
fn cross_entropy_in_half_types_is_a_loss_in_f32() {
    let target = classes(4, 35);
    assert_half_types(
        &|args| cross_entropy(&args[0], &target),
        &[random(&[4, 35], 1)],
        1.0,
    );
    let half = random(&[4, 35], 1).to_dtype(DType::BF16).unwrap();
    assert_eq!(cross_entropy(&half, &target).unwrap().dtype(), DType::F32);
}

#[test]
fn cross_entropy_of_large_logits_is_finite() {
    let logits = Var::new(&[[1e4f32, -1e4, 0.]], &Device::Cpu).unwrap();
    let target = Tensor::new(&[1u32], &Device::Cpu).unwrap();
    let loss = cross_entropy(&logits, &target).unwrap();
    assert_eq!(numbers(&loss), [2e4]);
    let grads = loss.backward().unwrap();
    assert_eq!(numbers(grads.get(&logits).unwrap()), [1., -1., 0.]);
}

#[test]
fn cross_entropy_takes_any_strides() {
    let target = classes(4, 6);
    let plain = |args: &[Tensor]| cross_entropy(&args[0], &target);
    let turned = |args: &[Tensor]| cross_entropy(&strided(&args[0]), &target);
    assert_same(&turned, &plain, &[random(&[4, 6], 1)], DType::F64, 0.0);
}

#[test]
fn cross_entropy_of_wrong_classes_or_no_rows_is_an_error() {
    let error = cross_entropy(&random(&[4, 6], 1), &classes(4, 60)).unwrap_err();
    assert!(error.to_string().contains("class 10 of row 1"), "{error}");
    assert!(cross_entropy(&random(&[4, 6], 1), &classes(3, 6)).is_err());
    assert!(cross_entropy(&random(&[0, 6], 1), &classes(0, 6)).is_err());
}

const LABELS: [i64; 9] = [3, IGNORE_INDEX, 4, 1, 0, 2, IGNORE_INDEX, 4, IGNORE_INDEX];
const LENS: [usize; 4] = [4, 0, 1, 4];

fn packed_loss(args: &[Tensor]) -> Result<Tensor> {
    let head = |xs: &Tensor| xs.matmul(&args[1].t()?);
    causal_lm_loss(&args[0], head, &LABELS, &LENS, IGNORE_INDEX)
}

#[test]
fn the_loss_is_that_of_each_sequence_with_shifted_labels() {
    // By hand: sequence 0 predicts its labels 2 and 3 from rows 1 and 2; sequence 1 is empty;
    // sequence 2 has nothing to predict; sequence 3 starts at row 5 and predicts label 7 from row 6.
    let slow = |args: &[Tensor]| {
        let rows = Tensor::new(&[1u32, 2, 6], &Device::Cpu)?;
        let target = Tensor::new(&[4u32, 1, 4], &Device::Cpu)?;
        let logits = args[0].index_select(&rows, 0)?.matmul(&args[1].t()?)?;
        candle_nn::loss::cross_entropy(&logits, &target)
    };
    let inputs = randoms(&[&[9, 3], &[5, 3]]);
    assert_same(&packed_loss, &slow, &inputs, DType::F64, 1e-13);
}

#[test]
fn loss_gradients_are_central_differences() {
    assert_gradients(&packed_loss, &randoms(&[&[9, 3], &[5, 3]]));
}

#[test]
fn logits_are_computed_only_where_a_label_counts() {
    let hidden = random(&[9, 3], 1);
    let head = |xs: &Tensor| {
        assert_eq!(xs.dims(), [3, 3]);
        Ok(xs.clone())
    };
    let labels = LABELS.map(|label| label.min(2));
    causal_lm_loss(&hidden, head, &labels, &LENS, IGNORE_INDEX).unwrap();
}

#[test]
fn another_ignore_index_is_ignored() {
    let hidden = random(&[3, 4], 1);
    let head = |xs: &Tensor| Ok(xs.clone());
    let one = causal_lm_loss(&hidden, head, &[0, 2, 0], &[3], 0).unwrap();
    let same = causal_lm_loss(&hidden, head, &[0, 2, -1], &[3], -1).unwrap();
    assert_close("loss", &one, &same, 0.0);
}

#[test]
fn labels_that_cannot_be_learned_are_named() {
    let hidden = random(&[3, 4], 1);
    let loss = |labels: &[i64], lens: &[usize]| {
        let head = |xs: &Tensor| Ok(xs.clone());
        let error = causal_lm_loss(&hidden, head, labels, lens, IGNORE_INDEX);
        error.unwrap_err().to_string()
    };
    let error = loss(&[0, 1, 4], &[3]);
    assert!(
        error.contains("label 4 at position 2") && error.contains("0..4"),
        "{error}"
    );
    let error = loss(&[0, -1, 1], &[3]);
    assert!(error.contains("label -1 at position 1"), "{error}");
    let error = loss(&[2, IGNORE_INDEX, IGNORE_INDEX], &[3]);
    assert!(error.contains("none of the 3 labels counts"), "{error}");
    let error = loss(&[1, 1, 1], &[1, 1, 1]);
    assert!(error.contains("none of the 3 labels counts"), "{error}");
    let error = loss(&[1, 1], &[3]);
    assert!(error.contains("2 labels"), "{error}");
    let error = loss(&[1, 1, 1], &[2]);
    assert!(error.contains("sum to 2"), "{error}");
}
