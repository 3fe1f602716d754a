#!/usr/bin/env python3
"""The main job in PyTorch + PEFT: the yardstick for `cargo run --release --example finetune`.

    python torch_peft.py MODEL [--data train.jsonl] [--steps 60] [--log LOG.jsonl] ...

MODEL is a GGUF file or a Hugging Face folder. f32; LoRA r=8, alpha=16 on all
seven linears of each block; AdamW, linear warm-up and decay, clip 1.0; loss on
the completion and its end token. Rows are taken in file order.

Writes one JSON line per step, {"step", "loss", "tokens", "seconds"}, where
`tokens` are the batch's tokens without padding and `seconds` the wall time of
forward, backward and optimizer step; then prints one JSON line of totals, the
first `--skip` steps left out.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DATA = Path(__file__).parent.parent / "data/wordnet-categories/train.jsonl"
IGNORE = -100


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, default=DATA)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--alpha", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--skip", type=int, default=2, help="steps left out of the totals")
    p.add_argument("--log", type=Path, help="JSON lines go here instead of to stderr")
    p.add_argument("--out", type=Path, help="save the adapter in this folder")
    p.add_argument("--eval", type=Path, help="JSON lines of held-out rows: report greedy accuracy after training")
    p.add_argument(
        "--label-logits",
        action="store_true",
        help="multiply by the output head only where a label counts (transformers does it everywhere)",
    )
    return p.parse_args()


def load(path):
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    import gguf_model

    return gguf_model.read(path)


def encode(rows, tok):
    """Each row as (ids, labels), the prompt's labels ignored."""
    for row in rows:
        prompt = tok(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = tok(row["completion"], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        yield prompt + completion, [IGNORE] * len(prompt) + completion


def collate(rows, pad):
    """Pads on the right: ids, labels and mask, each [batch, longest row]."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids, labels, mask


def loss_of(model, ids, labels, mask, label_logits):
    if not label_logits:
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORE
    logits = causal.lm_head(hidden[:, :-1][wanted])  # [labels that count, vocab]
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])


def greedy_accuracy(model, rows, tok):
    """Share of rows whose completion's first token is the most likely one."""
    right = 0
    with torch.no_grad():
        for row in rows:
            prompt = tok(row["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
            first = tok(row["completion"], add_special_tokens=False)["input_ids"][0]
            right += int(model(input_ids=prompt).logits[0, -1].argmax()) == first
    return right / len(rows)


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    base, tok = load(args.model)
    config = LoraConfig(
        r=args.rank, lora_alpha=args.alpha, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    rows = list(encode(map(json.loads, args.data.open(encoding="utf-8")), tok))

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0)
    rate = lambda step: min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    log = args.log.open("w") if args.log else sys.stderr
    steps = []
    for step in range(args.steps):
        batch = [rows[(step * args.batch + i) % len(rows)] for i in range(args.batch)]
        start = time.perf_counter()
        ids, labels, mask = collate(batch, tok.eos_token_id)
        loss = loss_of(model, ids, labels, mask, args.label_logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        steps.append({"step": step + 1, "loss": loss.item(), "tokens": int(mask.sum()), "seconds": seconds})
        print(json.dumps(steps[-1]), file=log, flush=True)

    timed = steps[args.skip :]
    total = {
        "torch": torch.__version__,
        "trainable": sum(p.numel() for p in params),
        "tokens_per_s": round(sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed), 2),
        "median_s_per_step": round(statistics.median(s["seconds"] for s in timed), 4),
        "last_loss": round(steps[-1]["loss"], 4),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if args.eval:
        held_out = list(map(json.loads, args.eval.open(encoding="utf-8")))
        total["greedy_accuracy"] = greedy_accuracy(model.eval(), held_out, tok)
    if args.out:
        model.save_pretrained(args.out)
    print(json.dumps(total))


main()
