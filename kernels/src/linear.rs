//! Forward and backward of one linear with its adapter.
//!
//! ```text
//! S  = s · D(x) Aᵀ                         [tokens, rank]   (kept for backward)
//! y  = x Wᵀ + b + S Bᵀ                     [tokens, out]
//! dS = s · dY B                            [tokens, rank]
//! dx = dY W + D'(dS A)                     [tokens, in]
//! dA = dSᵀ D(x)                            [rank, in]
//! dB = dYᵀ S                               [out, rank]
//! ```
//! With [`Place::Post`], `y = x Wᵀ + b + D(S Bᵀ)`, and `dS` and `dB` read `D'(dY)`. `D'` is the same
//! mask and scale as `D`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::dropout::{Dropout, Place};
use crate::element::{DType, Element};
use crate::error::{Error, Result, expect_size};
use crate::gemm::{F32Math, Product, Shape};
use crate::hopper::Fused;
use crate::kernels::Kernels;
use crate::path::{Path, Reason};
use crate::skinny::{Launcher, Layout, Rows, padded_rank};

/// A frozen linear and its adapter; `T` is the dtype of the base, `P` of the adapter (`T` or `f32`).
#[derive(Debug)]
pub struct LoraLinear<'a, T, P> {
    /// Frozen weight `[out_features, in_features]`, packed.
    pub weight: CudaView<'a, T>,
    /// Frozen bias `[out_features]`.
    pub bias: Option<CudaView<'a, T>>,
    /// Adapter `[rank, in_features]`, packed.
    pub a: CudaView<'a, P>,
    /// Adapter `[out_features, rank]`, packed.
    pub b: CudaView<'a, P>,
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Rank of the adapter, at least 1.
    pub rank: usize,
    /// Factor of the adapter's product: alpha / rank, or alpha / sqrt(rank).
    pub scaling: f32,
    /// Dropout of this step.
    pub dropout: Option<Dropout>,
    /// Arithmetic of f32 base products.
    pub math: F32Math,
}

/// What a forward returns.
#[derive(Debug)]
pub struct Forward<T> {
    /// Output `[tokens, out_features]`, packed.
    pub ys: CudaSlice<T>,
    /// Kept for backward, besides the input.
    pub saved: Saved<T>,
}

