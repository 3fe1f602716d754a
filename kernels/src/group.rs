//! Several linears that read one input: q, k and v, or gate and up.
//!
//! One pass over the input makes every S, one makes every gradient of A; the products of each linear
//! stay its own, and so do its adapter and its names. S and dS of a group are matrices
//! `[tokens, width]` in the dtype of the base, of which each member has [`Columns`] of its own:
//! ```text
//! forward:   shrink_group → S;  forward_from(S, columns) → y      for each member
//! backward:  backward_from(dY, S, columns) → dx, dB, dS's columns  for each member;  outer_group(dS) → every dA
//! ```
//! Dropout on the input ([`Place::Pre`]) draws another mask for each member, so such members do not
//! share a pass: they take [`Kernels::forward`] and [`Kernels::backward`].

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::backward::InputGradient;
use crate::columns::{Columns, GroupLayout};
use crate::dropout::{Dropout, Place};
use crate::element::Element;
use crate::error::{Error, Result, expect_size};
use crate::gemm::Product;

use crate::kernels::Kernels;
use crate::launch::Launcher;
use crate::linear::{LoraLinear, Packed};
use crate::low::Low;
use crate::making::MOST_MADE;
use crate::masking::Masking;
use crate::pack::Source;
use crate::path::Path;
use crate::reduce::{Gradient, Sum};
use crate::rows::Rows;
use crate::side::SideWork;
use crate::skinny::{RowsMut, Scales};
use crate::sweep::Down;

/// The half of an adapter that reads the shared input.
#[derive(Debug)]
pub struct Member<'a, P> {
    /// Adapter `[rank, in_features]`, packed.
    pub a: CudaView<'a, P>,
    /// Rank of the adapter.
    pub rank: usize,
    /// Factor of the adapter's product.
    pub scaling: f32,
}

/// What [`Kernels::forward_from`] returns.
#[derive(Debug)]
pub struct Grouped<T> {
    /// Output `[tokens, out_features]`, packed.
    pub ys: CudaSlice<T>,
    /// Kept for backward, besides S.
    pub packed: Packed<T>,
}

