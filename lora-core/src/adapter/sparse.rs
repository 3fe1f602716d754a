//! Sums of deltas of which only some elements count: TIES, DARE and pruning by magnitude.
//!
//! They act on the deltas themselves, `scaling · B A`, once each. (On the factors, as PEFT does by
//! default, the product of two pruned sums is another matrix.)

use candle_core::{DType, Device, Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::dropout::Mask;

/// How the sign of an element is elected among several deltas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Election {
    /// By the sign of the sum.
    #[default]
    Total,
    /// By the majority of the signs.
    Frequency,
}

/// Keeps the `density` largest elements by magnitude; of equal ones the first.
pub(super) fn pruned(delta: &Tensor, density: f64) -> Result<Tensor> {
    let mut values = delta.flatten_all()?.to_vec1::<f64>()?;
    let kept = (density * values.len() as f64) as usize;
    if kept < values.len() {
        let mut sizes: Vec<f64> = values.iter().map(|value| value.abs()).collect();
        let (larger, limit, _) = sizes.select_nth_unstable_by(kept, |a, b| b.total_cmp(a));
        let limit = *limit;
        let mut equals = kept - larger.iter().filter(|size| **size > limit).count();
        for value in &mut values {
            let size = value.abs();
            if size == limit && equals > 0 {
                equals -= 1;
            } else if size <= limit {
                *value = 0.0;
            }
        }
    }
    Tensor::from_vec(values, delta.shape(), &Device::Cpu)
}

/// Keeps each element with probability `density`, and divides by it.
///
/// The numbers come from the seed, the layer's path and the adapter's place in the list.
pub(super) fn dropped(
    delta: &Tensor,
    density: f64,
    (seed, site, adapter): (u64, u32, u64),
) -> Result<Tensor> {
    match Mask::new(1.0 - density, seed, site, adapter) {
        Some(mask) => delta.mul(&mask.tensor(delta.shape(), DType::F64, &Device::Cpu)?),
        None => Ok(delta.clone()),
    }
}

/// The mean of those weighted elements that agree with the elected sign (TIES, Yadav et al. 2023).
///
/// A delta with a negative weight votes with its sign turned; its weight is counted when the mean
/// is taken, not in the election.
pub(super) fn elected(deltas: &[(Tensor, f64)], election: Election) -> Result<Tensor> {
    let shape = deltas[0].0.shape().clone();
    let columns = deltas
        .iter()
        .map(|(delta, weight)| Ok((delta.flatten_all()?.to_vec1::<f64>()?, *weight)))
        .collect::<Result<Vec<_>>>()?;
    // A weight of zero is as good as no adapter: it has no vote.
    let columns: Vec<_> = columns
        .into_iter()
        .filter(|(_, weight)| *weight != 0.0)
        .collect();
    let element = |i: usize| {
        let votes = columns
            .iter()
            .map(|(delta, weight)| delta[i] * weight.signum());
        let count: f64 = match election {
            Election::Total => votes.sum(),
            Election::Frequency => votes
                .map(|vote| if vote == 0.0 { 0.0 } else { vote.signum() })
                .sum(),
        };
        let sign = if count >= 0.0 { 1.0 } else { -1.0 };
        let agreeing = columns
            .iter()
            .map(|(delta, weight)| delta[i] * weight)
            .filter(|value| value * sign > 0.0);
        let (sum, voters) = agreeing.fold((0.0, 0), |(sum, n), value| (sum + value, n + 1));
        sum / f64::from(voters.max(1))
    };
    let values: Vec<f64> = (0..shape.elem_count()).map(element).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}
