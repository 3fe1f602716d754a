#!/bin/sh
# Training speed of the main job: PyTorch + PEFT against ours, in turns, on two threads.
#
#     PYTHON=.venv/bin/python examples/bench/compare.sh MODEL [ROUNDS [STEPS]]
#
# MODEL is a GGUF file or a Hugging Face folder. PYTHON needs the packages of
# requirements.txt. Leave the machine alone meanwhile: with other work on the
# same cores PyTorch's threads wait for each other and fall behind by far more
# than their share, and the ratio means nothing.
set -eu
here=$(dirname "$0")
cargo build --release --quiet --example finetune
exec "${PYTHON:-python3}" "$here/compare.py" "$@"
