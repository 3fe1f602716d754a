"""several/: three adapters of one model, llama/untied, alone and together; and their combinations.

    adapter_config.json, adapter_model.safetensors   the adapter `default`, saved by PEFT
    wide/, late/                                     the others, which PEFT saves in folders of their names
    expected.safetensors                             what PEFT computes with them, names in README.md
    combined.safetensors                             weighted combinations of `combined/one` and `combined/two`
"""

import copy
import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import llama
import settings

OUT = Path(__file__).parent / "several"
BASE = "untied"
ROWS = ["late", "default", "__base__", "wide", "default"]
LENGTH = 7
# Ranks, scalings and sets of layers differ.
ADAPTERS = {
    "default": dict(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]),
    "wide": dict(r=3, lora_alpha=4, target_modules=["v_proj", "o_proj", "up_proj", "down_proj"], use_rslora=True),
    "late": dict(r=2, lora_alpha=3, target_modules=["q_proj", "gate_proj"], layers_to_transform=[1], rank_pattern={"gate_proj": 5}),
}  # fmt: skip
COMBINED = {
    "one": dict(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"]),
    "two": dict(r=3, lora_alpha=9, target_modules=["q_proj", "o_proj"]),
}
WEIGHTS, POSITIVE = [0.7, -1.25], [0.7, 1.25]


def model_with(adapters, seed):
    _, base = settings.base(BASE)
    torch.manual_seed(seed)
    model = None
    for name, fields in adapters.items():
        config = LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(fields))
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_B." in key:
                p.normal_(std=0.3)
    return model.eval()


def save(model, out):
    model.save_pretrained(out)
    for folder in [out, *(p for p in out.iterdir() if p.is_dir())]:
        (folder / "README.md").unlink(missing_ok=True)
        if (folder / "adapter_config.json").exists():
            settings.write_config(folder, BASE)


def together(model):
    """Logits of each adapter, of sums and of a mixed batch; gradients and merged weights of a sum."""
    tuner = model.base_model
    ids = torch.randint(3, model.config.vocab_size, (len(ROWS), LENGTH))
    tensors = {"input_ids": ids}
    with torch.no_grad():
        with model.disable_adapter():
            tensors["logits"] = model(input_ids=ids).logits
        for names in [["default"], ["wide"], ["late"], ["default", "wide"], ["late", "wide", "default"]]:
            tuner.set_adapter(names)
            tensors["logits." + "+".join(names)] = model(input_ids=ids).logits
        tensors["logits.rows"] = model(input_ids=ids, adapter_names=ROWS).logits
    tuner.set_adapter(["default", "wide"])
    out = model(input_ids=ids).logits
    tensors["cotangent"] = torch.randn(out.shape)
    (out * tensors["cotangent"]).sum().backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            path = key.removeprefix("base_model.model.")
            name = next(name for name in ADAPTERS if f".{name}." in path)
            tensors[f"grad.{name}.{path.replace(f'.{name}.', '.')}"] = p.grad
    with torch.no_grad():
        model.merge_adapter(["default", "wide"])
        for path, layer in settings.lora_layers(model).items():
            if layer.merged:
                tensors[f"merged.{path}.weight"] = layer.get_base_layer().weight.detach().clone()
    return {name: t.contiguous() for name, t in tensors.items()}


def combined(model):
    """The change of each weight, `s B A`, by the combinations whose result is what their name says.

    PEFT's linear has cross terms, and its ties of the factors is none of their product: these are
    left out. With a negative weight its ties elects signs that the weighted deltas do not have.
    """
    layers = settings.lora_layers(model)
    methods = {
        "cat": (WEIGHTS, dict(combination_type="cat")),
        "svd": (WEIGHTS, dict(combination_type="svd", svd_rank=2)),
        "ties": (POSITIVE, dict(combination_type="ties_svd", density=0.5, svd_rank=24)),  # of all 24
    }
    for name, (weights, options) in methods.items():
        model.add_weighted_adapter(list(COMBINED), weights, name, **options)
    return {
        f"{name}.{path}": layer.get_delta_weight(name).detach().contiguous()
        for name in [*COMBINED, *methods]
        for path, layer in layers.items()
    }


def write():
    shutil.rmtree(OUT, ignore_errors=True)
    metadata = {"made_with": llama.MADE_WITH}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_with(ADAPTERS, 7)
        save(model, OUT)
        save_file(together(model), OUT / "expected.safetensors", metadata=metadata)
        model = model_with(COMBINED, 8)
        save(model, OUT / "combined")
        save_file(combined(model), OUT / "combined.safetensors", metadata=metadata)
