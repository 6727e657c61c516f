"""Training step (forward, backward, Adam) of every method as a ratio to full fine-tuning.

    python benchmarks/step_time.py --size 16 --rounds 9

All methods live in one process and take turns; the ratio is the median over rounds. `floor` is the
frozen model with only biases and norms trained: what no adapter can be faster than.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import alternating, parser, show, timings, write
from models import lycoris_model, matched, peft_model, train_biases_and_norms, unet
from torch import nn

import tnpeft

RECIPES = ("lora_ddpm", "loha_ddpm", "lokr_ddpm", "tenvoo_l_ddpm", "tenvoo_q_ddpm")


def methods(model: str, peers: bool) -> dict[str, nn.Module]:
    """Every method on a model of its own; ranks are those of the recipes."""
    full = unet(model)
    floor = unet(model).requires_grad_(False)
    train_biases_and_norms(floor, matched(floor))
    found = {"full": full, "floor": floor}
    for recipe in RECIPES:
        found[recipe] = unet(model)
        tnpeft.attach(found[recipe], recipe)
    if peers:
        found["peft LoRA r=2"] = peft_model(unet(model), 2)
        found["lycoris LoCon r=2"] = lycoris_model(unet(model), "lora", 2)
        found["lycoris LoHa r=1"] = lycoris_model(unet(model), "loha", 1)
        found["lycoris LoKr r=24"] = lycoris_model(unet(model), "lokr", 24, decompose_both=True, factor=-1)
    return found


def step(model: nn.Module, size: int, batch: int) -> Callable[[], None]:
    """One training step on noise, as a function."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    x = torch.randn(batch, 1, size, size, size)
    target = torch.randn_like(x)
    timesteps = torch.full((batch,), 17)

    def run() -> None:
        loss = nn.functional.mse_loss(model(x, timesteps), target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return run


def main() -> None:
    options = parser(__doc__, "step_time.json")
    options.add_argument("--model", choices=("small", "paper"), default="small")
    options.add_argument("--size", type=int, default=16, help="side of the volume, voxels")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    options.add_argument("--only", nargs="*", help="these methods (and full) alone")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    models = methods(arguments.model, not arguments.no_peers)
    if arguments.only:
        models = {name: model for name, model in models.items() if name in ("full", *arguments.only)}
    steps = {name: step(model, arguments.size, arguments.batch) for name, model in models.items()}
    found = timings(alternating(steps, arguments.rounds, warmup=2), "full")
    trained = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    rows: list[list[Any]] = [
        [name, f"{trained[name]:,}", f"{t.seconds * 1e3:.0f}", f"{t.ratio:.3f}", f"{t.low:.3f} - {t.high:.3f}"]
        for name, t in found.items()
    ]
    title = f"Training step, {arguments.model} model, {arguments.size}^3, batch {arguments.batch}"
    show(title, ("method", "trained", "ms", "ratio to full", "middle half"), rows)
    write(
        arguments.out,
        {
            "model": arguments.model,
            "size": arguments.size,
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "methods": {name: {"trained": trained[name], **vars(t)} for name, t in found.items()},
        },
    )


if __name__ == "__main__":
    main()
