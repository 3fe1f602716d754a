//! What the behaviour tests share: random tensors, a gradient check by differences, error norms.

use candle_core::{DType, Device, Result, Tensor, Var};
use lora_core::philox;

/// A tensor of standard normal numbers that depends on `seed` and its shape alone.
pub fn randn(seed: u32, shape: impl Into<candle_core::Shape>, dtype: DType) -> Tensor {
    let shape = shape.into();
    let values: Vec<f64> = (0..shape.elem_count() as u32)
        .map(|i| {
            let [u, v, ..] = philox::<10>([i, 0, 0, 0], [seed, 0x7e57]);
            let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
            (-2.0 * unit(u).ln()).sqrt() * (std::f64::consts::TAU * unit(v)).cos()
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(dtype))
        .expect("a CPU tensor of a float type")
}

/// `‖got − want‖ / ‖want‖`, in f64; infinite if a number is not finite or the shapes differ.
pub fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    if got.dims() != want.dims() {
        return f64::INFINITY;
    }
    let (got, want) = (to_vec(got), to_vec(want));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(&want).map(|(got, want)| got - want));
    let size = norm(&mut want.iter().copied());
    let relative = if size == 0.0 { error } else { error / size };
    if relative.is_nan() {
        f64::INFINITY
    } else {
        relative
    }
}

/// The numbers of a tensor in row-major order.
pub fn to_vec(tensor: &Tensor) -> Vec<f64> {
    tensor
        .flatten_all()
        .and_then(|tensor| tensor.to_dtype(DType::F64))
        .and_then(|tensor| tensor.to_vec1())
        .expect("a float tensor")
}

/// The gradient of `loss` at `var` by central differences; everything must be f64.
///
/// # Errors
/// Those of `loss`.
pub fn numeric_gradient(var: &Var, loss: impl Fn() -> Result<Tensor>) -> Result<Tensor> {
    const STEP: f64 = 1e-5;
    let at = var.as_tensor().copy()?;
    let values = to_vec(&at);
    let mut gradient = Vec::with_capacity(values.len());
    for i in 0..values.len() {
        let side = |step: f64| {
            let mut moved = values.clone();
            moved[i] += step;
            var.set(&Tensor::from_vec(moved, at.shape(), at.device())?)?;
            loss()?.to_scalar::<f64>()
        };
        gradient.push((side(STEP)? - side(-STEP)?) / (2.0 * STEP));
    }
    var.set(&at)?;
    Tensor::from_vec(gradient, at.shape(), at.device())
}

/// The front page's example runs.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
