//! The adapted linear layer: forward and gradients of every dtype, shape and option.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use lora_core::{
    ComputePath,
    DropoutPosition::{self, Post, Pre},
    LinearLoRA, PeftConfig,
};
use lora_tests::{randn, relative_error, to_vec};

use crate::card;

/// A layer with a random adapter: B is not zero, alpha / rank is not one.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    bias: bool,
    dropout: Option<(f64, DropoutPosition)>,
    base: DType,
    adapter: DType,
}

impl Case {
    fn new(tokens: usize, inputs: usize, outputs: usize, rank: usize) -> Self {
        Self {
            tokens,
            inputs,
            outputs,
            rank,
            bias: false,
            dropout: None,
            base: DType::F32,
            adapter: DType::F32,
        }
    }

    fn of(self, base: DType, adapter: DType) -> Self {
        Self {
            base,
            adapter,
            ..self
        }
    }

    /// The same numbers on any device and, beyond rounding to the case's types, in any type.
    fn layer(&self, device: &Device, base: DType, adapter: DType) -> lora_core::Result<LinearLoRA> {
        let mut config = PeftConfig::all_linear()
            .dim(self.rank)
            .alpha(1.7 * self.rank as f64)
            .lora_dtype(adapter)
            .seed(3);
        if let Some((p, position)) = self.dropout {
            config = config.dropout(p).dropout_position(position);
        }
        let scale = 1.0 / (self.inputs as f64).sqrt();
        let place = |tensor: Tensor, own: DType, to: DType| {
            tensor.to_dtype(own)?.to_dtype(to)?.to_device(device)
        };
        let weight = (randn(1, (self.outputs, self.inputs), DType::F32) * scale)?;
        let weight = place(weight, self.base, base)?;
        let bias = match self.bias {
            true => Some(place(randn(2, self.outputs, DType::F32), self.base, base)?),
            false => None,
        };
        let layer = LinearLoRA::new("layers.7.proj", weight, bias, &config.adapter()?)?;
        let a = (randn(4, (self.rank, self.inputs), DType::F32) * scale)?;
        let b = randn(5, (self.outputs, self.rank), DType::F32);
        layer.lora_a().set(&place(a, self.adapter, adapter)?)?;
        layer.lora_b().set(&place(b, self.adapter, adapter)?)?;
        Ok(layer)
    }

    fn input(&self) -> Result<Tensor> {
        randn(9, (self.tokens, self.inputs), DType::F32).to_dtype(self.base)
    }

    fn output_gradient(&self) -> Result<Tensor> {
        randn(11, (self.tokens, self.outputs), DType::F32).to_dtype(self.base)
    }

    /// `[ys, dxs, dA, dB]` in f64 on the CPU, computed in the case's types on `device`.
    fn run(&self, device: &Device) -> lora_core::Result<[Tensor; 4]> {
        let layer = self.layer(device, self.base, self.adapter)?;
        let xs = self.input()?.to_device(device)?;
        let g = self.output_gradient()?.to_device(device)?;
        run(&layer, &xs, &g)
    }

    /// The same by the plain formula in f64 on the CPU.
    fn exact(&self) -> lora_core::Result<[Tensor; 4]> {
        let layer = self.layer(&Device::Cpu, DType::F64, DType::F64)?;
        let xs = self.input()?.to_dtype(DType::F64)?;
        let g = self.output_gradient()?.to_dtype(DType::F64)?;
        run(&layer, &xs, &g)
    }

    /// The same by one product of the library after the other, each rounded: what PyTorch runs for
    /// `linear(x) + lora_B(lora_A(x)) * scaling`.
    fn compose(&self, device: &Device) -> lora_core::Result<[Tensor; 4]> {
        let layer = self.layer(device, self.base, self.adapter)?;
        let xs = Var::from_tensor(&self.input()?.to_device(device)?)?;
        let g = self.output_gradient()?.to_device(device)?;
        let (a, b) = (layer.lora_a(), layer.lora_b());
        let low = xs.matmul(&a.t()?)?.matmul(&b.t()?)?;
        let ys = (xs.matmul(&layer.weight().t()?)? + (low * layer.scaling())?)?;
        gradients(&ys, &g, [&xs, a, b])
    }

