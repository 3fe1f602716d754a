#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is what is meant"
)]

use candle_core::{DType, Device, Result, Tensor, Var, backend::BackendStorage};

use super::*;
use crate::{
    op::LoraLinear,
    philox::{halves, path_hash, philox},
};

const DEV: Device = Device::Cpu;
const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

/// Numbers in ±1/√columns that depend on `name` alone.
fn draw(name: &str, shape: (usize, usize), dtype: DType) -> Result<Tensor> {
    let [low, high] = halves(path_hash(name));
    let bound = 1.0 / (shape.1 as f64).sqrt();
    let number = |i| {
        let [word, ..] = philox::<10>([i, 0, 0, 0], [low, high]);
        bound * (f64::from(word) / f64::from(u32::MAX / 2) - 1.0)
    };
    let numbers = (0..(shape.0 * shape.1) as u32).map(number);
    Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, &DEV)?.to_dtype(dtype)
}

/// An adapter that owns its tensors.
#[derive(Clone)]
struct Adapter {
    a: Var,
    b: Var,
    bias: Option<Var>,
    scaling: f64,
    dropout: Option<(Mask, DropoutPosition)>,
    rows: Option<Vec<Range<usize>>>,
}

impl Adapter {
    fn new(
        name: &str,
        (inputs, outputs): (usize, usize),
        rank: usize,
        dtype: DType,
    ) -> Result<Self> {
        let var = |of: &str, shape| Var::from_tensor(&draw(&format!("{name}.{of}"), shape, dtype)?);
        Ok(Self {
            a: var("a", (rank, inputs))?,
            b: var("b", (outputs, rank))?,
            bias: None,
            scaling: 1.5,
            dropout: None,
            rows: None,
        })
    }

    fn bias(mut self, name: &str) -> Result<Self> {
        let (outputs, dtype) = (self.b.dim(0)?, self.b.dtype());
        let bias = draw(name, (outputs, 1), dtype)?.flatten_all()?;
        self.bias = Some(Var::from_tensor(&bias)?);
        Ok(self)
    }

    fn dropout(mut self, step: u64, position: DropoutPosition) -> Self {
        self.dropout = Mask::new(0.4, 3, 5, step).map(|mask| (mask, position));
        self
    }

    fn rows(mut self, rows: impl IntoIterator<Item = Range<usize>>) -> Self {
        self.rows = Some(rows.into_iter().collect());
        self
    }

    fn part(&self) -> Part<'_> {
        Part {
            a: &self.a,
            b: &self.b,
            bias: self.bias.as_deref(),
            scaling: self.scaling,
            dropout: self.dropout,
            rows: self.rows.clone().map(Into::into),
        }
    }

    fn acts_on(&self, row: usize) -> bool {
        let rows = self.rows.as_ref();
        rows.is_none_or(|rows| rows.iter().any(|rows| rows.contains(&row)))
    }

    /// `Δ` on all rows, by the formula, in f64; zero where the adapter does not act.
    fn dense(&self, xs: &Tensor) -> Result<Tensor> {
        let wide = |xs: &Tensor| xs.to_dtype(DType::F64);
        let masked = |xs: Tensor, position| match self.dropout {
            Some((mask, at)) if at == position => {
                xs.mul(&mask.tensor(xs.shape(), DType::F64, &DEV)?)
            }
            _ => Ok(xs),
        };
        let (tokens, outputs) = (xs.dim(0)?, self.b.dim(0)?);
        let input = masked(wide(xs)?, DropoutPosition::Pre)?;
        let mut delta = input
            .matmul(&wide(&self.a)?.t()?)?
            .matmul(&wide(&self.b)?.t()?)?;
        if let Some(bias) = &self.bias {
            delta = delta.broadcast_add(&wide(bias)?)?;
        }
        let delta = masked((delta * self.scaling)?, DropoutPosition::Post)?;
        let acts = (0..tokens).map(|row| f64::from(u8::from(self.acts_on(row))));
        let acts = Tensor::from_vec(acts.collect::<Vec<_>>(), (tokens, 1), &DEV)?;
        delta.mul(&acts.broadcast_as((tokens, outputs))?)
    }
}