impl Kernels {
    /// S of all members, `[tokens, width]` of [`GroupLayout`]: `s_i · x A_iᵀ` in the columns of member
    /// `i`, in one pass over `xs`.
    ///
    /// # Errors
    /// Those of [`Kernels::forward`] and [`GroupLayout::new`].
    pub fn shrink_group<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        members: &[Member<P>],
    ) -> Result<CudaSlice<T>> {
        let ranks: Vec<usize> = members.iter().map(|member| member.rank).collect();
        let layout = GroupLayout::new(&ranks)?;
        xs.check("input")?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let mut scales = Scales::all(1.0);
        let mut sources = Vec::with_capacity(members.len());
        for (member, columns) in members.iter().zip(layout.columns()) {
            expect_size("adapter A", member.rank * xs.cols, member.a.len())?;
            sources.push(Source::a_rows(&member.a, member.rank, xs.cols));
            let end = columns.offset() + columns.padded();
            scales.set(columns.offset() / 16..end / 16, member.scaling);
        }
        // The last member is padded up to the width.
        if let (Some(source), Some(last)) = (sources.last_mut(), layout.columns().last()) {
            source.packed_rows = layout.width() - last.offset();
        }
        let mut s = launcher.alloc("the rank-sized products", xs.rows * layout.width())?;
        let packed = launcher.pack::<T, P>(&sources, None)?;
        let mut columns = RowsMut {
            data: s.as_view_mut(),
            cols: layout.width(),
            stride: layout.width(),
        };
        launcher.shrink(xs, &packed.all(), &scales, None, (&mut columns, true))?;
        Ok(s)
    }

    /// [`Kernels::forward`] of the member with these `columns` of the group's `s`.
    ///
    /// # Errors
    /// Those of [`Kernels::forward`], and [`Error::GroupedDropout`] for dropout on the input.
    pub fn forward_from<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
        s: &CudaView<T>,
        columns: Columns,
    ) -> Result<Grouped<T>> {
        linear.check()?;
        linear.check_input(xs)?;
        linear.check_columns(columns)?;
        let s = columns.of(s, xs.rows)?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let mut ys = launcher.alloc("the output", xs.rows * linear.out_features)?;
        let path = linear.path(&launcher, Product::Forward, xs);
        let packed = linear.pack(&launcher, xs.rows, path != Path::Hopper)?;
        launcher.output(xs, &s, linear, &packed, path, &mut ys)?;
        Ok(Grouped { ys, packed })
    }

    /// Gradients of [`Kernels::forward_from`] with respect to the input, if wanted, and to B
    /// `[out_features, rank]`; writes this member's columns of `ds`.
    ///
    /// The gradient of A follows from the whole `ds`, by [`Kernels::outer_group`].
    ///
    /// # Errors
    /// Those of [`Kernels::forward_from`].
    #[allow(clippy::too_many_arguments)] // the arguments of `backward` and the group's matrices
    pub fn backward_from<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        dys: &Rows<T>,
        packed: &Packed<T>,
        linear: &LoraLinear<T, P>,
        (s, ds): (&CudaView<T>, &mut CudaViewMut<T>),
        columns: Columns,
        input: InputGradient,
    ) -> Result<(Option<CudaSlice<T>>, CudaSlice<P>)> {
        let rows = dys.rows;
        linear.check()?;
        linear.check_output_gradient(dys)?;
        linear.check_columns(columns)?;
        let s = columns.of(s, rows)?;
        expect_size("dS of the group", rows * columns.width(), ds.len())?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let post = Dropout::at(linear.dropout, Place::Post);
        let mut b = launcher.alloc("the gradient of B", linear.out_features * linear.rank)?;
        let offset = columns.offset().min(ds.len());
        let mut into = RowsMut {
            data: ds.slice_mut(offset..),
            cols: columns.padded(),
            stride: columns.width(),
        };
        let scales = Scales::all(linear.scaling);
        let down = Down {
            p: &packed.b_rows(),
            scales: &scales,
            s: &mut into,
            bits: None,
            next: None,
        };
        let swept = launcher.shrink_and_outer(dys, down, &s, post)?;
        let part = swept.map(|swept| swept.outer);
        let ds = ds.as_view();
        let ds = columns.of(&ds, rows)?;
        let hopper = input == InputGradient::Wanted
            && rows > 0
            && linear.path(&launcher, Product::Backward, dys) == Path::Hopper;
        let dxs = packed.flags.backward(&launcher, |flags| {
            let beside = hopper
                && flags.is_some()
                && (part.is_some() || post.is_none() && s.cols <= MOST_MADE);
            let mut b_view = b.as_view_mut();
            let grad = Gradient::of_b(&launcher, &mut b_view, linear.rank, false);
            let swept = part.iter().map(|part| Sum::new(part, &grad)).collect();
            let side = beside.then_some(SideWork {
                a: None,
                b: part.is_none().then_some((&s, &grad)),
                before: swept,
            });
            let (dxs, left) = match input {
                InputGradient::Wanted => {
                    let (low, beside) = (Low::Given(&ds), (side, flags));
                    let masking = Masking::Off;
                    let (dxs, parts) =
                        launcher.input_gradient(dys, low, linear, packed, masking, beside)?;
                    (Some(dxs), parts.b)
                }
                InputGradient::Skipped => (None, None),
            };
            let left = match part.filter(|_| !beside).or(left) {
                None if !beside => Some(launcher.outer(dys, &s, Masking::drawn(post))?),
                left => left,
            };
            if let Some(part) = &left {
                launcher.reduce::<T>(&[Sum::new(part, &grad)])?;
            }
            Ok(dxs)
        })?;
        Ok((dxs, b))
    }

    /// The gradients of every member's A, `[rank, in_features]` each, in one pass over `xs`; `ds` is
    /// whole, `[tokens, width]`.
    ///
    /// # Errors
    /// Those of [`Kernels::forward`].
    pub fn outer_group<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        ds: &CudaView<T>,
        layout: &GroupLayout,
    ) -> Result<Vec<CudaSlice<P>>> {
        xs.check("input")?;
        expect_size("dS of the group", xs.rows * layout.width(), ds.len())?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let mut grads = layout
            .columns()
            .iter()
            .map(|columns| launcher.alloc("a gradient of A", columns.rank() * xs.cols))
            .collect::<Result<Vec<CudaSlice<P>>>>()?;
        let ds = Rows::packed(ds.slice(..), xs.rows, layout.width());
        let partial = launcher.outer(xs, &ds, Masking::Off)?;
        let mut views: Vec<_> = grads.iter_mut().map(|grad| grad.as_view_mut()).collect();
        let gradients: Vec<_> = views
            .iter_mut()
            .zip(layout.columns())
            .map(|(view, columns)| Gradient::of_a(&launcher, view, columns.rank(), false))
            .collect();
        let sums: Vec<_> = gradients
            .iter()
            .zip(layout.columns())
            .map(|(gradient, columns)| Sum {
                partial: &partial,
                first_rank: columns.offset(),
                gradient,
            })
            .collect();
        launcher.reduce::<T>(&sums)?;
        drop(gradients);
        drop(views);
        Ok(grads)
    }
}

impl<T: Element, P: Element> LoraLinear<'_, T, P> {
    fn check_columns(&self, columns: Columns) -> Result<()> {
        expect_size("rank of the member", self.rank, columns.rank())?;
        match Dropout::at(self.dropout, Place::Pre) {
            Some(_) => Err(Error::GroupedDropout),
            None => Ok(()),
        }
    }
}
