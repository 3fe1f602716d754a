//! `Y[rows] += Σ s · mask ∘ (P Q)`: a sum of thin products added to the rows they belong to, with
//! one rounding.

use candle_core::{
    CpuStorage, CudaStorage, InplaceOp1, InplaceOp3, Layout, MetalStorage, Result, Storage, Tensor,
    backend::BackendStorage, bail, op::Add,
};

use super::{
    super::{expand::Expand, frozen},
    Segment,
    rows::Rows,
};
use crate::Mask;

/// `s · mask ∘ (P Q)` for `P [rows of a part, rank]` and `Q [rank, width]`, of the compute type.
#[derive(Clone)]
pub(super) struct Product {
    pub p: Tensor,
    pub q: Tensor,
    pub scaling: f64,
    /// Over the whole of `Y`.
    pub mask: Option<Mask>,
}

/// The operation; `Y [tokens, width]` may be of a half type.
pub(super) struct RowSums<'a> {
    pub segments: &'a [Segment],
    /// One for each part.
    pub products: Vec<Product>,
}

impl RowSums<'_> {
    /// The products that a segment is the sum of: all without a mask make one.
    fn products(&self, segment: &Segment) -> Result<Vec<Product>> {
        let mut products = Vec::new();
        for &(part, first) in &segment.parts {
            let product = &self.products[part];
            products.push(Product {
                p: product.p.narrow(0, first, segment.rows.len())?,
                ..product.clone()
            });
        }
        let (masked, plain): (Vec<_>, Vec<_>) = products
            .into_iter()
            .partition(|product| product.mask.is_some());
        if plain.len() < 2 {
            return Ok([plain, masked].concat());
        }
        // Σ s P Q = [s P ..] [Q; ..]
        let scaled = plain.iter().map(|product| &product.p * product.scaling);
        let p = Tensor::cat(&scaled.collect::<Result<Vec<_>>>()?, 1)?;
        let q = plain.iter().map(|product| &product.q).collect::<Vec<_>>();
        let sum = Product {
            p,
            q: Tensor::cat(&q, 0)?,
            scaling: 1.0,
            mask: None,
        };
        Ok([vec![sum], masked].concat())
    }

    /// Adds everything by the operations that every device has.
    pub fn composed<S: BackendStorage>(
        &self,
        ys: &mut S,
        layout: &Layout,
        of: fn(&Storage) -> Option<&S>,
    ) -> Result<()> {
        for segment in self.segments {
            let layout = segment_of(layout, segment)?;
            let sum = sum(&self.products(segment)?, segment, &layout)?;
            add(ys, &layout, &sum, of)?;
        }
        Ok(())
    }
}

impl InplaceOp1 for RowSums<'_> {
    fn name(&self) -> &'static str {
        "lora-row-sums"
    }

    fn cpu_fwd(&self, ys: &mut CpuStorage, layout: &Layout) -> Result<()> {
        for segment in self.segments {
            let layout = segment_of(layout, segment)?;
            let products = self.products(segment)?;
            match &products[..] {
                // `Expand` takes the mask from its beginning.
                [product] if product.mask.is_none() || segment.rows.start == 0 => {
                    let expand = Expand {
                        scaling: product.scaling,
                        mask: product.mask,
                    };
                    let (p, q) = (product.p.contiguous()?, product.q.contiguous()?);
                    let ((p, p_layout), (q, q_layout)) =
                        (p.storage_and_layout(), q.storage_and_layout());
                    let (Storage::Cpu(p), Storage::Cpu(q)) = (&*p, &*q) else {
                        bail!("the adapter is on another device than the input")
                    };
                    InplaceOp3::cpu_fwd(&expand, ys, &layout, p, p_layout, q, q_layout)?;
                }
                products => {
                    let sum = sum(products, segment, &layout)?;
                    add(ys, &layout, &sum, frozen::cpu_storage)?;
                }
            }
        }
        Ok(())
    }

    fn cuda_fwd(&self, ys: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.composed(ys, layout, frozen::cuda_storage)
    }

    fn metal_fwd(&self, ys: &mut MetalStorage, layout: &Layout) -> Result<()> {
        self.composed(ys, layout, frozen::metal_storage)
    }
}

/// `Σ s · mask ∘ (P Q)` of at least one product, `[rows of the segment, width]`.
fn sum(products: &[Product], segment: &Segment, layout: &Layout) -> Result<Tensor> {
    let rows = Rows::new(Some([segment.rows.clone()].into()));
    let like = &products[0].p;
    let mut sum = Tensor::zeros(layout.shape(), like.dtype(), like.device())?;
    for Product {
        p,
        q,
        scaling,
        mask,
    } in products
    {
        let (p, q) = (p.contiguous()?, q.contiguous()?);
        let expand = |scaling| Expand {
            scaling,
            mask: None,
        };
        sum = if mask.is_none() {
            expand(*scaling).add(sum, &p, &q)?
        } else {
            let product = expand(1.0).add(sum.zeros_like()?, &p, &q)?;
            (sum + (rows.masked(&product, *mask)? * *scaling)?)?
        };
    }
    Ok(sum)
}

/// Adds `delta` to the part of `ys` at `layout`, with one rounding.
fn add<S: BackendStorage>(
    ys: &mut S,
    layout: &Layout,
    delta: &Tensor,
    of: fn(&Storage) -> Option<&S>,
) -> Result<()> {
    let contiguous = Layout::contiguous(layout.shape());
    let (delta_storage, delta_layout) = delta.storage_and_layout();
    let Some(delta_storage) = of(&delta_storage) else {
        bail!("the adapter is on another device than the input")
    };
    ys.to_dtype(layout, delta.dtype())?
        .binary_impl::<Add>(delta_storage, &contiguous, delta_layout)?
        .to_dtype(&contiguous, ys.dtype())?
        .copy_strided_src(ys, layout.start_offset(), &contiguous)
}

/// The layout of a segment of a contiguous matrix.
fn segment_of(layout: &Layout, segment: &Segment) -> Result<Layout> {
    layout.narrow(0, segment.rows.start, segment.rows.len())
}