    /// Of the output and the input's gradient, and of the adapter's gradients.
    fn tolerances(&self) -> [f64; 4] {
        let of = |dtype| -> f64 {
            match dtype {
                DType::F32 => 1e-5,
                DType::F16 => 2e-3,
                _ => 1e-2,
            }
        };
        let (base, adapter) = (of(self.base), of(self.base).max(of(self.adapter)));
        [base, base, adapter, adapter]
    }

    fn check(&self, device: &Device) -> lora_core::Result<()> {
        let (got, want) = (self.run(device)?, self.exact()?);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (name, error) = (["y", "dx", "dA", "dB"][i], relative_error(got, want));
            assert!(error <= self.tolerances()[i], "{name} of {self:?}: {error}");
        }
        Ok(())
    }
}

/// `[ys, dxs, dA, dB]` for the loss `Σ ys · g`, in f64 on the CPU.
fn run(layer: &LinearLoRA, xs: &Tensor, g: &Tensor) -> lora_core::Result<[Tensor; 4]> {
    let xs = Var::from_tensor(xs)?;
    layer.set_dropout_step(4);
    let ys = layer.forward(xs.as_tensor())?;
    gradients(&ys, g, [&xs, layer.lora_a(), layer.lora_b()])
}

/// `ys` and the gradients of `vars` for the loss `Σ ys · g`, in f64 on the CPU.
fn gradients(ys: &Tensor, g: &Tensor, vars: [&Var; 3]) -> lora_core::Result<[Tensor; 4]> {
    let grads = ys.mul(g)?.sum_all()?.backward()?;
    let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let grad = |var: &Var| cpu(grads.get(var).expect("a gradient"));
    let [xs, a, b] = vars;
    Ok([cpu(ys)?, grad(xs)?, grad(a)?, grad(b)?])
}

const DTYPES: [(DType, DType); 6] = [
    (DType::F32, DType::F32),
    (DType::BF16, DType::F32),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::F16, DType::F16),
    (DType::F32, DType::BF16),
];

#[test]
fn every_dtype_and_option_agrees_with_f64() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let dropouts = [None, Some((0.3, Pre)), Some((0.3, Post))];
    for (base, adapter) in DTYPES {
        for dropout in dropouts {
            for (tokens, inputs, outputs, rank) in [
                (1, 64, 64, 8),
                (7, 100, 36, 5),
                (0, 64, 64, 8),
                (130, 264, 136, 24),
            ] {
                let case = Case {
                    bias: tokens != 1,
                    dropout,
                    ..Case::new(tokens, inputs, outputs, rank).of(base, adapter)
                };
                case.check(&card)?;
            }
        }
    }
    Ok(())
}

#[test]
fn large_shapes_agree_with_f64() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    for (base, adapter) in DTYPES.into_iter().take(4) {
        for (tokens, inputs, outputs, rank) in [
            (2049, 1000, 4096, 16),
            (128, 14336, 64, 64),
            (2048, 2048, 2048, 16),
        ] {
            Case::new(tokens, inputs, outputs, rank)
                .of(base, adapter)
                .check(&card)?;
        }
    }
    Ok(())
}

