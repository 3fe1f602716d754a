"""init.json: how PEFT draws A and B, and how far the draws reach."""

import json
import math
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model

# (init_lora_weights, in, out, r): `true` is Kaiming uniform with a = sqrt(5).
CASES = [(True, 64, 48, 8), (True, 576, 192, 8), (True, 1536, 576, 16), ("gaussian", 576, 192, 8)]


def draw(init, n_in, n_out, r):
    torch.manual_seed(n_in + r)
    base = torch.nn.Sequential(torch.nn.Linear(n_in, n_out))
    model = get_peft_model(base, LoraConfig(r=r, target_modules=["0"], init_lora_weights=init))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    row = {"init_lora_weights": init, "in": n_in, "out": n_out, "r": r}
    if init is True:
        row |= {"bound": 1 / math.sqrt(n_in), "std": 1 / math.sqrt(3 * n_in)}
    else:
        row |= {"std": 1 / r}
    row |= {
        "drawn_abs_max": a.abs().max().item(),
        "drawn_mean": a.double().mean().item(),
        "drawn_std": a.double().std().item(),
        "b_abs_max": b.abs().max().item(),
    }
    assert row["drawn_abs_max"] <= row.get("bound", math.inf)
    assert abs(row["drawn_std"] / row["std"] - 1) < 0.05 and row["b_abs_max"] == 0
    return row


def write():
    golden = {"peft": peft.__version__, "torch": torch.__version__, "cases": [draw(*case) for case in CASES]}
    Path(__file__).with_name("init.json").write_text(json.dumps(golden, indent=1) + "\n")
