//! The loss of a language model.
//!
//! For C rows of logits z with labels c:
//!
//! ```text
//! loss = mean_rows(log Σ exp(z) - z[c])      dz = dloss (softmax(z) - onehot(c)) / C
//! ```

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, WithDType,
    backend::BackendStorage, bail,
};
use rayon::prelude::*;

use super::cpu::{
    Element, Reader, Real, dispatch_float, fold, map_rows, parallel_worthwhile, slice, vectorize,
};

/// The label of a token that does not count, as in PyTorch and Hugging Face.
pub const IGNORE_INDEX: i64 = -100;

/// The causal language-model loss over packed sequences: the mean cross-entropy of predicting each
/// counted label from the token before it, with logits computed only for those tokens.
///
/// - `hidden` `[T, d]`: the final hidden states of several sequences, packed one after the other
///   without padding; `seq_lens` are their lengths and sum to T.
/// - `head`: maps hidden states `[C, d]` to logits `[C, V]`, such as `|xs| lm_head.forward(xs)`.
/// - `labels`: one per token, **not shifted**: usually the tokens themselves, with `ignore_index`
///   where nothing is to be learned (the prompt). The shift happens here, inside each sequence: the
///   label at position t is predicted from position t - 1, so the first label of a sequence never
///   counts. This is Hugging Face's convention.
///
/// The result is a scalar in f32 (f64 for f64), the mean over the counted labels.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::nn::{IGNORE_INDEX, causal_lm_loss};
///
/// let dev = Device::Cpu;
/// let hidden = Tensor::zeros((5, 2), candle_core::DType::F32, &dev)?; // two sequences: 3 + 2
/// let weight = Tensor::randn(0f32, 1., (7, 2), &dev)?; // 7 words
/// let labels = [4, IGNORE_INDEX, 6, 3, 0]; // the 6 and the 0 count
/// let head = |xs: &Tensor| {
///     assert_eq!(xs.dims(), [2, 2]);
///     xs.matmul(&weight.t()?)
/// };
/// let loss = causal_lm_loss(&hidden, head, &labels, &[3, 2], IGNORE_INDEX)?;
/// assert!((loss.to_scalar::<f32>()? - 7f32.ln()).abs() < 1e-6); // every word is as likely
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When no label counts (the mean of nothing is not a number, and such a batch teaches nothing),
/// when a label is not in `0..V`, or when `labels` or `seq_lens` do not fit `hidden`.
pub fn causal_lm_loss(
    hidden: &Tensor,
    head: impl Fn(&Tensor) -> Result<Tensor>,
    labels: &[i64],
    seq_lens: &[usize],
    ignore_index: i64,
) -> Result<Tensor> {
    let (tokens, _) = hidden.dims2()?;
    if labels.len() != tokens || seq_lens.iter().sum::<usize>() != tokens {
        bail!(
            "causal-lm-loss: hidden {:?} has {tokens} tokens, but there are {} labels and the \
             sequence lengths {seq_lens:?} sum to {}",
            hidden.shape(),
            labels.len(),
            seq_lens.iter().sum::<usize>()
        )
    }
    let mut counted = Vec::new(); // positions of labels, each predicted from the one before
    let mut start = 0;
    for len in seq_lens {
        counted.extend((start + 1..start + len).filter(|&t| labels[t] != ignore_index));
        start += len;
    }
    if counted.is_empty() {
        bail!(
            "causal-lm-loss: none of the {tokens} labels counts: all are {ignore_index} (ignored) \
             or the first of their sequence"
        )
    }
    let rows: Vec<u32> = counted.iter().map(|&t| t as u32 - 1).collect();
    let rows = Tensor::from_vec(rows, counted.len(), hidden.device())?;
    let logits = head(&hidden.index_select(&rows, 0)?)?; // [C, V]
    let (rows, vocabulary) = logits.dims2()?;
    if rows != counted.len() {
        bail!(
            "causal-lm-loss: the head made logits {:?} of {} hidden states",
            logits.shape(),
            counted.len()
        )
    }
    let mut targets = Vec::with_capacity(rows);
    for t in counted {
        match u32::try_from(labels[t]) {
            Ok(label) if (label as usize) < vocabulary => targets.push(label),
            _ => bail!(
                "causal-lm-loss: label {} at position {t} is not in 0..{vocabulary}, nor the \
                 ignored {ignore_index}",
                labels[t]
            ),
        }
    }
    mean_cross_entropy(&logits, targets)
}

