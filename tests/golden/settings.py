"""settings/<model>/<adapter>/: every setting of PEFT's for linear layers, one or two at a time.

    <model>/config.json, model.safetensors   `encoder` and `classifier`: tiny BERTs, random, f32
    <model>/<adapter>/adapter_config.json    saved by PEFT, as is adapter_model.safetensors
    <model>/<adapter>/case.json              what PEFT was given, and what it made of it
    <model>/<adapter>/expected.safetensors   what PEFT computes with it, names in README.md

`untied` and `qwen2` are those of llama/.
"""

import copy
import json
import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel

import llama

OUT = Path(__file__).parent / "settings"
BATCH, LENGTH = 2, 7
SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    initializer_range=0.2,
)
QV = ["query", "value"]
QKVO = llama.ATTENTION

# model -> adapter -> the arguments of LoraConfig
CASES = {
    "encoder": {
        "default_targets": dict(r=4, lora_alpha=6),
        "all_linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
        "exclude": dict(r=2, lora_alpha=3, target_modules=["query", "dense"], exclude_modules=["pooler.dense", "0.output.dense"]),
        "regex": dict(r=2, lora_alpha=3, target_modules=r".*\.(query|key)", exclude_modules=r"encoder\.layer\.0\..*key"),
        "layers": dict(r=3, lora_alpha=4, target_modules=QV, layers_to_transform=[1], layers_pattern="layer"),
        "first_layer": dict(r=3, lora_alpha=4, target_modules=["key", "encoder.layer.1.output.dense"], layers_to_transform=0),
        "rslora": dict(r=4, lora_alpha=6, target_modules=QV, use_rslora=True),
        "patterns": dict(
            r=4,
            lora_alpha=6,
            target_modules=["query", "key", "intermediate.dense"],
            rank_pattern={"^encoder.layer.0.attention.self.query": 2, "query|key": 3},
            alpha_pattern={"layer.1.attention.self.key": 5, "intermediate.dense": 9},
        ),
        "rslora_patterns": dict(
            r=4, lora_alpha=6, target_modules=QV, use_rslora=True, rank_pattern={"value": 9}, alpha_pattern={"0.attention.self.value": 2}
        ),
        "bias_all": dict(r=2, lora_alpha=3, target_modules=QV, bias="all"),
        "bias_lora_only": dict(r=2, lora_alpha=3, target_modules=QV, bias="lora_only"),
        "lora_bias": dict(r=2, lora_alpha=3, target_modules=["query", "output.dense"], lora_bias=True),
        "lora_bias_rslora": dict(r=4, lora_alpha=6, target_modules=QV, lora_bias=True, use_rslora=True),
    },
    "classifier": {
        "pooler_saved": dict(r=2, lora_alpha=3, target_modules=QV, task_type="SEQ_CLS", modules_to_save=["pooler"]),
        "head": dict(r=2, lora_alpha=3, target_modules=QV, task_type="SEQ_CLS"),
        "head_bias_all": dict(r=2, lora_alpha=3, target_modules=["query"], task_type="SEQ_CLS", bias="all", modules_to_save=["pooler"]),
        "head_bias_rslora": dict(r=4, lora_alpha=6, target_modules=QV, task_type="SEQ_CLS", bias="lora_only", use_rslora=True),
        "all_linear": dict(r=2, lora_alpha=3, target_modules="all-linear", task_type="SEQ_CLS"),
    },
    "qwen2": {
        "bias_lora_only": dict(r=2, lora_alpha=3, target_modules=QKVO, bias="lora_only", task_type="CAUSAL_LM"),
        "bias_all": dict(r=2, lora_alpha=3, target_modules=["v_proj", "down_proj"], bias="all", task_type="CAUSAL_LM"),
        "lora_bias": dict(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"], lora_bias=True, task_type="CAUSAL_LM"),
    },
    "untied": {
        "all_linear": dict(r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM"),
        "head_saved": dict(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        "norms_saved": dict(r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
        "embedding_saved": dict(r=2, lora_alpha=3, target_modules=["v_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"),
        "head_adapted": dict(r=2, lora_alpha=3, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        "layers": dict(r=2, lora_alpha=3, target_modules=llama.SEVEN, layers_to_transform=[1], task_type="CAUSAL_LM"),
    },
}  # fmt: skip


def save_bert(name, model):
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("LayerNorm.weight"):
                p.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                p.normal_(std=0.3)
    model.save_pretrained(OUT / name)


def base(name):
    """The folder of a base model and the model."""
    classes = {"encoder": AutoModel, "classifier": AutoModelForSequenceClassification}
    folder = (OUT if name in classes else llama.OUT) / name
    return folder, classes.get(name, AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)


def inputs(model):
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH))
    if model.config.model_type != "bert":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0  # padding
    return {"input_ids": ids, "attention_mask": mask}


def output(model, given):
    """Hidden states of an encoder, else logits."""
    return model(**given)[0]


def path_of(key):
    """The name that a parameter of the wrapped model has in the model itself."""
    for part in ("base_model.model.", ".default", "base_layer.", "modules_to_save."):
        key = key.replace(part, "")
    return key


def make_visible(model):
    """What starts at zero or as a copy of the base is no test: moves all that is trained."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_B." in key:
                p.normal_(std=0.3)
            elif p.requires_grad and ".lora_" not in key:
                p.add_(torch.randn(p.shape) * 0.2)


def lora_layers(model):
    return {path_of(name): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def expected(model, base_output, given):
    """The output, every gradient of sum(output * cotangent), and the merged layers."""
    model.eval()  # BERT has dropout of its own
    out = output(model, given)
    cotangent = torch.randn(out.shape)
    (out * cotangent).sum().backward()
    tensors = given | {"base_output": base_output, "output": out.detach(), "cotangent": cotangent}
    # None for a bias of the encoder's pooler, which the hidden states do not go through.
    trained = {path_of(key): p.grad for key, p in model.named_parameters() if p.grad is not None}
    tensors |= {f"grad.{path}": grad for path, grad in trained.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that biases differ after merging
        model.merge_adapter()
        tensors["merged_output"] = output(model, given)
    for path, layer in lora_layers(model).items():
        tensors[f"merged.{path}.weight"] = layer.get_base_layer().weight.detach().clone()
        if layer.lora_bias["default"]:
            tensors[f"merged.{path}.bias"] = layer.get_base_layer().bias.detach().clone()
    return {name: t.contiguous() for name, t in tensors.items()}


def write_config(folder, base_name):
    """Writes what differs from run to run, sets in hash order and a path, in one way."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key].sort()
    config["base_model_name_or_path"] = base_name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_case(folder, fields, model):
    sites = {n: [m.r["default"], m.lora_alpha["default"], m.scaling["default"]] for n, m in lora_layers(model).items()}
    saved = sorted(path_of(n) for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n)
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(site)}" for n, site in sorted(sites.items()))
    case = f'{{\n "given": {json.dumps(fields)},\n "sites": {{\n{rows}\n }},\n "saved": {json.dumps(saved)}\n}}\n'
    (folder / "case.json").write_text(case)


def save_adapter(base_name, adapter, fields):
    folder, model = base(base_name)
    torch.manual_seed(sum(map(ord, base_name + adapter)))
    given = inputs(model)
    with torch.no_grad():
        base_output = output(model.eval(), given)
    model = get_peft_model(model, LoraConfig(**copy.deepcopy(fields)))  # PEFT lengthens the lists it is given
    make_visible(model)
    out = OUT / base_name / adapter
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()
    write_config(out, base_name)
    write_case(out, fields, model)
    tensors = expected(model, base_output, given)
    assert (tensors["output"] - base_output).abs().max() > 0.01, adapter
    save_file(tensors, out / "expected.safetensors", metadata={"made_with": llama.MADE_WITH})


def write():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(4)
    save_bert("encoder", BertModel(BertConfig(**SMALL)))
    labels = {"id2label": {i: f"L{i}" for i in range(3)}, "label2id": {f"L{i}": i for i in range(3)}}
    config = BertConfig(**SMALL, **labels)
    save_bert("classifier", AutoModelForSequenceClassification.from_config(config))
    for model, adapters in CASES.items():
        for adapter, fields in adapters.items():
            save_adapter(model, adapter, fields)
