#!/usr/bin/env python3
"""Takes adapters from PEFT to this framework and back, and compares what the models compute.

    pip install -r tests/golden/requirements.txt
    cargo build --release -p lora-examples --example forward
    python tests/python/live_check.py target/release/examples/forward [--only WORD] [--keep DIR]

For tiny random models of the Llama family and of BERT, and for every setting of LoRA on linear
layers: PEFT trains an adapter for a few steps and saves it, the program loads it and runs the
model; the program trains an adapter and saves it, PEFT loads it with warnings turned into errors,
and holds every tensor of the file bit for bit. Each time the two outputs may differ by 1e-5 of the
largest number in them (f32). Prints a table, and fails (exit code 1) if a check does.
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from strict import check_tensors, no_warnings  # first: it keeps transformers offline

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

TOLERANCE = 1e-5
SMALL = dict(
    vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
)  # fmt: skip
LLAMA = LlamaConfig(
    **SMALL, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
)  # fmt: skip
BERT = BertConfig(**SMALL, max_position_embeddings=16, num_labels=3)
FAMILIES = {
    "llama": (AutoModelForCausalLM, LLAMA, "CAUSAL_LM"),
    "bert": (AutoModel, BERT, "FEATURE_EXTRACTION"),
    "bert classifier": (AutoModelForSequenceClassification, BERT, "SEQ_CLS"),
}

# The settings in PEFT's words. {q} and {v} stand for the family's names, {layer} for its list.
PLAIN = dict(r=4, lora_alpha=6, target_modules=["{q}", "{v}"])
VARIANTS = {
    "plain": PLAIN,
    "every linear layer": PLAIN | dict(target_modules="all-linear"),
    "regular expression": PLAIN | dict(target_modules=r".*\.({q}|{v})", exclude_modules=r".*\.0\..*{v}"),
    "one layer": PLAIN | dict(layers_to_transform=[1], layers_pattern="{layer}"),
    "rsLoRA": PLAIN | dict(use_rslora=True),
    "patterns": PLAIN | dict(rank_pattern={"{q}": 2}, alpha_pattern={r"{layer}\.1\..*{v}": 5}),
    "rsLoRA, patterns": PLAIN | dict(use_rslora=True, rank_pattern={"{layer}.0.*{q}": 9}, alpha_pattern={"{v}": 3}),
    "bias of the layers": PLAIN | dict(bias="lora_only"),
    "all biases": PLAIN | dict(bias="all"),
    "lora_bias": PLAIN | dict(lora_bias=True),
    "modules_to_save": PLAIN | dict(modules_to_save=["{saved}"]),
    "all at once": PLAIN
    | dict(use_rslora=True, rank_pattern={"{q}": 3}, bias="lora_only", lora_bias=True, modules_to_save=["{saved}"]),
}
SECOND = dict(r=3, lora_alpha=9, target_modules=["{v}", "{up}"], use_rslora=True)
WORDS = {
    "llama": dict(q="q_proj", v="v_proj", up="up_proj", layer="layers", saved="lm_head"),
    "bert": dict(q="query", v="value", up="intermediate.dense", layer="layer", saved="encoder.layer.1.output.dense"),
    "bert classifier": dict(q="query", v="value", up="intermediate.dense", layer="layer", saved="pooler"),
}


class Differs(Exception):
    pass


def in_words_of(family, value):
    if isinstance(value, str):
        for word, name in WORDS[family].items():
            value = value.replace("{" + word + "}", name)
        return value
    if isinstance(value, list):
        return [in_words_of(family, v) for v in value]
    if isinstance(value, dict):
        return {in_words_of(family, k): in_words_of(family, v) for k, v in value.items()}
    return value


def our_config(family, fields):
    """The same settings for the program: a string is a regular expression there only after `re:`."""
    names = {"r": "dim", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    ours = {names.get(key, key): value for key, value in fields.items()}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(ours.get(key), str) and ours[key] != "all-linear":
            ours[key] = f"re:{ours[key]}"
        elif isinstance(ours.get(key), list):
            ours[key] = [f"*.{name}" if "." in name else name for name in ours[key]]
    if family == "bert classifier":  # PEFT adds it for this task
        ours["modules_to_save"] = [*ours.get("modules_to_save", []), "classifier"]
    return ours


class Family:
    """A base model in a folder, token ids for it, and both programs to run it."""

    def __init__(self, name, program, work):
        self.name, self.program, self.work = name, program, work
        self.model_class, config, self.task = FAMILIES[name]
        self.dir = work / name.replace(" ", "_")
        torch.manual_seed(len(name))
        model = self.model_class.from_config(copy.deepcopy(config))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "norm" in key.lower() and key.endswith("weight"):
                    p.uniform_(0.5, 1.5)
                elif key.endswith("bias"):
                    p.normal_(std=0.3)
        model.save_pretrained(self.dir)
        self.inputs = {"input_ids": torch.randint(3, config.vocab_size, (4, 9))}
        if name != "llama":
            self.inputs["attention_mask"] = torch.ones(4, 9, dtype=torch.int64)
            self.inputs["attention_mask"][1:3, -3:] = 0
        save_file(self.inputs, self.dir / "inputs.safetensors")

    def base(self):
        return self.model_class.from_pretrained(self.dir, dtype=torch.float32).eval()

    def config(self, fields):
        return LoraConfig(task_type=self.task, **copy.deepcopy(fields))

    def run(self, model, **options):
        with torch.no_grad():
            return model(**self.inputs, **options)[0]

    def train(self, model):
        """A few steps, so that B is not zero and what is saved with it has moved."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(**self.inputs)[0].square().mean().backward()
            optimizer.step()

    def ours(self, *arguments):
        """What the program computes."""
        out = self.work / "out.safetensors"
        out.unlink(missing_ok=True)
        fixed = ["--model", self.dir, "--inputs", self.dir / "inputs.safetensors", "--out", out]
        done = subprocess.run([self.program, *fixed, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise Differs((done.stderr or done.stdout).strip())
        return load_file(out)["output"]

    def compare(self, ours, theirs):
        """The largest difference, relative to the largest number."""
        if ours.shape != theirs.shape:
            raise Differs(f"shapes {list(ours.shape)} and {list(theirs.shape)}")
        base = self.run(self.base())
        if (theirs - base).abs().max() < 1e-2:
            raise Differs("the adapter changes nothing")
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= TOLERANCE:
            raise Differs(f"outputs differ by {difference:.1e}")
        return difference


def trained_by_peft(family, adapters):
    """A model with these adapters, each trained alone."""
    model = None
    for name, fields in adapters.items():
        if model is None:
            model = get_peft_model(family.base(), family.config(fields), adapter_name=name)
        else:
            model.add_adapter(name, family.config(fields))
        model.set_adapter(name)
        family.train(model)
    return model.eval()


def loaded_by_peft(family, folders):
    """A model with the adapters of these folders; a warning is an error."""
    with no_warnings():
        model = None
        for name, folder in folders.items():
            if model is None:
                model = PeftModel.from_pretrained(family.base(), folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
    for name, folder in folders.items():
        check_tensors(model, load_file(folder / "adapter_model.safetensors"), name)
    return model.eval()


def from_peft(family, fields, out, **options):
    model = trained_by_peft(family, {"default": fields})
    model.save_pretrained(out, save_embedding_layers=False, **options)
    return family.compare(family.ours("--adapter", out), family.run(model))


def to_peft(family, fields, out):
    config = out.with_suffix(".json")
    config.write_text(json.dumps(our_config(family.name, fields)))
    ours = family.ours("--train", config, "--save", out)
    return family.compare(ours, family.run(loaded_by_peft(family, {"default": out})))


NAMES = ["default", "second"]
ROWS = ["second", "default", "__base__", "default"]


def run_several(family, model, rows):
    if rows:
        return family.run(model, adapter_names=ROWS)
    model.base_model.set_adapter(NAMES)
    return family.run(model)


def several_from_peft(family, adapters, out, rows):
    model = trained_by_peft(family, adapters)
    model.save_pretrained(out, save_embedding_layers=False)
    folders = {"default": out, "second": out / "second"}
    arguments = [word for name in NAMES for word in ("--adapter", f"{name}={folders[name]}")]
    ours = family.ours(*arguments, *(["--rows", ",".join(ROWS)] if rows else []))
    return family.compare(ours, run_several(family, model, rows))


def several_to_peft(family, adapters, out, rows):
    arguments = []
    for name, fields in adapters.items():
        config = out.with_suffix(f".{name}.json")
        config.write_text(json.dumps(our_config(family.name, fields)))
        arguments += ["--train", f"{name}={config}"]
    ours = family.ours(*arguments, "--save", out, *(["--rows", ",".join(ROWS)] if rows else []))
    model = loaded_by_peft(family, {name: out / name for name in NAMES})
    return family.compare(ours, run_several(family, model, rows))


def checks(family):
    """(name of the check, PEFT to ours, ours to PEFT), the last two functions of a folder."""
    for name, fields in VARIANTS.items():
        fields = in_words_of(family.name, fields)
        yield name, lambda out, f=fields: from_peft(family, f, out), lambda out, f=fields: to_peft(family, f, out)
    plain = in_words_of(family.name, PLAIN)
    yield "a .bin file", lambda out: from_peft(family, plain, out, safe_serialization=False), None
    # Two classifiers, each trained with an adapter, have no sum.
    adapters = {"default": plain, "second": in_words_of(family.name, SECOND)}
    if family.task != "SEQ_CLS":
        for name, rows in (("sum of two, by name", False), ("one a row", True)):
            yield (
                name,
                lambda out, rows=rows: several_from_peft(family, adapters, out, rows),
                lambda out, rows=rows: several_to_peft(family, adapters, out, rows),
            )


def outcome(check, out):
    """A difference, or why there is none."""
    if check is None:
        return "-", None
    try:
        with contextlib.redirect_stderr(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's about training and saving
            return f"{check(out):.0e}", None
    except Exception as error:
        return "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program", type=Path, help="the example `forward`")
    p.add_argument("--only", default="", help="run the checks whose name has this in it")
    p.add_argument("--keep", type=Path, help="leave the models and adapters here")
    args = p.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(f"PEFT {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"| model | adapter | PEFT to ours | ours to PEFT |\n|---|---|---|---|")
    failures = []
    with contextlib.ExitStack() as stack:
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in FAMILIES:
            family = Family(name, args.program.resolve(), work)
            for i, (check, *directions) in enumerate(checks(family)):
                if args.only not in f"{name}, {check}":
                    continue
                cells = []
                for direction, run in zip(("from_peft", "to_peft"), directions):
                    cell, failure = outcome(run, family.dir / f"{direction}-{i}")
                    cells.append(cell)
                    if failure:
                        failures.append(f"{name}, {check}, {direction}: {failure}")
                print(f"| {name} | {check} | {cells[0]} | {cells[1]} |", flush=True)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
