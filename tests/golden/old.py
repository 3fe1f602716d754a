#!/usr/bin/env python3
"""old/VERSION/: the adapter llama/untied/qv as older releases of PEFT save it.

Not a part of make.py, since each needs its own PEFT (and none of its dependencies):

    for v in 0.2.0 0.5.0 0.10.0; do
        pip install --no-deps --target /tmp/peft-$v peft==$v
        PYTHONPATH=/tmp/peft-$v python old.py
    done
"""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
PLAIN = HERE / "llama" / "untied" / "qv" / "adapter_model.safetensors"
FILES = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors")


def main():
    base = AutoModelForCausalLM.from_pretrained(HERE / "llama" / "untied", dtype=torch.float32)
    base.config._name_or_path = base.name_or_path = "untied"
    fields = dict(r=4, lora_alpha=10, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, LoraConfig(**fields))
    tensors, copied = load_file(PLAIN), 0
    with torch.no_grad():
        for key, p in model.named_parameters():
            plain = key.replace(".default.", ".")
            if plain in tensors:
                p.copy_(tensors[plain])
                copied += 1
    assert copied == len(tensors)
    out = HERE / "old" / peft.__version__
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    for path in out.iterdir():
        if path.name not in FILES:
            path.unlink()
    # A set, in hash order.
    path = out / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"] = sorted(written["target_modules"])
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


main()
