//! Rows as tokens, and batches of them packed end to end.

use std::ops::Range;

use candle_core::Device;
use candle_core::Tensor;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::Error;
use crate::Result;
use crate::data::Row;
use crate::tokenizer::TextTokenizer;

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// All tokens of the row.
    pub ids: Vec<u32>,
    /// The tokens to learn; none of them is the first.
    pub learned: Vec<Range<usize>>,
    /// The last completion without its end token: what a greedy answer is held against.
    pub answer: Range<usize>,
}

impl Example {
    /// Tokenises a row: a completion gets the end token, a conversation the model's chat template.
    ///
    /// # Errors
    /// If the tokenizer or the chat template refuses the row.
    pub fn new(row: &Row, tokenizer: &TextTokenizer) -> Result<Self> {
        match row {
            Row::Completion { prompt, completion } => {
                let mut ids = tokenizer.encode_start(prompt)?;
                let start = ids.len();
                ids.extend(tokenizer.encode(completion)?);
                let answer = start..ids.len();
                ids.push(tokenizer.end_token());
                let learned = start..ids.len();
                Self::checked(ids, vec![learned], answer)
            }
            Row::Chat(messages) => {
                let mut ids = Vec::new();
                let mut learned = Vec::new();
                let mut answer = 0..0;
                let mut rendered = String::new();
                for i in (0..messages.len()).filter(|i| messages[*i].role == "assistant") {
                    let asked = tokenizer.render_chat(&messages[..i], true)?;
                    let told = tokenizer.render_chat(&messages[..=i], false)?;
                    let (Some(question), Some(reply)) =
                        (asked.strip_prefix(&rendered), told.strip_prefix(&asked))
                    else {
                        return Err(Error::tokenizer(
                            "the chat template rewrites earlier turns; \
                             give rows with `prompt` and `completion`",
                        ));
                    };
                    ids.extend(tokenizer.encode(question)?);
                    let start = ids.len();
                    ids.extend(tokenizer.encode(reply)?);
                    let end = ids[start..]
                        .iter()
                        .position(|id| *id == tokenizer.end_token());
                    answer = start..end.map_or(ids.len(), |end| start + end);
                    learned.push(start..ids.len());
                    rendered = told;
                }
                Self::checked(ids, learned, answer)
            }
        }
    }

    fn checked(ids: Vec<u32>, learned: Vec<Range<usize>>, answer: Range<usize>) -> Result<Self> {
        if learned.iter().any(|range| range.start == 0) {
            return Err(Error::tokenizer("a prompt has no tokens"));
        }
        Ok(Self {
            ids,
            learned,
            answer,
        })
    }

    /// Tokens of the prompt of the last completion.
    pub fn prompt(&self) -> &[u32] {
        &self.ids[..self.answer.start]
    }

    /// Cuts the row to `length` tokens; false if nothing to learn is left.
    fn truncate(&mut self, length: usize) -> bool {
        self.ids.truncate(length);
        for range in self.learned.iter_mut().chain([&mut self.answer]) {
            *range = range.start.min(length)..range.end.min(length);
        }
        self.learned.retain(|range| !range.is_empty());
        !self.learned.is_empty()
    }
}

/// What a length limit did to a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Truncated {
    /// Rows that were cut.
    pub cut: usize,
    /// Rows that were left out because the cut took all there was to learn.
    pub dropped: usize,
}

/// Tokenises rows and cuts them to `max_length` tokens.
///
/// # Errors
/// As [`Example::new`], or if no row is left.
pub fn examples(
    rows: &[Row],
    tokenizer: &TextTokenizer,
    max_length: usize,
) -> Result<(Vec<Example>, Truncated)> {
    let mut truncated = Truncated::default();
    let mut examples = Vec::with_capacity(rows.len());
    for row in rows {
        let mut example = Example::new(row, tokenizer)?;
        if example.ids.len() <= max_length {
            examples.push(example);
        } else if example.truncate(max_length) {
            truncated.cut += 1;
            examples.push(example);
        } else {
            truncated.dropped += 1;
        }
    }
    if examples.is_empty() {
        return Err(Error::Usage(format!(
            "no row has anything to learn within {max_length} tokens; give a longer --seq-len"
        )));
    }
    Ok((examples, truncated))
}

/// Which rows a training step takes: row numbers below `rows`, `batch` of them.
///
/// Every pass over the data is a new shuffle, drawn from `seed` and the number of the pass, so a
/// step needs nothing from the steps before it.
pub fn rows_of_step(step: usize, batch: usize, rows: usize, seed: u64) -> Vec<usize> {
    let mut shuffled: Option<(usize, Vec<usize>)> = None;
    (step * batch..(step + 1) * batch)
        .map(|k| {
            let (pass, place) = (k / rows, k % rows);
            let order = match &mut shuffled {
                Some((p, order)) if *p == pass => order,
                other => {
                    let mut order: Vec<usize> = (0..rows).collect();
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    rng.set_stream(pass as u64);
                    order.shuffle(&mut rng);
                    &mut other.insert((pass, order)).1
                }
            };
            order[place]
        })
        .collect()
}

