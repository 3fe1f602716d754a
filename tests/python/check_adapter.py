#!/usr/bin/env python3
"""Loads a saved adapter with the released PEFT and says whether all of it landed.

    python check_adapter.py ADAPTER_DIR BASE_DIR [--logits FILE] [--ids 1,2,3] [--tolerance 1e-4]

BASE_DIR is a Hugging Face folder. Works offline, in f32. Fails (exit code 1)
on any warning or log record of level warning, on a tensor of the file that the
model does not hold bit for bit afterwards, on a tensor the model wants and the
file lacks, and on an adapter that changes nothing.

FILE is a safetensors file with `input_ids` [batch, tokens] (any integer type)
and `logits` [batch, tokens, vocab] (f32), as our side computed them; without it
the ids given by --ids are run. Prints one line. Needs ../golden/requirements.txt.
"""

import argparse
import sys
from pathlib import Path

from strict import Fail, check_tensors, no_warnings  # first: it keeps transformers offline

import torch
from peft import PeftModel, __version__ as peft_version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("adapter", type=Path)
    p.add_argument("base", type=Path)
    p.add_argument("--logits", type=Path)
    p.add_argument("--ids", default="1,2,3,4,5", help="token ids, when there is no --logits")
    p.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference of a logit")
    return p.parse_args()


def run(args):
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    file = load_file(args.adapter / "adapter_model.safetensors")
    check_tensors(model, file)

    ours = load_file(args.logits) if args.logits else {}
    if args.logits and ours.keys() != {"input_ids", "logits"}:
        raise Fail(f"{args.logits}: holds {sorted(ours)}, expected input_ids and logits")
    ids = ours["input_ids"].long() if ours else torch.tensor([[int(i) for i in args.ids.split(",")]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with model.disable_adapter():
            change = (logits - model(input_ids=ids).logits).abs().max().item()
    if not change > 0:
        raise Fail("the adapter changes no logit (is B zero?)")

    line = f"PEFT {peft_version} loaded {len(file)} tensors without a warning; logits move by up to {change:.3g}"
    if ours:
        if ours["logits"].shape != logits.shape:
            raise Fail(f"logits are {list(ours['logits'].shape)}, PEFT's are {list(logits.shape)}")
        difference = (logits - ours["logits"]).abs().max().item()
        if not difference <= args.tolerance:
            raise Fail(f"logits differ by up to {difference:.3g}, tolerance {args.tolerance:g}")
        line += f" and agree with ours to {difference:.2g}"
    return line


def main():
    args = arguments()
    try:
        with no_warnings():
            print(f"{args.adapter}: {run(args)}")
    except (Fail, Warning, OSError, ValueError, RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())
        sys.exit(f"{args.adapter}: {type(error).__name__}: {text[:1000]}")


main()
