//! What acts on a layer in a forward pass, and by which path.

use candle_core::{Result, Tensor, bail};

use super::LinearLoRA;
use crate::{
    LoraAdapter,
    op::{ComputePath, LoraLinear},
    selection::{Choice, Pick},
};

/// What acts on a layer in a forward pass.
pub(super) enum Acting<'a> {
    /// The frozen base alone.
    Base,
    /// One adapter on all rows, without a bias, and what it is multiplied by beside its scaling.
    One(&'a LoraAdapter, f64),
    /// Several adapters, one with a bias, or one for each row.
    Parts,
    /// A weight or a bias trained in the place of the base's.
    Trained,
}

impl LinearLoRA {
    /// What the calling thread's forward pass selects for this layer.
    pub(super) fn choice(&self) -> Result<Choice> {
        match self.enabled {
            true => self.switch.choice(),
            false => Ok(Choice::none()),
        }
    }

    pub(super) fn acting(&self, choice: &Choice) -> Acting<'_> {
        let picks: &[Pick] = match choice {
            Choice::Sum(picks) => picks,
            Choice::Rows(rows) => match rows.single() {
                Some(pick) => std::slice::from_ref(pick),
                None => return Acting::Parts,
            },
        };
        if picks.iter().any(|pick| self.trained(pick.id).is_some()) {
            return Acting::Trained;
        }
        let mut loras = picks.iter().filter_map(|pick| {
            let lora = self.lora(pick.id).filter(|lora| !lora.is_idle())?;
            Some((lora, pick.weight))
        });
        match (loras.next(), loras.next()) {
            (None, _) => Acting::Base,
            (Some((lora, weight)), None) if lora.lora_bias().is_none() => Acting::One(lora, weight),
            _ => Acting::Parts,
        }
    }

    /// How the layer would compute its output for `xs`, and why not faster. Forward passes of one
    /// adapter on a CUDA device tell it too, by `tracing` at its debug level.
    ///
    /// # Errors
    /// If `xs` is no input of this layer, or what is selected can't act.
    pub fn compute_path(&self, xs: &Tensor) -> Result<ComputePath> {
        self.check_input(xs)?;
        let choice = self.choice()?;
        self.check_rows(xs, &choice)?;
        let fused = |pick: &Pick| self.lora(pick.id).is_none_or(LoraAdapter::is_fused);
        match self.acting(&choice) {
            Acting::Base => Ok(ComputePath::Base),
            Acting::One(lora, _) if !lora.is_fused() => {
                Ok(ComputePath::Composed("use_fused is off"))
            }
            Acting::One(lora, _) => {
                let adapter = (lora.lora_a().as_tensor(), lora.lora_b().as_tensor());
                LoraLinear::path(&self.base, xs, adapter, lora.next_mask())
            }
            // A batch by rows is one operation in any case.
            Acting::Parts if matches!(choice, Choice::Sum(_)) && !choice.picks().all(fused) => {
                Ok(ComputePath::Composed("use_fused is off"))
            }
            Acting::Parts if xs.device().is_cpu() => Ok(ComputePath::Fused),
            Acting::Parts => Ok(ComputePath::Composed(
                "there are kernels for one adapter without a bias on all rows",
            )),
            Acting::Trained => Ok(ComputePath::Composed("a weight of the layer is trained")),
        }
    }

    /// Whether `xs` has the width and the type of the weight.
    pub(crate) fn check_input(&self, xs: &Tensor) -> Result<()> {
        let inputs = self.weight().dim(1)?;
        if xs.dims().last() != Some(&inputs) || xs.dtype() != self.weight().dtype() {
            bail!(
                "{}: the input is {:?} of {}; it must be [.., {inputs}] of {}",
                self.path,
                xs.dims(),
                xs.dtype().as_str(),
                self.weight().dtype().as_str(),
            );
        }
        Ok(())
    }

    /// Whether a batch by rows can be `xs`.
    pub(super) fn check_rows(&self, xs: &Tensor, choice: &Choice) -> Result<()> {
        if let Choice::Rows(rows) = choice
            && (xs.rank() < 2 || !xs.dims()[0].is_multiple_of(rows.count))
        {
            bail!(
                "{}: the input is {:?}, and adapters are selected for {} rows; its first \
                 dimension must be a multiple of that",
                self.path,
                xs.dims(),
                rows.count,
            );
        }
        Ok(())
    }
}
