//! Softmax.

use candle_core::{
    CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, WithDType,
    backend::BackendStorage, shape::Dim,
};

use super::cpu::{Element, Reader, Real, dispatch_float, fold, fold2, map_rows, slice, vectorize};

/// `y = exp(x - max(x)) / Σ exp(x - max(x))` over the last dimension, in place of
/// `candle_nn::ops::softmax_last_dim`, which cuts the gradient.
///
/// The backward is `dx = y (dy - Σ dy y)`. Half types are computed in f32. On the CPU it is one fused
/// op; on other devices it runs as candle's differentiable ops.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora_core::nn::softmax_last_dim;
///
/// let xs = Var::new(&[[0f32, 3f32.ln()]], &Device::Cpu)?;
/// let ys = softmax_last_dim(&xs)?;
/// let first = ys.to_vec2::<f32>()?[0][0];
/// assert!((first - 0.25).abs() < 1e-6);
/// assert!(ys.sqr()?.backward()?.get(&xs).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When `xs` is a scalar or not of a floating-point type.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    xs.dim(D::Minus1)?;
    if xs.device().is_cpu() {
        return xs.contiguous()?.apply_op1(SoftmaxLastDim);
    }
    match xs.dtype() {
        dtype @ (DType::BF16 | DType::F16) => {
            candle_nn::ops::softmax(&xs.to_dtype(DType::F32)?, D::Minus1)?.to_dtype(dtype)
        }
        _ => candle_nn::ops::softmax(xs, D::Minus1),
    }
}

/// Softmax over the dimension `dim`: [`softmax_last_dim`] for the last one, candle's differentiable
/// ops for the others.
///
/// ```
/// use candle_core::{D, Device, Tensor};
/// use lora_core::nn::softmax;
///
/// let xs = Tensor::new(&[[1f32, 1.], [1., 1.], [1., 1.], [1., 1.]], &Device::Cpu)?;
/// assert_eq!(softmax(&xs, D::Minus1)?.to_vec2::<f32>()?[0], [0.5, 0.5]);
/// assert_eq!(softmax(&xs, 0)?.to_vec2::<f32>()?[0], [0.25, 0.25]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When `xs` has no such dimension.
pub fn softmax<D: Dim>(xs: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(xs.shape(), "softmax")?;
    if dim + 1 == xs.rank() {
        softmax_last_dim(xs)
    } else {
        candle_nn::ops::softmax(xs, dim)
    }
}

const NAME: &str = "softmax-last-dim";

struct SoftmaxLastDim;

impl SoftmaxLastDim {
    fn forward<T: Element>(xs: &[T], width: usize) -> Vec<T> {
        let mut ys = vec![T::from_f64(0.0); xs.len()];
        map_rows(&mut ys, width, |row, ys| {
            let xs = &xs[row * width..][..ys.len()];
            // Half types keep the exponentials of a row here until their sum is known.
            let mut exps = vec![T::Acc::ZERO; width];
            vectorize(
                #[inline(always)]
                || {
                    for (xs, ys) in xs.chunks_exact(width).zip(ys.chunks_exact_mut(width)) {
                        let max = fold(xs, T::Acc::NEG_INFINITY, Real::larger, |x| x);
                        for (exp, x) in exps.iter_mut().zip(xs) {
                            *exp = (x.widen() - max).exp();
                        }
                        let sum = fold(&exps, T::Acc::ZERO, |a, b| a + b, |x| x);
                        let scale = sum.recip();
                        for (y, &exp) in ys.iter_mut().zip(&exps) {
                            *y = T::narrow(exp * scale);
                        }
                    }
                },
            )
        });
        ys
    }

    fn backward<T: Element>(ys: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let grad = grad.contiguous()?;
        let (y_reader, g_reader) = (Reader::new(ys), Reader::new(&grad));
        let (y_all, g_all) = (y_reader.slice::<T>()?, g_reader.slice::<T>()?);
        let width = ys.dim(D::Minus1)?;
        let mut dx = vec![T::from_f64(0.0); y_all.len()];
        map_rows(&mut dx, width, |row, dx| {
            let y_rows = &y_all[row * width..][..dx.len()];
            let g_rows = &g_all[row * width..][..dx.len()];
            vectorize(
                #[inline(always)]
                || {
                    let rows = y_rows.chunks_exact(width).zip(g_rows.chunks_exact(width));
                    for ((ys, gs), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                        let sum: T::Acc = fold2(ys, gs, |y, g| y * g);
                        for ((dx, y), g) in dx.iter_mut().zip(ys).zip(gs) {
                            *dx = T::narrow(y.widen() * (g.widen() - sum));
                        }
                    }
                },
            )
        });
        Tensor::from_vec(dx, ys.shape(), &Device::Cpu)
    }
}

impl CustomOp1 for SoftmaxLastDim {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = layout.shape();
        let width = shape.dims()[shape.rank() - 1];
        dispatch_float!(NAME, xs.dtype(), T => {
            let ys = Self::forward::<T>(slice(xs, layout)?, width);
            Ok((T::to_cpu_storage_owned(ys), shape.clone()))
        })
    }

    fn bwd(&self, _xs: &Tensor, ys: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = dispatch_float!(NAME, ys.dtype(), T => Self::backward::<T>(ys, grad)?);
        Ok(Some(dx))
    }
}
