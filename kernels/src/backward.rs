//! `dS = s · dY B`, `dx = dY W + D'(dS A)`, `dA = dSᵀ D(x)`, `dB = dYᵀ S`

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut};

use crate::dropout::{Dropout, Mask, Place};
use crate::element::Element;
use crate::error::{Result, expect_size};
use crate::forward::Saved;
use crate::gemm::Product;
use crate::hopper::Fused;
use crate::kernels::Kernels;
use crate::launch::Launcher;
use crate::linear::{LoraLinear, Packed};
use crate::low::{Low, Made};
use crate::making::MOST_MADE;
use crate::masking::Masking;
use crate::pack::Source;
use crate::path::Path;
use crate::reduce::{Gradient, Sum};
use crate::rows::{Rows, padded_rank};
use crate::side::{Pace, Parts, SideWork};
use crate::skinny::{RowsMut, Scales};
use crate::sweep::{Down, Next};

/// What a backward returns.
#[derive(Debug)]
pub struct Gradients<T, P> {
    /// Gradient of the input `[tokens, in_features]`, if it was asked for.
    pub xs: Option<CudaSlice<T>>,
    /// Gradient of A `[rank, in_features]`.
    pub a: CudaSlice<P>,
    /// Gradient of B `[out_features, rank]`.
    pub b: CudaSlice<P>,
}

/// Whether backward computes the gradient of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// Compute it.
    Wanted,
    /// Skip it: the first layer, or an input that nothing upstream trains.
    Skipped,
}

impl Kernels {
    /// Gradients of a forward with the same `xs`, `linear` and dropout, given `dys = dL/dy`.
    ///
    /// # Errors
    /// Those of [`Kernels::forward`].
    pub fn backward<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        dys: &Rows<T>,
        saved: &Saved<T>,
        linear: &LoraLinear<T, P>,
        input: InputGradient,
    ) -> Result<Gradients<T, P>> {
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let mut a = launcher.alloc("the gradient of A", linear.rank * linear.in_features)?;
        let mut b = launcher.alloc("the gradient of B", linear.out_features * linear.rank)?;
        let into = (&mut a.as_view_mut(), &mut b.as_view_mut());
        let xs = self.backward_to(stream, xs, dys, saved, linear, input, into, false)?;
        Ok(Gradients { xs, a, b })
    }

    /// Like [`Kernels::backward`], but adds the gradients of A and B to `a` and `b`: gradient
    /// accumulation over micro-batches without a pass of its own. Returns the gradient of the input.
    ///
    /// # Errors
    /// Those of [`Kernels::forward`].
    #[allow(clippy::too_many_arguments)] // the arguments of `backward` and two buffers
    pub fn backward_accumulate<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        dys: &Rows<T>,
        saved: &Saved<T>,
        linear: &LoraLinear<T, P>,
        input: InputGradient,
        (a, b): (&mut CudaViewMut<P>, &mut CudaViewMut<P>),
    ) -> Result<Option<CudaSlice<T>>> {
        self.backward_to(stream, xs, dys, saved, linear, input, (a, b), true)
    }

    #[allow(clippy::too_many_arguments)] // as above
    fn backward_to<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        dys: &Rows<T>,
        saved: &Saved<T>,
        linear: &LoraLinear<T, P>,
        input: InputGradient,
        (a_grad, b_grad): (&mut CudaViewMut<P>, &mut CudaViewMut<P>),
        accumulate: bool,
    ) -> Result<Option<CudaSlice<T>>> {
        let LoraLinear {
            rank,
            in_features,
            out_features,
            ..
        } = *linear;
        let (rows, cols) = (xs.rows, padded_rank(rank));
        linear.check()?;
        linear.check_input(xs)?;
        linear.check_output_gradient(dys)?;
        expect_size("rows of the output gradient", rows, dys.rows)?;
        expect_size("saved product of the forward", rows * cols, saved.s.len())?;
        expect_size("gradient of A", rank * in_features, a_grad.len())?;
        expect_size("gradient of B", out_features * rank, b_grad.len())?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let pre = Dropout::at(linear.dropout, Place::Pre);
        let post = Dropout::at(linear.dropout, Place::Post);

        let s = Rows::packed(saved.s.as_view(), rows, cols);
        let again;
        let packed = match &saved.packed {
            Some(packed) => packed,
            None => {
                again = linear.pack(&launcher, rows, false)?;
                &again
            }
        };
        let hopper = input == InputGradient::Wanted
            && linear.path(&launcher, Product::Backward, dys) == Path::Hopper;
        packed.flags.backward(&launcher, |flags| {
            let beside = hopper && cols <= MOST_MADE && flags.is_some();
            let mut ds = launcher.alloc("the rank-sized gradient", rows * cols)?;
            let pace = Pace {
                ranks: cols,
                masked: pre.is_some(),
            };
            let made = beside && post.is_none() && launcher.makes_backward(dys, xs, pace);
            // Where a mask is read, dS holds its scale, for dx and dA.
            let (mask, mask_scale) = pre.filter(|_| hopper).map(Mask::split).unzip();
            let scale = linear.scaling * mask_scale.unwrap_or(1.0);
            let mut bits = mask
                .map(|mask| launcher.bits((rows, in_features), mask))
                .transpose()?;
            let a_beside = beside && launcher.aligned(xs);
            let swept = if made {
                bits.as_mut().map_or(Ok(()), |bits| launcher.draw(bits))?;
                None
            } else {
                let first_col = if a_beside {
                    launcher.sweeps_from(dys, xs, pace)
                } else {
                    // The pass reads no mask but the one that it draws.
                    let masked = pre.is_some() && bits.is_none();
                    (!masked && launcher.sweeps_next(dys, cols, xs, xs.cols)).then_some(0)
                };
                let mut columns = RowsMut {
                    data: ds.as_view_mut(),
                    cols,
                    stride: cols,
                };
                let down = Down {
                    p: &packed.b_rows(),
                    scales: &Scales::all(scale),
                    s: &mut columns,
                    bits: bits.as_mut(),
                    next: first_col.map(|first_col| Next { xs, first_col }),
                };
                launcher.shrink_and_outer(dys, down, &s, post)?
            };
            let masking = bits.as_ref().map_or(Masking::drawn(pre), Masking::Read);
            let a_grad = Gradient::of_a(&launcher, a_grad, rank, accumulate);
            let b_grad = Gradient::of_b(&launcher, b_grad, rank, accumulate);
            let b_swept = swept.as_ref().map(|swept| &swept.outer);
            let a_swept = swept.as_ref().and_then(|swept| swept.next.as_ref());
            let b_beside = beside && b_swept.is_none() && post.is_none();
            // What is not swept of the gradient of A.
            let a_cols = a_swept.map_or(xs.cols, |part| part.made.start);
            let of_a = a_swept.map(|part| Sum::new(part, &a_grad));
            let of_b = b_swept.map(|part| Sum::new(part, &b_grad));
            let mut sums: Vec<Sum> = of_a.into_iter().chain(of_b).collect();
            let side = (a_beside || b_beside).then(|| SideWork {
                a: a_beside.then_some((xs, &a_grad, a_cols)),
                b: b_beside.then_some((&s, &b_grad)),
                before: std::mem::take(&mut sums),
            });
            let (dxs, parts) = match input {
                InputGradient::Wanted => {
                    let given;
                    let low = if made {
                        Low::Made(Made {
                            down: &packed.b_rows(),
                            ranks: cols,
                            scale,
                            into: &mut ds,
                            mask: None,
                        })
                    } else {
                        given = Rows::packed(ds.as_view(), rows, cols);
                        Low::Given(&given)
                    };
                    let beside = (side, flags);
                    let (dxs, parts) =
                        launcher.input_gradient(dys, low, linear, packed, masking, beside)?;
                    (Some(dxs), parts)
                }
                InputGradient::Skipped => (None, Parts::default()),
            };
            let ds = Rows::packed(ds.as_view(), rows, cols);
            let a_part = match parts.a {
                None if !a_beside && a_cols > 0 => Some(launcher.outer(xs, &ds, masking)?),
                left => left,
            };
            let b_part = match parts.b {
                None if !b_beside && b_swept.is_none() => {
                    Some(launcher.outer(dys, &s, Masking::drawn(post))?)
                }
                left => left,
            };
            sums.extend(a_part.as_ref().map(|part| Sum::new(part, &a_grad)));
            sums.extend(b_part.as_ref().map(|part| Sum::new(part, &b_grad)));
            launcher.reduce::<T>(&sums)?;
            Ok(dxs)
        })
    }
}

