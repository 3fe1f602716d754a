//! Adapted linear layers that read one input, such as q, k and v: the input is read once for all
//! their `A`, and once for the gradients of all of them.
//!
//! ```text
//! S   = X [A_1; A_2; ..]ᵀ                      dA_i = dS_iᵀ X
//! Y_i = X W_iᵀ + b_i + D_i(s_i S_i B_iᵀ)       dB_i = s_i G_iᵀ S_i      G_i = D'_i(dY_i)
//!                                              dS_i = s_i G_i B_i
//!                                              dX   = Σ_i dY_i W_i + dS_i A_i
//! ```
//!
//! `S` is a node of the graph and so is every `Y_i`. The node of `S` gives the `A_i` their gradients;
//! all of `dX` comes from the nodes of the `Y_i`, where the base's product makes it in one pass.
//! Kept for the backward pass: `X` once, and `S`, which is thin (the CPU keeps a copy of it too).

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, D, Layout, MetalStorage, Result, Shape, Tensor,
    backend::BackendStorage, bail,
};

use super::{FrozenLinear, LoraLinear, compute_dtype, frozen, thin};
use crate::{DropoutPosition, Mask};

/// One of the layers. Dropout, if any, is on the adapter's output.
pub(crate) struct Member<'a> {
    pub base: &'a FrozenLinear,
    /// `[rank, in]`
    pub a: &'a Tensor,
    /// `[out, rank]`
    pub b: &'a Tensor,
    pub scaling: f64,
    pub dropout: Option<Mask>,
}

/// The outputs `[.., out]` of the layers for `xs`, `[.., in]`.
pub(crate) fn apply(xs: &Tensor, members: &[Member]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if xs.device().is_cuda() && super::cuda::shared::supported(members) {
        return super::cuda::shared::apply(xs, members);
    }
    let Some((&inputs, leading)) = xs.dims().split_last() else {
        bail!("a linear layer expects an input of at least one dimension")
    };
    let rows = xs.reshape((leading.iter().product::<usize>(), inputs))?;
    apply_rows(&rows.contiguous()?, members)?
        .into_iter()
        .map(|ys| ys.reshape([leading, &ys.dims()[1..]].concat()))
        .collect()
}

/// The outputs for `xs`, `[tokens, in]` and contiguous.
fn apply_rows(xs: &Tensor, members: &[Member]) -> Result<Vec<Tensor>> {
    let Some(first) = members.first() else {
        return Ok(Vec::new());
    };
    let dtype = compute_dtype(first.base.weight().dtype());
    let all = members.iter().map(|member| member.a.to_dtype(dtype));
    let all = Tensor::cat(&all.collect::<Result<Vec<_>>>()?, 0)?;
    let s = xs.apply_op2(&all, Shrink)?; // [tokens, sum of ranks]
    let mut start = 0;
    let outputs = members.iter().map(|member| {
        let rank = member.a.dim(0)?;
        let s = s.narrow(D::Minus1, start, rank)?;
        start += rank;
        SharedLinear::apply(xs, &s, member)
    });
    outputs.collect()
}

/// `X Aᵀ`, whose backward pass leaves the gradient of `X` to the layers that read it.
struct Shrink;

impl CustomOp2 for Shrink {
    fn name(&self) -> &'static str {
        "lora-shared-shrink"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if xs.dtype() == a.dtype() {
            return CustomOp2::cpu_fwd(&thin::Shrink, xs, xs_layout, a, a_layout);
        }
        let wide = xs.to_dtype(xs_layout, a.dtype())?;
        let layout = Layout::contiguous(xs_layout.shape());
        CustomOp2::cpu_fwd(&thin::Shrink, &wide, &layout, a, a_layout)
    }

    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        product(xs, xs_layout, a, a_layout)
    }

    fn metal_fwd(
        &self,
        xs: &MetalStorage,
        xs_layout: &Layout,
        a: &MetalStorage,
        a_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        product(xs, xs_layout, a, a_layout)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        a: &Tensor,
        _s: &Tensor,
        ds: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let da = thin::outer(ds, &xs.detach().to_dtype(a.dtype())?)?;
        Ok((None, Some(da)))
    }
}

/// `xs aᵀ` composed of the operations that every device has.
fn product<S: BackendStorage>(
    xs: &S,
    xs_layout: &Layout,
    a: &S,
    a_layout: &Layout,
) -> Result<(S, Shape)> {
    let (tokens, width) = xs_layout.shape().dims2()?;
    let rank = a_layout.shape().dims2()?.0;
    let wide = xs.to_dtype(xs_layout, a.dtype())?;
    let layout = Layout::contiguous(xs_layout.shape());
    let s = wide.matmul(
        a,
        (1, tokens, rank, width),
        &layout,
        &a_layout.transpose(0, 1)?,
    )?;
    Ok((s, Shape::from((tokens, rank))))
}

/// `Y` of `X`, `S [tokens, rank]` and `B [out, rank]`.
struct SharedLinear {
    layer: LoraLinear,
    /// `[rank, in]`
    a: Tensor,
}

impl SharedLinear {
    fn apply(xs: &Tensor, s: &Tensor, member: &Member) -> Result<Tensor> {
        let dtype = s.dtype();
        let layer = LoraLinear {
            base: member.base.clone(),
            scaling: member.scaling,
            dropout: member.dropout.map(|mask| (mask, DropoutPosition::Post)),
            hidden: s.detach().contiguous()?,
            b_transposed: member.b.detach().to_dtype(dtype)?.t()?.contiguous()?,
        };
        let a = member.a.detach();
        xs.apply_op3(s, member.b, Self { layer, a })
    }
}

impl CustomOp3 for SharedLinear {
    fn name(&self) -> &'static str {
        "lora-shared-linear"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        s: &CpuStorage,
        s_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        CustomOp3::cpu_fwd(&self.layer, xs, xs_layout, s, s_layout, b, b_layout)
    }

    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        _s: &CudaStorage,
        _s_layout: &Layout,
        _b: &CudaStorage,
        _b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.layer.composed(xs, xs_layout, frozen::cuda_storage)
    }

    fn metal_fwd(
        &self,
        xs: &MetalStorage,
        xs_layout: &Layout,
        _s: &MetalStorage,
        _s_layout: &Layout,
        _b: &MetalStorage,
        _b_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.layer.composed(xs, xs_layout, frozen::metal_storage)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        _s: &Tensor,
        b: &Tensor,
        _ys: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dys = dys.contiguous()?;
        let (ds, db) = self.layer.low_rank_gradients(&dys)?;
        let dxs = self.layer.input_gradient(xs, &dys, &ds, &self.a)?;
        Ok((dxs, Some(ds), Some(db.to_dtype(b.dtype())?)))
    }
}
