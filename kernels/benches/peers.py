"""R of other implementations, for the table in RESULTS.md.

R = (LoRA forward + dx + dA + dB) / (frozen forward + dx), both in PyTorch, bf16, random data;
baseline and candidate alternate, device events, median of the ratios of neighbouring runs. Needs a
CUDA device, torch and, for its row, peft:

    python kernels/benches/peers.py
"""

import statistics
import sys

import torch
import torch.nn.functional as F

LAYERS = [  # tokens, in, out, rank
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (8192, 2048, 2048, 16),
    (8192, 8192, 8192, 16),
    (8192, 4096, 4096, 64),
    (2048, 4096, 4096, 16),
]
SHAPES = [(*layer, p) for layer in LAYERS for p in (0.0, 0.1)]
ROUNDS = 30


class Eager:
    """The formula, composed of torch's operations; adapters in bf16."""

    name = "torch eager"

    def __init__(self, weight, a, b, scaling, p):
        self.weight, self.scaling, self.p = weight, scaling, p
        self.a, self.b = (t.to(weight.dtype).requires_grad_() for t in (a, b))

    def __call__(self, x):
        low = F.linear(F.dropout(x, self.p), self.a)
        return F.linear(x, self.weight) + F.linear(low, self.b) * self.scaling


class InPlace(torch.autograd.Function):
    """The adapter is added into the base's output by addmm; x A^T is recomputed in backward."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        y = x @ weight.t()
        return y.addmm_(x @ a.t(), b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        dlow = dy @ b
        da = (dlow.t() @ x) * ctx.scaling
        db = (dy.t() @ (x @ a.t())) * ctx.scaling
        dx = dy @ weight
        dx.addmm_(dlow, a, alpha=ctx.scaling)
        return dx, None, da, db, None


class AddMm(Eager):
    """The graph of Unsloth's fast LoRA: no dropout."""

    name = "addmm graph"

    def __call__(self, x):
        return InPlace.apply(x, self.weight, self.a, self.b, self.scaling)


class Peft:
    """Hugging Face PEFT's layer as it comes: adapters in f32."""

    name = "PEFT"

    def __init__(self, weight, a, b, scaling, p):
        from peft import LoraConfig, inject_adapter_in_model

        rank = a.shape[0]
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        config = LoraConfig(
            r=rank, lora_alpha=scaling * rank, lora_dropout=p, target_modules=["0"]
        )
        self.model = inject_adapter_in_model(config, torch.nn.Sequential(linear))
        self.model.train()
        layer = self.model[0]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)

    def __call__(self, x):
        return self.model(x)


def elapsed(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ratio(peer, tokens, inputs, outputs, rank, p):
    generator = torch.Generator(device="cuda").manual_seed(1)
    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    weight = (normal(outputs, inputs) * 0.02).bfloat16()
    layer = peer(weight, normal(rank, inputs) * 0.02, normal(outputs, rank), 2.0, p)
    x = normal(tokens, inputs).bfloat16().requires_grad_()
    dy = normal(tokens, outputs).bfloat16()

    def frozen():
        F.linear(x, weight).backward(dy)

    def adapted():
        layer(x).backward(dy)

    ratios = []
    for round in range(ROUNDS + 5):
        x.grad = None
        base = elapsed(frozen)
        x.grad = None
        lora = elapsed(adapted)
        if round >= 5:
            ratios.append(lora / base)
    return statistics.median(ratios)


def main():
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    peers = [Eager, AddMm, Peft]
    print("| tokens | in→out | r | p |", " | ".join(peer.name for peer in peers), "|")
    print("|--" * (4 + len(peers)) + "|")
    for shape in SHAPES:
        tokens, inputs, outputs, rank, p = shape
        cells = []
        for peer in peers:
            try:
                skipped = peer is AddMm and p > 0
                cells.append("-" if skipped else f"{ratio(peer, *shape):.2f}")
            except ImportError as error:
                cells.append(str(error))
        print(f"| {tokens} | {inputs}→{outputs} | {rank} | {p} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
