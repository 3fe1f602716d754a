//! Greedy accuracy on held-out rows.

use candle_core::D;
use candle_core::DType;
use candle_core::Tensor;

use crate::Result;
use crate::batch::Batch;
use crate::batch::Example;
use crate::model::CausalLm;

/// Rows in one forward pass.
const ROWS: usize = 16;

/// How many rows the model completes word for word when it always takes the likeliest token.
///
/// Greedy decoding writes the answer exactly if, given the answer so far, each next token of it is
/// the likeliest: one forward pass tells, and only the answer's positions need logits.
pub fn exact_matches(
    model: &CausalLm,
    rows: &[Example],
    mut on_rows: impl FnMut(usize),
) -> Result<usize> {
    let mut exact = 0;
    for rows in rows.chunks(ROWS) {
        let batch = Batch::to_answer(rows, model.device())?;
        let hidden = model.hidden_states(&batch.ids, &batch.lengths)?.detach();
        let logits = model.logits(&hidden.index_select(&batch.positions, 0)?)?;
        let hits = logits.argmax(D::Minus1)?.eq(&batch.targets)?;
        let hits = hits.to_dtype(DType::U8)?.to_vec1::<u8>()?;
        let mut hits = hits.into_iter();
        for row in rows {
            // `all` would stop early and leave this row's hits to the next row
            let missed = hits
                .by_ref()
                .take(row.answer.len())
                .filter(|hit| *hit == 0)
                .count();
            exact += usize::from(missed == 0 && !row.answer.is_empty());
        }
        on_rows(rows.len());
    }
    Ok(exact)
}

/// Mean cross-entropy of the tokens to learn, in nats; the forward half of a training step.
pub fn loss(model: &CausalLm, batch: &Batch) -> Result<Tensor> {
    let hidden = model.hidden_states(&batch.ids, &batch.lengths)?;
    let logits = model.logits(&hidden.index_select(&batch.positions, 0)?)?;
    Ok(lora_core::nn::cross_entropy(&logits, &batch.targets)?)
}
