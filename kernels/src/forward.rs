//! `y = x Wᵀ + b + S Bᵀ`

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::dropout::{Dropout, Place};
use crate::element::Element;
use crate::error::{Result, expect_size};
use crate::gemm::{F32Math, Product, Shape};
use crate::hopper::Fused;
use crate::kernels::Kernels;
use crate::launch::Launcher;
use crate::linear::{LoraLinear, Packed};
use crate::low::{Low, Made};
use crate::making::MOST_MADE;
use crate::masking::Masking;
use crate::path::Path;
use crate::rows::{Rows, padded_rank};
use crate::skinny::{RowsMut, Scales};

/// What a forward returns.
#[derive(Debug)]
pub struct Forward<T> {
    /// Output `[tokens, out_features]`, packed.
    pub ys: CudaSlice<T>,
    /// Kept for backward, besides the input.
    pub saved: Saved<T>,
}

/// What a backward needs of its forward: the rank-sized product `S` and the packed adapter.
#[derive(Debug)]
pub struct Saved<T> {
    /// `[tokens, padded_rank]`
    pub(crate) s: CudaSlice<T>,
    /// None of a decode, which reads the adapter as it is kept.
    pub(crate) packed: Option<Packed<T>>,
}

impl Kernels {
    /// `y = x Wᵀ + b + s · D(x) Aᵀ Bᵀ` on `stream`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::AdapterDType`](crate::Error::AdapterDType) for
    /// arguments that do not fit, [`Error::OutOfMemory`](crate::Error::OutOfMemory),
    /// [`Error::Compile`](crate::Error::Compile) at first use, [`Error::Driver`](crate::Error::Driver) and
    /// [`Error::Blas`](crate::Error::Blas) from the device.
    pub fn forward<T: Element, P: Element>(
        &self,
        stream: &Arc<CudaStream>,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
    ) -> Result<Forward<T>> {
        linear.check()?;
        linear.check_input(xs)?;
        let launcher = Launcher {
            kernels: self,
            stream,
        };
        let cols = padded_rank(linear.rank);
        let mut s = launcher.alloc("the rank-sized product", xs.rows * cols)?;
        let mut ys = launcher.alloc("the output", xs.rows * linear.out_features)?;
        if linear.decodes(&launcher, xs) {
            launcher.decode(xs, linear, (&mut ys, &mut s))?;
            let packed = None;
            return Ok(Forward {
                ys,
                saved: Saved { s, packed },
            });
        }
        let path = linear.path(&launcher, Product::Forward, xs);
        let packed = linear.pack(&launcher, xs.rows, path != Path::Hopper)?;
        let pre = Dropout::at(linear.dropout, Place::Pre);
        let made = path == Path::Hopper
            && Dropout::at(linear.dropout, Place::Post).is_none()
            && cols <= MOST_MADE;
        if made {
            packed.flags.forward(|flags| {
                let made = Made {
                    down: &packed.a_rows(),
                    ranks: cols,
                    scale: linear.scaling,
                    into: &mut s,
                    mask: pre,
                };
                launcher.hopper_output(xs, Low::Made(made), linear, &packed, flags, &mut ys)
            })?;
        } else {
            let mut columns = RowsMut {
                data: s.as_view_mut(),
                cols,
                stride: cols,
            };
            let scales = Scales::all(linear.scaling);
            launcher.shrink(xs, &packed.a_rows(), &scales, pre, (&mut columns, true))?;
            let low = Rows::packed(s.as_view(), xs.rows, cols);
            launcher.output(xs, &low, linear, &packed, path, &mut ys)?;
        }
        Ok(Forward {
            ys,
            saved: Saved {
                s,
                packed: Some(packed),
            },
        })
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

impl Launcher<'_> {
    /// `ys = x Wᵀ + b + D(S Bᵀ)`
    pub fn output<T: Element, P: Element>(
        &self,
        xs: &Rows<T>,
        s: &Rows<T>,
        linear: &LoraLinear<T, P>,
        packed: &Packed<T>,
        path: Path,
        ys: &mut CudaSlice<T>,
    ) -> Result<()> {
        match path {
            Path::Hopper => self.hopper_output(xs, Low::Given(s), linear, packed, None, ys),
            Path::Decode | Path::General(_) => {
                let mask = Dropout::at(linear.dropout, Place::Post);
                let (b, bias) = (packed.b_cols(), linear.bias.as_ref());
                self.expand(s, &b, bias, mask, (ys, linear.out_features))?;
                self.accumulate(Product::Forward, xs, linear, ys)
            }
        }
    }

    /// [`Self::output`] by the Hopper path.
    fn hopper_output<T: Element, P: Element>(
        &self,
        xs: &Rows<T>,
        s: Low<T>,
        linear: &LoraLinear<T, P>,
        packed: &Packed<T>,
        flags: Option<&mut CudaViewMut<u32>>,
        ys: &mut CudaSlice<T>,
    ) -> Result<()> {
        let fused = Fused {
            product: Product::Forward,
            input: xs,
            weight: &linear.weight,
            w_rows: linear.out_features,
            w_cols: linear.in_features,
            bias: linear.bias.as_ref(),
            q: s,
            p: &packed.b_cols(),
            masking: Masking::drawn(Dropout::at(linear.dropout, Place::Post)),
            side: None,
        };
        self.fused(fused, flags, ys).map(drop)
    }

    /// `out += input · op(W)`
    pub fn accumulate<T: Element, P: Element>(
        &self,
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
        self.kernels
            .blas()
            .run(self.stream, shape, &linear.weight, &input.data, out)
    }
}
