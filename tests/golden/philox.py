"""philox.json: known answers of Philox4x32 with 7 and 10 rounds.

The generator is that of Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC'11, written here from the paper for both word
sizes. It is held against two independent sources before anything is written:
the published answers of the Random123 library (`kat_vectors`), and, in its
64-bit form, numpy's Philox bit generator.
"""

import json
from pathlib import Path

import numpy as np

# word bits: (multipliers, Weyl increments of the key)
CONSTANTS = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
}

# Random123's kat_vectors, the lines `philox4x32 7` and `philox4x32 10`: rounds, counter, key, output.
PUBLISHED = """
7  00000000 00000000 00000000 00000000 00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


def philox4(counter, key, rounds, bits=32):
    """Four words of `bits` bits from a counter of four words and a key of two."""
    (m0, m1), (w0, w1) = CONSTANTS[bits]
    mask = (1 << bits) - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> bits) ^ c1 ^ k0, p1 & mask, (p0 >> bits) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return [c0, c1, c2, c3]


def published():
    for line in PUBLISHED.strip().splitlines():
        rounds, *words = line.split()
        words = [int(w, 16) for w in words]
        yield {"rounds": int(rounds), "counter": words[:4], "key": words[4:6], "output": words[6:]}


def check_against_numpy():
    rng = np.random.default_rng(0)
    for _ in range(100):
        counter = [int(w) for w in rng.integers(0, 2**64, 4, dtype=np.uint64)]
        key = [int(w) for w in rng.integers(0, 2**64, 2, dtype=np.uint64)]
        generator = np.random.Philox(counter=np.array(counter, np.uint64), key=np.array(key, np.uint64))
        # numpy steps its 256-bit counter before the first block.
        stepped = sum(w << (64 * i) for i, w in enumerate(counter)) + 1
        stepped = [(stepped >> (64 * i)) & (2**64 - 1) for i in range(4)]
        assert generator.random_raw(4).tolist() == philox4(stepped, key, 10, bits=64)


def write():
    check_against_numpy()
    vectors = list(published())
    for v in vectors:
        assert philox4(v["counter"], v["key"], v["rounds"]) == v["output"], v
    rng = np.random.default_rng(1)
    for rounds in (7, 10):
        for _ in range(16):
            counter, key = rng.integers(0, 2**32, 4).tolist(), rng.integers(0, 2**32, 2).tolist()
            vectors.append({"rounds": rounds, "counter": counter, "key": key, "output": philox4(counter, key, rounds)})
    golden = {
        "source": "first six: Random123 kat_vectors (philox4x32); the others: philox.py, which gives those six too",
        "words": "in index order: counter[0..4], key[0..2], output[0..4]",
        "vectors": vectors,
    }
    lines = ",\n".join("  " + json.dumps(v) for v in golden.pop("vectors"))
    head = json.dumps(golden, indent=1)[:-2]
    Path(__file__).with_name("philox.json").write_text(f'{head},\n "vectors": [\n{lines}\n ]\n}}\n')
