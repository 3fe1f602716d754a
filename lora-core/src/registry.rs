//! Which adaptable models are linked into a program.

use crate::tree::TargetTree;

/// An entry of the [`registry`]: a type that derives `LoraTargets`.
#[derive(Debug)]
pub struct Registration {
    name: &'static str,
    targets: &'static TargetTree,
}

impl Registration {
    /// Describes a type. The derive calls this; write it yourself beside a hand-written
    /// `LoraTargets`, in an `inventory::submit!`.
    pub const fn new(name: &'static str, targets: &'static TargetTree) -> Self {
        Self { name, targets }
    }

    /// The type, with its module: `my_models::llama::Llama`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The linear layers it can have.
    pub fn targets(&self) -> &'static TargetTree {
        self.targets
    }
}

inventory::collect!(Registration);

/// Every non-generic type with `#[derive(LoraTargets)]` that is linked into this program, sorted
/// by name.
///
/// This is for discovery, not for correctness: a crate that the program depends on but never
/// names is not linked (`use my_models as _;` links it), and generic types have no entry.
///
/// ```
/// use lora_core::{LoraTargets, nn::Linear, registry};
///
/// #[derive(LoraTargets)]
/// struct Head { out: Linear }
///
/// let head = registry().into_iter().find(|entry| entry.name().ends_with("::Head")).unwrap();
/// assert_eq!(head.targets().paths(), ["out"]);
/// ```
pub fn registry() -> Vec<&'static Registration> {
    let mut entries: Vec<_> = inventory::iter::<Registration>.into_iter().collect();
    entries.sort_by_key(|entry| entry.name);
    entries
}
