//! One adapted layer as one node.

use std::{
    any::Any,
    sync::{Mutex, PoisonError},
};

use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use lora_kernels::{InputGradient, LoraLinear, Path, Saved};

use super::{
    FrozenLinear, Layer, Number, candle, cuda, dispatch, kernels,
    rows::{rows, seen_as_rows},
    tensor,
};
use crate::{DropoutPosition, Mask};

/// The node. Kept for the backward pass: the input, by candle, and what the forward saved.
pub(in crate::op) struct CudaLoraLinear {
    layer: Layer,
    /// A [`Saved`] of the base's type.
    saved: Mutex<Option<Box<dyn Any + Send>>>,
}

impl CudaLoraLinear {
    /// The node for a layer whose base is not [`unsupported`](super::unsupported).
    pub fn new(
        base: &FrozenLinear,
        adapter: (&Tensor, &Tensor),
        scaling: f64,
        dropout: Option<(Mask, DropoutPosition)>,
    ) -> Result<Self> {
        Ok(Self {
            layer: Layer::new(base, adapter, scaling, dropout)?,
            saved: Mutex::default(),
        })
    }

    /// Applies the layer to `xs`, `[.., in]`.
    pub fn apply(self, xs: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        seen_as_rows(xs)?.apply_op3(a, b, self)
    }

    /// Which kernels run the forward pass on `xs`, and why not faster ones.
    pub fn path(&self, xs: &Tensor) -> Result<Path> {
        let xs = seen_as_rows(xs)?;
        let (storage, layout) = xs.storage_and_layout();
        let storage = cuda(&storage)?;
        dispatch!(self.layer.dtypes(), self.path_of(storage, layout))
    }

    fn path_of<T: Number, P: Number>(&self, xs: &CudaStorage, layout: &Layout) -> Result<Path> {
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, layout)?;
        self.layer
            .with(|linear: &LoraLinear<T, P>| Ok(kernels.forward_path(&stream, &rows, linear)))
    }

    fn forward<T: Number, P: Number>(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, layout)?;
        let forward = self.layer.with(|linear: &LoraLinear<T, P>| {
            tracing::debug!(path = %kernels.forward_path(&stream, &rows, linear), "lora forward");
            kernels.forward(&stream, &rows, linear).map_err(candle)
        })?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(forward.saved));
        let leading = &layout.dims()[..layout.dims().len() - 1];
        let shape = [leading, &[self.layer.base.weight().dim(0)?]].concat();
        let ys = CudaStorage::wrap_cuda_slice(forward.ys, xs.device.clone());
        Ok((ys, Shape::from(shape)))
    }

    /// `dX`, `dA` and `dB`.
    fn backward<T: Number, P: Number>(
        &self,
        xs: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let (xs_storage, xs_layout) = xs.storage_and_layout();
        let (dys_storage, dys_layout) = dys.storage_and_layout();
        let (xs_storage, dys_storage) = (cuda(&xs_storage)?, cuda(&dys_storage)?);
        let device = &xs_storage.device;
        let (kernels, stream) = kernels(device)?;
        let (x_rows, dy_rows) = (
            rows::<T>(xs_storage, xs_layout)?,
            rows::<T>(dys_storage, dys_layout)?,
        );
        let input = match xs.track_op() {
            true => InputGradient::Wanted,
            false => InputGradient::Skipped,
        };
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = saved.as_ref().and_then(|s| s.downcast_ref::<Saved<T>>()) else {
            bail!("lora-linear: a backward pass without a forward pass")
        };
        let gradients = self.layer.with(|linear: &LoraLinear<T, P>| {
            kernels
                .backward(&stream, &x_rows, &dy_rows, saved, linear, input)
                .map_err(candle)
        })?;
        Ok((
            gradients.xs.map(|dxs| tensor(dxs, device, xs.shape())),
            tensor(gradients.a, device, self.layer.a.shape()),
            tensor(gradients.b, device, self.layer.b.shape()),
        ))
    }
}

impl CustomOp3 for CudaLoraLinear {
    fn name(&self) -> &'static str {
        "lora-linear-cuda"
    }

    fn cpu_fwd(
        &self,
        _xs: &CpuStorage,
        _xs_layout: &Layout,
        _a: &CpuStorage,
        _a_layout: &Layout,
        _b: &CpuStorage,
        _b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("the layer is on a CUDA device, its input on the CPU")
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
        dispatch!(self.layer.dtypes(), self.forward(xs, layout))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _ys: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dys = seen_as_rows(dys)?;
        let (dxs, da, db) = dispatch!(self.layer.dtypes(), self.backward(xs, &dys))?;
        Ok((
            dxs,
            Some(da.to_dtype(a.dtype())?),
            Some(db.to_dtype(b.dtype())?),
        ))
    }
}