#[test]
fn errors_are_no_larger_than_those_of_the_composition() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (tokens, inputs, outputs, rank) in [
            (130, 264, 136, 24),
            (2048, 2048, 2048, 16),
            (2049, 1000, 4096, 64),
        ] {
            let case = Case::new(tokens, inputs, outputs, rank).of(dtype, dtype);
            let (exact, ours, theirs) = (case.exact()?, case.run(&card)?, case.compose(&card)?);
            for (i, want) in exact.iter().enumerate() {
                let error = |got: &[Tensor; 4]| relative_error(&got[i], want);
                let (name, ours, theirs) =
                    (["y", "dx", "dA", "dB"][i], error(&ours), error(&theirs));
                println!(
                    "{dtype:?} {tokens} {inputs}→{outputs} r {rank} {name}: {:.2}",
                    ours / theirs
                );
                assert!(
                    ours <= 1.1 * theirs,
                    "{name} of {case:?}: {ours}, composed {theirs}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_card_draws_the_masks_of_the_cpu() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    for position in [Pre, Post] {
        let case = Case {
            dropout: Some((0.5, position)),
            ..Case::new(33, 40, 24, 4)
        };
        let (cpu, card) = (case.run(&Device::Cpu)?, case.run(&card)?);
        for (cpu, card) in cpu.iter().zip(&card) {
            assert!(relative_error(card, cpu) < 1e-5);
        }
    }
    Ok(())
}

#[test]
fn two_runs_give_equal_bits() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    for (base, adapter) in DTYPES.into_iter().take(2) {
        let case = Case {
            dropout: Some((0.1, Post)),
            ..Case::new(2048, 1024, 1024, 16).of(base, adapter)
        };
        for (first, second) in case.run(&card)?.iter().zip(&case.run(&card)?) {
            assert_eq!(to_vec(first), to_vec(second));
        }
    }
    Ok(())
}

#[test]
fn views_with_gaps_and_more_dimensions_give_the_right_output() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let case = Case::new(12, 40, 24, 4).of(DType::BF16, DType::F32);
    let layer = case.layer(&card, case.base, case.adapter)?;
    let exact = case.layer(&Device::Cpu, DType::F64, DType::F64)?;
    let wide = randn(13, (3, 4, 100), DType::F32).to_dtype(DType::BF16)?;
    let columns = |start: usize| wide.narrow(2, start, 40);
    let views = [
        columns(0)?,
        columns(8)?,
        columns(3)?,
        columns(16)?.narrow(0, 1, 2)?,
        columns(0)?.transpose(0, 1)?,
        columns(0)?.narrow(1, 1, 2)?,
    ];
    for (i, view) in views.iter().enumerate() {
        let on_card = wide.to_device(&card)?;
        let columns = |start: usize| on_card.narrow(2, start, 40);
        let same = match i {
            0 => columns(0)?,
            1 => columns(8)?,
            2 => columns(3)?,
            3 => columns(16)?.narrow(0, 1, 2)?,
            4 => columns(0)?.transpose(0, 1)?,
            _ => columns(0)?.narrow(1, 1, 2)?,
        };
        let want = exact.forward(&view.to_dtype(DType::F64)?)?;
        let got = layer.forward(&same)?.to_device(&Device::Cpu)?;
        let error = relative_error(&got, &want);
        assert!(error < 1e-2, "view {i}: {error}");
    }
    Ok(())
}

#[test]
fn the_path_taken_is_told() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let path = |case: Case| -> lora_core::Result<ComputePath> {
        let layer = case.layer(&card, case.base, case.adapter)?;
        Ok(layer.compute_path(&case.input()?.to_device(&card)?)?)
    };
    let f32 = path(Case::new(64, 64, 64, 8))?;
    assert!(
        matches!(&f32, ComputePath::Kernels(path) if path.starts_with("general (")),
        "{f32}"
    );
    let f64 = path(Case::new(64, 64, 64, 8).of(DType::F64, DType::F64))?;
    assert!(matches!(f64, ComputePath::Composed(_)), "{f64}");
    Ok(())
}

#[test]
fn f64_runs_composed_and_exactly() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    for dropout in [None, Some((0.3, Pre)), Some((0.3, Post))] {
        let case = Case {
            dropout,
            bias: true,
            ..Case::new(9, 20, 12, 3).of(DType::F64, DType::F64)
        };
        for (got, want) in case.run(&card)?.iter().zip(&case.exact()?) {
            assert!(relative_error(got, want) < 1e-12);
        }
    }
    Ok(())
}

#[test]
fn an_adapter_on_another_device_is_an_error() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let case = Case::new(4, 8, 8, 2);
    let layer = case.layer(&card, case.base, case.adapter)?;
    assert!(layer.forward(&case.input()?).is_err());
    let layer = case.layer(&Device::Cpu, case.base, case.adapter)?;
    assert!(layer.forward(&case.input()?.to_device(&card)?).is_err());
    Ok(())
}
