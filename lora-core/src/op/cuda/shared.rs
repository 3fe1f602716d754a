//! Adapted layers on one input: a node for all of `S`, and one for each output.
//!
//! `S [tokens, width]` is in the base's type and carries the scaling of each layer; its columns are
//! those of a [`GroupLayout`].

use std::{
    any::Any,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail,
};
use half::{bf16, f16};
use lora_kernels::{Columns, GroupLayout, InputGradient, LoraLinear, Packed};

use super::{
    Layer, Number, adapter_dtype, candle, cuda, dispatch, kernels, packed,
    rows::{rows, seen_as_rows},
    tensor, unsupported,
};
use crate::{DropoutPosition, op::shared::Member};

/// Whether the kernels can run these layers together.
pub(in crate::op) fn supported(members: &[Member]) -> bool {
    let dtype = |member: &Member| member.base.weight().dtype();
    members
        .iter()
        .all(|m| unsupported(m.base).is_none() && dtype(m) == dtype(&members[0]))
        && GroupLayout::new(&ranks(members)).is_ok()
}

fn ranks(members: &[Member]) -> Vec<usize> {
    members.iter().map(|member| member.a.dims()[0]).collect()
}

/// The outputs of the layers for `xs`, `[.., in]`.
pub(in crate::op) fn apply(xs: &Tensor, members: &[Member]) -> Result<Vec<Tensor>> {
    let xs = seen_as_rows(xs)?;
    let layout = Arc::new(GroupLayout::new(&ranks(members)).map_err(candle)?);
    let of_a: Vec<&Tensor> = members.iter().map(|member| member.a).collect();
    let dtype = adapter_dtype(members[0].base, &of_a);
    let all = of_a.iter().map(|a| a.to_dtype(dtype));
    let all = Tensor::cat(&all.collect::<Result<Vec<_>>>()?, 0)?;
    let shrink = CudaShrink {
        layout: layout.clone(),
        scalings: members.iter().map(|member| member.scaling as f32).collect(),
        base: members[0].base.weight().dtype(),
    };
    let s = xs.apply_op2(&all, shrink)?;
    let outputs = members
        .iter()
        .zip(layout.columns())
        .map(|(member, &columns)| {
            let dropout = member.dropout.map(|mask| (mask, DropoutPosition::Post));
            let layer = Layer::new(member.base, (member.a, member.b), member.scaling, dropout)?;
            let op = CudaSharedLinear {
                layer,
                columns,
                packed: Mutex::default(),
            };
            xs.apply_op3(&s, member.b, op)
        });
    outputs.collect()
}

/// `S` of `X` and of all `A` one below the other.
struct CudaShrink {
    layout: Arc<GroupLayout>,
    scalings: Vec<f32>,
    base: DType,
}

impl CudaShrink {
    fn forward<T: Number, P: Number>(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, layout)?;
        let (all, start) = (a.as_cuda_slice::<P>()?, a_layout.start_offset());
        let mut end = start;
        let members: Vec<_> = self
            .layout
            .columns()
            .iter()
            .zip(&self.scalings)
            .map(|(columns, &scaling)| {
                let start = end;
                end += columns.rank() * rows.cols;
                lora_kernels::Member {
                    a: all.slice(start..end),
                    rank: columns.rank(),
                    scaling,
                }
            })
            .collect();
        let s = kernels
            .shrink_group(&stream, &rows, &members)
            .map_err(candle)?;
        let shape = Shape::from((rows.rows, self.layout.width()));
        Ok((CudaStorage::wrap_cuda_slice(s, xs.device.clone()), shape))
    }

    /// The gradients of all `A` one below the other.
    fn backward<T: Number, P: Number>(&self, xs: &Tensor, ds: &Tensor) -> Result<Tensor> {
        let (xs_storage, xs_layout) = xs.storage_and_layout();
        let xs = cuda(&xs_storage)?;
        let (ds_storage, ds_layout) = ds.storage_and_layout();
        let ds = packed::<T>(&ds_storage, ds_layout)?;
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, xs_layout)?;
        let grads = kernels
            .outer_group::<T, P>(&stream, &rows, &ds, &self.layout)
            .map_err(candle)?;
        let grads = grads.into_iter().zip(self.layout.columns());
        let grads = grads.map(|(grad, columns)| {
            tensor(grad, &xs.device, &Shape::from((columns.rank(), rows.cols)))
        });
        Tensor::cat(&grads.collect::<Vec<_>>(), 0)
    }
}

