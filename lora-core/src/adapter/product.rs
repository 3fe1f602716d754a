//! The delta of a layer as a product of two thin matrices: `ΔW = B A`, the scaling inside `B`.
//!
//! `ΔW` is never formed. With `B = Q_b R_b` and `Aᵀ = Q_a R_a`, all that is large is orthonormal,
//! and norms and singular values are those of the small core `R_b R_aᵀ`.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{
    LayerWeights,
    matrix::{Matrix, Svd},
    universal::scaled_b,
};

/// `B A` in f64 on the CPU.
#[derive(Clone, Debug)]
pub(super) struct Product {
    /// `[rank, in]`
    pub a: Tensor,
    /// `[out, rank]`
    pub b: Tensor,
}

/// A product of the largest singular values alone.
pub(super) struct Truncated {
    pub product: Product,
    /// The share of the squared Frobenius norm that is kept.
    pub energy: f64,
}

impl Product {
    pub fn of(layer: &LayerWeights) -> Result<Self> {
        Ok(Self {
            a: layer.a.to_device(&Device::Cpu)?.to_dtype(DType::F64)?,
            b: scaled_b(layer)?,
        })
    }

    /// `Σ weightᵢ Bᵢ Aᵢ` without cross terms: the factors side by side.
    pub fn sum(terms: &[(Product, f64)]) -> Result<Self> {
        let a: Vec<&Tensor> = terms.iter().map(|(product, _)| &product.a).collect();
        let b = terms
            .iter()
            .map(|(product, weight)| &product.b * *weight)
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            a: Tensor::cat(&a, 0)?,
            b: Tensor::cat(&b, 1)?,
        })
    }

    /// The Frobenius norm.
    pub fn norm(&self) -> Result<f64> {
        let (_, core, _) = self.core()?;
        Ok(core.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
    }

    /// The sum of the products of corresponding elements.
    pub fn dot(&self, other: &Self) -> Result<f64> {
        let b = self.b.t()?.matmul(&other.b)?;
        let a = self.a.matmul(&other.a.t()?)?;
        (b * a)?.sum_all()?.to_scalar()
    }

    /// The matrix itself, `[out, in]`.
    pub fn dense(&self) -> Result<Tensor> {
        /// Numbers of the largest matrix that is formed: more than any layer has.
        const LARGEST: usize = 1 << 31;
        let (outputs, inputs) = (self.b.dim(0)?, self.a.dim(1)?);
        if outputs.saturating_mul(inputs) > LARGEST {
            bail!(
                "[{outputs}, {inputs}] is too large a matrix to form; combine by linear, cat or svd"
            )
        }
        self.b.matmul(&self.a)
    }

    /// The nearest matrix of at most `rank`; singular values that are rounding errors are left
    /// out even below that.
    pub fn truncated(&self, rank: usize) -> Result<Truncated> {
        const NEGLIGIBLE: f64 = 1e-14;
        let (left, core, right) = self.core()?;
        let Svd { u, values, v } = Matrix::of(&core)?.svd();
        let largest = values.first().copied().unwrap_or(0.0);
        let matters = values
            .iter()
            .filter(|value| **value > NEGLIGIBLE * largest)
            .count();
        let rank = rank.min(matters).max(1);
        let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let total = square(&values);
        let energy = if total > 0.0 {
            square(&values[..rank]) / total
        } else {
            1.0
        };
        // Both factors get the root, so that neither is much larger than the other.
        let roots: Vec<f64> = values.iter().map(|value| value.sqrt()).collect();
        let b = left
            .tensor()?
            .matmul(&u.first(rank).scaled(&roots).tensor()?)?;
        let a = right
            .tensor()?
            .matmul(&v.first(rank).scaled(&roots).tensor()?)?;
        let product = Self {
            a: a.t()?.contiguous()?,
            b,
        };
        Ok(Truncated { product, energy })
    }

    /// `Q_b`, `R_b R_aᵀ` and `Q_a`.
    fn core(&self) -> Result<(Matrix, Tensor, Matrix)> {
        let (outputs, rank) = self.b.dims2()?;
        let inputs = self.a.dim(1)?;
        if rank > outputs.min(inputs) {
            // The matrix itself is smaller than its factors, and no core may be larger.
            let whole = |size| Matrix::of(&Tensor::eye(size, DType::F64, &Device::Cpu)?);
            let dense = self.dense()?;
            return Ok(if outputs <= inputs {
                let (right, core) = Matrix::of(&dense.t()?)?.qr();
                (whole(outputs)?, core.tensor()?.t()?.contiguous()?, right)
            } else {
                let (left, core) = Matrix::of(&dense)?.qr();
                (left, core.tensor()?, whole(inputs)?)
            });
        }
        let (left, r_b) = Matrix::of(&self.b)?.qr();
        let (right, r_a) = Matrix::of(&self.a.t()?)?.qr();
        let core = r_b.tensor()?.matmul(&r_a.tensor()?.t()?)?;
        Ok((left, core, right))
    }
}