/// The rank-sized product `S` of a forward, which its backward needs: `[tokens, rank]`, padded.
#[derive(Debug)]
pub struct Saved<T> {
    s: CudaSlice<T>,
}

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
    /// `y = x Wᵀ + b + s · D(x) Aᵀ Bᵀ` on `stream`.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::AdapterDType`] for arguments that do not fit, [`Error::OutOfMemory`],
    /// [`Error::Compile`] at first use, [`Error::Driver`] and [`Error::Blas`] from the device.
    pub fn forward<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
    ) -> Result<Forward<T>> {
        linear.check()?;
        expect_size("width of the input", linear.in_features, xs.cols)?;
        xs.check("input")?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let LoraLinear {
            rank,
            in_features,
            out_features,
            ..
        } = *linear;
        let pre = Dropout::at(linear.dropout, Place::Pre);
        let post = Dropout::at(linear.dropout, Place::Post);

        let (a, b) = launcher.pack::<T, P>(
            (&linear.a, Layout::RankRows),
            (&linear.b, Layout::RankCols),
            rank,
            (in_features, out_features),
        )?;
        let s = launcher.shrink(xs, &a, rank, linear.scaling, pre)?;
        let ys = match linear.path(&launcher, Product::Forward, xs) {
            Path::Hopper => {
                launcher
                    .fused(Fused {
                        product: Product::Forward,
                        input: xs,
                        weight: &linear.weight,
                        w_rows: out_features,
                        w_cols: in_features,
                        bias: linear.bias.as_ref(),
                        q: &s,
                        p: &b,
                        rank,
                        mask: post,
                        side: None,
                    })?
                    .out
            }
            Path::General(_) => {
                let mut ys = launcher.expand(
                    (&s, xs.rows),
                    (&b, out_features),
                    rank,
                    linear.bias.as_ref(),
                    post,
                )?;
                self.accumulate(stream, Product::Forward, xs, linear, &mut ys)?;
                ys
            }
        };
        Ok(Forward {
            ys,
            saved: Saved { s },
        })
    }

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
        linear.check()?;
        expect_size("width of the input", linear.in_features, xs.cols)?;
        expect_size(
            "width of the output gradient",
            linear.out_features,
            dys.cols,
        )?;
        expect_size("rows of the output gradient", xs.rows, dys.rows)?;
        expect_size(
            "saved product of the forward",
            xs.rows * padded_rank(linear.rank),
            saved.s.len(),
        )?;
        expect_size(
            "gradient of A",
            linear.rank * linear.in_features,
            a_grad.len(),
        )?;
        expect_size(
            "gradient of B",
            linear.out_features * linear.rank,
            b_grad.len(),
        )?;
        xs.check("input")?;
        dys.check("output gradient")?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let LoraLinear {
            rank,
            in_features,
            out_features,
            ..
        } = *linear;
        let pre = Dropout::at(linear.dropout, Place::Pre);
        let post = Dropout::at(linear.dropout, Place::Post);

        let path = linear.path(&launcher, Product::Backward, dys);
        let a_layout = if path == Path::Hopper {
            Layout::RankRows
        } else {
            Layout::RankCols
        };
        let (a, b) = launcher.pack::<T, P>(
            (&linear.a, a_layout),
            (&linear.b, Layout::RankRows),
            rank,
            (in_features, out_features),
        )?;
        let ds = launcher.shrink(dys, &b, rank, linear.scaling, post)?;
        let (dxs, a_part, b_part) = match path {
            _ if input == InputGradient::Skipped => (None, None, None),
            Path::Hopper => {
                let widths = (out_features, in_features);
                let side = launcher.side_work(widths, rank, &saved.s, (xs, &ds), pre.is_some());
                let fused = launcher.fused(Fused {
                    product: Product::Backward,
                    input: dys,
                    weight: &linear.weight,
                    w_rows: out_features,
                    w_cols: in_features,
                    bias: None,
                    q: &ds,
                    p: &a,
                    rank,
                    mask: pre,
                    side: side.filter(|_| post.is_none()),
                })?;
                (Some(fused.out), fused.a, fused.b)
            }
            Path::General(_) => {
                let mut dxs =
                    launcher.expand((&ds, xs.rows), (&a, in_features), rank, None, pre)?;
                self.accumulate(stream, Product::Backward, dys, linear, &mut dxs)?;
                (Some(dxs), None, None)
            }
        };
        let a_part = a_part.map_or_else(|| launcher.outer(xs, &ds, rank, pre), Ok)?;
        let b_part = b_part.map_or_else(|| launcher.outer(dys, &saved.s, rank, post), Ok)?;
        launcher.reduce::<T, P>((&a_part, a_grad), (&b_part, b_grad), rank, accumulate)?;
        Ok(dxs)
    }

    /// How [`Kernels::forward`] computes this layer, and why not faster.
    pub fn forward_path<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
    ) -> Path {
        linear.path(
            &Launcher {
                kernels: self,
                stream,
            },
            Product::Forward,
            xs,
        )
    }

    /// How [`Kernels::backward`] computes the gradient of the input, and why not faster.
    pub fn backward_path<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        dys: &Rows<T>,
        linear: &LoraLinear<T, P>,
    ) -> Path {
        linear.path(
            &Launcher {
                kernels: self,
                stream,
            },
            Product::Backward,
            dys,
        )
    }

    /// `out += input · op(W)`
    fn accumulate<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        product: Product,
        input: &Rows<T>,
        linear: &LoraLinear<T, P>,
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        if input.rows == 0 {
            return Ok(());
        }
        let shape = Shape {
            product,
            rows: input.rows,
            w_rows: linear.out_features,
            w_cols: linear.in_features,
            stride: input.stride,
            accumulate: true,
            math: linear.math,
        };
        self.blas()
            .run(stream, shape, &linear.weight, &input.data, out)
    }

    /// The frozen product alone, `x Wᵀ` or `dY W`: the baseline of benchmarks.
    ///
    /// # Errors
    /// Those of [`Kernels::forward`].
    #[doc(hidden)]
    pub fn frozen<T: Element>(
        &self,
        stream: &Arc<CudaStream>,
        input: &Rows<T>,
        (weight, out_features, in_features): (&CudaView<T>, usize, usize),
        backward: bool,
    ) -> Result<CudaSlice<T>> {
        let (product, cols) = if backward {
            (Product::Backward, in_features)
        } else {
            (Product::Forward, out_features)
        };
        expect_size("weight", out_features * in_features, weight.len())?;
        expect_size(
            "width of the input",
            if backward { out_features } else { in_features },
            input.cols,
        )?;
        input.check("input")?;
        let mut out = Launcher {
            kernels: self,
            stream,
        }
        .alloc("the output", input.rows * cols)?;
        let shape = Shape {
            product,
            rows: input.rows,
            w_rows: out_features,
            w_cols: in_features,
            stride: input.stride,
            accumulate: false,
            math: F32Math::Exact,
        };
        self.blas()
            .run(stream, shape, weight, &input.data, &mut out)?;
        Ok(out)
    }
}

impl<T: Element, P: Element> LoraLinear<'_, T, P> {
    fn path(&self, launcher: &Launcher, product: Product, input: &Rows<T>) -> Path {
        let place = if product == Product::Forward {
            Place::Post
        } else {
            Place::Pre
        };
        let mask = Dropout::at(self.dropout, place);
        let pairs = |bias| launcher.address(bias).is_multiple_of(4); // the kernel reads two halves at once
        if product == Product::Forward && !self.bias.as_ref().is_none_or(pairs) {
            return Path::General(Reason::Alignment);
        }
        launcher.path(
            product,
            input,
            (&self.weight, self.out_features, self.in_features),
            self.rank,
            mask,
        )
    }

    fn check(&self) -> Result<()> {
        if P::DTYPE != T::DTYPE && P::DTYPE != DType::F32 {
            return Err(Error::AdapterDType {
                adapter: P::DTYPE,
                base: T::DTYPE,
            });
        }
        for (what, size) in [
            ("rank", self.rank),
            ("in_features", self.in_features),
            ("out_features", self.out_features),
        ] {
            if size == 0 || size > i32::MAX as usize / 2 {
                return Err(Error::Shape {
                    what,
                    expected: "1 to 1073741823".into(),
                    found: size.to_string(),
                });
            }
        }
        expect_size(
            "weight",
            self.out_features * self.in_features,
            self.weight.len(),
        )?;
        expect_size("adapter A", self.rank * self.in_features, self.a.len())?;
        expect_size("adapter B", self.out_features * self.rank, self.b.len())?;
        self.bias.as_ref().map_or(Ok(()), |bias| {
            expect_size("bias", self.out_features, bias.len())
        })
    }
}
