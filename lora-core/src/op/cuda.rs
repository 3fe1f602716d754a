//! The adapted linear layer on CUDA, by `lora-kernels`.

pub(super) mod linear;
mod rows;
pub(super) mod shared;

use std::sync::Arc;

use candle_core::{
    CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail,
    cuda_backend::{
        CudaDType, CudaDevice,
        cudarc::driver::{CudaSlice, CudaStream, CudaView},
        gemm_reduced_precision_f32,
    },
    op::BackpropOp,
};
use lora_kernels::{Dropout, Element, F32Math, Kernels, LoraLinear, Place};

use super::FrozenLinear;
use crate::{DropoutPosition, Mask};

/// Runs `$self.$method::<base, adapter>($args)` for a pair of element types.
macro_rules! dispatch {
    ($dtypes:expr, $self:ident . $method:ident($($arg:expr),*)) => {
        match $dtypes {
            (DType::BF16, DType::F32) => $self.$method::<bf16, f32>($($arg),*),
            (DType::BF16, DType::BF16) => $self.$method::<bf16, bf16>($($arg),*),
            (DType::F16, DType::F32) => $self.$method::<f16, f32>($($arg),*),
            (DType::F16, DType::F16) => $self.$method::<f16, f16>($($arg),*),
            (DType::F32, DType::F32) => $self.$method::<f32, f32>($($arg),*),
            (base, adapter) => bail!("no kernels for an adapter of {adapter:?} on {base:?}"),
        }
    };
}
use dispatch;

/// A type of elements that candle and the kernels know.
trait Number: Element + CudaDType {}
impl<T: Element + CudaDType> Number for T {}

/// An adapted layer in types that the kernels take.
struct Layer {
    base: FrozenLinear,
    /// `[rank, in]`, packed, in f32 or the base's type.
    a: Tensor,
    /// `[out, rank]`, likewise.
    b: Tensor,
    scaling: f32,
    dropout: Option<Dropout>,
}

impl Layer {
    fn new(
        base: &FrozenLinear,
        (a, b): (&Tensor, &Tensor),
        scaling: f64,
        dropout: Option<(Mask, DropoutPosition)>,
    ) -> Result<Self> {
        let dtype = adapter_dtype(base, &[a, b]);
        let operand = |tensor: &Tensor| tensor.detach().to_dtype(dtype)?.contiguous();
        Ok(Self {
            base: base.clone(),
            a: operand(a)?,
            b: operand(b)?,
            scaling: scaling as f32,
            dropout: dropout.map(|(mask, at)| mask.on_cuda(at)).transpose()?,
        })
    }

    /// Of the base and of the adapter.
    fn dtypes(&self) -> (DType, DType) {
        (self.base.weight().dtype(), self.a.dtype())
    }

    /// Calls `run` with the layer as the kernels see it.
    fn with<T: Number, P: Number, R>(
        &self,
        run: impl FnOnce(&LoraLinear<T, P>) -> Result<R>,
    ) -> Result<R> {
        let (out_features, in_features) = self.base.weight().dims2()?;
        let (weight, weight_layout) = self.base.weight().storage_and_layout();
        let bias = self.base.bias().map(Tensor::storage_and_layout);
        let (a, a_layout) = self.a.storage_and_layout();
        let (b, b_layout) = self.b.storage_and_layout();
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

/// The type in which the kernels take adapters of this base: the base's own, if all are of it, else
/// f32, which the kernels bring to the base's type themselves.
fn adapter_dtype(base: &FrozenLinear, tensors: &[&Tensor]) -> DType {
    let dtype = base.weight().dtype();
    match tensors.iter().all(|tensor| tensor.dtype() == dtype) {
        true => dtype,
        false => DType::F32,
    }
}

fn kernels(device: &CudaDevice) -> Result<(Arc<Kernels>, Arc<CudaStream>)> {
    let stream = device.cuda_stream();
    let kernels = Kernels::shared(stream.context()).map_err(candle)?;
    Ok((kernels, stream))
}

fn candle(error: lora_kernels::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// The storage of a tensor that must be on a CUDA device.
fn cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("the layer and its input are on different devices"),
    }
}

/// The elements of a tensor without gaps.
fn packed<'a, T: Number>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("the kernels expect a contiguous tensor, got {layout:?}")
    };
    Ok(cuda(storage)?.as_cuda_slice::<T>()?.slice(start..end))
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
        let probability = f64::from(threshold) / 2f64.powi(32);
        Dropout::new(place, probability, seed, site, step).map_err(candle)
    }
}
