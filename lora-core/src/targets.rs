//! The trait that says where a model can be adapted.

mod containers;
mod leaves;
mod refused;

use std::path::Path;

use candle_core::{Var, backprop::GradStore};

use crate::{
    LinearLoRA, LoraPlan, LoraReport, LoraSite, ModulePath, PeftConfig, Result, adapter_folder,
    apply, gradients,
    nn::{Embedding, LayerNorm, Linear, RmsNorm, with_tracing},
    plan,
    survey::Survey,
    tree::TargetTree,
    visit::Visitor,
};

/// A model, or a part of one, whose linear layers can be adapted.
///
/// Derive it. The derive writes the constant [`TARGETS`](Self::TARGETS) and the traversal
/// [`patch_linear`](Self::patch_linear); everything else is written once, here, over these two.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say what in it can be adapted",
    label = "nothing is known about LoRA here",
    note = "derive `LoraTargets` where the type is declared, or mark the field `#[lora(skip)]` if nothing in it is to be adapted",
    note = "layers of `candle_nn` have drop-ins of the same name in `lora_core::nn`"
)]
pub trait LoraTargets {
    /// The linear layers that a value of this type can have.
    const TARGETS: TargetTree;

    /// Calls `visitor` at every linear layer and every parameter, with its path.
    ///
    /// # Errors
    /// The first error of the visitor ends the traversal.
    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()>;

    /// Calls `visit` for every linear layer.
    ///
    /// # Errors
    /// The first error of `visit` ends the traversal.
    fn for_each_linear(
        &mut self,
        visit: &mut dyn FnMut(&ModulePath, &mut Linear) -> Result<()>,
    ) -> Result<()> {
        self.patch_linear(&mut ModulePath::root(), &mut EachLinear(visit))
    }

    /// Calls `visit` for every adapter.
    ///
    /// # Errors
    /// The first error of `visit` ends the traversal.
    fn for_each_adapter(
        &mut self,
        visit: &mut dyn FnMut(&mut LinearLoRA) -> Result<()>,
    ) -> Result<()> {
        self.for_each_linear(&mut |_, linear| linear.lora_mut().map_or(Ok(()), &mut *visit))
    }

    /// What [`apply_lora`](Self::apply_lora) would do, without doing it: nothing is allocated for
    /// an adapter.
    ///
    /// # Errors
    /// Those of `apply_lora`, before there is anything to undo.
    fn lora_plan(&mut self, config: &PeftConfig) -> Result<LoraPlan>
    where
        Self: Sized,
    {
        plan::plan(self, config)
    }

    /// Freezes the whole model and attaches an adapter, in training mode, to every linear layer
    /// that `config` names: NeMo AutoModel's `apply_lora_to_linear_modules`.
    ///
    /// # Errors
    /// If the configuration has an impossible value; if a pattern names no layer, or nothing is
    /// left to adapt; if a layer is adapted already or can't be; if a layer was loaded from
    /// another path than it has. The model is then unchanged.
    fn apply_lora(&mut self, config: &PeftConfig) -> Result<LoraReport>
    where
        Self: Sized,
    {
        apply::apply(self, config)
    }

