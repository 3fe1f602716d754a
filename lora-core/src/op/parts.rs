//! The frozen linear layer with several adapters, each on all rows or on some, as one node.
//!
//! With `X_p` the rows of part `p`, `D_p` its dropout, `s_p` its scaling and `c_p` its bias:
//!
//! ```text
//! pre:  H_p    = D_p(X_p) A_pᵀ            post:  H_p    = X_p A_pᵀ
//!       Δ_p    = s_p (H_p B_pᵀ + c_p)            Δ_p    = D_p(s_p (H_p B_pᵀ + c_p))
//!
//! Y = X Wᵀ + b, and Y[rows of p] += Δ_p for every p
//! ```
//!
//! The backward pass is that of [`LoraLinear`](super::LoraLinear), part by part. The bias is one
//! more column of `B_p`, against a one in `H_p`. The parts of a row are summed in the compute type
//! and rounded once, when the sum is added; a row without a part is the base's, bit for bit. Kept
//! for the backward pass: `X`, once, the `H_p`, and all `A` and all `B` below each other.
//!
//! A dropout mask is indexed by the row in the whole input, not in the part. Under one mask, that
//! is one seed, site and step, a row therefore draws the same factors whether its part acts on all
//! rows or on a few, alone or among others.

mod rows;
mod sum;
#[cfg(test)]
mod tests;

use std::{ops::Range, sync::Arc};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, InplaceOp1, Layout, MetalStorage, Result, Shape, Tensor,
    bail,
};
use rows::{Rows, Segment};
use sum::{Product, RowSums};

use super::{FrozenLinear, compute_dtype, frozen, thin};
use crate::{DropoutPosition, Mask};

/// One adapter of the layer, and the rows that it acts on.
pub(crate) struct Part<'a> {
    /// `A`, `[rank, in]`.
    pub a: &'a Tensor,
    /// `B`, `[out, rank]`.
    pub b: &'a Tensor,
    /// `[out]`; scaled like `B`.
    pub bias: Option<&'a Tensor>,
    pub scaling: f64,
    pub dropout: Option<(Mask, DropoutPosition)>,
    /// Rows of the input, ascending and disjoint; `None`: all.
    pub rows: Option<Arc<[Range<usize>]>>,
}

/// `base(xs) + sum of the parts` for `xs [tokens, in]`, contiguous. Differentiable in `xs` and in
/// every `a`, `b` and `bias`.
pub(crate) fn apply(base: &FrozenLinear, xs: &Tensor, parts: &[Part]) -> Result<Tensor> {
    if parts.is_empty() {
        return base.apply(xs);
    }
    let dtype = compute_dtype(base.weight().dtype());
    let tokens = xs.dim(0)?;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for part in parts {
        part.check(base.weight(), tokens)?;
        a.push(part.a.to_dtype(dtype)?);
        b.push(part.b.to_dtype(dtype)?.t()?);
        if let Some(bias) = part.bias {
            b.push(bias.to_dtype(dtype)?.unsqueeze(0)?);
        }
    }
    let a = Tensor::cat(&a, 0)?.contiguous()?; // [sum of ranks, in]
    let b = Tensor::cat(&b, 0)?.contiguous()?; // [sum of ranks and biases, out]

    let input = xs.detach().to_dtype(dtype)?;
    let (mut terms, mut at) = (Vec::new(), (0, 0));
    for part in parts {
        let term = Term::new(part, &input, (&a, &b), at)?;
        at = (term.ranks.end, term.columns.end);
        terms.push(term);
    }
    let segments = Segment::of(terms.iter().map(|term| &term.rows), tokens);
    let op = PartsLinear {
        base: base.clone(),
        terms,
        segments,
    };
    xs.apply_op3(&a, &b, op)
}

impl Part<'_> {
    fn check(&self, weight: &Tensor, tokens: usize) -> Result<()> {
        let (outputs, inputs) = weight.dims2()?;
        let rank = self.a.dim(0)?;
        if self.a.dims() != [rank, inputs] || self.b.dims() != [outputs, rank] {
            bail!(
                "an adapter of A {:?} and B {:?} does not fit the weight {:?}",
                self.a.dims(),
                self.b.dims(),
                weight.dims()
            )
        }
        if let Some(bias) = self.bias
            && bias.dims() != [outputs]
        {
            bail!(
                "the adapter's bias is {:?}; it must be [{outputs}]",
                bias.dims()
            )
        }
        let mut end = 0;
        for rows in self.rows.iter().flat_map(|rows| rows.iter()) {
            if rows.start < end || rows.end < rows.start || rows.end > tokens {
                bail!("the rows {rows:?} of an adapter are not ascending within {tokens}")
            }
            end = rows.end;
        }
        Ok(())
    }
}

/// The node: `Y [tokens, out]` of `X`, all `A` and all `Bᵀ` with the biases below them.
struct PartsLinear {
    base: FrozenLinear,
    terms: Vec<Term>,
    segments: Vec<Segment>,
}

/// What the node keeps of a part.
struct Term {
    rows: Rows,
    /// Its rows among all `A`.
    ranks: Range<usize>,
    /// Its rows among all `Bᵀ`; one more than ranks if it has a bias.
    columns: Range<usize>,
    scaling: f64,
    dropout: Option<(Mask, DropoutPosition)>,
    /// `H`, `[rows, columns]`: a column of ones stands for the bias.
    hidden: Tensor,
    /// `Bᵀ`, `[columns, out]`.
    b: Tensor,
}

