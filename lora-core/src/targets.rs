//! The trait that says where a model can be adapted.

mod containers;
mod layers;
mod leaves;
mod refused;

use std::{collections::BTreeMap, path::Path};

use candle_core::{Tensor, Var, backprop::GradStore};

use crate::{
    AdapterStatus, Adapters, LinearLoRA, LoraPlan, LoraReport, ModulePath, PeftConfig, Result,
    adapter::AdapterWeights, adapter_folder, apply, gradients, nn::Linear, plan, tree::TargetTree,
    verbs, visit::Visitor,
};

/// A model, or a part of one, whose linear layers can be adapted.
///
/// Derive it. The derive writes the constant [`TARGETS`](Self::TARGETS) and the traversal
/// [`patch_linear`](Self::patch_linear); everything else is written once, here, over these two.
///
/// # Several adapters
/// A model can hold many adapters by name, each with its own layers and ranks. All its layers share
/// one switch that says which act, and so do clones of the model, which share the tensors too. The
/// verbs do all that they say, or nothing. They are for the whole model; a part that was adapted
/// apart is joined with the rest by the first verb that meets both, and what has the same name
/// there is one adapter from then on.
///
/// Clones are for running the same adapters elsewhere. Adding and deleting adapters, and putting in
/// what an adapter trains outside linear layers (`modules_to_save`), reach the value that the verb is
/// called on alone: do that before cloning.
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
    /// that `config` names: NeMo AutoModel's `apply_lora_to_linear_modules`. The adapter is called
    /// `default` and is active.
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

    /// Adds another adapter, in training mode, which is not active yet; what it begins with
    /// depends on `config`, not on its name. Freezes the model if that has not been done.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use lora_core::{LoraTargets, PeftConfig, nn::Linear};
    ///
    /// let mut layer = Linear::new(Tensor::zeros((6, 4), DType::F32, &Device::Cpu)?, None);
    /// layer.add_adapter("french", &PeftConfig::all_linear().dim(2))?;
    /// layer.add_adapter("legal", &PeftConfig::all_linear().dim(3))?;
    /// assert!(layer.lora_vars()?.is_empty());
    /// layer.set_adapters(&["legal", "french"])?; // their sum
    /// let ranks = layer.lora_report()?.sites.into_iter().map(|site| site.rank);
    /// assert_eq!(ranks.collect::<Vec<_>>(), [3, 2]);
    ///
    /// let error = layer.set_adapter("frensh").unwrap_err();
    /// assert!(error.to_string().contains("nearest: `french`"), "{error}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As of [`apply_lora`](Self::apply_lora); if the name is taken or can't be one; if the model
    /// is merged; if the adapter trains parameters outside of linear layers and another does so
    /// already. The model is then unchanged.
    fn add_adapter(&mut self, name: &str, config: &PeftConfig) -> Result<LoraReport>
    where
        Self: Sized,
    {
        apply::add(self, name, config)
    }

    /// Adds an adapter of given numbers, in evaluation mode, which is not active yet.
    ///
    /// # Errors
    /// An [`Error::NamedAdapter`](crate::Error::NamedAdapter) that names every tensor without a place in the
    /// model and every one that does not fit; else as of [`add_adapter`](Self::add_adapter). The
    /// model is then unchanged.
    fn import_adapter(&mut self, name: &str, weights: &AdapterWeights) -> Result<LoraReport>
    where
        Self: Sized,
    {
        verbs::import(self, name, weights)
    }

    /// Copies an adapter out of the model, to the CPU.
    ///
    /// # Errors
    /// If the name is unknown.
    fn export_adapter(&mut self, name: &str) -> Result<AdapterWeights> {
        verbs::export(self, name)
    }

    /// A handle on the adapters: their names, and what is selected of them.
    ///
    /// # Errors
    /// If the model has no adapter.
    fn adapters(&mut self) -> Result<Adapters> {
        verbs::adapters(self)
    }

    /// Makes one adapter the active one.
    ///
    /// # Errors
    /// As of [`set_adapters`](Self::set_adapters).
    fn set_adapter(&mut self, name: &str) -> Result<()> {
        self.set_adapters(&[name])
    }

    /// Makes these adapters the active ones: each adapted layer adds up what they have for it, in
    /// this order. [`Adapters::set`] does the same without a traversal.
    ///
    /// # Errors
    /// If a name is unknown or given twice; if two of them replace the same parameters; if the
    /// model is merged. The adapters that were active are then still so.
    fn set_adapters(&mut self, names: &[impl AsRef<str>]) -> Result<()> {
        verbs::set(self, names)
    }

    /// Drops an adapter and its tensors. If no other is active then, the one that was added first
    /// is. Without its last adapter the model is what it was, but frozen.
    ///
    /// # Errors
    /// If the name is unknown; if the model is merged; if the adapter is on rows of the selected
    /// batch.
    fn delete_adapter(&mut self, name: &str) -> Result<()> {
        verbs::delete(self, name)
    }

    /// Gives an adapter another name.
    ///
    /// # Errors
    /// If `from` is unknown, or `to` is taken or can't be a name.
    fn rename_adapter(&mut self, from: &str, to: &str) -> Result<()> {
        verbs::rename(self, from, to)
    }

    /// Copies other numbers over those of an adapter: no tensor is made or dropped, and its
    /// variables stay the same ones. Each layer takes a rank up to the one in place, alpha and
    /// all; layers that `weights` leaves out are then left alone by the adapter. It stays in its
    /// mode, and as active as it is.
    ///
    /// # Errors
    /// If the name is unknown; if the model is merged; an
    /// [`Error::NamedAdapter`](crate::Error::NamedAdapter) that names every layer which is not in place and
    /// every tensor that does not fit. The adapter is then unchanged.
    fn swap_adapter(&mut self, name: &str, weights: &AdapterWeights) -> Result<()> {
        verbs::swap(self, name, weights)
    }

    /// Every adapter of the model, in the order of addition.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn adapter_status(&mut self) -> Result<Vec<AdapterStatus>> {
        verbs::status(self)
    }

    /// The active adapters of the model, layer by layer.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn lora_report(&mut self) -> Result<LoraReport> {
        verbs::report(self)
    }

    /// The tensors to train: those of the active adapters, in the model's order.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn lora_vars(&mut self) -> Result<Vec<Var>> {
        Ok(unnamed(self.named_lora_vars()?))
    }

    /// The tensors to train with their names: `<path>.lora_A.weight`, `<path>.lora_B.weight`, and
    /// `<path>.lora_B.bias`; for a copy of a parameter of the base that of the parameter. If
    /// several adapters are active, each name has that of its adapter in it, as in
    /// `<path>.lora_A.<adapter>.weight` and `<path>.weight.<adapter>`.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn named_lora_vars(&mut self) -> Result<Vec<(String, Var)>> {
        verbs::active_vars(self)
    }

    /// The tensors of one adapter, active or not, in the model's order.
    ///
    /// # Errors
    /// If the name is unknown.
    fn adapter_vars(&mut self, name: &str) -> Result<Vec<Var>> {
        Ok(unnamed(self.named_adapter_vars(name)?))
    }

    /// The tensors of one adapter, active or not, with their names.
    ///
    /// # Errors
    /// If the name is unknown.
    fn named_adapter_vars(&mut self, name: &str) -> Result<Vec<(String, Var)>> {
        verbs::vars(self, name)
    }

    /// Turns dropout on, for all adapters.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn train(&mut self) -> Result<()> {
        self.for_each_adapter(&mut |lora| {
            lora.set_training(true);
            Ok(())
        })
    }

    /// Turns dropout off, for all adapters.
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
        verbs::set_disabled(self, false)
    }

    /// Makes the forward pass that of the base model, merged or not, until
    /// [`enable_adapters`](Self::enable_adapters). For a few passes of one thread there is
    /// [`Selection::none`](crate::Selection::none) and its scope.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn disable_adapters(&mut self) -> Result<()> {
        verbs::set_disabled(self, true)
    }

    /// Adds the active adapters to copies of the weights; [`unmerge`](Self::unmerge) goes back.
    /// Meanwhile no others can be selected. Does nothing if just these are merged.
    ///
    /// # Errors
    /// If a merged number would be NaN or infinite, with the path of the layer; if adapters are
    /// selected row by row; if others are merged. The model is then unchanged.
    fn merge(&mut self) -> Result<()> {
        verbs::merge_active(self)
    }

    /// Adds these adapters, active or not, to copies of the weights, which are then all that
    /// acts; [`unmerge`](Self::unmerge) goes back to what is active.
    ///
    /// # Errors
    /// As of [`set_adapters`](Self::set_adapters) and [`merge`](Self::merge).
    fn merge_adapters(&mut self, names: &[impl AsRef<str>]) -> Result<()> {
        verbs::merge(self, names)
    }

    /// Goes back to the weights before [`merge`](Self::merge), bit for bit.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn unmerge(&mut self) -> Result<()> {
        verbs::unmerge(self)
    }

    /// Merges the active adapters for good: every layer is plain then, of the merged weight, and no
    /// adapter is left.
    ///
    /// # Errors
    /// As of [`merge`](Self::merge).
    fn merge_and_unload(&mut self) -> Result<()> {
        verbs::merge_and_unload(self)
    }

    /// The tensors in which the model with the active adapters merged differs from the base, by
    /// `<module path>.<parameter>`, in the base's types: what a folder of the merged model has of
    /// its own. The model does not change.
    ///
    /// # Errors
    /// As of [`merge`](Self::merge).
    fn merged_tensors(&mut self) -> Result<BTreeMap<String, Tensor>> {
        verbs::merged_tensors(self)
    }

    /// Takes all adapters off: every layer computes what it did before it was adapted.
    ///
    /// # Errors
    /// Those of a hand-written traversal.
    fn remove_adapters(&mut self) -> Result<()> {
        verbs::remove_all(self)
    }

    /// Checks that a backward pass gave every tensor of the active adapters a gradient.
    ///
    /// # Errors
    /// An [`Error::NoGradient`](crate::Error::NoGradient) that names the tensors without one and
    /// the likely cause.
    fn check_gradients(&mut self, grads: &GradStore) -> Result<()> {
        gradients::check(&self.named_lora_vars()?, grads)
    }

    /// Writes an adapter to the folder `dir`, as Hugging Face PEFT does: the one called `default`,
    /// or the only one. The same adapters give the same bytes.
    ///
    /// # Errors
    /// If the model has no such adapter, or a file can't be written; no file is then half-written.
    fn save_adapter(&mut self, dir: impl AsRef<Path>) -> Result<()>
    where
        Self: Sized,
    {
        adapter_folder::save(self, dir.as_ref())
    }

    /// Writes the adapter called `name` to the folder `dir`. The name is not written.
    ///
    /// # Errors
    /// As of [`save_adapter`](Self::save_adapter).
    fn save_adapter_as(&mut self, name: &str, dir: impl AsRef<Path>) -> Result<()> {
        adapter_folder::save_as(self, name, dir.as_ref())
    }

    /// Reads an adapter folder: adds its adapter as `default` and makes it active, or, if the model
    /// has a `default` of the same layers, ranks and scalings, replaces its numbers. It is then in
    /// evaluation mode.
    ///
    /// # Errors
    /// If the folder can't be read, or an adapter file has what the model does not, or does not
    /// fit; everything that is wrong is named. The model is then unchanged.
    fn load_adapter(&mut self, dir: impl AsRef<Path>) -> Result<LoraReport>
    where
        Self: Sized,
    {
        adapter_folder::load(self, dir.as_ref())
    }

    /// Reads an adapter folder and adds its adapter as `name`, in evaluation mode and not active
    /// yet.
    ///
    /// # Errors
    /// As of [`load_adapter`](Self::load_adapter) and [`add_adapter`](Self::add_adapter).
    fn load_adapter_as(&mut self, name: &str, dir: impl AsRef<Path>) -> Result<LoraReport>
    where
        Self: Sized,
    {
        adapter_folder::load_as(self, name, dir.as_ref())
    }
}

fn unnamed(vars: Vec<(String, Var)>) -> Vec<Var> {
    vars.into_iter().map(|(_, var)| var).collect()
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
