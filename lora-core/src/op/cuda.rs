//! The adapted linear layer on CUDA: `lora-kernels`' forward and backward as one node.

use std::{
    any::Any,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail,
    cuda_backend::{
        CudaDType, CudaDevice, cudarc::driver::CudaSlice, cudarc::driver::CudaStream,
        cudarc::driver::CudaView, gemm_reduced_precision_f32,
    },
    op::BackpropOp,
};
use half::{bf16, f16};
use lora_kernels::{
    Dropout, Element, F32Math, InputGradient, Kernels, LoraLinear, Path, Place, Rows, Saved,
};

use super::FrozenLinear;
use crate::{DropoutPosition, Mask};

/// The node. Kept for the backward pass: the input, by candle, and what the forward saved.
pub(super) struct CudaLoraLinear {
    base: FrozenLinear,
    /// `A [rank, in]` and `B [out, rank]`, packed, in a type that the kernels take.
    adapter: (Tensor, Tensor),
    scaling: f32,
    dropout: Option<Dropout>,
    /// A [`Saved`] of the base's type.
    saved: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Runs `$self.$method::<base, adapter>($args)` for the element types at hand.
macro_rules! dispatch {
    ($self:ident . $method:ident($($arg:expr),*)) => {
        match ($self.base.weight().dtype(), $self.adapter.0.dtype()) {
            (DType::BF16, DType::F32) => $self.$method::<bf16, f32>($($arg),*),
            (DType::BF16, DType::BF16) => $self.$method::<bf16, bf16>($($arg),*),
            (DType::F16, DType::F32) => $self.$method::<f16, f32>($($arg),*),
            (DType::F16, DType::F16) => $self.$method::<f16, f16>($($arg),*),
            (DType::F32, DType::F32) => $self.$method::<f32, f32>($($arg),*),
            (base, adapter) => bail!("no kernels for an adapter of {adapter:?} on {base:?}"),
        }
    };
}

impl CudaLoraLinear {
    /// The node for a layer that is not [`unsupported`].
    pub fn new(
        base: &FrozenLinear,
        (a, b): (&Tensor, &Tensor),
        scaling: f64,
        dropout: Option<(Mask, DropoutPosition)>,
    ) -> Result<Self> {
        let dtype = base.weight().dtype();
        // Masters in f32 are converted inside the kernels; another type is brought to f32 here.
        let operand = |tensor: &Tensor| {
            let own = tensor.dtype() == dtype || tensor.dtype() == DType::F32;
            let tensor = tensor.detach();
            match own {
                true => tensor.contiguous(),
                false => tensor.to_dtype(DType::F32)?.contiguous(),
            }
        };
        Ok(Self {
            base: base.clone(),
            adapter: (operand(a)?, operand(b)?),
            scaling: scaling as f32,
            dropout: dropout.map(|(mask, at)| mask.on_cuda(at)).transpose()?,
            saved: Mutex::default(),
        })
    }

    /// Applies the layer to `xs`, `[.., in]`.
    pub fn apply(self, xs: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let xs = match RowsOf::new(xs.layout()) {
            Some(_) => xs.clone(),
            None => xs.contiguous()?,
        };
        xs.apply_op3(a, b, self)
    }

    /// Which kernels run the forward pass on `xs`, and why not faster ones.
    pub fn path(&self, xs: &Tensor) -> Result<Path> {
        let (storage, layout) = xs.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!("the input is not on a CUDA device")
        };
        dispatch!(self.path_of(storage, layout))
    }

