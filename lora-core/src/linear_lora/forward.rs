//! The forward pass of a layer with adapters, for whatever is selected.

use std::{ops::Range, sync::Arc};

use candle_core::{Module, Result, Tensor};

use super::{LinearLoRA, acting::Acting};
use crate::{
    LoraAdapter,
    op::{FrozenLinear, LoraLinear, compute_dtype, over_rows, parts},
    selection::{Choice, Pick, Rows},
};

impl LinearLoRA {
    /// The base's layer.
    pub(crate) fn forward_base(&self, xs: &Tensor) -> Result<Tensor> {
        over_rows(xs, self.weight().dim(0)?, |xs| self.base.apply(xs))
    }

    /// The sum of adapters, for `xs [tokens, in]` and contiguous.
    fn sum(&self, xs: &Tensor, picks: &[Pick]) -> Result<Tensor> {
        let loras: Vec<Weighted> = self.of(picks).collect();
        let trained = picks.iter().find_map(|pick| self.trained(pick.id));
        let Some(trained) = trained else {
            return adapted(&self.base, xs, &loras);
        };
        match trained.forward(xs)? {
            Some(ys) => composed(ys, xs, &loras),
            None => {
                let base = FrozenLinear::new(self.weight().clone(), None);
                trained.add_bias(adapted(&base, xs, &loras)?)
            }
        }
    }

    /// One adapter or none for each row, for `xs [tokens, in]` and contiguous.
    fn mixed(&self, xs: &Tensor, rows: &Rows) -> Result<Tensor> {
        let tokens = xs.dim(0)? / rows.count; // of a row
        let scaled = |ranges: &[Range<usize>]| -> Vec<Range<usize>> {
            let scaled = |rows: &Range<usize>| rows.start * tokens..rows.end * tokens;
            ranges.iter().map(scaled).collect()
        };
        let mut parts = Vec::new();
        let mut replaced = Vec::new();
        for (pick, ranges) in &rows.parts {
            if self.trained(pick.id).is_some() {
                replaced.extend(scaled(ranges).into_iter().map(|range| (range, pick)));
            } else if let Some(lora) = self.lora(pick.id).filter(|lora| !lora.is_idle()) {
                parts.push(lora.part(pick.weight, Some(Arc::from(scaled(ranges)))));
            }
        }
        let ys = parts::apply(&self.base, xs, &parts)?;
        if replaced.is_empty() || tokens == 0 {
            return Ok(ys);
        }
        replaced.sort_by_key(|(range, _)| range.start);
        let (mut pieces, mut end) = (Vec::new(), 0);
        for (range, pick) in replaced {
            pieces.push(ys.narrow(0, end, range.start - end)?);
            let xs = xs.narrow(0, range.start, range.len())?;
            pieces.push(self.sum(&xs, std::slice::from_ref(pick))?);
            end = range.end;
        }
        pieces.push(ys.narrow(0, end, ys.dim(0)? - end)?);
        pieces.retain(|piece| piece.dims()[0] > 0);
        Tensor::cat(&pieces, 0)
    }
}

impl Module for LinearLoRA {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.check_input(xs)?;
        let outputs = self.weight().dim(0)?;
        let choice = self.choice()?;
        self.check_rows(xs, &choice)?;
        match self.acting(&choice) {
            Acting::Base => return self.forward_base(xs),
            Acting::One(lora, weight) if lora.is_fused() => {
                return alone(&self.base, xs, (lora, weight));
            }
            _ => {}
        }
        match choice {
            Choice::Sum(picks) => over_rows(xs, outputs, |xs| self.sum(xs, &picks)),
            Choice::Rows(rows) => over_rows(xs, outputs, |xs| match rows.single() {
                Some(pick) => self.sum(xs, std::slice::from_ref(pick)),
                None => self.mixed(xs, &rows),
            }),
        }
    }
}

/// An adapter, and what it is multiplied by beside its scaling.
type Weighted<'a> = (&'a LoraAdapter, f64);

/// A frozen layer and adapters on all rows.
fn adapted(base: &FrozenLinear, xs: &Tensor, loras: &[Weighted]) -> Result<Tensor> {
    match loras {
        [] => base.apply(xs),
        loras if loras.iter().any(|(lora, _)| !lora.is_fused()) => {
            composed(base.apply(xs)?, xs, loras)
        }
        [lora] if lora.0.lora_bias().is_none() => alone(base, xs, *lora),
        loras => {
            let parts: Vec<_> = loras
                .iter()
                .map(|(lora, weight)| lora.part(*weight, None))
                .collect();
            parts::apply(base, xs, &parts)
        }
    }
}

/// A frozen layer and one adapter without a bias on all rows of `xs [.., in]`.
fn alone(base: &FrozenLinear, xs: &Tensor, (lora, weight): Weighted) -> Result<Tensor> {
    let adapter = (lora.lora_a().as_tensor(), lora.lora_b().as_tensor());
    LoraLinear::apply(base, xs, adapter, lora.scaling() * weight, lora.mask())
}

/// `ys` and what adapters add to it, composed of candle's operations and rounded once.
fn composed(ys: Tensor, xs: &Tensor, loras: &[Weighted]) -> Result<Tensor> {
    if loras.is_empty() {
        return Ok(ys);
    }
    let mut sum = ys.to_dtype(compute_dtype(xs.dtype()))?;
    for (lora, weight) in loras {
        sum = (sum + lora.composed(xs, *weight)?)?;
    }
    sum.to_dtype(xs.dtype())
}
