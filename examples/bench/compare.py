"""Runs both programs in turns and prints the ratio of their medians; see compare.sh."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE.parent / "data/wordnet-categories/train.jsonl"
THREADS = "2"
BUSY = 0.7  # load average; the build just before is part of it
SKIP = 2  # steps at the start of each run that do not count


def run(name, command, log):
    """Runs one program to its end; returns tokens/s, s/step and peak memory."""
    env = os.environ | {"RAYON_NUM_THREADS": THREADS, "OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"{name} failed ({process.returncode}):\n{output.read().decode(errors='replace')[-4000:]}")
    steps = [json.loads(line) for line in log().read_text().splitlines()]
    steps = [s for s in steps if "seconds" in s][SKIP:]
    result = {
        "tokens_per_s": sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps),
        "s_per_step": statistics.median(s["seconds"] for s in steps),
        "peak_mb": usage.ru_maxrss / 1024,
        "tokens": sum(s["tokens"] for s in steps),
        "loss": statistics.mean(s["loss"] for s in steps[-5:]),
    }
    print(
        f"{name:<13} {result['tokens_per_s']:7.1f} tokens/s  {result['s_per_step']:6.3f} s/step"
        f"  {result['peak_mb']:6.0f} MB  {result['tokens']} tokens  loss of the last five steps {result['loss']:.3f}",
        flush=True,
    )
    return result


def torch_run(model, steps, folder):
    log = folder / "torch.jsonl"
    command = [sys.executable, HERE / "torch_peft.py", model, "--data", DATA, "--log", log]
    command += ["--steps", steps, "--threads", THREADS]
    return run("torch + peft", command, lambda: log)


def our_run(model, steps, folder):
    out = folder / "ours"
    command = "cargo run --release --quiet --example finetune --".split()
    command += ["--model", model, "--data", DATA]
    command += ["--steps", steps, "--batch", "8", "--rank", "8", "--alpha", "16", "--lr", "2e-3", "--out", out]
    return run("ours", command, lambda: next(out.glob("*.jsonl")))


def main():
    if not 2 <= len(sys.argv) <= 4:
        sys.exit("usage: compare.sh MODEL [ROUNDS [STEPS]]")
    model, rounds, steps = [*sys.argv[1:], *["3", "20"][len(sys.argv) - 2 :]]
    print(f"{rounds} rounds of {steps} steps, the first {SKIP} of each not counted")
    load = os.getloadavg()[0]  # of the minute before
    if load > BUSY:
        print(f"the machine is busy (load average {load:.1f}): these numbers cannot be trusted")
    torch_runs, our_runs = [], []
    for _ in range(int(rounds)):
        for runs, start in ((torch_runs, torch_run), (our_runs, our_run)):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(start(model, steps, Path(folder)))
    median = lambda runs, field: statistics.median(r[field] for r in runs)
    theirs, ours = median(torch_runs, "tokens_per_s"), median(our_runs, "tokens_per_s")
    print(f"median tokens/s: torch + peft {theirs:.1f}, ours {ours:.1f}: ratio {ours / theirs:.2f}")
    print(f"median peak memory: torch + peft {median(torch_runs, 'peak_mb'):.0f} MB, ours {median(our_runs, 'peak_mb'):.0f} MB")


main()
