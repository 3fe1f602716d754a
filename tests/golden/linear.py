"""linear/*.safetensors: one LoRA linear layer, forward, backward and merge."""

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

OUT = Path(__file__).parent / "linear"
# One entry: safetensors writes several in an order that differs from run to run.
MADE_WITH = f"peft {peft.__version__}, torch {torch.__version__}"


@dataclass
class Case:
    name: str
    shape: tuple  # of x; the last is `in`
    out: int
    r: int
    alpha: float
    bias: bool = False
    dtype: torch.dtype = torch.float32
    rslora: bool = False
    master: bool = True  # adapters in f32 under a half-precision base


CASES = [
    Case("f32_2d", (5, 7), 11, 3, 7),
    Case("f32_2d_bias", (5, 7), 11, 3, 7, bias=True),
    Case("f32_3d", (2, 5, 19), 13, 4, 10),
    Case("f32_3d_bias", (2, 5, 19), 13, 4, 10, bias=True),
    Case("f32_4d_bias", (2, 3, 2, 9), 6, 2, 5, bias=True),
    Case("f32_1d", (9,), 6, 2, 5),
    Case("f32_rank_1", (4, 17), 15, 1, 0.5),
    Case("f32_rank_above_min", (6, 5), 4, 8, 3, bias=True),
    Case("f32_one_token", (1, 1, 33), 31, 8, 16),
    Case("f32_wide", (37, 65), 129, 16, 24, bias=True),
    Case("f32_rslora", (2, 5, 19), 13, 4, 10, bias=True, rslora=True),
    Case("f64_2d", (5, 7), 11, 3, 7, dtype=torch.float64),
    Case("f64_3d_bias", (2, 5, 19), 13, 4, 10, bias=True, dtype=torch.float64),
    Case("f64_rslora", (5, 7), 11, 3, 7, dtype=torch.float64, rslora=True),
    Case("bf16_master_f32", (2, 5, 19), 13, 4, 10, bias=True, dtype=torch.bfloat16),
    Case("bf16_adapters_bf16", (2, 5, 19), 13, 4, 10, bias=True, dtype=torch.bfloat16, master=False),
    Case("f16_master_f32", (5, 7), 11, 3, 7, dtype=torch.float16),
]


class Model(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.proj = torch.nn.Linear(case.shape[-1], case.out, bias=case.bias, dtype=case.dtype)

    def forward(self, x):
        return self.proj(x)


def tensors(case, seed):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=case.r, lora_alpha=case.alpha, use_rslora=case.rslora, target_modules=["proj"], lora_dropout=0.0
    )
    model = get_peft_model(Model(case), config, autocast_adapter_dtype=case.master)
    layer = model.base_model.model.proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.randn(b.shape) / case.r**0.5)  # PEFT starts B at zero: not a test
    x = torch.randn(case.shape, dtype=case.dtype, requires_grad=True)
    y = model(x)
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy)
    assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)
    out = {"x": x, "W": layer.weight, "A": a, "B": b, "y": y, "dY": dy, "dx": x.grad, "dA": a.grad, "dB": b.grad}
    if case.bias:
        out["b"] = layer.bias
    out["alpha"] = torch.tensor([case.alpha], dtype=torch.float64)
    out["scaling"] = torch.tensor([layer.scaling["default"]], dtype=torch.float64)
    out = {name: t.detach().clone().contiguous() for name, t in out.items()}
    layer.merge()
    out["W_merged"] = layer.weight.detach().clone()
    assert not torch.equal(out["W"], out["W_merged"])
    return out


def write():
    OUT.mkdir(exist_ok=True)
    for seed, case in enumerate(CASES):
        save_file(tensors(case, seed), OUT / f"{case.name}.safetensors", metadata={"made_with": MADE_WITH})
