//! Small dense linear algebra in f64: what the arithmetic of adapters rests on.

use candle_core::{DType, Device, Result, Tensor};

/// A matrix by columns.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    rows: usize,
    columns: Vec<Vec<f64>>,
}

/// `U diag(values) Vᵀ` with the values in falling order.
pub(super) struct Svd {
    pub u: Matrix,
    pub values: Vec<f64>,
    pub v: Matrix,
}

impl Matrix {
    /// The columns of a tensor of two axes.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let transposed = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.t()?;
        Ok(Self {
            rows: tensor.dim(0)?,
            columns: transposed.contiguous()?.to_vec2()?,
        })
    }

    /// As a tensor, `[rows, columns]`.
    pub fn tensor(&self) -> Result<Tensor> {
        let flat: Vec<f64> = self.columns.iter().flatten().copied().collect();
        Tensor::from_vec(flat, (self.columns.len(), self.rows), &Device::Cpu)?
            .t()?
            .contiguous()
    }

    /// The first `count` columns.
    pub fn first(mut self, count: usize) -> Self {
        self.columns.truncate(count);
        self
    }

    /// Each column times its factor.
    pub fn scaled(mut self, factors: &[f64]) -> Self {
        for (column, factor) in self.columns.iter_mut().zip(factors) {
            column.iter_mut().for_each(|value| *value *= factor);
        }
        self
    }

    /// `Q R`, by Gram and Schmidt with every projection done twice ("twice is enough", Giraud,
    /// Langou and Rozložník 2005). A column that depends on earlier ones is zero in `Q`.
    pub fn qr(self) -> (Self, Self) {
        const NEGLIGIBLE: f64 = 1e-14;
        let count = self.columns.len();
        let mut q = Vec::<Vec<f64>>::with_capacity(count);
        let mut r = vec![vec![0.0; count]; count];
        for (j, mut column) in self.columns.into_iter().enumerate() {
            let before = norm(&column);
            for _ in 0..2 {
                for (i, basis) in q.iter().enumerate() {
                    let part = dot(basis, &column);
                    r[j][i] += part;
                    add(&mut column, -part, basis);
                }
            }
            let rest = norm(&column);
            if rest > NEGLIGIBLE * before {
                column.iter_mut().for_each(|value| *value /= rest);
                r[j][j] = rest;
            } else {
                column.fill(0.0);
            }
            q.push(column);
        }
        let q = Self {
            rows: self.rows,
            columns: q,
        };
        let r = Self {
            rows: count,
            columns: r,
        };
        (q, r)
    }

    /// The singular value decomposition, by Jacobi rotations of columns (Hestenes 1958).
    pub fn svd(self) -> Svd {
        const SWEEPS: usize = 60;
        const ORTHOGONAL: f64 = 1e-15;
        let count = self.columns.len();
        let mut u = self.columns;
        let mut v: Vec<Vec<f64>> = (0..count).map(|i| unit(count, i)).collect();
        for _ in 0..SWEEPS {
            let mut rotated = false;
            for p in 0..count {
                for q in p + 1..count {
                    let (a, b, c) = (dot(&u[p], &u[p]), dot(&u[q], &u[q]), dot(&u[p], &u[q]));
                    if c == 0.0 || c.abs() <= ORTHOGONAL * (a * b).sqrt() {
                        continue;
                    }
                    rotated = true;
                    let zeta = (b - a) / (2.0 * c);
                    let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                    let cosine = 1.0 / tangent.hypot(1.0);
                    rotate(&mut u, (p, q), (cosine, cosine * tangent));
                    rotate(&mut v, (p, q), (cosine, cosine * tangent));
                }
            }
            if !rotated {
                break;
            }
        }
        let values: Vec<f64> = u.iter().map(|column| norm(column)).collect();
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&p, &q| values[q].total_cmp(&values[p]));
        let take = |columns: &mut Vec<Vec<f64>>| -> Vec<Vec<f64>> {
            order
                .iter()
                .map(|&i| std::mem::take(&mut columns[i]))
                .collect()
        };
        let (mut u, v) = (take(&mut u), take(&mut v));
        let values: Vec<f64> = order.iter().map(|&i| values[i]).collect();
        for (column, &value) in u.iter_mut().zip(&values).filter(|(_, value)| **value > 0.0) {
            column.iter_mut().for_each(|entry| *entry /= value);
        }
        Svd {
            u: Self {
                rows: self.rows,
                columns: u,
            },
            values,
            v: Self {
                rows: count,
                columns: v,
            },
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut()
        .zip(from)
        .for_each(|(to, from)| *to += factor * from);
}

fn unit(len: usize, at: usize) -> Vec<f64> {
    let mut unit = vec![0.0; len];
    unit[at] = 1.0;
    unit
}

/// Turns two columns by an angle given by its cosine and sine.
fn rotate(columns: &mut [Vec<f64>], (p, q): (usize, usize), (cosine, sine): (f64, f64)) {
    let (left, right) = columns.split_at_mut(q);
    for (a, b) in left[p].iter_mut().zip(&mut right[0]) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u32) -> Tensor {
        let values = (0..(rows * columns) as u32)
            .map(|i| f64::from(crate::philox::<7>([i, 0, 0, 0], [seed, 0])[0]) / 4e9 - 0.5)
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        let square = (a - b).unwrap().sqr().unwrap().sum_all().unwrap();
        square.to_scalar::<f64>().unwrap().sqrt()
    }

    #[test]
    fn qr_multiplies_back_and_q_is_orthonormal() {
        let a = random(9, 4, 1);
        let (q, r) = Matrix::of(&a).unwrap().qr();
        let (q, r) = (q.tensor().unwrap(), r.tensor().unwrap());
        assert!(distance(&q.matmul(&r).unwrap(), &a) < 1e-14);
        let gram = q.t().unwrap().matmul(&q).unwrap();
        let one = Tensor::eye(4, DType::F64, &Device::Cpu).unwrap();
        assert!(distance(&gram, &one) < 1e-14);
    }

    #[test]
    fn qr_of_dependent_columns_multiplies_back() {
        let a = random(5, 3, 2);
        let a = Tensor::cat(&[&a, &a, &a], 1).unwrap();
        let (q, r) = Matrix::of(&a).unwrap().qr();
        let back = q.tensor().unwrap().matmul(&r.tensor().unwrap()).unwrap();
        assert!(distance(&back, &a) < 1e-13);
    }

    #[test]
    fn svd_multiplies_back_with_falling_values() {
        let a = random(6, 6, 3).matmul(&random(6, 6, 4)).unwrap();
        let svd = Matrix::of(&a).unwrap().svd();
        assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]));
        let u = svd.u.scaled(&svd.values).tensor().unwrap();
        let back = u.matmul(&svd.v.tensor().unwrap().t().unwrap()).unwrap();
        assert!(distance(&back, &a) < 1e-13);
    }
}
