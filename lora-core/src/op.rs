//! The adapted linear layer as one node of the autograd graph.
//!
//! With `D` the dropout of the adapter, `s` its scaling and `H` its rank-r product:
//!
//! ```text
//! pre:  H  = D(X) Aᵀ           post:  H  = X Aᵀ
//!       Y  = X Wᵀ + b + s H Bᵀ        Y  = X Wᵀ + b + D(s H Bᵀ)
//!
//!       G  = dY                       G  = D'(dY)
//!       dB = s Gᵀ H                   dB = s Gᵀ H
//!       dH = s G B                    dH = s G B
//!       dA = dHᵀ D(X)                 dA = dHᵀ X
//!       dX = dY W + D'(dH A)          dX = dY W + dH A
//! ```
//!
//! `D'` multiplies by the factors of the same mask. `W` and `b` ride in the node and never get a
//! gradient; `dX` is computed only if `X` needs one. Kept for the backward pass: `X` and `H`.
//! The adapter's side is computed in f32, or in f64 over an f64 base, and rounded once, when it
//! is added.

#[cfg(feature = "cuda")]
mod cuda;
mod expand;
mod frozen;
pub(crate) mod parts;
mod path;
pub(crate) mod shared;
mod thin;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, InplaceOp3, Layout, MetalStorage, Result, Shape, Storage,
    Tensor,
    backend::BackendStorage,
    bail,
    op::{Add, Mul},
};
use expand::Expand;
pub(crate) use expand::compute_dtype;
pub(crate) use frozen::FrozenLinear;
pub use path::ComputePath;

use crate::{DropoutPosition, Mask};

/// The node: `Y [tokens, out]` of `X [tokens, in]`, `A [rank, in]` and `B [out, rank]`.
pub(crate) struct LoraLinear {
    base: FrozenLinear,
    scaling: f64,
    dropout: Option<(Mask, DropoutPosition)>,
    /// `H`, `[tokens, rank]`.
    hidden: Tensor,
    /// `Bᵀ`, `[rank, out]`.
    b_transposed: Tensor,
}

impl LoraLinear {
    /// Applies the layer to `xs`, `[.., in]`.
    pub fn apply(
        base: &FrozenLinear,
        xs: &Tensor,
        (a, b): (&Tensor, &Tensor),
        scaling: f64,
        dropout: Option<(Mask, DropoutPosition)>,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if xs.device().is_cuda() {
            let Some(reason) = cuda::unsupported(base) else {
                return cuda::linear::CudaLoraLinear::new(base, (a, b), scaling, dropout)?
                    .apply(xs, a, b);
            };
            tracing::debug!(reason, "lora forward, composed of candle's operations");
        }
        over_rows(xs, base.weight().dim(0)?, |xs| {
            Self::apply_rows(base, xs, (a, b), scaling, dropout)
        })
    }

    /// Applies the layer to `xs`, `[tokens, in]` and contiguous.
    fn apply_rows(
        base: &FrozenLinear,
        xs: &Tensor,
        (a, b): (&Tensor, &Tensor),
        scaling: f64,
        dropout: Option<(Mask, DropoutPosition)>,
    ) -> Result<Tensor> {
        let dtype = compute_dtype(base.weight().dtype());
        let input = dropped(&xs.detach().to_dtype(dtype)?, dropout, DropoutPosition::Pre)?;
        let hidden = thin::shrink(&input, &a.detach().to_dtype(dtype)?)?; // [tokens, rank]
        let b_transposed = b.detach().to_dtype(dtype)?.t()?.contiguous()?; // [rank, out]
        let op = Self {
            base: base.clone(),
            scaling,
            dropout,
            hidden,
            b_transposed,
        };
        xs.apply_op3(a, b, op)
    }

    /// How [`apply`](Self::apply) computes the layer.
    pub fn path(
        base: &FrozenLinear,
        xs: &Tensor,
        adapter: (&Tensor, &Tensor),
        dropout: Option<(Mask, DropoutPosition)>,
    ) -> Result<ComputePath> {
        #[cfg(feature = "cuda")]
        if xs.device().is_cuda() {
            return match cuda::unsupported(base) {
                Some(reason) => Ok(ComputePath::Composed(reason)),
                None => cuda::linear::CudaLoraLinear::new(base, adapter, 1.0, dropout)?
                    .path(xs)
                    .map(|path| ComputePath::Kernels(path.to_string())),
            };
        }
        let _ = (base, adapter, dropout); // the CPU has one path for all of them
        Ok(match xs.device().is_cpu() {
            true => ComputePath::Fused,
            false => ComputePath::Composed("there are no kernels for this device"),
        })
    }

    /// `dH [tokens, rank]` and `dB [out, rank]` of contiguous `dY [tokens, out]`.
    fn low_rank_gradients(&self, dys: &Tensor) -> Result<(Tensor, Tensor)> {
        let dys = dys.to_dtype(self.hidden.dtype())?;
        let g = dropped(&dys, self.dropout, DropoutPosition::Post)?; // [tokens, out]
        let db = (thin::outer(&self.hidden, &g)?.t()? * self.scaling)?;
        let dh = (thin::shrink(&g, &self.b_transposed)? * self.scaling)?;
        Ok((dh, db))
    }