    /// The adapters of the model.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn lora_report(&mut self) -> Result<LoraReport> {
        let base_parameters = Survey::of(self)?.parameters;
        let mut sites = Vec::new();
        self.for_each_adapter(&mut |lora| {
            sites.push(LoraSite::of(lora));
            Ok(())
        })?;
        Ok(LoraReport {
            sites,
            base_parameters,
        })
    }

    /// The tensors to train: `A` and `B` of every adapter, in the model's order.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn lora_vars(&mut self) -> Result<Vec<Var>> {
        Ok(self
            .named_lora_vars()?
            .into_iter()
            .map(|(_, var)| var)
            .collect())
    }

    /// The tensors to train with their names, `<path>.lora_A.weight` and `<path>.lora_B.weight`.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn named_lora_vars(&mut self) -> Result<Vec<(String, Var)>> {
        let mut vars = Vec::new();
        self.for_each_adapter(&mut |lora| {
            vars.push((
                format!("{}.lora_A.weight", lora.path()),
                lora.lora_a().clone(),
            ));
            vars.push((
                format!("{}.lora_B.weight", lora.path()),
                lora.lora_b().clone(),
            ));
            Ok(())
        })?;
        Ok(vars)
    }

    /// Turns dropout on.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn train(&mut self) -> Result<()> {
        self.for_each_adapter(&mut |lora| {
            lora.set_training(true);
            Ok(())
        })
    }

    /// Turns dropout off.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn eval(&mut self) -> Result<()> {
        self.for_each_adapter(&mut |lora| {
            lora.set_training(false);
            Ok(())
        })
    }

    /// Makes `step` the number of every adapter's next dropout mask, to repeat or resume a run.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn set_dropout_step(&mut self, step: u64) -> Result<()> {
        self.for_each_adapter(&mut |lora| {
            lora.set_dropout_step(step);
            Ok(())
        })
    }

    /// Lets the adapters take part in the forward pass.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn enable_adapters(&mut self) -> Result<()> {
        self.for_each_adapter(&mut |lora| {
            lora.set_enabled(true);
            Ok(())
        })
    }

    /// Makes the forward pass that of the base model.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn disable_adapters(&mut self) -> Result<()> {
        self.for_each_adapter(&mut |lora| {
            lora.set_enabled(false);
            Ok(())
        })
    }

    /// Adds every adapter to a copy of its layer's weight; [`unmerge`](Self::unmerge) goes back.
    ///
    /// # Errors
    /// Those of the product, with the path of the layer; the layers before it stay merged.
    fn merge(&mut self) -> Result<()> {
        self.for_each_linear(&mut |_, linear| linear.merge())
    }

    /// Goes back to the weights before [`merge`](Self::merge), bit for bit.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn unmerge(&mut self) -> Result<()> {
        self.for_each_linear(&mut |_, linear| {
            linear.unmerge();
            Ok(())
        })
    }

    /// Takes all adapters off: every layer computes what it did before it was adapted.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn remove_adapters(&mut self) -> Result<()> {
        self.for_each_linear(&mut |_, linear| {
            linear.remove_adapter();
            Ok(())
        })
    }

    /// Checks that a backward pass gave every adapter a gradient.
    ///
    /// # Errors
    /// An [`Error::NoGradient`](crate::Error::NoGradient) that names the tensors without one and
    /// the likely cause.
    fn check_gradients(&mut self, grads: &GradStore) -> Result<()> {
        gradients::check(&self.named_lora_vars()?, grads)
    }

    /// Writes `adapter_model.safetensors` and `adapter_config.json` to the folder `dir`, as Hugging
    /// Face PEFT does. The same adapters give the same bytes.
    ///
    /// # Errors
    /// If the model has no adapter, or a file can't be written; no file is then half-written.
    fn save_adapter(&mut self, dir: impl AsRef<Path>) -> Result<()>
    where
        Self: Sized,
    {
        adapter_folder::save(self, dir.as_ref())
    }

    /// Reads such a folder: attaches its adapters to a model without, or replaces the numbers of a
    /// model that has the same. They are then in evaluation mode.
    ///
    /// # Errors
    /// An [`Error::Checkpoint`](crate::Error::Checkpoint) that names every missing, extra and
    /// mis-shaped key, or an [`Error::File`](crate::Error::File); the model is then unchanged.
    fn load_adapter(&mut self, dir: impl AsRef<Path>) -> Result<LoraReport>
    where
        Self: Sized,
    {
        adapter_folder::load(self, dir.as_ref())
    }
}

/// A function as a visitor of linear layers.
struct EachLinear<'a>(&'a mut dyn FnMut(&ModulePath, &mut Linear) -> Result<()>);

impl Visitor for EachLinear<'_> {
    fn linear(&mut self, path: &ModulePath, linear: &mut Linear) -> Result<()> {
        (self.0)(path, linear)
    }
}

/// Target names that the compiler checks against a model.
///
/// Expands to an array of the names, for [`PeftConfig::new`](crate::PeftConfig::new). A pattern
/// that no linear layer of the type can match does not compile; the error names the nearest paths.
///
/// ```
/// use lora_core::{LoraTargets, nn::Linear, targets};
///
/// #[derive(LoraTargets)]
/// struct Attention { q_proj: Linear, v_proj: Linear }
/// #[derive(LoraTargets)]
/// struct Model { layers: Vec<Attention> }
///
/// let names = targets!(Model: ["*.q_proj", "layers.1.v_proj"]);
/// assert_eq!(names, ["*.q_proj", "layers.1.v_proj"]);
/// ```
///
/// ```compile_fail,E0080
/// # use lora_core::{LoraTargets, nn::Linear, targets};
/// # #[derive(LoraTargets)]
/// # struct Attention { q_proj: Linear, v_proj: Linear }
/// let names = targets!(Attention: ["q_porj"]);
/// // error: no linear layer of `Attention` matches `q_porj`; nearest: `q_proj`, `v_proj`
/// ```
#[macro_export]
macro_rules! targets {
    ($($input:tt)*) => {
        $crate::__private::targets!($crate; $($input)*)
    };
}

impl LoraTargets for Linear {
    const TARGETS: TargetTree = TargetTree::Linear;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        visitor.linear(path, self)
    }
}

/// Layers whose parameters are frozen with the model and never adapted.
macro_rules! layers_without_targets {
    ($($layer:ty),* $(,)?) => {$(
        impl LoraTargets for $layer {
            const TARGETS: TargetTree = TargetTree::Empty;

            fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
                for (name, tensor) in self.params_mut() {
                    visitor.parameter(path, name, tensor)?;
                }
                Ok(())
            }
        }
    )*};
}

layers_without_targets!(Embedding, LayerNorm, RmsNorm, with_tracing::RmsNorm);