/// The mean cross-entropy of `inp` `[N, C]`, raw logits, with the classes `target` `[N]` (u32), in
/// place of `candle_nn::loss::cross_entropy`.
///
/// Half types are computed in f32 and the result is in f32 (f64 for f64). On the CPU it is one fused
/// op that keeps one number a row for its backward; on other devices it runs as candle's
/// differentiable ops.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use lora_core::nn::cross_entropy;
///
/// let logits = Var::new(&[[0f32, 0.], [3f32.ln(), 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[1u32, 0], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - (2f32.ln() + (4f32 / 3.).ln()) / 2.).abs() < 1e-6);
/// let grads = loss.backward()?;
/// assert_eq!(grads.get(&logits).unwrap().to_vec2::<f32>()?[0], [0.25, -0.25]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When there are no rows, a class is not in `0..C`, or the shapes do not fit.
pub fn cross_entropy(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    let (rows, classes) = inp.dims2()?;
    if target.dims() != [rows] {
        bail!(
            "{NAME}: inp {:?} has {rows} rows, but target is {:?}",
            inp.shape(),
            target.shape()
        )
    }
    if rows == 0 {
        bail!(
            "{NAME}: inp {:?} has no rows to take the mean of",
            inp.shape()
        )
    }
    let targets = target.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    for (i, &class) in targets.iter().enumerate() {
        if class as usize >= classes {
            bail!("{NAME}: class {class} of row {i} is not in 0..{classes}")
        }
    }
    mean_cross_entropy(inp, targets)
}

/// The mean cross-entropy of at least one row and classes that have been checked.
fn mean_cross_entropy(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    if logits.device().is_cpu() {
        let op = CrossEntropy {
            targets,
            log_sums: OnceLock::new(),
        };
        return logits.contiguous()?.apply_op1(op);
    }
    let wide = match logits.dtype() {
        DType::BF16 | DType::F16 => logits.to_dtype(DType::F32)?,
        _ => logits.clone(),
    };
    let target = Tensor::from_vec(targets, logits.dim(0)?, logits.device())?;
    candle_nn::loss::cross_entropy(&wide, &target)
}

const NAME: &str = "cross-entropy";

struct CrossEntropy {
    targets: Vec<u32>,
    /// log Σ exp of each row, from the forward for the backward.
    log_sums: OnceLock<Vec<f64>>,
}

impl CrossEntropy {
    fn forward<T: Element>(&self, logits: &[T], classes: usize) -> Vec<T::Acc> {
        let zero = T::Acc::ZERO;
        let log_sum = |row: &[T]| {
            vectorize(
                #[inline(always)]
                || {
                    let max = fold(row, T::Acc::NEG_INFINITY, Real::larger, |x| x);
                    let sum = fold(row, zero, |a, b| a + b, |x| (x - max).exp());
                    (sum.ln() + max).to_f64()
                },
            )
        };
        let log_sums: Vec<f64> = if parallel_worthwhile(logits.len()) {
            logits.par_chunks_exact(classes).map(log_sum).collect()
        } else {
            logits.chunks_exact(classes).map(log_sum).collect()
        };
        let total: f64 = (self.targets.iter().zip(&log_sums).enumerate())
            .map(|(i, (&class, log_sum))| {
                log_sum - logits[i * classes + class as usize].widen().to_f64()
            })
            .sum();
        let mean = total / self.targets.len() as f64;
        // The op runs once; a second forward of the same op would find the same sums.
        self.log_sums.get_or_init(|| log_sums);
        vec![T::Acc::from_f64(mean)]
    }

    fn backward<T: Element>(&self, logits: &Tensor, grad: f64) -> Result<Tensor> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("{NAME}: backward before forward")
        };
        let reader = Reader::new(logits);
        let logits_all = reader.slice::<T>()?;
        let classes = logits.dim(1)?;
        let scale = T::Acc::from_f64(grad / self.targets.len() as f64);
        let mut dz_all = vec![T::from_f64(0.0); logits_all.len()];
        map_rows(&mut dz_all, classes, |first_row, dz_rows| {
            for (i, dz) in dz_rows.chunks_exact_mut(classes).enumerate() {
                let row = first_row + i;
                let logits = &logits_all[row * classes..][..classes];
                let log_sum = T::Acc::from_f64(log_sums[row]);
                let class = self.targets[row] as usize;
                vectorize(
                    #[inline(always)]
                    || {
                        for (dz, z) in dz.iter_mut().zip(logits) {
                            *dz = T::narrow((z.widen() - log_sum).exp() * scale);
                        }
                    },
                );
                let probability = (logits[class].widen() - log_sum).exp();
                dz[class] = T::narrow((probability - T::Acc::ONE) * scale);
            }
        });
        Tensor::from_vec(dz_all, logits.shape(), &Device::Cpu)
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, classes) = layout.shape().dims2()?;
        dispatch_float!(NAME, logits.dtype(), T => {
            let loss = self.forward::<T>(slice(logits, layout)?, classes);
            Ok((WithDType::to_cpu_storage_owned(loss), Shape::from(())))
        })
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let dz = dispatch_float!(NAME, logits.dtype(), T => self.backward::<T>(logits, grad)?);
        Ok(Some(dz))
    }
}
