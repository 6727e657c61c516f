"""What an adapted model takes without gradients: attached, inside `tnpeft.serving` and merged, against the plain one.

    python benchmarks/inference.py --size 16
    python benchmarks/inference.py --model llama --tokens 1
    python benchmarks/inference.py --threads 1 --clock cpu

The four take turns in one process. Ratios are medians over rounds of what was timed in the same round. `small` and
`paper` are MONAI's U-Nets with the recipes, `llama` is a decoder with adapters on the seven matrices of each block.
`--clock cpu` counts what this process computes, beside others that share the cores. Outputs of `serving` and `merged`
are compared by their bits.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from common import CLOCKS, add_clock, alternating, parser, show, timings, write
from methods import RECIPES, adapt
from models import unet
from torch import Tensor, nn
from torch.nn import functional

import tnpeft

WARMUP = 2
KINDS = ("plain", "attached", "serving", "merged")
MATRICES = r"(query|key|value|out|gate|up|down)$"
WIDTH, HIDDEN, HEADS, BLOCKS, VOCABULARY = 1024, 2816, 16, 8, 8192


class Block(nn.Module):
    """A decoder's block: attention and a gated MLP, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        heads = [each(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.between(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def llama() -> nn.Module:
    """A decoder of Llama's kind with 119 M parameters."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(BLOCKS)]
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.RMSNorm(WIDTH), head)


def main() -> None:
    arguments = options().parse_args()
    torch.set_num_threads(arguments.threads)
    setting = {key: getattr(arguments, key) for key in ("model", "size", "tokens", "mode", "rounds", "clock")}
    results: dict[str, Any] = {**setting, "methods": {}}
    base, inputs = subject(arguments)
    for name in arguments.methods or (("lora", "dora") if arguments.model == "llama" else RECIPES):
        results["methods"][name] = measured(name, base, inputs, arguments)
        print(name, results["methods"][name], flush=True)
        write(arguments.out, results)
    rows = [
        [
            name,
            kind,
            f"{about['seconds'] * 1e3:.0f}",
            f"{about['ratio']:.3f}",
            f"{about['low']:.3f} - {about['high']:.3f}",
        ]
        for name, found in results["methods"].items()
        for kind, about in found["kinds"].items()
    ]
    show(f"Inference, {arguments.model} model", ("method", "", "ms", "ratio to plain", "middle half"), rows)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__, "inference.json")
    found.add_argument("--model", choices=("tiny", "small", "paper", "llama"), default="small")
    found.add_argument("--size", type=int, default=16, help="side of a U-Net's volume, voxels")
    found.add_argument("--tokens", type=int, default=64, help="of the decoder's sequence")
    found.add_argument("--mode", default="auto", help="execution mode of the adapters")
    found.add_argument("--methods", nargs="+", help="recipes for a U-Net, specs for the decoder")
    found.add_argument("--rounds", type=int, default=15)
    add_clock(found)
    return found


def subject(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The plain model and its inputs."""
    if arguments.model == "llama":
        return llama().eval(), (torch.randint(VOCABULARY, (1, arguments.tokens)),)
    x = torch.randn(1, 1, *[arguments.size] * 3)
    return unet(arguments.model).eval(), (x, torch.full((1,), 17))


def attached(name: str, base: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    """A copy of the model with a method on it whose cores have left their start."""
    model = copy.deepcopy(base)
    if arguments.model == "llama":
        tnpeft.attach(model, name, match=MATRICES, mode=arguments.mode)
    else:
        adapt(model, name, arguments.mode)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def measured(name: str, base: nn.Module, inputs: tuple[Tensor, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """A method's four kinds, and what is kept for one of them."""
    models = {kind: attached(name, base, arguments) for kind in KINDS[1:]} | {"plain": base}
    tnpeft.merge(models["merged"])
    outputs: dict[str, Tensor] = {}

    def call(kind: str) -> Callable[[], None]:
        def run() -> None:
            outputs[kind] = models[kind](*inputs)

        return run

    with torch.no_grad(), tnpeft.serving(models["serving"]) as kept:
        times = alternating(
            {kind: call(kind) for kind in KINDS}, arguments.rounds, WARMUP, clock=CLOCKS[arguments.clock]
        )
        return {
            "kinds": {kind: vars(timing) for kind, timing in timings(times, "plain").items()},
            "kept_bytes": kept.bytes,
            "kept": str(kept),
            "same_bits": torch.equal(outputs["serving"], outputs["merged"]),
        }


if __name__ == "__main__":
    main()
