"""Training steps of models made of Linear layers, beside PEFT: time, and what the forward pass leaves for the backward.

    python benchmarks/linear_models.py --clock cpu
    python benchmarks/linear_models.py --compile
    python benchmarks/linear_models.py --models llama_1b --device cuda --autocast bf16

A step is forward, mean squared error, backward and Adam on noise, on models of transformers with random weights; every
Linear of a block is adapted, LoRA at rank 8 by both libraries. All methods of a model live in one process and take
turns; a ratio to `full`, which trains everything, is the median over the rounds' ratios. No round begins after
`--minutes`. `saved` is what autograd saves, each storage once and without parameters and buffers, `left` what is
allocated in a forward pass and alive at its end: functions may keep what autograd does not know of.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from allocation import Allocations, saved_bytes
from common import CLOCKS, add_clock, alternating, parser, show, timings, write
from torch import Tensor, nn

import tnpeft
from tnpeft.execution import AdaptedLayer

MIB = 2**20
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT = ("query", "key", "value", "dense")
# Of transformers' configs; the batch's size and its tokens; the layers to adapt.
MODELS: Mapping[str, tuple[str, dict[str, int], tuple[int, int], tuple[str, ...]]] = {
    "llama": ("Llama", {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
                        "num_attention_heads": 8, "vocab_size": 1024}, (2, 256), LLAMA),
    "bert": ("Bert", {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
                      "num_attention_heads": 6, "vocab_size": 1024}, (2, 128), BERT),
    "llama_1b": ("Llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}, (4, 1024), LLAMA),
    "tiny": ("Llama", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "vocab_size": 16}, (1, 8), LLAMA),
}  # fmt: skip
# Specs of tnpeft, their params, and the mode.
OURS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "lora": ("lora", {"r": 8}, "auto"),
    "lora factored": ("lora", {"r": 8}, "factored"),
    "lora hybrid": ("lora", {"r": 8}, "hybrid"),
    "lora dense": ("lora", {"r": 8}, "dense"),
    "quanta": ("quanta", {"r": 4}, "auto"),
    "tt_lora": ("tt_lora", {}, "auto"),
}
FULL, PEER = "full", "peft LoRA"


def main() -> None:
    arguments = options().parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {key: getattr(arguments, key) for key in ("rounds", "device", "autocast", "compile", "clock")}
    results: dict[str, Any] = {**settings, "models": {}}
    ends = time.monotonic() + 60 * arguments.minutes
    for number, name in enumerate(arguments.models):
        share = (ends - time.monotonic()) / (len(arguments.models) - number)
        results["models"][name] = found = measure(name, arguments, time.monotonic() + share)
        columns = ("method", "ms", "ratio to full", "middle half", f"of {PEER}'s", "saved MiB", "left MiB", "modes")
        rows = [row(*about) for about in found["methods"].items()]
        show(f"Training step, {name}, {found['rounds']} rounds", columns, rows)
    write(arguments.out, results)


def options() -> argparse.ArgumentParser:
    found = parser(__doc__, "linear_models.json")
    found.add_argument("--models", nargs="+", choices=list(MODELS), default=["llama", "bert"])
    found.add_argument("--methods", nargs="+", choices=[PEER, *OURS], default=[PEER, *OURS])
    found.add_argument("--rounds", type=int, default=15, help="at most")
    found.add_argument("--minutes", type=float, default=9.0, help="after which no round begins")
    found.add_argument("--device", default="cpu", help="such as cuda")
    found.add_argument("--autocast", choices=tuple(AUTOCAST))
    found.add_argument("--compile", action="store_true", help="every model through torch.compile")
    add_clock(found)
    return found


def measure(name: str, arguments: argparse.Namespace, ends: float) -> dict[str, Any]:
    """Of every method on a model: times, ratios, bytes and modes."""
    base, tokens = model_of(name, arguments.device)
    models = {method: adapted(base, name, method) for method in (FULL, *arguments.methods)}
    steps, memory = {}, {}
    for method, model in models.items():
        steps[method] = one = Step(model, tokens, arguments)
        one()
        # On a CPU compiled code allocates unseen.
        left = None if arguments.compile else left_bytes(one.forward, arguments.device)
        memory[method] = {"saved": saved_bytes(one.forward, *model.parameters(), *model.buffers()), "left": left}
    on_gpu = arguments.device.startswith("cuda")
    times = alternating(steps, arguments.rounds, 2, on_gpu, CLOCKS[arguments.clock], ends)
    of_peer = timings(times, PEER) if PEER in times else {}
    methods = {
        method: {
            "trained": sum(parameter.numel() for parameter in models[method].parameters() if parameter.requires_grad),
            **vars(timing),
            "of_peer": of_peer[method].ratio if of_peer else None,
            **memory[method],
            "modes": modes_of(models[method]),
        }
        for method, timing in timings(times, FULL).items()
    }
    del models, steps
    gc.collect()
    return {"tokens": list(tokens.shape), "rounds": len(times[FULL]), "methods": methods}


def model_of(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """A model of transformers without its head, and tokens for it."""
    import transformers

    kind, sizes, shape, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="sdpa", use_cache=False)
    model: nn.Module = getattr(transformers, f"{kind}Model")(config).to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, torch.randint(0, sizes["vocab_size"], shape, device=device)


def adapted(base: nn.Module, name: str, method: str) -> nn.Module:
    """A copy of the model that trains what the method trains."""
    model = copy.deepcopy(base)
    *_, ends = MODELS[name]
    layers = [
        found for found, module in model.named_modules()
        if isinstance(module, nn.Linear) and found.rsplit(".", 1)[-1] in ends and "pooler" not in found
    ]  # fmt: skip
    if method == FULL:
        return model
    if method == PEER:
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=layers))
    spec, params, mode = OURS[method]
    tnpeft.attach(model, spec, match=layers, mode=mode, **params)
    return model


class Step:
    """One training step on noise."""

    def __init__(self, model: nn.Module, tokens: Tensor, arguments: argparse.Namespace) -> None:
        self.tokens, self.device, self.autocast = tokens, tokens.device.type, arguments.autocast
        self.called = torch.compile(model) if arguments.compile else model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.Adam(trained, lr=1e-5)
        with torch.no_grad():
            self.target = torch.randn_like(model(tokens).last_hidden_state, dtype=torch.float32)

    def forward(self) -> Tensor:
        with self._precision():
            return nn.functional.mse_loss(self.called(self.tokens).last_hidden_state.float(), self.target)

    def __call__(self) -> None:
        self.forward().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device, AUTOCAST[self.autocast]) if self.autocast else contextlib.nullcontext()


def left_bytes(forward: Callable[[], Tensor], device: str) -> int:
    """Bytes that a forward pass allocates and that are alive at its end."""
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        loss = forward()
        return torch.cuda.memory_allocated() - before
    with Allocations() as counted:
        loss = forward()
        left = counted.alive
    del loss
    return left


def modes_of(model: nn.Module) -> dict[str, int]:
    """In which modes adapted layers ran when they were called last; in compiled graphs nothing is noted."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    lasts = [layer.calls("default").last for layer in layers]
    return dict(Counter("none noted" if last is None else last.mode for last in lasts))


def row(name: str, about: Mapping[str, Any]) -> list[str]:
    """A method's row of the table."""
    of_peer = about["of_peer"]
    return [
        name,
        f"{about['seconds'] * 1e3:.1f}",
        f"{about['ratio']:.3f}",
        f"{about['low']:.3f} - {about['high']:.3f}",
        "" if of_peer is None else f"{of_peer:.3f}",
        f"{about['saved'] / MIB:.1f}",
        "" if about["left"] is None else f"{about['left'] / MIB:.1f}",
        ", ".join(f"{number} {mode}" for mode, number in about["modes"].items()),
    ]


if __name__ == "__main__":
    main()