fn base((inputs, outputs): (usize, usize), dtype: DType) -> Result<FrozenLinear> {
    let bias = draw("base.bias", (outputs, 1), dtype)?.flatten_all()?;
    Ok(FrozenLinear::new(
        draw("base", (outputs, inputs), dtype)?,
        Some(bias),
    ))
}

fn run(base: &FrozenLinear, xs: &Tensor, adapters: &[Adapter]) -> Result<Tensor> {
    let parts = adapters.iter().map(Adapter::part).collect::<Vec<_>>();
    apply(base, xs, &parts)
}

fn values(xs: &Tensor) -> Result<Vec<f64>> {
    xs.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Three adapters of different ranks: everywhere with a bias, on overlapping rows, on one row.
fn mixed(sizes: (usize, usize), dtype: DType) -> Result<Vec<Adapter>> {
    Ok(vec![
        Adapter::new("x", sizes, 3, dtype)?
            .bias("x.bias")?
            .rows([0..4, 6..9]),
        Adapter::new("y", sizes, 8, dtype)?.rows([2..7]),
        Adapter::new("z", sizes, 1, dtype)?
            .bias("z.bias")?
            .rows([10..11]),
    ])
}

#[test]
fn every_type_computes_the_formula_and_rounds_once() -> Result<()> {
    let sizes = (19, 33);
    for base_dtype in FLOATS {
        let base = base(sizes, base_dtype)?;
        let xs = (draw("xs", (13, 19), base_dtype)? * 4.0)?;
        let ys_of_base = base.apply(&xs)?;
        for dtype in FLOATS {
            let everywhere = [
                Adapter::new("u", sizes, 2, dtype)?.bias("u.bias")?,
                Adapter::new("v", sizes, 5, dtype)?,
            ];
            for adapters in [&mixed(sizes, dtype)?[..], &everywhere, &everywhere[..1]] {
                let ys = run(&base, &xs, adapters)?;
                assert_eq!(ys.dtype(), base_dtype);
                let mut exact = ys_of_base.to_dtype(DType::F64)?;
                for adapter in adapters {
                    exact = (exact + adapter.dense(&xs)?)?;
                }
                // Of the base's type, and of the sums.
                let (roundoff, sums) = match base_dtype {
                    DType::BF16 => (2f64.powi(-8), 1e-6),
                    DType::F16 => (2f64.powi(-11), 1e-6),
                    DType::F32 => (2f64.powi(-24), 1e-6),
                    _ => (0.0, 1e-13),
                };
                for (y, exact) in values(&ys)?.iter().zip(values(&exact)?) {
                    let bound = roundoff * exact.abs() + sums;
                    assert!(
                        (y - exact).abs() <= bound,
                        "{base_dtype:?} {dtype:?}: {y} {exact}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_sum_over_a_half_base_is_the_rounding_of_the_whole_sum() -> Result<()> {
    let sizes = (16, 24);
    let base = base(sizes, DType::BF16)?;
    let xs = draw("xs", (9, 16), DType::BF16)?;
    let adapters = [
        Adapter::new("x", sizes, 4, DType::F32)?,
        Adapter::new("y", sizes, 2, DType::F32)?.rows([1..6]),
        Adapter::new("z", sizes, 2, DType::F32)?.dropout(1, DropoutPosition::Post),
    ];
    let mut exact = base.apply(&xs)?.to_dtype(DType::F64)?;
    for adapter in &adapters {
        exact = (exact + adapter.dense(&xs)?)?;
    }
    let rounded = exact.to_dtype(DType::F32)?.to_dtype(DType::BF16)?;
    let same = values(&run(&base, &xs, &adapters)?)?
        .iter()
        .zip(values(&rounded)?)
        .filter(|(a, b)| **a == *b)
        .count();
    // All but those that f32 sums put on the other side of a tie.
    assert!(same >= 9 * 24 - 1, "{same} of {}", 9 * 24);
    Ok(())
}

#[test]
fn rows_without_a_part_are_the_bases_bits() -> Result<()> {
    let sizes = (12, 20);
    for dtype in FLOATS {
        let base = base(sizes, dtype)?;
        let mut rows = vec![vec![0.5f32; 12]; 13];
        rows[5] = vec![f32::NAN; 12];
        rows[9] = vec![f32::INFINITY; 12];
        rows[12] = vec![-0.0; 12];
        let xs = Tensor::new(rows, &DEV)?.to_dtype(dtype)?;
        let adapters = [
            Adapter::new("x", sizes, 3, DType::F32)?
                .bias("x")?
                .rows([0..1, 7..8]),
            Adapter::new("y", sizes, 3, DType::F32)?
                .dropout(2, DropoutPosition::Post)
                .rows([3..5]),
        ];
        let (ys, plain) = (run(&base, &xs, &adapters)?, base.apply(&xs)?);
        for row in 0..13 {
            let bits = |ys: &Tensor| -> Result<Vec<u64>> {
                Ok(values(&ys.get(row)?)?
                    .into_iter()
                    .map(f64::to_bits)
                    .collect())
            };
            let acted_on = adapters.iter().any(|adapter| adapter.acts_on(row));
            assert_eq!(
                bits(&ys)? == bits(&plain)?,
                !acted_on,
                "{dtype:?} row {row}"
            );
        }
    }
    Ok(())
}

#[test]
fn one_part_on_all_rows_is_lora_linear_bit_for_bit() -> Result<()> {
    use DropoutPosition::{Post, Pre};
    for (dtype, dropout) in FLOATS
        .into_iter()
        .flat_map(|dtype| [None, Some(Pre), Some(Post)].map(|at| (dtype, at)))
    {
        let sizes = (21, 18);
        let base = base(sizes, dtype)?;
        let xs = Var::from_tensor(&draw("xs", (11, 21), dtype)?)?;
        let mut adapter = Adapter::new("x", sizes, 4, DType::F32)?;
        if let Some(at) = dropout {
            adapter = adapter.dropout(9, at);
        }
        let whole = adapter.clone().rows([0..11]);
        let pair = (adapter.a.as_tensor(), adapter.b.as_tensor());
        let expected = LoraLinear::apply(&base, &xs, pair, 1.5, adapter.dropout)?;
        let expected_grads = expected.sqr()?.sum_all()?.backward()?;
        for adapter in [&adapter, &whole] {
            let ys = run(&base, &xs, std::slice::from_ref(adapter))?;
            assert_eq!(values(&ys)?, values(&expected)?, "{dtype:?} {dropout:?}");
            let grads = ys.sqr()?.sum_all()?.backward()?;
            for var in [&xs, &adapter.a, &adapter.b] {
                let of = |grads: &candle_core::backprop::GradStore| values(grads.get(var).unwrap());
                assert_eq!(of(&grads)?, of(&expected_grads)?, "{dtype:?} {dropout:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_of_a_mixed_batch_is_the_row_of_its_adapter_alone() -> Result<()> {
    use DropoutPosition::{Post, Pre};
    let sizes = (21, 18);
    for dtype in [DType::F32, DType::BF16] {
        for position in [None, Some(Pre), Some(Post)] {
            let base = base(sizes, dtype)?;
            let xs = draw("xs", (11, 21), dtype)?;
            let adapter = |name, step, rank| -> Result<Adapter> {
                let adapter = Adapter::new(name, sizes, rank, DType::F32)?.bias(name)?;
                Ok(match position {
                    Some(at) => adapter.dropout(step, at),
                    None => adapter,
                })
            };
            let (x, y) = (adapter("x", 1, 3)?, adapter("y", 2, 4)?);
            let batch = [x.clone().rows([0..2, 5..6]), y.clone().rows([2..3, 6..11])];
            let ys = run(&base, &xs, &batch)?;
            let alone = [run(&base, &xs, &[x])?, run(&base, &xs, &[y])?];
            for row in 0..11 {
                let expected = match batch.iter().position(|adapter| adapter.acts_on(row)) {
                    Some(which) => alone[which].get(row)?,
                    None => base.apply(&xs)?.get(row)?,
                };
                let ys = values(&ys.get(row)?)?;
                assert_eq!(ys, values(&expected)?, "{dtype:?} {position:?} row {row}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_any_device_adds_is_what_the_cpu_adds() -> Result<()> {
    let sizes = (21, 18);
    for dtype in FLOATS {
        let base = base(sizes, dtype)?;
        let xs = draw("xs", (13, 21), dtype)?;
        let input = xs.to_dtype(compute_dtype(dtype))?;
        let mut terms = Vec::new();
        for (adapter, position) in mixed(sizes, input.dtype())?.into_iter().zip([
            DropoutPosition::Pre,
            DropoutPosition::Post,
            DropoutPosition::Post,
        ]) {
            let adapter = adapter.dropout(1, position);
            let mut b = adapter.b.t()?;
            if let Some(bias) = &adapter.bias {
                b = Tensor::cat(&[b, bias.unsqueeze(0)?], 0)?;
            }
            let b = b.contiguous()?;
            terms.push(Term::new(
                &adapter.part(),
                &input,
                (&adapter.a, &b),
                (0, 0),
            )?);
        }
        let segments = Segment::of(terms.iter().map(|term| &term.rows), 13);
        let op = PartsLinear {
            base: base.clone(),
            terms,
            segments,
        };
        let ys = base.apply(&xs)?;
        let (storage, layout) = ys.storage_and_layout();
        let storage = frozen::cpu_storage(&storage).unwrap();
        let (mut fast, mut composed) = (storage.clone(), storage.clone());
        op.deltas().cpu_fwd(&mut fast, layout)?;
        op.deltas()
            .composed(&mut composed, layout, frozen::cpu_storage)?;
        let wide = |storage: &CpuStorage| -> Result<Vec<f64>> {
            Ok(match storage {
                CpuStorage::F32(values) => values.iter().map(|y| f64::from(*y)).collect(),
                CpuStorage::F64(values) => values.clone(),
                CpuStorage::BF16(values) => values.iter().map(|y| y.to_f64()).collect(),
                CpuStorage::F16(values) => values.iter().map(|y| y.to_f64()).collect(),
                other => bail!("unexpected {:?}", other.dtype()),
            })
        };
        assert_eq!(wide(&composed)?, wide(&fast)?, "{dtype:?}");
        assert_ne!(wide(&fast)?, values(&ys)?, "{dtype:?}");
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    use DropoutPosition::{Post, Pre};
    let sizes = (7, 5);
    let base = base(sizes, DType::F64)?;
    let xs = Var::from_tensor(&draw("xs", (13, 7), DType::F64)?)?;
    let [x, y, z] = &mixed(sizes, DType::F64)?[..] else {
        unreachable!("three adapters")
    };
    let everywhere = Adapter::new("w", sizes, 2, DType::F64)?.bias("w")?;
    let adapters = [
        x.clone().dropout(1, Pre),
        y.clone().dropout(2, Post),
        z.clone(),
        everywhere.clone().dropout(3, Post),
    ];
    let weights = draw("weights", (13, 5), DType::F64)?;
    let loss = || run(&base, &xs, &adapters)?.sqr()?.mul(&weights)?.sum_all();

    let grads = loss()?.backward()?;
    let vars = adapters
        .iter()
        .flat_map(|adapter| [&adapter.a, &adapter.b].into_iter().chain(&adapter.bias));
    for var in vars.chain([&xs]) {
        let kept = var.as_tensor().copy()?;
        let grad = values(grads.get(var).unwrap())?;
        for (i, grad) in grad.into_iter().enumerate() {
            let at = |offset: f64| -> Result<f64> {
                let mut moved = values(&kept)?;
                moved[i] += offset;
                var.set(&Tensor::from_vec(moved, kept.shape(), &DEV)?)?;
                loss()?.to_scalar()
            };
            let difference = (at(1e-4)? - at(-1e-4)?) / 2e-4;
            assert!(
                (grad - difference).abs() < 1e-7,
                "{grad} is not {difference}"
            );
        }
        var.set(&kept)?;
    }
    Ok(())
}

#[test]
fn base_gets_no_gradient_and_an_untracked_input_none() -> Result<()> {
    let (weight, bias) = (
        draw("w", (5, 7), DType::F32)?,
        draw("b", (5, 1), DType::F32)?,
    );
    let (weight, bias) = (
        Var::from_tensor(&weight)?,
        Var::from_tensor(&bias.flatten_all()?)?,
    );
    let base = FrozenLinear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    let xs = draw("xs", (13, 7), DType::F32)?;
    let adapters = mixed((7, 5), DType::BF16)?;
    let grads = run(&base, &xs, &adapters)?.sum_all()?.backward()?;
    for frozen in [weight.as_tensor(), bias.as_tensor(), &xs] {
        assert!(grads.get(frozen).is_none());
    }
    for adapter in &adapters {
        let grad = grads.get(&adapter.a).unwrap();
        assert_eq!((grad.dtype(), grad.dims()), (DType::BF16, adapter.a.dims()));
    }
    Ok(())
}

#[test]
fn empty_inputs_and_parts_without_rows() -> Result<()> {
    let sizes = (7, 5);
    let base = base(sizes, DType::F32)?;
    let nothing = Tensor::zeros((0, 7), DType::F32, &DEV)?;
    let adapters = [
        Adapter::new("x", sizes, 3, DType::F32)?.bias("x")?,
        Adapter::new("y", sizes, 2, DType::F32)?
            .bias("y")?
            .dropout(1, DropoutPosition::Post)
            .rows([]),
        Adapter::new("z", sizes, 2, DType::F32)?
            .dropout(1, DropoutPosition::Pre)
            .rows([0..0]),
    ];
    assert_eq!(run(&base, &nothing, &adapters)?.dims(), [0, 5]);
    assert_eq!(run(&base, &nothing, &[])?.dims(), [0, 5]);

    let xs = Var::from_tensor(&draw("xs", (3, 7), DType::F32)?)?;
    let ys = run(&base, &xs, &adapters)?;
    assert_eq!(values(&ys)?, values(&run(&base, &xs, &adapters[..1])?)?);
    let grads = ys.sum_all()?.backward()?;
    assert!(
        values(grads.get(&adapters[2].a).unwrap())?
            .iter()
            .all(|grad| *grad == 0.0)
    );
    assert_eq!(
        values(&run(&base, &xs, &adapters[1..])?)?,
        values(&base.apply(&xs)?)?
    );
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let sizes = (7, 5);
    let base = base(sizes, DType::F32)?;
    let xs = draw("xs", (3, 7), DType::F32)?;
    let adapter = Adapter::new("x", sizes, 2, DType::F32)?;
    for rows in [vec![0..4], vec![1..2, 0..1], vec![0..2, 1..3]] {
        let error = run(&base, &xs, &[adapter.clone().rows(rows)])
            .unwrap_err()
            .to_string();
        assert!(error.contains("are not ascending within 3"), "{error}");
    }
    let error = run(&base, &xs, &[Adapter::new("x", (8, 5), 2, DType::F32)?]).unwrap_err();
    assert!(
        error.to_string().contains("does not fit the weight [5, 7]"),
        "{error}"
    );
    let wide = Adapter {
        bias: Adapter::new("y", (7, 6), 2, DType::F32)?.bias("y")?.bias,
        ..adapter
    };
    let error = run(&base, &xs, &[wide]).unwrap_err();
    assert!(error.to_string().contains("must be [5]"), "{error}");
    Ok(())
}
