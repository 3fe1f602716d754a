#!/usr/bin/env python3
"""Writes every golden file of this folder with the released PEFT.

    python -m venv .venv && .venv/bin/pip install -r requirements.txt
    .venv/bin/python make.py

README.md says what is in the files. Two runs write the same bytes.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

import folders
import init
import linear
import llama
import matching
import philox
import several
import settings

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
for part in (linear, llama, matching, init, philox, settings, several, folders):
    part.write()
    print(f"{part.__name__}: written")
