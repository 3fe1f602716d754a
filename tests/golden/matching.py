"""matching.json: which modules PEFT adapts, and with which rank and alpha.

Nothing here decides a match: PEFT is let loose on a model with the given
module names, and what it turned into LoRA layers is written down.
"""

import json
import re
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import llama

SELF_ATTN = [f"self_attn.{p}" for p in llama.ATTENTION]
MLP = [f"mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")]

# Every name is a linear layer.
MODELS = {
    "llama": [f"model.layers.{i}.{m}" for i in (0, 1, 10, 11) for m in SELF_ATTN + MLP] + ["lm_head"],
    "bert": [f"encoder.layer.{i}.{m}" for i in (0, 1) for m in (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )] + ["pooler.dense", "classifier"],
    "moe": [f"model.layers.{i}.mlp.{m}" for i in (0, 1) for m in (
        "gate", "experts.0.up_proj", "experts.0.down_proj", "experts.1.up_proj", "experts.1.down_proj",
    )],
    "root": ["q", "q_proj", "layers.0.q", "layers.1.q", "layers.10.q", "h.0.layers.1.q"],
    "odd": ["q_proj", "a.q_proj", "a.xq_proj", "a.q_projx", "a.q-proj", "b.0", "b.1", "b.10", "all-linear", "a.Q_PROJ"],
}  # fmt: skip
# Transformers' own models: PEFT leaves out the output head when it targets "all-linear".
TRANSFORMERS = {f"transformers_{name}": llama.MODELS[name] for name in ("tied", "untied")}

CASES = [
    # a list: the whole name or a suffix after a dot, literally
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["attn.q_proj"]}),
    ("llama", {"target_modules": ["proj"]}),
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["1.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["model.layers.10.mlp.up_proj", "k_proj"]}),
    ("llama", {"target_modules": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "no_such_proj"]}),
    ("llama", {"target_modules": ["no_such_proj"]}),
    ("llama", {"target_modules": ["*.q_proj"]}),
    ("llama", {"target_modules": [".*q_proj"]}),
    ("llama", {"target_modules": [".q_proj"]}),
    ("llama", {"target_modules": ["Q_PROJ"]}),
    ("llama", {"target_modules": []}),
    ("odd", {"target_modules": ["q_proj"]}),
    ("odd", {"target_modules": ["1"]}),
    ("odd", {"target_modules": ["b.1"]}),
    ("odd", {"target_modules": ["q-proj"]}),
    ("odd", {"target_modules": ["q.proj"]}),
    ("odd", {"target_modules": ["all-linear"]}),
    # a string: a regular expression over the whole name
    ("llama", {"target_modules": "q_proj"}),
    ("llama", {"target_modules": ".*q_proj"}),
    ("llama", {"target_modules": r".*\.q_proj"}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.1\..*_proj"}),
    ("llama", {"target_modules": r"model.layers.(0|11).mlp.\w+"}),
    ("llama", {"target_modules": r".*\.q_pro"}),
    ("llama", {"target_modules": "*.q_proj"}),
    ("odd", {"target_modules": "q_proj"}),
    ("odd", {"target_modules": ".*q.proj"}),
    ("odd", {"target_modules": "(?i).*q_proj"}),
    # "all-linear"
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear"}),
    ("llama", {"target_modules": ["all-linear", "q_proj"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["lm_head"]}),
    ("transformers_tied", {"target_modules": "all-linear"}),
    ("transformers_untied", {"target_modules": "all-linear"}),
    ("transformers_untied", {"target_modules": ["q_proj", "lm_head"]}),
    ("transformers_untied", {"target_modules": None}),
    # exclude_modules comes first and wins
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*\.layers\.1\..*"}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": r"layers\.1"}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.1"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["no_such_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    # modules_to_save are trained whole, not adapted
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("bert", {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
    # layers_to_transform, layers_pattern
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 10]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [7]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
    ("llama", {"target_modules": ["model.layers.10.self_attn.q_proj", "q_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": r".*\.q_proj", "layers_to_transform": [0]}),
    ("moe", {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    ("moe", {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "experts"}),
    ("root", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("root", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("root", {"target_modules": ["q"]}),
    # rank_pattern, alpha_pattern: regular expressions anchored at the end of the name
    ("root", {"target_modules": ["q"], "rank_pattern": {"q": 2}}),
    ("root", {"target_modules": ["q"], "rank_pattern": {"^q": 2}}),
    ("root", {"target_modules": ["q"], "rank_pattern": {"layers.1.q": 2}}),
    ("root", {"target_modules": ["q"], "rank_pattern": {"^layers.1.q": 2}, "alpha_pattern": {"layers.0.q": 3}}),
    ("root", {"target_modules": ["q", "q_proj"], "rank_pattern": {"q_proj|layers.10.q": 2}}),
    ("root", {"target_modules": ["q", "q_proj"], "rank_pattern": {".*q": 2, "layers.1.q": 4}}),
    ("root", {"target_modules": ["q", "q_proj"], "rank_pattern": {"layers.1.q": 4, ".*q": 2}}),
    ("root", {"target_modules": ["q"], "rank_pattern": {"nothing": 2}, "alpha_pattern": {"nothing": 3}}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}),
    ("llama", {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\d\..*q_proj": 2}}),
]  # fmt: skip


def build(name):
    if name in TRANSFORMERS:
        return AutoModelForCausalLM.from_config(TRANSFORMERS[name])
    root = torch.nn.Module()
    for path in MODELS[name]:
        *parents, leaf = path.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module._modules[parent]
        module.add_module(leaf, torch.nn.Linear(2, 2))
    return root


def linear_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def run(model, fields):
    """What PEFT does: {"adapted": {name: [r, alpha]}} or {"error": class}."""
    case = {"model": model} | fields
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(build(model), LoraConfig(r=8, lora_alpha=16, **fields))
    except re.error:
        return case | {"error": "re.error"}
    except ValueError as error:
        return case | {"error": type(error).__name__}
    layers = {
        name.removeprefix("base_model.model."): m for name, m in adapted.named_modules() if isinstance(m, LoraLayer)
    }
    return case | {"adapted": {n: [m.r["default"], m.lora_alpha["default"]] for n, m in layers.items()}}


def write():
    names = MODELS | {name: linear_names(build(name)) for name in TRANSFORMERS}
    golden = {
        "peft": peft.__version__,
        "defaults": {"r": 8, "lora_alpha": 16},
        "models": names,
        "cases": [run(model, fields) for model, fields in CASES],
    }
    rows = ",\n".join("  " + json.dumps(case) for case in golden.pop("cases"))
    head = json.dumps(golden, indent=1)[:-2]
    Path(__file__).with_name("matching.json").write_text(f'{head},\n "cases": [\n{rows}\n ]\n}}\n')
