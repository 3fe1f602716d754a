"""llama/<model>/: tiny Llama-family models as Hugging Face folders.

    config.json, model.safetensors       random weights, f32
    <adapter>/adapter_config.json        saved by PEFT
    <adapter>/adapter_model.safetensors
    <adapter>/expected.safetensors       what PEFT computes with it, names in README.md
"""

import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

OUT = Path(__file__).parent / "llama"
# One entry: safetensors writes several in an order that differs from run to run.
MADE_WITH = f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
BATCH, LENGTH = 2, 13
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = ATTENTION + ["gate_proj", "up_proj", "down_proj"]

SMALL = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


MODELS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope(1e5)),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters=rope(1e4)),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=rope(1e6)),
    # q_proj is [heads * head_dim, hidden] = [32, 24], so o_proj is [24, 32]
    "mistral": MistralConfig(
        **SMALL, head_dim=8, sliding_window=None, tie_word_embeddings=False, rope_parameters=rope(1e4)
    ),
}
ADAPTERS = {
    "qv": LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]),
    "seven": LoraConfig(r=3, lora_alpha=8, target_modules=SEVEN),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=SEVEN),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=SEVEN,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 6},
        alpha_pattern={"layers.0.self_attn.v_proj": 3, "^model.layers.1.mlp.up_proj": 16},
    ),
}
WANTED = {
    "tied": ["qv", "seven", "rslora", "patterns"],
    "untied": ["qv", "seven"],
    "qwen2": ["seven"],
    "mistral": ["seven"],
}


def write_config_of_transformers_4(folder):
    """The form most folders on the Hub still have: `rope_theta` and `torch_dtype` at the top."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_base(name, config):
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                p.normal_(std=0.3)
    folder = OUT / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if name == "untied":
        write_config_of_transformers_4(folder)
    return folder


def save_adapter(folder, adapter):
    torch.manual_seed(len(adapter))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(**(ADAPTERS[adapter].to_dict() | {"task_type": "CAUSAL_LM"}))
    model = get_peft_model(base, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_B." in key:
                p.normal_(std=0.3)  # PEFT starts B at zero: not a test
    out = folder / adapter
    model.save_pretrained(out)
    (out / "README.md").unlink()
    # Two fields would differ from run to run: a set in hash order, and where this folder lies.
    path = out / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"].sort()
    written["base_model_name_or_path"] = folder.name
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    save_file(expected(model), out / "expected.safetensors", metadata={"made_with": MADE_WITH})


def expected(model):
    """Logits with and without the adapter; loss and every adapter gradient of one training step."""
    model.train()
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH))
    labels = ids.clone()
    labels[:, :5] = -100  # a prompt
    labels[1, -3:] = -100  # and padding: the rows count differently many labels
    with torch.no_grad(), model.disable_adapter():
        base_logits = model(input_ids=ids).logits
    out = model(input_ids=ids, labels=labels)
    out.loss.backward()
    assert (out.logits - base_logits).abs().max() > 0.1
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "base_logits": base_logits,
        "logits": out.logits.detach(),
        "loss": out.loss.detach().reshape(1),
    }
    for key, p in model.named_parameters():
        assert (p.grad is not None) == (".lora_" in key)
        if p.grad is not None:
            path = key.removeprefix("base_model.model.").replace(".default.", ".")
            tensors[f"grad.{path}"] = p.grad
    return {name: t.contiguous() for name, t in tensors.items()}


def write():
    shutil.rmtree(OUT, ignore_errors=True)
    for name, config in MODELS.items():
        folder = save_base(name, config)
        for adapter in WANTED[name]:
            save_adapter(folder, adapter)
