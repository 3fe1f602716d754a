//! Named base weights that are read when asked for, one tensor at a time.
//!
//! A model file and the model built from it are never in memory at once.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::Device;
use candle_core::Shape;
use candle_core::Tensor;
use candle_nn::Init;
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;

use crate::Result;

/// The tensors of a model under their Hugging Face names.
pub trait Weights: Send + Sync {
    /// The file or folder they are in.
    fn path(&self) -> &Path;

    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape of a tensor; `None` where there is no such name.
    fn shape(&self, name: &str) -> Option<Shape>;

    /// Reads one tensor onto the CPU.
    ///
    /// # Errors
    /// If there is no such name, or the file cannot be read.
    fn load(&self, name: &str) -> Result<Tensor>;
}

/// Hands `weights` to a model's constructors.
pub fn var_builder(weights: Arc<dyn Weights>, dtype: DType, dev: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Backend(weights)), dtype, dev.clone())
}

struct Backend(Arc<dyn Weights>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        dev: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, dev)?;
        if tensor.shape() != &shape {
            candle_core::bail!(
                "{}: `{name}` has shape {:?}, the configuration asks for {:?}",
                self.0.path().display(),
                tensor.dims(),
                shape.dims(),
            )
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.0.load(name)?.to_dtype(dtype)?.to_device(dev)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.shape(name).is_some()
    }
}