/// Sequences packed end to end, and the positions whose next token is predicted.
#[derive(Debug)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub ids: Tensor,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// Positions in `ids` whose next token counts, `[predictions]`.
    pub positions: Tensor,
    /// The tokens after those positions, `[predictions]`.
    pub targets: Tensor,
}

impl Batch {
    /// Packs rows to train on: every learned token is a target.
    pub fn to_learn<'a>(rows: impl IntoIterator<Item = &'a Example>, dev: &Device) -> Result<Self> {
        Self::pack(
            rows.into_iter().map(|row| (row, row.learned.as_slice())),
            dev,
        )
    }

    /// Packs rows to be answered: only the tokens of the last completion are targets.
    pub fn to_answer<'a>(
        rows: impl IntoIterator<Item = &'a Example>,
        dev: &Device,
    ) -> Result<Self> {
        Self::pack(
            rows.into_iter()
                .map(|row| (row, std::slice::from_ref(&row.answer))),
            dev,
        )
    }

    fn pack<'a>(
        rows: impl Iterator<Item = (&'a Example, &'a [Range<usize>])>,
        dev: &Device,
    ) -> Result<Self> {
        let (mut ids, mut lengths) = (Vec::new(), Vec::new());
        let (mut positions, mut targets) = (Vec::new(), Vec::new());
        for (row, ranges) in rows {
            let start = ids.len();
            // Nothing is predicted after the last target, so it need not be read.
            let read = ranges
                .iter()
                .map(|range| range.end)
                .max()
                .unwrap_or(0)
                .saturating_sub(1);
            ids.extend_from_slice(&row.ids[..read]);
            lengths.push(read);
            for target in ranges.iter().cloned().flatten() {
                positions.push((start + target - 1) as u32);
                targets.push(row.ids[target]);
            }
        }
        Ok(Self {
            ids: Tensor::new(ids, dev)?,
            lengths,
            positions: Tensor::new(positions, dev)?,
            targets: Tensor::new(targets, dev)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretrained::Pretrained;
    use crate::tokenizer::Message;

    fn row(ids: &[u32], answer: Range<usize>) -> Example {
        let learned = answer.start..ids.len();
        Example {
            ids: ids.to_vec(),
            learned: vec![learned],
            answer,
        }
    }

    #[test]
    fn every_pass_takes_each_row_once() {
        let taken = |step| rows_of_step(step, 4, 10, 7);
        let mut pass: Vec<usize> = (0..5).flat_map(taken).collect();
        assert_ne!(pass[..10], pass[10..], "passes are shuffled anew");
        pass[..10].sort_unstable();
        pass[10..].sort_unstable();
        let all: Vec<usize> = (0..10).collect();
        assert_eq!((&pass[..10], &pass[10..]), (&all[..], &all[..]));
        assert_ne!(rows_of_step(0, 10, 10, 7), rows_of_step(0, 10, 10, 8));
        // A run that is resumed with a newer build must draw what the first one drew.
        assert_eq!(taken(0), [0, 7, 5, 2]);
    }

    #[test]
    fn only_the_assistants_turns_of_a_chat_are_learned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        crate::tiny::write_gguf(&path);
        let tokenizer = Pretrained::open(&path).unwrap().tokenizer;
        let say = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        let chat = [
            say("user", "a"),
            say("assistant", " c "),
            say("user", "b"),
            say("assistant", "ab"),
        ];
        let example = Example::new(&Row::Chat(chat.to_vec()), &tokenizer).unwrap();
        assert_eq!(example.ids, [1, 3, 2, 1, 5, 2, 1, 4, 2, 1, 9, 2]);
        assert_eq!(
            (example.learned, example.answer),
            (vec![4..6, 10..12], 10..11)
        );
    }

    #[test]
    fn packed_targets_follow_their_positions() {
        let rows = [row(&[5, 6, 7, 8, 2], 3..4), row(&[9, 4, 2], 1..2)];
        let batch = Batch::to_learn(&rows, &Device::Cpu).unwrap();
        assert_eq!(batch.ids.to_vec1::<u32>().unwrap(), [5, 6, 7, 8, 9, 4]);
        assert_eq!(batch.lengths, [4, 2]);
        assert_eq!(batch.positions.to_vec1::<u32>().unwrap(), [2, 3, 4, 5]);
        assert_eq!(batch.targets.to_vec1::<u32>().unwrap(), [8, 2, 4, 2]);
        let batch = Batch::to_answer(&rows, &Device::Cpu).unwrap();
        assert_eq!(batch.ids.to_vec1::<u32>().unwrap(), [5, 6, 7, 9]);
        assert_eq!(batch.targets.to_vec1::<u32>().unwrap(), [8, 4]);
    }

    #[test]
    fn truncation_keeps_only_rows_with_something_to_learn() {
        let mut long = row(&[5, 6, 7, 8, 2], 3..4);
        assert!(long.truncate(4));
        let kept = 3..4;
        assert_eq!(long.ids, [5, 6, 7, 8]);
        assert_eq!((&long.learned, &long.answer), (&vec![kept.clone()], &kept));
        assert!(!long.truncate(3));
    }
}