    fn path_of<T: Number, P: Number>(&self, xs: &CudaStorage, layout: &Layout) -> Result<Path> {
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, layout)?;
        self.with_linear(|linear: &LoraLinear<T, P>| {
            Ok(kernels.forward_path(&stream, &rows, linear))
        })
    }

    fn forward<T: Number, P: Number>(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (kernels, stream) = kernels(&xs.device)?;
        let rows = rows::<T>(xs, layout)?;
        let forward = self.with_linear(|linear: &LoraLinear<T, P>| {
            tracing::debug!(path = %kernels.forward_path(&stream, &rows, linear), "lora forward");
            kernels.forward(&stream, &rows, linear).map_err(candle)
        })?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(forward.saved));
        let outputs = self.base.weight().dim(0)?;
        let leading = &layout.dims()[..layout.dims().len() - 1];
        let shape = Shape::from([leading, &[outputs]].concat());
        let ys = CudaStorage::wrap_cuda_slice(forward.ys, xs.device.clone());
        Ok((ys, shape))
    }

    /// `dX`, `dA` and `dB`.
    fn backward<T: Number, P: Number>(
        &self,
        xs: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let (xs_storage, xs_layout) = xs.storage_and_layout();
        let (dys_storage, dys_layout) = dys.storage_and_layout();
        let (Storage::Cuda(xs_storage), Storage::Cuda(dys_storage)) = (&*xs_storage, &*dys_storage)
        else {
            bail!("the gradient is on another device than the input")
        };
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
            bail!("lora-linear: backward without a forward")
        };
        let gradients = self.with_linear(|linear: &LoraLinear<T, P>| {
            kernels
                .backward(&stream, &x_rows, &dy_rows, saved, linear, input)
                .map_err(candle)
        })?;
        Ok((
            gradients.xs.map(|dxs| tensor(dxs, device, xs.shape())),
            tensor(gradients.a, device, self.adapter.0.shape()),
            tensor(gradients.b, device, self.adapter.1.shape()),
        ))
    }

    /// Calls `run` with the layer as the kernels see it.
    fn with_linear<T: Number, P: Number, R>(
        &self,
        run: impl FnOnce(&LoraLinear<T, P>) -> Result<R>,
    ) -> Result<R> {
        let weight = self.base.weight();
        let (out_features, in_features) = weight.dims2()?;
        let (weight, weight_layout) = weight.storage_and_layout();
        let bias = self.base.bias().map(Tensor::storage_and_layout);
        let (a, a_layout) = self.adapter.0.storage_and_layout();
        let (b, b_layout) = self.adapter.1.storage_and_layout();
        let bias = match &bias {
            Some((storage, layout)) => Some(packed::<T>(storage, layout)?),
            None => None,
        };
        run(&LoraLinear {
            weight: packed::<T>(&weight, weight_layout)?,
            bias,
            a: packed::<P>(&a, a_layout)?,
            b: packed::<P>(&b, b_layout)?,
            in_features,
            out_features,
            rank: a_layout.dims()[0],
            scaling: self.scaling,
            dropout: self.dropout,
            math: match gemm_reduced_precision_f32() {
                true => F32Math::Tf32,
                false => F32Math::Exact,
            },
        })
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
        dispatch!(self.forward(xs, layout))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _ys: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dys = match RowsOf::new(dys.layout()) {
            Some(_) => dys.clone(),
            None => dys.contiguous()?,
        };
        let (dxs, da, db) = dispatch!(self.backward(xs, &dys))?;
        Ok((
            dxs,
            Some(da.to_dtype(a.dtype())?),
            Some(db.to_dtype(b.dtype())?),
        ))
    }
}

/// Why the kernels can't run a layer with this base.
pub(super) fn unsupported(base: &FrozenLinear) -> Option<&'static str> {
    let packed = |tensor: &Tensor| tensor.is_contiguous();
    if !matches!(base.weight().dtype(), DType::F32 | DType::BF16 | DType::F16) {
        Some("the kernels are for f32, bf16 and f16")
    } else if !packed(base.weight()) || !base.bias().is_none_or(packed) {
        Some("the weight or the bias is not contiguous")
    } else {
        None
    }
}

/// A type of elements that candle and the kernels know.
trait Number: Element + CudaDType {}
impl<T: Element + CudaDType> Number for T {}

fn kernels(device: &CudaDevice) -> Result<(Arc<Kernels>, Arc<CudaStream>)> {
    let stream = device.cuda_stream();
    let kernels = Kernels::shared(stream.context()).map_err(candle)?;
    Ok((kernels, stream))
}

fn candle(error: lora_kernels::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// The elements of a tensor without gaps.
fn packed<'a, T: Number>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let (Storage::Cuda(storage), Some((start, end))) = (storage, layout.contiguous_offsets())
    else {
        bail!("the layer is on another device than the input, or has gaps")
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

/// A tensor `[.., width]` seen as a matrix.
struct RowsOf {
    start: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl RowsOf {
    /// Rows with packed elements, all equally far apart; `None` if the layout has no such rows.
    fn new(layout: &Layout) -> Option<Self> {
        let (&cols, leading) = layout.dims().split_last()?;
        let (&step, strides) = layout.stride().split_last()?;
        if step != 1 && cols > 1 {
            return None;
        }
        let rows = leading.iter().product();
        let mut stride = None;
        let mut next = 0; // what the next dimension outwards must step by
        for (&size, &step) in leading.iter().zip(strides).rev() {
            if size == 1 {
                continue;
            }
            match stride {
                None => stride = Some(step),
                Some(_) if step != next => return None,
                Some(_) => {}
            }
            next = step * size;
        }
        let stride = stride.unwrap_or(cols);
        (stride >= cols || rows == 0).then_some(Self {
            start: layout.start_offset(),
            rows,
            cols,
            stride: stride.max(cols),
        })
    }
}

fn rows<'a, T: Number>(storage: &'a CudaStorage, layout: &Layout) -> Result<Rows<'a, T>> {
    let Some(of) = RowsOf::new(layout) else {
        bail!("lora-linear: {layout:?} has no rows with packed elements")
    };
    let data = storage.as_cuda_slice::<T>()?;
    let end = match of.rows {
        0 => of.start,
        rows => of.start + (rows - 1) * of.stride + of.cols,
    };
    Ok(Rows {
        data: data.slice(of.start..end),
        rows: of.rows,
        cols: of.cols,
        stride: of.stride,
    })
}

fn tensor<T: Number>(slice: CudaSlice<T>, device: &CudaDevice, shape: &Shape) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

impl Mask {
    /// The same mask for the kernels.
    fn on_cuda(&self, position: DropoutPosition) -> Result<Dropout> {
        let place = match position {
            DropoutPosition::Pre => Place::Pre,
            DropoutPosition::Post => Place::Post,
        };
        let (threshold, seed, site, step) = self.numbers();
        let probability = f64::from(threshold) / 65536.0;
        Dropout::new(place, probability, seed, site, step).map_err(candle)
    }
}
