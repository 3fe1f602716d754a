//! Random tensors, and three oracles for an op: another implementation, finite differences, and the
//! op itself in a wider type.

use candle_core::{DType, Device, Result, Tensor, Var};

/// A function of several tensors.
pub type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Numbers that look random and are the same on every run, in about -2..2.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let numbers: Vec<f64> = (0..shape.iter().product())
        .map(|_| 2.0 * (next() + next() - 1.0))
        .collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// [`random`] tensors of several shapes.
pub fn randoms(shapes: &[&[usize]]) -> Vec<Tensor> {
    (shapes.iter().zip(1..))
        .map(|(shape, seed)| random(shape, seed))
        .collect()
}

/// The elements in order, widened.
pub fn numbers(tensor: &Tensor) -> Vec<f64> {
    let wide = tensor.to_dtype(DType::F64).unwrap();
    wide.flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that no two elements differ by more than `bound` times the largest element (at least 1).
#[track_caller]
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, bound: f64) {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    let (actual, expected) = (numbers(actual), numbers(expected));
    let size = expected.iter().fold(1f64, |max, x| max.max(x.abs()));
    for (i, (a, b)) in actual.iter().zip(&expected).enumerate() {
        assert!(
            (a - b).abs() <= bound * size,
            "{what}: element {i} is {a}, expected {b} ± {:e}",
            bound * size
        );
    }
}

/// The value of `op` at `inputs`, and the gradients of `Σ value · weights` with fixed random weights.
pub fn value_and_grads(op: Op, inputs: &[Tensor]) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = (inputs.iter())
        .map(|input| Var::from_tensor(input).unwrap())
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let ys = op(&tensors).unwrap();
    // Representable in every type, so that only the op rounds.
    let weights = ((random(ys.dims(), 99) * 16.0).unwrap().round().unwrap() / 16.0).unwrap();
    let wide = ys.to_dtype(DType::F64).unwrap();
    let grads = (wide * weights).unwrap().sum_all().unwrap().backward();
    let grads = grads.unwrap();
    let grads = vars.iter().enumerate().map(|(i, var)| {
        let grad = grads
            .get(var)
            .unwrap_or_else(|| panic!("no gradient for input {i}"));
        assert_eq!(grad.dtype(), var.dtype());
        grad.clone()
    });
    (ys.detach(), grads.collect())
}

/// Asserts that both ops have the same value and gradients at `inputs`, converted to `dtype`.
#[track_caller]
pub fn assert_same(ours: Op, theirs: Op, inputs: &[Tensor], dtype: DType, bound: f64) {
    let inputs = convert(inputs, dtype);
    let (our_ys, our_grads) = value_and_grads(ours, &inputs);
    let (their_ys, their_grads) = value_and_grads(theirs, &inputs);
    assert_close("value", &our_ys, &their_ys, bound);
    for (i, (our, their)) in our_grads.iter().zip(&their_grads).enumerate() {
        assert_close(&format!("gradient of input {i}"), our, their, bound);
    }
}

/// Asserts that the gradients of `op` in f64 are its central differences.
#[track_caller]
pub fn assert_gradients(op: Op, inputs: &[Tensor]) {
    const STEP: f64 = 1e-5;
    let (ys, grads) = value_and_grads(op, inputs);
    let weights = ((random(ys.dims(), 99) * 16.0).unwrap().round().unwrap() / 16.0).unwrap();
    for (i, grad) in grads.iter().enumerate() {
        let start = numbers(&inputs[i]);
        let objective_at = |element: usize, step: f64| {
            let mut moved = start.clone();
            moved[element] += step;
            let mut inputs = inputs.to_vec();
            inputs[i] = Tensor::from_vec(moved, inputs[i].dims(), &Device::Cpu).unwrap();
            let ys = op(&inputs).unwrap();
            numbers(&(ys * &weights).unwrap().sum_all().unwrap())[0]
        };
        let slopes: Vec<f64> = (0..start.len())
            .map(|e| (objective_at(e, STEP) - objective_at(e, -STEP)) / (2.0 * STEP))
            .collect();
        let slopes = Tensor::from_vec(slopes, grad.dims(), &Device::Cpu).unwrap();
        assert_close(&format!("gradient of input {i}"), grad, &slopes, 1e-8);
    }
}

/// Asserts that `op` in bf16 and f16 is, up to `roundings` roundings, what it is in f32.
#[track_caller]
pub fn assert_half_types(op: Op, inputs: &[Tensor], roundings: f64) {
    for (dtype, rounding) in [(DType::BF16, 0.5f64.powi(8)), (DType::F16, 0.5f64.powi(11))] {
        let narrow = convert(inputs, dtype);
        let (half_ys, half_grads) = value_and_grads(op, &narrow);
        let (ys, grads) = value_and_grads(op, &convert(&narrow, DType::F32));
        let bound = 1.01 * roundings * rounding;
        assert_close(&format!("value in {dtype:?}"), &half_ys, &ys, bound);
        for (i, (half, full)) in half_grads.iter().zip(&grads).enumerate() {
            assert_close(&format!("gradient {i} in {dtype:?}"), half, full, bound);
        }
    }
}

/// The same values with other strides.
pub fn strided(xs: &Tensor) -> Tensor {
    let last = xs.rank() - 1;
    let turned = xs.transpose(0, last).unwrap().contiguous().unwrap();
    let strided = turned.transpose(0, last).unwrap();
    assert!(!strided.is_contiguous());
    strided
}

pub fn convert(tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    (tensors.iter())
        .map(|tensor| tensor.to_dtype(dtype).unwrap())
        .collect()
}
