//! Rotary position embeddings ([Su et al., 2021](https://arxiv.org/abs/2104.09864)).
//!
//! Each pair of numbers of a head is rotated by an angle that grows with the position:
//!
//! ```text
//! y0 = x0 cos - x1 sin       dx0 =  dy0 cos + dy1 sin
//! y1 = x0 sin + x1 cos       dx1 = -dy0 sin + dy1 cos
//! ```
//!
//! The backward is the rotation by the opposite angle. Half types are computed in f32. On the CPU it
//! is one fused op; on other devices, and where `cos` or `sin` are themselves trained, it runs as
//! candle's differentiable ops.

use candle_core::{
    CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, WithDType,
    backend::BackendStorage, bail,
};

use super::cpu::{Element, dispatch_float, map_rows, slice, vectorize};

/// Rotates the pairs `(x[i], x[i + d/2])` of `xs` `[batch, heads, tokens, d]`, in place of
/// `candle_nn::rotary_emb::rope`, which cuts the gradient.
///
/// `cos` and `sin` are `[positions, d/2]` or `[batch, positions, d/2]` with at least as many
/// positions as there are tokens, of the dtype of `xs`; token `t` takes row `t`. See the
/// formulas above; this is the layout of Llama's weights on Hugging Face.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_core::nn::rope;
///
/// let xs = Var::new(&[[[[1f32, 2., 3., 4.]]]], &Device::Cpu)?; // one token
/// let cos = Tensor::new(&[[0f32, 1.]], &Device::Cpu)?; // a quarter turn, then none
/// let sin = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let ys = rope(&xs, &cos, &sin)?;
/// assert_eq!(ys.flatten_all()?.to_vec1::<f32>()?, [-3., 2., 1., 4.]);
/// assert!(ys.backward()?.get(&xs).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rotation::new("rope", Axes::HeadsTokens, Pairs::Halves).apply(xs, cos, sin)
}

/// Rotates the pairs `(x[2i], x[2i + 1])` of `xs` `[batch, heads, tokens, d]`, in place of
/// `candle_nn::rotary_emb::rope_i`, which cuts the gradient.
///
/// Everything else is as in [`rope`]; this is the layout of Llama's weights in GGUF files.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::nn::rope_i;
///
/// let xs = Tensor::new(&[[[[1f32, 2., 3., 4.]]]], &Device::Cpu)?;
/// let cos = Tensor::new(&[[0f32, 1.]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let ys = rope_i(&xs, &cos, &sin)?;
/// assert_eq!(ys.flatten_all()?.to_vec1::<f32>()?, [-2., 1., 3., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rotation::new("rope-i", Axes::HeadsTokens, Pairs::Interleaved).apply(xs, cos, sin)
}

/// Rotates the pairs `(x[i], x[i + d/2])` of `xs` `[batch, tokens, heads, d]`, in place of
/// `candle_nn::rotary_emb::rope_thd`, which cuts the gradient.
///
/// Everything else is as in [`rope`]. With packed sequences, `[1, tokens, heads, d]` and rows of
/// `cos` and `sin` gathered by each token's position, no transpose is needed before
/// [`causal_attention`](super::causal_attention).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::nn::rope_thd;
///
/// let xs = Tensor::new(&[[[[1f32, 2.]], [[1., 2.]]]], &Device::Cpu)?; // two tokens
/// let cos = Tensor::new(&[[1f32], [0.]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32], [1.]], &Device::Cpu)?;
/// let ys = rope_thd(&xs, &cos, &sin)?;
/// assert_eq!(ys.flatten_all()?.to_vec1::<f32>()?, [1., 2., -2., 1.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Rotation::new("rope-thd", Axes::TokensHeads, Pairs::Halves).apply(xs, cos, sin)
}

/// The order of the two inner axes.
#[derive(Clone, Copy)]
enum Axes {
    HeadsTokens,
    TokensHeads,
}

/// Which numbers of a head are rotated together.
#[derive(Clone, Copy)]
enum Pairs {
    Halves,
    Interleaved,
}

#[derive(Clone, Copy)]
struct Rotation {
    name: &'static str,
    axes: Axes,
    pairs: Pairs,
    inverse: bool,
}

impl Rotation {
    fn new(name: &'static str, axes: Axes, pairs: Pairs) -> Self {
        Self {
            name,
            axes,
            pairs,
            inverse: false,
        }
    }

    fn tokens(self, [_, a, b, _]: [usize; 4]) -> usize {
        match self.axes {
            Axes::HeadsTokens => b,
            Axes::TokensHeads => a,
        }
    }

    fn apply(self, xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (batch, a, b, d) = xs.dims4()?;
        let tokens = self.tokens([batch, a, b, d]);
        let fits = match *cos.dims() {
            [positions, half] => positions >= tokens && 2 * half == d,
            [n, positions, half] => n == batch && positions >= tokens && 2 * half == d,
            _ => false,
        };
        if !fits || cos.shape() != sin.shape() {
            bail!(
                "{}: xs {:?} has {tokens} tokens of {d} numbers, so cos {:?} and sin {:?} should \
                 be [{tokens} or more, {}], perhaps with a batch of {batch} before",
                self.name,
                xs.shape(),
                cos.shape(),
                sin.shape(),
                d / 2
            )
        }
        if cos.dtype() != xs.dtype() || sin.dtype() != xs.dtype() {
            bail!(
                "{}: xs is {:?}, but cos is {:?} and sin {:?}; convert them",
                self.name,
                xs.dtype(),
                cos.dtype(),
                sin.dtype()
            )
        }
        if xs.device().is_cpu() && !cos.track_op() && !sin.track_op() {
            let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
            xs.contiguous()?.apply_op3(&cos, &sin, self)
        } else {
            self.composed(xs, cos, sin, tokens)
        }
    }

