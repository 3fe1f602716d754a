"""folders/: the kinds of adapter folder that are about, each by the program that writes it.

Those of `read/` hold an adapter of llama/untied in another form; `same_as` in kinds.json names the
plain folder that holds the same numbers. Those of `refused/` hold what is no LoRA of linear layers.
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import llama
import settings

OUT = Path(__file__).parent / "folders"
BASE = "untied"
PLAIN = "llama/untied/"


def base():
    return settings.base(BASE)[1]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save(model, out, **options):
    model.save_pretrained(out, **options)
    (out / "README.md").unlink()
    settings.write_config(out, BASE)


def loaded(adapter, **options):
    return PeftModel.from_pretrained(base(), llama.OUT / BASE / adapter, **options)


def pickled(out):
    """PEFT before 0.6, and since then with `safe_serialization=False`."""
    save(loaded("seven"), out, safe_serialization=False)


def named(out):
    """PEFT, for an adapter that is not called `default`."""
    save_named = loaded("qv", adapter_name="poet")
    save_named.save_pretrained(out)
    (out / "README.md").unlink()
    settings.write_config(out / "poet", BASE)


def sharded(out):
    """transformers' own `save_pretrained`, whose index is called as a model's."""
    model = base()
    model.load_adapter(str(llama.OUT / BASE / "seven"))
    model.save_pretrained(out, max_shard_size="8KB")
    (out / "generation_config.json").unlink()
    settings.write_config(out, BASE)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def half(out):
    """PEFT, of adapters in bfloat16: the numbers of `qv`, rounded."""
    save(loaded("qv").bfloat16(), out)


def with_names(out):
    """By hand: keys as in the model, where the adapter's name is a part. PEFT loads them too."""
    shutil.copytree(llama.OUT / BASE / "qv", out, ignore=shutil.ignore_patterns("expected*"))
    tensors = load_file(out / "adapter_model.safetensors")
    named = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})


def minimal(out):
    """By hand: the least that PEFT loads, with its defaults r = 8 and lora_alpha = 8."""
    torch.manual_seed(9)
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(out)
    (out / "README.md").unlink()
    write_json(out / "adapter_config.json", {"peft_type": "LORA", "target_modules": ["q_proj"]})


def nemo(out):
    """By hand, what NeMo AutoModel writes: full names, few fields, a second configuration."""
    out.mkdir(parents=True)
    tensors = load_file(llama.OUT / BASE / "seven" / "adapter_model.safetensors")
    save_file(tensors, out / "adapter_model.safetensors")
    suffix = ".lora_A.weight"
    names = [key.removeprefix("base_model.model.").removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    fields = dict(
        base_model_name_or_path=BASE, bias="none", lora_alpha=8, peft_type="LORA", r=3,
        target_modules=sorted(names), task_type="CAUSAL_LM", use_dora=False,
    )  # fmt: skip
    write_json(out / "adapter_config.json", fields)
    rest = dict(
        target_modules=["*_proj"], exclude_modules=[], match_all_linear=False, dropout=0.05, dropout_position="post",
        lora_A_init="xavier", lora_dtype="torch.bfloat16", moe_rank_scaling=False, use_dora=False,
        use_memory_efficient_lora=True, use_triton=False,
    )  # fmt: skip
    write_json(out / "automodel_peft_config.json", rest)


def head_base_saved(out):
    """PEFT, which by default adds the base weight of an adapted output head."""
    torch.manual_seed(10)
    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    settings.make_visible(model)
    save(model, out, save_embedding_layers=True)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(out / "adapter_model.safetensors")


READ = {
    "pickled": (pickled, PLAIN + "seven"),
    "named": (named, PLAIN + "qv"),
    "sharded": (sharded, PLAIN + "seven"),
    "half": (half, PLAIN + "qv"),
    "with_names": (with_names, PLAIN + "qv"),
    "nemo": (nemo, PLAIN + "seven"),
    "minimal": (minimal, None),
    "head_base_saved": (head_base_saved, None),
}


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2)


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(2, 6, 4))


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()


def tiny_llama():
    return AutoModelForCausalLM.from_config(LlamaConfig(**llama.SMALL))


QV = dict(r=2, target_modules=["q_proj", "v_proj"])
# What the error must name: a field of the configuration or a tensor.
REFUSED = {
    "dora": (tiny_llama, LoraConfig(**QV, use_dora=True), "use_dora"),
    "embedding": (tiny_llama, LoraConfig(r=2, target_modules=["embed_tokens"]), "lora_embedding_A"),
    "convolution": (Convolution, LoraConfig(r=2, target_modules=["conv"]), "conv.lora_A.weight"),
    "multihead_attention": (Attention, LoraConfig(r=2, target_modules=["attention"]), "attention.base_layer.out_proj"),
    "experts": (Mixture, LoraConfig(r=2, target_parameters=["experts.up"]), "target_parameters"),
    "token_indices": (tiny_llama, LoraConfig(**QV, trainable_token_indices=[0, 5]), "trainable_token_indices"),
    "activated": (tiny_llama, LoraConfig(**QV, alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"), "alora_invocation_tokens"),
    "replicated": (tiny_llama, LoraConfig(**QV, layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    "pissa": (tiny_llama, LoraConfig(**QV, init_lora_weights="pissa"), "init_lora_weights"),
    "ia3": (tiny_llama, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "peft_type"),
}  # fmt: skip


def write_refused(name, model, config):
    torch.manual_seed(11)
    out = OUT / "refused" / name
    model = get_peft_model(model(), config)
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    written = json.loads(path.read_text())
    for key, value in written.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            value.sort()
    write_json(path, written)


def write():
    shutil.rmtree(OUT, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (make, _) in READ.items():
            make(OUT / "read" / name)
        for name, (model, config, _) in REFUSED.items():
            write_refused(name, model, config)
    kinds = {
        "same_as": {name: plain for name, (_, plain) in READ.items() if plain},
        "refused": {name: word for name, (_, _, word) in REFUSED.items()},
    }
    write_json(OUT / "kinds.json", kinds)
