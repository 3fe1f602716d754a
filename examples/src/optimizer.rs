//! AdamW with a state that can be saved ([Loshchilov & Hutter, 2019](https://arxiv.org/abs/1711.05101)).
//!
//! ```text
//! g ← g · min(1, clip / ‖all g‖)
//! m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) g²
//! θ ← θ - lr · (m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε) + weight_decay · θ)
//! ```
//!
//! candle's own AdamW keeps its moments private and in the parameters' dtype, and clips nothing.

use std::collections::BTreeMap;

use candle_core::DType;
use candle_core::Tensor;
use candle_core::Var;
use candle_core::backprop::GradStore;

use crate::Error;
use crate::Result;

/// Constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients, β₁.
    pub beta1: f64,
    /// Decay of the mean of squared gradients, β₂.
    pub beta2: f64,
    /// Added to the root, ε.
    pub eps: f64,
    /// Decay of the parameters, apart from the gradient.
    pub weight_decay: f64,
    /// Largest global norm of the gradient.
    pub clip: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.,
            clip: 1.,
        }
    }
}

/// AdamW over named parameters, with moments in f32.
pub struct AdamW {
    config: AdamWConfig,
    parameters: Vec<Parameter>,
    steps: u64,
}

struct Parameter {
    name: String,
    var: Var,
    /// Mean of gradients.
    m: Tensor,
    /// Mean of squared gradients.
    v: Tensor,
}

impl AdamW {
    /// An optimizer with moments of zero.
    pub fn new(vars: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        let parameters = vars.into_iter().map(|(name, var)| {
            let zeros = || Tensor::zeros(var.shape(), DType::F32, var.device());
            Ok(Parameter {
                m: zeros()?,
                v: zeros()?,
                name,
                var,
            })
        });
        Ok(Self {
            config,
            parameters: parameters.collect::<Result<_>>()?,
            steps: 0,
        })
    }

    /// Takes one step and returns the norm of the gradient before clipping.
    ///
    /// A parameter without a gradient stays as it is. So do all of them when the norm is not a
    /// finite number: one bad batch must not spoil the moments.
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> Result<f64> {
        let grads: Vec<Option<Tensor>> = self
            .parameters
            .iter()
            .map(|p| {
                grads
                    .get(&p.var)
                    .map(|g| g.to_dtype(DType::F32))
                    .transpose()
            })
            .collect::<candle_core::Result<_>>()?;
        let norm = global_norm(grads.iter().flatten())?;
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.steps += 1;
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            clip,
        } = self.config;
        let factor = (clip / (norm + 1e-6)).min(1.);
        let correct1 = 1. - beta1.powf(self.steps as f64);
        let correct2 = 1. - beta2.powf(self.steps as f64);
        for (p, grad) in self.parameters.iter_mut().zip(grads) {
            let Some(grad) = grad else { continue };
            let grad = (grad * factor)?;
            p.m = ((&p.m * beta1)? + (&grad * (1. - beta1))?)?;
            p.v = ((&p.v * beta2)? + (grad.sqr()? * (1. - beta2))?)?;
            let step = ((&p.m / correct1)? / ((&p.v / correct2)?.sqrt()? + eps)?)?;
            let theta = p.var.as_detached_tensor().to_dtype(DType::F32)?;
            let decayed = (theta * (1. - lr * weight_decay))?;
            p.var
                .set(&(decayed - (step * lr)?)?.to_dtype(p.var.dtype())?)?;
        }
        Ok(norm)
    }

    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Parameters and moments by name: `NAME`, `NAME.exp_avg`, `NAME.exp_avg_sq`.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let named = self.parameters.iter().flat_map(|p| {
            [
                (p.name.clone(), p.var.as_detached_tensor()),
                (format!("{}.exp_avg", p.name), p.m.clone()),
                (format!("{}.exp_avg_sq", p.name), p.v.clone()),
            ]
        });
        named.collect()
    }

    /// Takes over what [`state`](Self::state) gave after `steps` steps.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape; nothing is changed then.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        let find = |name: String, like: &Tensor| match state.get(&name) {
            None => Err(Error::Usage(format!("the saved state has no `{name}`"))),
            Some(tensor) if tensor.shape() != like.shape() => Err(Error::Usage(format!(
                "`{name}` has shape {:?} in the saved state, {:?} in the model",
                tensor.dims(),
                like.dims()
            ))),
            Some(tensor) => Ok(tensor.to_device(like.device())?.to_dtype(like.dtype())?),
        };
        let found = self.parameters.iter().map(|p| {
            let theta = find(p.name.clone(), &p.var)?;
            let m = find(format!("{}.exp_avg", p.name), &p.m)?;
            let v = find(format!("{}.exp_avg_sq", p.name), &p.v)?;
            Ok((theta, m, v))
        });
        let found = found.collect::<Result<Vec<_>>>()?;
        for (p, (theta, m, v)) in self.parameters.iter_mut().zip(found) {
            p.var.set(&theta)?;
            (p.m, p.v) = (m, v);
        }
        self.steps = steps;
        Ok(())
    }
}

