//! The frozen linear layer: `Y = X Wᵀ + b`, whose backward pass is `dX = dY W` and nothing else.
//!
//! candle's own product computes and keeps `dW` even for a weight that nobody trains.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail, op::Add,
};

/// A weight `[out, in]` and a bias `[out]` that get no gradient.
#[derive(Clone, Debug)]
pub(crate) struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl FrozenLinear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            weight: weight.detach(),
            bias: bias.map(|bias| bias.detach()),
        }
    }

    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Applies the layer to `xs`, `[tokens, in]` and contiguous.
    pub fn apply(&self, xs: &Tensor) -> Result<Tensor> {
        xs.apply_op1(self.clone())
    }

    /// `dX = dY W`
    pub fn backward(&self, dys: &Tensor) -> Result<Tensor> {
        dys.matmul(&self.weight)
    }

    /// `Y` on a device whose storage in a tensor `of` finds.
    pub fn forward<S: BackendStorage>(
        &self,
        xs: &S,
        layout: &Layout,
        of: fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (tokens, width) = layout.shape().dims2()?;
        let weight = self.weight.t()?;
        let outputs = weight.dim(1)?;
        let shape = Shape::from((tokens, outputs));
        let (weight, weight_layout) = weight.storage_and_layout();
        let Some(weight) = of(&weight) else {
            bail!("the weight is on another device than the input")
        };
        let ys = xs.matmul(weight, (1, tokens, outputs, width), layout, weight_layout)?;
        let Some(bias) = &self.bias else {
            return Ok((ys, shape));
        };
        let bias = bias.broadcast_as(&shape)?;
        let (bias, bias_layout) = bias.storage_and_layout();
        let Some(bias) = of(&bias) else {
            bail!("the bias is on another device than the input")
        };
        let ys = ys.binary_impl::<Add>(bias, &Layout::contiguous(&shape), bias_layout)?;
        Ok((ys, shape))
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(xs, layout, cpu_storage)
    }

    fn cuda_fwd(&self, xs: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward(xs, layout, cuda_storage)
    }

    fn metal_fwd(&self, xs: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward(xs, layout, metal_storage)
    }

    fn bwd(&self, _xs: &Tensor, _ys: &Tensor, dys: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.backward(&dys.contiguous()?)?))
    }
}

pub(crate) fn cpu_storage(storage: &Storage) -> Option<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Some(storage),
        _ => None,
    }
}

pub(crate) fn cuda_storage(storage: &Storage) -> Option<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Some(storage),
        _ => None,
    }
}

pub(crate) fn metal_storage(storage: &Storage) -> Option<&MetalStorage> {
    match storage {
        Storage::Metal(storage) => Some(storage),
        _ => None,
    }
}
