//! Where in a model a visitor stands.

use std::fmt;

/// The dotted path of a module, such as `model.layers.3.self_attn.q_proj`.
///
/// The traversal that `#[derive(LoraTargets)]` writes enters a segment for every named field,
/// list index and map key; `Option`, `Box` and newtypes add none.
///
/// ```
/// use lora_core::ModulePath;
///
/// let mut path = ModulePath::root();
/// let seen = path.enter("layers", |path| path.enter("3", |path| path.to_string()));
/// assert_eq!(seen, "layers.3");
/// assert_eq!(path.as_str(), "");
/// ```
#[derive(Clone, Debug, Default)]
pub struct ModulePath {
    path: String,
    head: bool,
}

impl ModulePath {
    /// The path of the model itself: empty.
    pub fn root() -> Self {
        Self::default()
    }

    /// Runs `visit` one segment deeper. A segment may hold dots itself (`rename = "model.layers"`);
    /// an empty one adds nothing.
    pub fn enter<T>(&mut self, segment: &str, visit: impl FnOnce(&mut Self) -> T) -> T {
        let len = self.path.len();
        if !segment.is_empty() {
            if len > 0 {
                self.path.push('.');
            }
            self.path.push_str(segment);
        }
        let result = visit(self);
        self.path.truncate(len);
        result
    }

    /// Runs `visit` with everything below marked as the model's output head.
    pub fn enter_head<T>(&mut self, visit: impl FnOnce(&mut Self) -> T) -> T {
        let head = std::mem::replace(&mut self.head, true);
        let result = visit(self);
        self.head = head;
        result
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.path
    }

    /// Whether this is the output head (`#[lora(head)]`), which `match_all_linear` leaves alone.
    pub fn is_head(&self) -> bool {
        self.head
    }
}

impl fmt::Display for ModulePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}
