//! The macros of `lora-core`, which re-exports both: name that crate, not this one.
//!
//! - [`LoraTargets`](macro@LoraTargets) names the linear layers of a model and walks over them.
//! - [`targets!`](targets) has the compiler check target names against such a model.
//!
//! An input goes through four stages, a file each: `attr` reads `#[lora(..)]`, `ast` makes a
//! model of the type, `check` finds its mistakes and `expand` writes the implementation; if there
//! was a mistake, `fallback` writes a stand-in, so that one mistake is one error.
#![forbid(unsafe_code)]

mod ast;
mod attr;
mod check;
mod errors;
mod expand;
mod fallback;
mod suggest;
mod targets;

use proc_macro::TokenStream;

/// Writes the target tree and the traversal of a model struct or enum.
///
/// ```
/// use lora_core::{LoraTargets, nn::Linear};
///
/// #[derive(LoraTargets)]
/// struct Attention {
///     q_proj: Linear,
///     o_proj: Linear,
///     scale: f64,
/// }
///
/// #[derive(LoraTargets)]
/// struct Model {
///     #[lora(rename = "model.layers")]
///     blocks: Vec<Attention>,
///     #[lora(head)]
///     lm_head: Option<Linear>,
/// }
///
/// assert_eq!(
///     Model::TARGETS.paths(),
///     ["model.layers.*.q_proj", "model.layers.*.o_proj", "lm_head"],
/// );
/// ```
///
/// # Paths
/// A linear layer is known by the dotted path of the fields that lead to it.
///
/// | what | adds the segment |
/// |---|---|
/// | a named field | its name, a raw identifier without `r#` |
/// | a field of a tuple, or of a tuple struct with several fields | its position: `0`, `1`, … |
/// | the field of a newtype, `Option`, `Box` | none |
/// | a variant of an enum | none; its fields add theirs |
/// | an element of a `Vec`, an array or a slice | its index |
/// | an entry of a `HashMap<String, _>` or `BTreeMap<String, _>` | its key |
///
/// # Fields
/// Every field's type has to implement `LoraTargets`: the layers of `lora_core::nn`, the
/// containers above, and what plainly holds no layer (numbers, strings, tensors, devices, …) do.
/// For any other type, derive it there too or skip the field: nothing is left out by silence.
///
/// # Attributes of a field
/// - `#[lora(skip)]`: nothing in this field is adapted, or frozen. Any type will do.
/// - `#[lora(rename = "a.b")]`: the segment, or several, in place of the field's name. Use the
///   names of the checkpoint: an adapter is saved under these paths.
/// - `#[lora(head)]`: what is in this field is the model's output head, which
///   `match_all_linear` leaves alone.
/// - `#[lora(flatten)]`: the field adds no segment.
///
/// # Attributes of the type
/// - `#[lora(crate = "path")]`: where to find `lora_core`, if not at `::lora_core`.
///
/// # Generics
/// A field whose type mentions a type parameter becomes a bound, `Vec<T>: LoraTargets`. Generic
/// types, and those with lifetimes, have no entry in `lora_core::registry()`.
#[proc_macro_derive(LoraTargets, attributes(lora))]
pub fn derive_lora_targets(input: TokenStream) -> TokenStream {
    let input = syn::parse_macro_input!(input as syn::DeriveInput);
    expand::derive(&input).into()
}

/// Checks target names against a model type at compile time: `lora_core::targets!`, told where
/// `lora_core` is.
///
/// ```compile_fail
/// # use lora_core::{LoraTargets, nn::Linear, targets};
/// #[derive(LoraTargets)]
/// struct Attention { q_proj: Linear }
///
/// let names = targets!(Attention: ["q_porj"]); // no linear layer of `Attention` matches `q_porj`
/// ```
#[proc_macro]
pub fn targets(input: TokenStream) -> TokenStream {
    targets::expand(input.into()).into()
}