impl Term {
    /// The term of `part`, whose share of all `A` and all `Bᵀ` begins `at`.
    fn new(
        part: &Part,
        input: &Tensor,
        (a, b): (&Tensor, &Tensor),
        at: (usize, usize),
    ) -> Result<Self> {
        let rank = part.a.dim(0)?;
        let mut term = Self {
            rows: Rows::new(part.rows.clone()),
            ranks: at.0..at.0 + rank,
            columns: at.1..at.1 + rank + usize::from(part.bias.is_some()),
            scaling: part.scaling,
            dropout: part.dropout,
            hidden: input.clone(),
            b: b.detach(),
        };
        let input = term.rows.select(input)?;
        let input = term
            .rows
            .masked(&input, term.mask_at(DropoutPosition::Pre))?;
        let a = take(&a.detach(), &term.ranks)?;
        term.hidden = thin::shrink(&input, &a)?;
        if part.bias.is_some() {
            let (rows, dtype) = (input.dim(0)?, input.dtype());
            let ones = Tensor::ones((rows, 1), dtype, input.device())?;
            term.hidden = Tensor::cat(&[&term.hidden, &ones], 1)?;
        }
        term.b = take(&term.b, &term.columns)?;
        Ok(term)
    }

    /// The mask, if dropout is at `position`.
    fn mask_at(&self, position: DropoutPosition) -> Option<Mask> {
        self.dropout
            .filter(|(_, at)| *at == position)
            .map(|(mask, _)| mask)
    }
}

impl PartsLinear {
    /// What the forward pass adds to the base's output.
    fn deltas(&self) -> RowSums<'_> {
        let products = self.terms.iter().map(|term| Product {
            p: term.hidden.clone(),
            q: term.b.clone(),
            scaling: term.scaling,
            mask: term.mask_at(DropoutPosition::Post),
        });
        RowSums {
            segments: &self.segments,
            products: products.collect(),
        }
    }
}

impl CustomOp3 for PartsLinear {
    fn name(&self) -> &'static str {
        "lora-parts"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        layout: &Layout,
        _a: &CpuStorage,
        _a_layout: &Layout,
        _b: &CpuStorage,
        _b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut ys, shape) = self.base.forward(xs, layout, frozen::cpu_storage)?;
        self.deltas()
            .cpu_fwd(&mut ys, &Layout::contiguous(&shape))?;
        Ok((ys, shape))
    }

    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        layout: &Layout,
        _a: &CudaStorage,
        _a_layout: &Layout,
        _b: &CudaStorage,
        _b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (mut ys, shape) = self.base.forward(xs, layout, frozen::cuda_storage)?;
        self.deltas()
            .cuda_fwd(&mut ys, &Layout::contiguous(&shape))?;
        Ok((ys, shape))
    }

    fn metal_fwd(
        &self,
        xs: &MetalStorage,
        layout: &Layout,
        _a: &MetalStorage,
        _a_layout: &Layout,
        _b: &MetalStorage,
        _b_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let (mut ys, shape) = self.base.forward(xs, layout, frozen::metal_storage)?;
        self.deltas()
            .metal_fwd(&mut ys, &Layout::contiguous(&shape))?;
        Ok((ys, shape))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _ys: &Tensor,
        dys: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dys = dys.contiguous()?;
        let all_g = dys.to_dtype(a.dtype())?; // [tokens, out]
        let input = xs.detach().to_dtype(a.dtype())?; // [tokens, in]
        let (mut da, mut db, mut products) = (Vec::new(), Vec::new(), Vec::new());
        for term in &self.terms {
            let [pre, post] =
                [DropoutPosition::Pre, DropoutPosition::Post].map(|at| term.mask_at(at));
            let g = term.rows.masked(&term.rows.select(&all_g)?, post)?;
            let b_transposed = term.b.narrow(0, 0, term.ranks.len())?; // [rank, out]
            let dh = (thin::shrink(&g, &b_transposed)? * term.scaling)?; // [rows, rank]
            if a.track_op() {
                let input = term.rows.masked(&term.rows.select(&input)?, pre)?;
                da.push(thin::outer(&dh, &input)?); // [rank, in]
            }
            if b.track_op() {
                db.push((thin::outer(&term.hidden, &g)? * term.scaling)?); // [columns, out]
            }
            products.push(Product {
                p: dh,
                q: take(&a.detach(), &term.ranks)?,
                scaling: 1.0,
                mask: pre,
            });
        }
        let dxs = if xs.track_op() {
            let sums = RowSums {
                segments: &self.segments,
                products,
            };
            let dxs = self.base.backward(&dys)?;
            dxs.inplace_op1(&sums)?;
            Some(dxs)
        } else {
            None
        };
        let cat = |grads: Vec<Tensor>| match &grads[..] {
            [] => Ok(None),
            grads => Tensor::cat(grads, 0).map(Some),
        };
        Ok((dxs, cat(da)?, cat(db)?))
    }
}

/// The rows `rows` of a matrix.
fn take(xs: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    xs.narrow(0, rows.start, rows.len())
}
