//! Greedy decoding of one sequence, with a key-value cache.

use candle_core::D;
use candle_core::Tensor;

use crate::Result;
use crate::model::CausalLm;
use crate::model::KvCache;

/// Continues `prompt` with the likeliest token, up to `limit` times or to a token of `ends`.
///
/// `on_token` sees each new token as it is made. The end token is not part of the result.
///
/// # Errors
/// If the prompt is empty, or longer than the model's context.
pub fn greedy(
    model: &CausalLm,
    prompt: &[u32],
    limit: usize,
    ends: &[u32],
    mut on_token: impl FnMut(u32),
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(crate::Error::Usage("the prompt is empty".into()));
    }
    let mut cache = KvCache::default();
    let mut made = Vec::new();
    let mut next = prompt.to_vec();
    let room = model.max_length().saturating_sub(prompt.len());
    while made.len() < limit.min(room) {
        let ids = Tensor::new(next.as_slice(), model.device())?;
        let hidden = model.continue_sequence(&ids, &mut cache)?;
        let last = hidden.narrow(0, ids.dim(0)? - 1, 1)?;
        let token = model
            .logits(&last)?
            .argmax(D::Minus1)?
            .squeeze(0)?
            .to_scalar::<u32>()?;
        if ends.contains(&token) {
            break;
        }
        made.push(token);
        on_token(token);
        next = vec![token];
    }
    Ok(made)
}
