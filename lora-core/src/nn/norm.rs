//! The normalisation that [`RmsNorm`](super::RmsNorm) and [`LayerNorm`](super::LayerNorm) share.
//!
//! For each row x of n numbers, with mean μ (0 when the mean is not removed):
//!
//! ```text
//! r  = 1 / sqrt(mean((x - μ)²) + eps)
//! x̂  = (x - μ) r
//! y  = w x̂ + b
//! dx = r (g - mean(g) - x̂ mean(g x̂))   with g = w dy; mean(g) only when the mean is removed
//! dw = Σ_rows dy x̂                      db = Σ_rows dy
//! ```
//!
//! Nothing is saved for the backward pass: μ and r are two sums over a row that is read anyway.

use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, WithDType,
    backend::BackendStorage, bail,
};

use super::cpu::{Element, Reader, Real, dispatch_float, fold, fold3, map_rows, slice, vectorize};

/// Normalises the last dimension of `xs`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub(super) name: &'static str,
    pub(super) eps: f64,
    pub(super) remove_mean: bool,
}

/// Gradients of one pass over the rows.
struct Gradients {
    xs: Tensor,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Norm {
    /// Runs the norm; on the CPU as one fused op, elsewhere as candle's differentiable ops.
    pub(super) fn apply(
        self,
        xs: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let width = xs.dim(D::Minus1)?;
        for scale in [Some(weight), bias].into_iter().flatten() {
            if scale.dims() != [width] {
                bail!(
                    "{}: xs {:?} has rows of {width}, but the weight is {:?} and the bias {:?}",
                    self.name,
                    xs.shape(),
                    weight.shape(),
                    bias.map(Tensor::shape)
                )
            }
            if scale.dtype() != xs.dtype() {
                bail!(
                    "{}: xs is {:?}, but its weight or bias is {:?}; convert one of them",
                    self.name,
                    xs.dtype(),
                    scale.dtype()
                )
            }
        }
        if !xs.device().is_cpu() {
            return self.composed(xs, weight, bias);
        }
        let (xs, weight) = (xs.contiguous()?, weight.contiguous()?);
        match bias {
            None => xs.apply_op2(&weight, self),
            Some(bias) => xs.apply_op3(&weight, &bias.contiguous()?, self),
        }
    }

    /// The same from candle's ops, in f32 for half types.
    fn composed(self, xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let dtype = xs.dtype();
        let internal = match dtype {
            DType::BF16 | DType::F16 => DType::F32,
            dtype => dtype,
        };
        let mut xs = xs.to_dtype(internal)?;
        if self.remove_mean {
            xs = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
        }
        let variance = xs.sqr()?.mean_keepdim(D::Minus1)?;
        let mut ys = xs
            .broadcast_div(&(variance + self.eps)?.sqrt()?)?
            .broadcast_mul(&weight.to_dtype(internal)?)?;
        if let Some(bias) = bias {
            ys = ys.broadcast_add(&bias.to_dtype(internal)?)?;
        }
        ys.to_dtype(dtype)
    }

    /// μ and r of a row.
    #[inline(always)]
    fn moments<T: Element>(self, xs: &[T]) -> (T::Acc, T::Acc) {
        let zero = T::Acc::ZERO;
        let n = T::Acc::from_f64(xs.len() as f64);
        let mean = if self.remove_mean {
            fold(xs, zero, |a, b| a + b, |x| x) / n
        } else {
            zero
        };
        let squares = fold(xs, zero, |a, b| a + b, |x| (x - mean) * (x - mean));
        let eps = T::Acc::from_f64(self.eps);
        (mean, (squares / n + eps).sqrt().recip())
    }

    fn forward<T: Element>(
        self,
        (xs, layout): (&CpuStorage, &Layout),
        weight: &[T],
        bias: Option<&[T]>,
    ) -> Result<(CpuStorage, Shape)> {
        let xs = slice::<T>(xs, layout)?;
        let width = weight.len();
        let mut ys = vec![T::from_f64(0.0); xs.len()];
        map_rows(&mut ys, width, |row, ys| {
            let xs = &xs[row * width..][..ys.len()];
            vectorize(
                #[inline(always)]
                || {
                    for (xs, ys) in xs.chunks_exact(width).zip(ys.chunks_exact_mut(width)) {
                        let (mean, scale) = self.moments(xs);
                        let normalised = |x: T| (x.widen() - mean) * scale;
                        let rows = ys.iter_mut().zip(xs).zip(weight);
                        match bias {
                            None => {
                                for ((y, &x), w) in rows {
                                    *y = T::narrow(normalised(x) * w.widen());
                                }
                            }
                            Some(bias) => {
                                for (((y, &x), w), b) in rows.zip(bias) {
                                    *y = T::narrow(normalised(x) * w.widen() + b.widen());
                                }
                            }
                        }
                    }
                },
            )
        });
        Ok((T::to_cpu_storage_owned(ys), layout.shape().clone()))
    }

    fn backward<T: Element>(
        self,
        xs: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<Gradients> {
        let grad = grad.contiguous()?;
        let (x_reader, w_reader, g_reader) =
            (Reader::new(xs), Reader::new(weight), Reader::new(&grad));
        let (x_all, w, g_all) = (
            x_reader.slice::<T>()?,
            w_reader.slice::<T>()?,
            g_reader.slice::<T>()?,
        );
        let width = w.len();
        let n = T::Acc::from_f64(width as f64);
        let zero = T::Acc::ZERO;
        let sums_of = |tracked: bool| vec![zero; if tracked { width } else { 0 }];
        let (dw_tracked, db_tracked) = (weight.track_op(), bias.is_some_and(Tensor::track_op));

        let mut dx_all = vec![T::from_f64(0.0); x_all.len()];
        let partial_sums = map_rows(&mut dx_all, width, |row, dx_rows| {
            let (mut dw, mut db) = (sums_of(dw_tracked), sums_of(db_tracked));
            let x_rows = &x_all[row * width..][..dx_rows.len()];
            let g_rows = &g_all[row * width..][..dx_rows.len()];
            vectorize(
                #[inline(always)]
                || {
                    let rows = x_rows.chunks_exact(width).zip(g_rows.chunks_exact(width));
                    for ((xs, gs), dx) in rows.zip(dx_rows.chunks_exact_mut(width)) {
                        let (mean, scale) = self.moments(xs);
                        let normalised = |x: T| (x.widen() - mean) * scale;
                        // Σ g and Σ g x̂ in one pass over the row.
                        let (g_sum, gx_sum) = fold3(xs, gs, w, |x, g, w| {
                            let g = g * w;
                            (g, g * (x - mean) * scale)
                        });
                        let g_mean = if self.remove_mean { g_sum / n } else { zero };
                        let gx_mean = gx_sum / n;
                        for (((dx, &x), g), w) in dx.iter_mut().zip(xs).zip(gs).zip(w) {
                            let g = g.widen() * w.widen();
                            *dx = T::narrow(scale * (g - g_mean - normalised(x) * gx_mean));
                        }
                        for ((dw, &x), g) in dw.iter_mut().zip(xs).zip(gs) {
                            *dw += g.widen() * normalised(x);
                        }
                        for (db, g) in db.iter_mut().zip(gs) {
                            *db += g.widen();
                        }
                    }
                },
            );
            (dw, db)
        });

        let (mut dw, mut db) = (sums_of(dw_tracked), sums_of(db_tracked));
        for (dw_part, db_part) in partial_sums {
            dw.iter_mut()
                .zip(dw_part)
                .for_each(|(sum, part)| *sum += part);
            db.iter_mut()
                .zip(db_part)
                .for_each(|(sum, part)| *sum += part);
        }
        let to_tensor = |sums: Vec<T::Acc>, tracked: bool| {
            tracked
                .then(|| Tensor::from_vec(T::narrow_all(sums), width, &Device::Cpu))
                .transpose()
        };
        Ok(Gradients {
            xs: Tensor::from_vec(dx_all, xs.shape(), &Device::Cpu)?,
            weight: to_tensor(dw, dw_tracked)?,
            bias: to_tensor(db, db_tracked)?,
        })
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        dispatch_float!(self.name, xs.dtype(), T => {
            self.forward::<T>((xs, xs_layout), slice(weight, weight_layout)?, None)
        })
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _ys: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grads = dispatch_float!(self.name, xs.dtype(), T => {
            self.backward::<T>(xs, weight, None, grad)?
        });
        Ok((xs.track_op().then_some(grads.xs), grads.weight))
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        dispatch_float!(self.name, xs.dtype(), T => {
            let (weight, bias) = (slice(weight, weight_layout)?, slice(bias, bias_layout)?);
            self.forward::<T>((xs, xs_layout), weight, Some(bias))
        })
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _ys: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grads = dispatch_float!(self.name, xs.dtype(), T => {
            self.backward::<T>(xs, weight, Some(bias), grad)?
        });
        Ok((xs.track_op().then_some(grads.xs), grads.weight, grads.bias))
    }
}
