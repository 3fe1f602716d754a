//! One linear with its adapter.
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

use cudarc::driver::{CudaStream, CudaView};

use crate::dropout::{Dropout, Place};
use crate::element::{DType, Element};
use crate::error::{Error, Result, expect_size};
use crate::flags::Flags;
use crate::gemm::{F32Math, Product};
use crate::kernels::Kernels;
use crate::launch::Launcher;
use crate::pack::{Matrices, Source};
use crate::path::{Path, Reason};
use crate::rows::Rows;

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

/// An adapter in the dtype of the base, padded and laid out for the kernels.
///
/// A forward makes it and its backward reads it again, so the adapter is converted once a step.
#[derive(Debug)]
pub struct Packed<T> {
    matrices: Matrices<T>,
    has_a_cols: bool,
    /// Of the launches that read it.
    pub(crate) flags: Flags,
}

impl<T> Packed<T> {
    /// A `[rank, in]`
    pub(crate) fn a_rows(&self) -> CudaView<'_, T> {
        self.matrices.at(0)
    }

    /// B `[out, rank]`
    pub(crate) fn b_cols(&self) -> CudaView<'_, T> {
        self.matrices.at(1)
    }

    /// Bᵀ `[rank, out]`
    pub(crate) fn b_rows(&self) -> CudaView<'_, T> {
        self.matrices.at(2)
    }

    /// Aᵀ `[in, rank]`
    pub(crate) fn a_cols(&self) -> Option<CudaView<'_, T>> {
        self.has_a_cols.then(|| self.matrices.at(3))
    }
}

impl Kernels {
    /// How [`Kernels::forward`] computes this layer, and why not faster.
    pub fn forward_path<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
    ) -> Path {
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        if linear.decodes(&launcher, xs) {
            return Path::Decode;
        }
        linear.path(&launcher, Product::Forward, xs)
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
}

impl<T: Element, P: Element> LoraLinear<'_, T, P> {
    /// The adapter as the kernels read it: all that forward and backward need, but for A by columns,
    /// which only the general path's backward reads; `rows` is the number of tokens.
    pub(crate) fn pack(&self, launcher: &Launcher, rows: usize, a_cols: bool) -> Result<Packed<T>> {
        let (rank, wide, out) = (self.rank, self.in_features, self.out_features);
        let sources = [
            Source::a_rows(&self.a, rank, wide),
            Source::b_cols(&self.b, rank, out),
            Source::b_rows(&self.b, rank, out),
            Source::a_cols(&self.a, rank, wide),
        ];
        let count = if a_cols { 4 } else { 3 };
        let flags = Flags::new::<T>(launcher, rows)?;
        Ok(Packed {
            matrices: flags.zeroed_by(|words| launcher.pack(&sources[..count], words))?,
            has_a_cols: a_cols,
            flags,
        })
    }

    pub(crate) fn decodes(&self, launcher: &Launcher, xs: &Rows<T>) -> bool {
        launcher.decodes(xs, self, !self.undropped())
    }

    /// Whether nothing is dropped in this step.
    pub(crate) fn undropped(&self) -> bool {
        let masked = |place| Dropout::at(self.dropout, place).is_some();
        !masked(Place::Pre) && !masked(Place::Post)
    }

    pub(crate) fn path(&self, launcher: &Launcher, product: Product, input: &Rows<T>) -> Path {
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
        let weight = (&self.weight, self.out_features, self.in_features);
        launcher.path(product, input, weight, self.rank, mask)
    }

    pub(crate) fn check_input(&self, xs: &Rows<T>) -> Result<()> {
        expect_size("width of the input", self.in_features, xs.cols)?;
        xs.check("input")
    }

    pub(crate) fn check_output_gradient(&self, dys: &Rows<T>) -> Result<()> {
        expect_size("width of the output gradient", self.out_features, dys.cols)?;
        dys.check("output gradient")
    }

    pub(crate) fn check(&self) -> Result<()> {
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