    /// `dX [tokens, in]`, if `X` needs one.
    fn input_gradient(
        &self,
        xs: &Tensor,
        dys: &Tensor,
        dh: &Tensor,
        a: &Tensor,
    ) -> Result<Option<Tensor>> {
        if !xs.track_op() {
            return Ok(None);
        }
        let expand = Expand {
            scaling: 1.0,
            mask: self.mask_at(DropoutPosition::Pre),
        };
        let a = a.detach().to_dtype(dh.dtype())?.contiguous()?;
        expand.add(self.base.backward(dys)?, dh, &a).map(Some)
    }

    /// The mask, if dropout is at `position`.
    fn mask_at(&self, position: DropoutPosition) -> Option<Mask> {
        self.dropout
            .filter(|(_, at)| *at == position)
            .map(|(mask, _)| mask)
    }

    /// `Y` composed of the operations that every device has.
    fn composed<S: BackendStorage>(
        &self,
        xs: &S,
        layout: &Layout,
        of: fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (ys, shape) = self.base.forward(xs, layout, of)?;
        let (tokens, outputs) = shape.dims2()?;
        let (dtype, compute) = (ys.dtype(), self.hidden.dtype());
        let contiguous = Layout::contiguous(&shape);
        let (hidden, hidden_layout) = self.hidden.storage_and_layout();
        let (b, b_layout) = self.b_transposed.storage_and_layout();
        let (Some(hidden), Some(b)) = (of(&hidden), of(&b)) else {
            bail!("the adapter is on another device than the input")
        };
        let rank = b_layout.dims()[0];
        let mut delta = hidden
            .matmul(b, (1, tokens, outputs, rank), hidden_layout, b_layout)?
            .affine(&contiguous, self.scaling, 0.0)?;
        if let Some(mask) = self.mask_at(DropoutPosition::Post) {
            let mask = mask.tensor(&shape, compute, self.hidden.device())?;
            let (mask, mask_layout) = mask.storage_and_layout();
            let Some(mask) = of(&mask) else {
                bail!("the dropout mask is on another device than the input")
            };
            delta = delta.binary_impl::<Mul>(mask, &contiguous, mask_layout)?;
        }
        let ys = ys
            .to_dtype(&contiguous, compute)?
            .binary_impl::<Add>(&delta, &contiguous, &contiguous)?
            .to_dtype(&contiguous, dtype)?;
        Ok((ys, shape))
    }
}

impl CustomOp3 for LoraLinear {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        layout: &Layout,
        _a: &CpuStorage,
        _a_layout: &Layout,
        _b: &CpuStorage,
        _b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut ys, shape) = self.base.forward(xs, layout, frozen::cpu_storage)?;
        let expand = Expand {
            scaling: self.scaling,
            mask: self.mask_at(DropoutPosition::Post),
        };
        let (hidden, hidden_layout) = self.hidden.storage_and_layout();
        let (b, b_layout) = self.b_transposed.storage_and_layout();
        let (Storage::Cpu(hidden), Storage::Cpu(b)) = (&*hidden, &*b) else {
            bail!("the adapter is on another device than the input")
        };
        let contiguous = Layout::contiguous(&shape);
        InplaceOp3::cpu_fwd(
            &expand,
            &mut ys,
            &contiguous,
            hidden,
            hidden_layout,
            b,
            b_layout,
        )?;
        Ok((ys, shape))
    }

    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
        _a: &CudaStorage,
        _a_layout: &Layout,
        _b: &CudaStorage,
        _b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.composed(xs, layout, frozen::cuda_storage)
    }

    fn metal_fwd(
        &self,
        xs: &MetalStorage,
        layout: &Layout,
        _a: &MetalStorage,
        _a_layout: &Layout,
        _b: &MetalStorage,
        _b_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.composed(xs, layout, frozen::metal_storage)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _ys: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dys = dys.contiguous()?;
        let (dh, db) = self.low_rank_gradients(&dys)?;
        let input = xs.detach().to_dtype(dh.dtype())?;
        let input = dropped(&input, self.dropout, DropoutPosition::Pre)?; // [tokens, in]
        let da = thin::outer(&dh, &input)?; // [rank, in]
        Ok((
            self.input_gradient(xs, &dys, &dh, a)?,
            Some(da.to_dtype(a.dtype())?),
            Some(db.to_dtype(b.dtype())?),
        ))
    }
}

/// `xs` with dropout, if it is at `position`.
fn dropped(
    xs: &Tensor,
    dropout: Option<(Mask, DropoutPosition)>,
    position: DropoutPosition,
) -> Result<Tensor> {
    match dropout {
        Some((mask, at)) if at == position => mask.apply(xs),
        _ => Ok(xs.clone()),
    }
}

/// Applies `layer` to `xs [.., in]` seen as contiguous rows `[tokens, in]`.
pub(crate) fn over_rows(
    xs: &Tensor,
    outputs: usize,
    layer: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some((&inputs, leading)) = xs.dims().split_last() else {
        bail!("a linear layer expects an input of at least one dimension")
    };
    let tokens = leading.iter().product::<usize>();
    let shape = [leading, &[outputs]].concat();
    layer(&xs.reshape((tokens, inputs))?.contiguous()?)?.reshape(shape)
}