impl Launcher<'_> {
    /// `dx = dY W + D(dS A)`, and by the Hopper path what is to be made beside it, of which the partial
    /// sums that are left to be added up are returned.
    pub fn input_gradient<T: Element, P: Element>(
        &self,
        dys: &Rows<T>,
        ds: Low<T>,
        linear: &LoraLinear<T, P>,
        packed: &Packed<T>,
        masking: Masking,
        (side, flags): (Option<SideWork<T>>, Option<&mut CudaViewMut<u32>>),
    ) -> Result<(CudaSlice<T>, Parts)> {
        let mut dxs = self.alloc("the gradient of the input", dys.rows * linear.in_features)?;
        let parts = match (linear.path(self, Product::Backward, dys), ds) {
            (Path::Decode | Path::General(_), Low::Given(ds)) => {
                let again; // where the forward took the Hopper path, which needs no such layout
                let a = match packed.a_cols() {
                    Some(a) => a,
                    None => {
                        let source = Source::a_cols(&linear.a, linear.rank, linear.in_features);
                        again = self.pack(&[source], None)?;
                        again.at(0)
                    }
                };
                self.expand(ds, &a, None, masking.mask(), (&mut dxs, linear.in_features))?;
                self.accumulate(Product::Backward, dys, linear, &mut dxs)?;
                Parts::default()
            }
            (_, q) => {
                let fused = Fused {
                    product: Product::Backward,
                    input: dys,
                    weight: &linear.weight,
                    w_rows: linear.out_features,
                    w_cols: linear.in_features,
                    bias: None,
                    q,
                    p: &packed.a_rows(),
                    masking,
                    side,
                };
                self.fused(fused, flags, &mut dxs)?
            }
        };
        Ok((dxs, parts))
    }
}
