//! The gated activation of Llama's feed-forward block.

use candle_core::{
    CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, WithDType,
    backend::BackendStorage, bail,
};

use super::cpu::{
    Element, Reader, Real, dispatch_float, map_row_pairs, map_rows, slice, vectorize,
};

/// `silu(gate) · up`, with `silu(x) = x σ(x)` and `σ(x) = 1 / (1 + exp(-x))`
/// ([Shazeer, 2020](https://arxiv.org/abs/2002.05202)).
///
/// candle's `swiglu` takes both halves in one tensor; Llama's projections give two. The backward is
/// `dup = dy silu(gate)` and `dgate = dy up σ (1 + gate (1 - σ))`, in one pass over the inputs.
/// Half types are computed in f32. On the CPU it is one fused op; on other devices it runs as
/// candle's differentiable ops.
///
/// ```
/// use candle_core::{Device, Var};
/// use lora_core::nn::swiglu;
///
/// let gate = Var::new(&[0f32, 2.], &Device::Cpu)?;
/// let up = Var::new(&[5f32, 3.], &Device::Cpu)?;
/// let ys = swiglu(&gate, &up)?;
/// assert!((ys.sum_all()?.to_scalar::<f32>()? - 6.0 / (1.0 + (-2f32).exp())).abs() < 1e-5);
/// assert_eq!(ys.backward()?.get(&gate).unwrap().to_vec1::<f32>()?[0], 2.5);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When `gate` and `up` differ in shape or dtype.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        bail!(
            "{NAME}: gate {:?} {:?} and up {:?} {:?} differ",
            gate.dtype(),
            gate.shape(),
            up.dtype(),
            up.shape()
        )
    }
    if gate.device().is_cpu() {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, Swiglu);
    }
    match gate.dtype() {
        dtype @ (DType::BF16 | DType::F16) => {
            (gate.to_dtype(DType::F32)?.silu()? * up.to_dtype(DType::F32)?)?.to_dtype(dtype)
        }
        _ => gate.silu()? * up,
    }
}

const NAME: &str = "swiglu";

struct Swiglu;

impl Swiglu {
    fn forward<T: Element>(gate: &[T], up: &[T]) -> Vec<T> {
        let mut ys = vec![T::from_f64(0.0); gate.len()];
        map_rows(&mut ys, 1, |start, ys| {
            let (gate, up) = (&gate[start..][..ys.len()], &up[start..][..ys.len()]);
            vectorize(
                #[inline(always)]
                || {
                    for ((y, gate), up) in ys.iter_mut().zip(gate).zip(up) {
                        let gate = gate.widen();
                        *y = T::narrow(gate * gate.sigmoid() * up.widen());
                    }
                },
            )
        });
        ys
    }

    fn backward<T: Element>(gate: &Tensor, up: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
        let grad = grad.contiguous()?;
        let readers = [gate, up, &grad].map(Reader::new);
        let (gate_all, up_all, g_all) = (
            readers[0].slice::<T>()?,
            readers[1].slice::<T>()?,
            readers[2].slice::<T>()?,
        );
        let one = T::Acc::ONE;
        let mut d_gate = vec![T::from_f64(0.0); gate_all.len()];
        let mut d_up = vec![T::from_f64(0.0); gate_all.len()];
        map_row_pairs(&mut d_gate, &mut d_up, 1, |start, d_gate, d_up| {
            let range = start..start + d_gate.len();
            let inputs = gate_all[range.clone()].iter().zip(&up_all[range.clone()]);
            let inputs = inputs.zip(&g_all[range]);
            vectorize(
                #[inline(always)]
                || {
                    for ((d_gate, d_up), ((gate, up), grad)) in
                        d_gate.iter_mut().zip(d_up).zip(inputs)
                    {
                        let (gate, up, grad) = (gate.widen(), up.widen(), grad.widen());
                        let sigmoid = gate.sigmoid();
                        *d_gate = T::narrow(grad * up * sigmoid * (one + gate * (one - sigmoid)));
                        *d_up = T::narrow(grad * gate * sigmoid);
                    }
                },
            )
        });
        Ok([
            Tensor::from_vec(d_gate, gate.shape(), &Device::Cpu)?,
            Tensor::from_vec(d_up, up.shape(), &Device::Cpu)?,
        ])
    }
}

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        dispatch_float!(NAME, gate.dtype(), T => {
            let ys = Self::forward::<T>(slice(gate, gate_layout)?, slice(up, up_layout)?);
            Ok((T::to_cpu_storage_owned(ys), gate_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _ys: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [d_gate, d_up] =
            dispatch_float!(NAME, gate.dtype(), T => Self::backward::<T>(gate, up, grad)?);
        Ok((
            gate.track_op().then_some(d_gate),
            up.track_op().then_some(d_up),
        ))
    }
}
