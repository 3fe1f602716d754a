#!/usr/bin/env python3
"""Writes train.jsonl and test.jsonl from WordNet's data.noun.

    python3 make.py /usr/share/wordnet/data.noun      # Debian package wordnet-base 1:3.0-37

A row asks for the category of a definition: the gloss of a noun up to its
first ";" (15 to 160 characters), and the name of the lexicographer file the
noun is kept in. Ten categories, 300 rows of each to train and 50 to test,
drawn with a fixed seed. A gloss that occurs twice is left out, so that no
test row was seen in training and no text has two answers.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

# Lexicographer file numbers, lexnames(5WN).
CATEGORIES = {
    5: "animal", 6: "artifact", 8: "body", 12: "feeling", 13: "food",
    15: "location", 18: "person", 20: "plant", 27: "substance", 28: "time",
}
TRAIN, TEST = 300, 50


def glosses(path):
    """Yields (text, category) for each noun synset of the ten files."""
    for line in open(path, encoding="utf-8"):
        if line.startswith("  "):  # the licence, ahead of the data
            continue
        fields, gloss = line.split(" | ", 1)
        category = CATEGORIES.get(int(fields.split()[1]))
        text = gloss.split(";")[0].strip()
        if category and 15 <= len(text) <= 160:
            yield text, category


def main():
    rows = list(glosses(sys.argv[1]))
    times = Counter(text for text, _ in rows)
    rng = random.Random(2006)
    splits = {"train": [], "test": []}
    for category in sorted(CATEGORIES.values()):
        texts = sorted(text for text, c in rows if c == category and times[text] == 1)
        drawn = rng.sample(texts, TRAIN + TEST)
        splits["train"] += [(text, category) for text in drawn[:TRAIN]]
        splits["test"] += [(text, category) for text in drawn[TRAIN:]]
    for name, split in splits.items():
        rng.shuffle(split)
        with open(Path(__file__).with_name(f"{name}.jsonl"), "w", encoding="utf-8") as out:
            for text, category in split:
                row = {"prompt": f"Definition: {text}\nCategory:", "completion": f" {category}"}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


main()