/// Root of the sum of squares of all elements.
fn global_norm<'a>(grads: impl Iterator<Item = &'a Tensor>) -> Result<f64> {
    let squares = grads.map(|g| g.sqr()?.sum_all());
    let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
    if squares.is_empty() {
        return Ok(0.);
    }
    let sum = Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f32>()?;
    Ok(f64::from(sum).sqrt())
}

/// Learning rate of a step (from 0): a linear rise over `warmup` steps, then a linear fall that
/// would reach zero at `steps`.
pub fn linear_schedule(peak: f64, step: usize, warmup: usize, steps: usize) -> f64 {
    let warmup = warmup.min(steps.saturating_sub(1));
    if step < warmup {
        peak * (step + 1) as f64 / (warmup + 1) as f64
    } else {
        peak * steps.saturating_sub(step) as f64 / (steps - warmup).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn optimizer(config: AdamWConfig) -> (Var, AdamW) {
        let var = Var::new(&[0.5f32, -2., 3.], &Device::Cpu).unwrap();
        let optimizer = AdamW::new(vec![("w".into(), var.clone())], config).unwrap();
        (var, optimizer)
    }

    /// Gradient `[1, 2, 2] * scale`, of norm `3 * scale`.
    fn grads(var: &Var, scale: f64) -> GradStore {
        let weights = Tensor::new(&[1f32, 2., 2.], &Device::Cpu).unwrap();
        let loss = (var.as_tensor() * weights).unwrap().sum_all().unwrap();
        (loss * scale).unwrap().backward().unwrap()
    }

    #[test]
    fn two_steps_equal_the_formula() {
        let config = AdamWConfig {
            weight_decay: 0.1,
            ..AdamWConfig::default()
        };
        let (var, mut optimizer) = optimizer(config);
        let (lr, mut theta, mut m, mut v) = (0.01, [0.5f64, -2., 3.], [0f64; 3], [0f64; 3]);
        for t in 1..=2 {
            let scale = t as f64 / 4.; // norms 0.75 and 1.5: unclipped, then clipped
            let norm = optimizer.step(&grads(&var, scale), lr).unwrap();
            assert!((norm - 3. * scale).abs() < 1e-6);
            for i in 0..3 {
                let g = [1., 2., 2.][i] * scale * (1. / (norm + 1e-6)).min(1.);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let hat = (m[i] / (1. - 0.9f64.powi(t)))
                    / ((v[i] / (1. - 0.999f64.powi(t))).sqrt() + 1e-8);
                theta[i] -= lr * (hat + 0.1 * theta[i]);
            }
        }
        for (found, expected) in var.to_vec1::<f32>().unwrap().iter().zip(theta) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-6,
                "{found} {expected}"
            );
        }
    }

    #[test]
    fn restored_optimizer_goes_on_bit_for_bit() {
        let (var, mut whole) = optimizer(AdamWConfig::default());
        whole.step(&grads(&var, 0.2), 0.1).unwrap();
        let state: BTreeMap<_, _> = whole
            .state()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.copy().unwrap()))
            .collect();
        whole.step(&grads(&var, 0.3), 0.1).unwrap();

        let (other, mut resumed) = optimizer(AdamWConfig::default());
        resumed.restore(&state, 1).unwrap();
        resumed.step(&grads(&other, 0.3), 0.1).unwrap();
        assert_eq!(
            var.to_vec1::<f32>().unwrap(),
            other.to_vec1::<f32>().unwrap()
        );

        let mut short = state.clone();
        short.remove("w.exp_avg_sq");
        let error = resumed.restore(&short, 1).unwrap_err().to_string();
        assert!(error.contains("no `w.exp_avg_sq`"), "{error}");
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let (var, mut optimizer) = optimizer(AdamWConfig::default());
        assert!(
            optimizer
                .step(&grads(&var, f64::INFINITY), 0.1)
                .unwrap()
                .is_infinite()
        );
        assert_eq!(var.to_vec1::<f32>().unwrap(), [0.5, -2., 3.]);
        assert_eq!(optimizer.steps(), 0);
    }

    #[test]
    fn schedule_rises_to_the_peak_and_falls_to_zero() {
        let rates: Vec<f64> = (0..10)
            .map(|step| linear_schedule(1., step, 4, 10))
            .collect();
        assert!(rates[..5].is_sorted() && rates[4] == 1.);
        assert!(rates[4..].is_sorted_by(|a, b| a > b) && rates[9] > 0.);
        assert_eq!(linear_schedule(1., 0, 5, 1), 1.);
    }
}
