//! Adapters in models that know nothing of them.

mod merged;
mod transformers;