    /// The same from candle's ops, in f32 for half types.
    fn composed(self, xs: &Tensor, cos: &Tensor, sin: &Tensor, tokens: usize) -> Result<Tensor> {
        let dtype = xs.dtype();
        let internal = match dtype {
            DType::BF16 | DType::F16 => DType::F32,
            dtype => dtype,
        };
        // [batch or nothing, tokens, d/2], with a dimension of 1 where xs has its heads.
        let angles = |table: &Tensor| {
            let table = table.narrow(D::Minus2, 0, tokens)?.to_dtype(internal)?;
            match self.axes {
                Axes::HeadsTokens => table.unsqueeze(table.rank() - 2),
                Axes::TokensHeads => table.unsqueeze(table.rank() - 1),
            }
        };
        let (cos, sin) = (angles(cos)?, angles(sin)?);
        let d = xs.dim(D::Minus1)?;
        let wide = xs.to_dtype(internal)?;
        let (x0, x1) = match self.pairs {
            Pairs::Halves => (
                wide.narrow(D::Minus1, 0, d / 2)?,
                wide.narrow(D::Minus1, d / 2, d / 2)?,
            ),
            Pairs::Interleaved => {
                let (batch, a, b, _) = xs.dims4()?;
                let pairs = wide.reshape((batch, a, b, d / 2, 2))?;
                (
                    pairs.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?,
                    pairs.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1)?,
                )
            }
        };
        let y0 = (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?;
        let y1 = (x0.broadcast_mul(&sin)? + x1.broadcast_mul(&cos)?)?;
        let ys = match self.pairs {
            Pairs::Halves => Tensor::cat(&[y0, y1], D::Minus1)?,
            Pairs::Interleaved => Tensor::stack(&[y0, y1], D::Minus1)?.reshape(xs.shape())?,
        };
        ys.to_dtype(dtype)
    }

    fn forward<T: Element>(
        self,
        xs: &[T],
        dims: [usize; 4],
        (cos, sin): (&[T], &[T]),
        table_dims: &[usize],
    ) -> Vec<T> {
        let [_, a, b, d] = dims;
        let half = d / 2;
        // The distance between the tables of two batches, 0 where they share one.
        let batch_stride = match *table_dims {
            [_, positions, _] => positions * half,
            _ => 0,
        };
        let sign = T::Acc::from_f64(if self.inverse { -1.0 } else { 1.0 });
        let rotate = |x0: T, x1: T, cos: T, sin: T| {
            let (x0, x1, cos, sin) = (x0.widen(), x1.widen(), cos.widen(), sign * sin.widen());
            (
                T::narrow(x0 * cos - x1 * sin),
                T::narrow(x0 * sin + x1 * cos),
            )
        };
        let mut ys = vec![T::from_f64(0.0); xs.len()];
        map_rows(&mut ys, d, |first_row, ys| {
            let xs = &xs[first_row * d..][..ys.len()];
            vectorize(
                #[inline(always)]
                || {
                    for (i, (xs, ys)) in xs.chunks_exact(d).zip(ys.chunks_exact_mut(d)).enumerate()
                    {
                        let row = first_row + i;
                        let token = match self.axes {
                            Axes::HeadsTokens => row % b,
                            Axes::TokensHeads => row / b % a,
                        };
                        let start = row / (a * b) * batch_stride + token * half;
                        let angles = cos[start..][..half].iter().zip(&sin[start..][..half]);
                        match self.pairs {
                            Pairs::Halves => {
                                let (x0, x1) = xs.split_at(half);
                                let (y0, y1) = ys.split_at_mut(half);
                                let pairs = y0.iter_mut().zip(y1).zip(x0.iter().zip(x1));
                                for (((y0, y1), (&x0, &x1)), (&cos, &sin)) in pairs.zip(angles) {
                                    (*y0, *y1) = rotate(x0, x1, cos, sin);
                                }
                            }
                            Pairs::Interleaved => {
                                let (y_pairs, _) = ys.as_chunks_mut::<2>();
                                let (x_pairs, _) = xs.as_chunks::<2>();
                                let pairs = y_pairs.iter_mut().zip(x_pairs);
                                for (([y0, y1], &[x0, x1]), (&cos, &sin)) in pairs.zip(angles) {
                                    (*y0, *y1) = rotate(x0, x1, cos, sin);
                                }
                            }
                        }
                    }
                },
            )
        });
        ys
    }
}

impl CustomOp3 for Rotation {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = xs_layout.shape();
        let dims = shape.dims4()?.into();
        dispatch_float!(self.name, xs.dtype(), T => {
            let angles = (slice(cos, cos_layout)?, slice(sin, sin_layout)?);
            let ys = self.forward::<T>(slice(xs, xs_layout)?, dims, angles, cos_layout.dims());
            Ok((T::to_cpu_storage_owned(ys), shape.clone()))
        })
    }

    fn bwd(
        &self,
        _xs: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _ys: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let opposite = Self {
            inverse: !self.inverse,
            ..*self
        };
        let dx = grad.contiguous()?.apply_op3_no_bwd(cos, sin, &opposite)?;
        Ok((Some(dx), None, None))
    }
}
