//! The rows of an input that a part acts on, and the segments that several parts cut it into.

use std::{ops::Range, slice, sync::Arc};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::take;
use crate::Mask;

/// Some rows of a matrix, ascending, or all.
#[derive(Clone)]
pub(super) struct Rows(Option<Arc<[Range<usize>]>>);

impl Rows {
    pub fn new(rows: Option<Arc<[Range<usize>]>>) -> Self {
        Self(rows)
    }

    /// These rows of `xs`, one below the other.
    pub fn select(&self, xs: &Tensor) -> Result<Tensor> {
        let Some(ranges) = &self.0 else {
            return Ok(xs.clone());
        };
        match &ranges[..] {
            [] => take(xs, &(0..0)),
            [range] => take(xs, range),
            ranges => {
                let slices = ranges.iter().map(|range| take(xs, range));
                Tensor::cat(&slices.collect::<Result<Vec<_>>>()?, 0)
            }
        }
    }

    /// `xs`, these rows of a matrix, with that matrix' mask applied.
    pub fn masked(&self, xs: &Tensor, mask: Option<Mask>) -> Result<Tensor> {
        let Some(mask) = mask else {
            return Ok(xs.clone());
        };
        let Some(ranges) = &self.0 else {
            return mask.apply(xs);
        };
        let rows = ranges.iter().cloned().flatten().collect::<Vec<_>>();
        let width = xs.dim(1)?;
        let mut factors = vec![0f32; rows.len() * width];
        factors
            .par_chunks_mut(width.max(1))
            .zip(rows)
            .for_each(|(factors, row)| {
                mask.row(row as u64, width, |column, factor| factors[column] = factor);
            });
        let factors = Tensor::from_vec(factors, xs.shape(), &Device::Cpu)?;
        xs.mul(&factors.to_dtype(xs.dtype())?.to_device(xs.device())?)
    }
}

/// A run of rows on which the same parts act.
pub(super) struct Segment {
    pub rows: Range<usize>,
    /// The parts, by their index, in order, each with the place of the segment among its rows.
    pub parts: Vec<(usize, usize)>,
}

impl Segment {
    /// The segments of a matrix of `tokens` rows, ascending, without the rows that no part acts on.
    pub fn of<'a>(parts: impl Iterator<Item = &'a Rows>, tokens: usize) -> Vec<Self> {
        struct Span {
            rows: Range<usize>,
            part: usize,
            first: usize,
        }
        let (mut spans, all) = (Vec::new(), 0..tokens);
        for (part, Rows(ranges)) in parts.enumerate() {
            let mut first = 0;
            for rows in ranges.as_deref().unwrap_or(slice::from_ref(&all)) {
                spans.push(Span {
                    rows: rows.clone(),
                    part,
                    first,
                });
                first += rows.len();
            }
        }
        let mut cuts = spans
            .iter()
            .flat_map(|span| [span.rows.start, span.rows.end])
            .collect::<Vec<_>>();
        cuts.sort_unstable();
        cuts.dedup();
        spans.sort_by_key(|span| span.rows.start);

        let (mut waiting, mut active) = (spans.into_iter().peekable(), Vec::<Span>::new());
        let mut segments = Vec::new();
        for (start, end) in cuts.iter().copied().zip(cuts.iter().copied().skip(1)) {
            active.retain(|span| span.rows.end > start);
            while let Some(span) = waiting.next_if(|span| span.rows.start == start) {
                if !span.rows.is_empty() {
                    active.push(span);
                }
            }
            active.sort_by_key(|span| span.part);
            if !active.is_empty() {
                let place = |span: &Span| (span.part, span.first + start - span.rows.start);
                segments.push(Self {
                    rows: start..end,
                    parts: active.iter().map(place).collect(),
                });
            }
        }
        segments
    }
}