impl CustomOp2 for CudaShrink {
    fn name(&self) -> &'static str {
        "lora-shared-shrink-cuda"
    }

    fn cpu_fwd(
        &self,
        _xs: &CpuStorage,
        _xs_layout: &Layout,
        _a: &CpuStorage,
        _a_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("the layers are on a CUDA device, their input on the CPU")
    }

    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;

        dispatch!(
            (self.base, a.dtype()),
            self.forward(xs, xs_layout, a, a_layout)
        )
    }

    /// The gradient of `X` comes from the layers.
    fn bwd(
        &self,
        xs: &Tensor,
        a: &Tensor,
        _s: &Tensor,
        ds: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ds = ds.contiguous()?;
        let da = dispatch!((self.base, a.dtype()), self.backward(xs, &ds))?;
        Ok((None, Some(da)))
    }
}

/// `Y` of `X`, the whole `S`, and `B [out, rank]`.
struct CudaSharedLinear {
    layer: Layer,
    columns: Columns,
    /// A [`Packed`] of the base's type.
    packed: Mutex<Option<Box<dyn Any + Send>>>,
}

impl CudaSharedLinear {
    fn forward<T: Number, P: Number>(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
        s: &CudaStorage,
    ) -> Result<(CudaStorage, Shape)> {
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, layout)?;
        let s = s.as_cuda_slice::<T>()?.as_view();
        let grouped = self.layer.with(|linear: &LoraLinear<T, P>| {
            tracing::debug!(path = %kernels.forward_path(&stream, &rows, linear), "lora forward");
            kernels
                .forward_from(&stream, &rows, linear, &s, self.columns)
                .map_err(candle)
        })?;
        *self.packed.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Box::new(grouped.packed));
        let leading = &layout.dims()[..layout.dims().len() - 1];
        let shape = [leading, &[self.layer.base.weight().dim(0)?]].concat();
        let ys = CudaStorage::wrap_cuda_slice(grouped.ys, xs.device.clone());
        Ok((ys, Shape::from(shape)))
    }

    /// `dX`, `dS` and `dB`.
    fn backward<T: Number, P: Number>(
        &self,
        xs: &Tensor,
        s: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let (dys_storage, dys_layout) = dys.storage_and_layout();
        let (s_storage, s_layout) = s.storage_and_layout();
        let dys = cuda(&dys_storage)?;
        let device = &dys.device;
        let (kernels, stream) = kernels(device)?;
        let rows = rows::<T>(dys, dys_layout)?;
        let s_view = packed::<T>(&s_storage, s_layout)?;
        // The other layers' columns of dS are theirs to add.
        let mut ds = device.alloc_zeros::<T>(s_view.len())?;
        let input = match xs.track_op() {
            true => InputGradient::Wanted,
            false => InputGradient::Skipped,
        };
        let saved = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = saved.as_ref().and_then(|p| p.downcast_ref::<Packed<T>>()) else {
            bail!("lora-linear: a backward pass without a forward pass")
        };
        let (dxs, db) = self.layer.with(|linear: &LoraLinear<T, P>| {
            let low = (&s_view, &mut ds.as_view_mut());
            kernels
                .backward_from(&stream, &rows, saved, linear, low, self.columns, input)
                .map_err(candle)
        })?;
        Ok((
            dxs.map(|dxs| tensor(dxs, device, xs.shape())),
            tensor(ds, device, s.shape()),
            tensor(db, device, self.layer.b.shape()),
        ))
    }
}

impl CustomOp3 for CudaSharedLinear {
    fn name(&self) -> &'static str {
        "lora-shared-linear-cuda"
    }

    fn cpu_fwd(
        &self,
        _xs: &CpuStorage,
        _xs_layout: &Layout,
        _s: &CpuStorage,
        _s_layout: &Layout,
        _b: &CpuStorage,
        _b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("the layer is on a CUDA device, its input on the CPU")
    }

    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
        s: &CudaStorage,
        _s_layout: &Layout,
        _b: &CudaStorage,
        _b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        dispatch!(self.layer.dtypes(), self.forward(xs, layout, s))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        s: &Tensor,
        b: &Tensor,
        _ys: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dys = seen_as_rows(dys)?;
        let (dxs, ds, db) = dispatch!(self.layer.dtypes(), self.backward(xs, s, &dys))?;
        Ok((dxs, Some(ds), Some(db.to_dtype(b.dtype())?)))
    }
}
