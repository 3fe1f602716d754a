//! Token embeddings.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// A table of vectors that is looked up by index, in place of `candle_nn::Embedding`.
///
/// A frozen table gets no gradient buffer; one that is a variable gets its gradient. Runs on every
/// device as candle's `index_select`.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use lora_core::nn::Embedding;
///
/// let table = Tensor::new(&[[0f32, 1.], [2., 3.], [4., 5.]], &Device::Cpu)?;
/// let embedding = Embedding::new(table, 2);
/// let ys = embedding.forward(&Tensor::new(&[2u32, 0], &Device::Cpu)?)?;
/// assert_eq!(ys.to_vec2::<f32>()?, [[4., 5.], [0., 1.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    embeddings: Tensor, // [vocabulary, hidden]
    hidden_size: usize,
    path: Option<Arc<str>>,
}

impl Embedding {
    /// A layer of the table `embeddings` `[vocabulary, hidden_size]`.
    pub fn new(embeddings: Tensor, hidden_size: usize) -> Self {
        Self {
            embeddings,
            hidden_size,
            path: None,
        }
    }

    /// The table `[vocabulary, hidden]`.
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    /// The length of a vector.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// The prefix of the [`VarBuilder`] that this layer was built from.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The parameters with their names in the layer.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        [("weight", &mut self.embeddings)].into_iter()
    }
}

impl Module for Embedding {
    /// Looks up `indexes` of any shape and adds a last dimension of `hidden_size`.
    ///
    /// # Errors
    /// When an index is outside of the table.
    fn forward(&self, indexes: &Tensor) -> Result<Tensor> {
        let mut shape = indexes.dims().to_vec();
        shape.push(self.hidden_size);
        let rows = self.embeddings.index_select(&indexes.flatten_all()?, 0)?;
        rows.reshape(shape)
    }
}

/// Builds a table of `in_size` vectors of length `out_size` from `vb`'s `weight`.
///
/// # Errors
/// When `vb` has no such tensor of shape `[in_size, out_size]`.
pub fn embedding(in_size: usize, out_size: usize, vb: VarBuilder) -> Result<Embedding> {
    let init = Init::Randn {
        mean: 0.,
        stdev: 1.,
    };
    Ok(Embedding {
        embeddings: vb.get_with_hints((in_size, out_size), "weight", init)?,
        hidden_size: out_size,
        path: Some(vb.prefix().into()),
    })
}
