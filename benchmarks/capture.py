"""How much of a full update does `fit` capture with a spec, and how much with the same network from zero?

The updates of convolutions are real: a small denoiser is trained on T1-like volumes and fully fine-tuned on T2-like
ones, both made from the MNI152 template. The updates of linear layers are random: of rank 2, and of full rank. "From
zero" is the same spec text with `start: zero` and one core of zeros, fitted in the same way. `margin` is how many
percentage points the spec is above it. `copy` is the frozen copy that the fit chose.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import yaml
from torch import Tensor, nn

import tnpeft
from tnpeft.network import Spec, load_spec

CHANNELS = (16, 32, 32, 16)
LINEAR = ((64, 128), (96, 96), (48, 120))
CONVOLUTION_SPECS, LINEAR_SPECS = ("tenvoo_l", "tenvoo_q", "pissa"), ("quanta", "quanta_4", "pissa")
SUBJECTS, SIDE, BATCH = 12, 16, 4
RATE = 2e-3


class Denoiser(nn.Module):
    """Predicts the noise of a volume from the volume and its noise's share, as one more channel; (B, 1, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, CHANNELS[0], 3, padding=1)
        sizes = itertools.pairwise(CHANNELS)
        self.middle = nn.ModuleList(nn.Conv3d(inputs, outputs, 3, padding=1) for inputs, outputs in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for channels in CHANNELS[:-1])
        self.last = nn.Conv3d(CHANNELS[-1], 1, 3, padding=1)

    def forward(self, noisy: Tensor, share: Tensor) -> Tensor:
        x = self.first(torch.cat([noisy, share.expand_as(noisy)], 1))
        for norm, convolution in zip(self.norms, self.middle, strict=True):
            x = convolution(nn.functional.silu(norm(x)))
        return self.last(nn.functional.silu(x))  # type: ignore[no-any-return]


def main() -> None:
    options = common.parser(__doc__, "capture.json")
    options.add_argument("--steps", nargs=2, type=int, default=(200, 200), help="steps of training and of fine-tuning")
    options.add_argument("--r", type=int, default=4, help="rank of all specs")
    options.add_argument("--only", nargs="+", help="specs to fit (default: all)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, layer, update in (*convolutions(*arguments.steps), *linear_layers()):
        specs = CONVOLUTION_SPECS if isinstance(layer, nn.Conv3d) else LINEAR_SPECS
        for spec in specs:
            if not arguments.only or spec in arguments.only:
                rows.append({"update": name, **measured(spec, layer, update, arguments.r)})
    rows = [*rows, *totals(rows)]
    columns = ["update", "spec", "parameters", "captured", "from zero", "margin", "copy", "by", "s", "s from zero"]
    cells = [
        [f"{row[key]:.1%}" if key in ("captured", "from zero") else str(row.get(key, "")) for key in columns]
        for row in rows
    ]
    common.show("Share of an update's energy that a fit captures", columns, cells)
    common.write(arguments.out, rows)


def convolutions(training: int, tuning: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The denoiser's three middle convolutions before its full fine-tune, and what that changed."""
    torch.manual_seed(0)
    model = Denoiser()
    generator = torch.Generator().manual_seed(0)
    train(model, painted("t1", generator), training, generator)
    before = [convolution.weight.detach().clone() for convolution in model.middle]
    train(model, painted("t2", generator), tuning, generator)
    for convolution, weight in zip(model.middle, before, strict=True):
        update = convolution.weight.detach().double() - weight.double()
        convolution.weight.data = weight
        yield f"Conv3d {convolution.in_channels} -> {convolution.out_channels}", convolution, update


def painted(domain: Any, generator: torch.Generator) -> Tensor:
    """Subjects of the demonstration's population, (subjects, 1, side, side, side)."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from ddpm_lab.data.anatomies import tissues_of
    from ddpm_lab.data.population import paint_subject

    tissues = tissues_of("mni152", SIDE)
    return torch.stack([paint_subject(tissues, domain, generator)[None] for _ in range(SUBJECTS)]) * 2 - 1


def train(model: nn.Module, volumes: Tensor, steps: int, generator: torch.Generator) -> None:
    """Train everything: noise is predicted where it makes up any share of the variance."""
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        clean = volumes[torch.randint(len(volumes), (BATCH,), generator=generator)]
        share = torch.rand(BATCH, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = (1 - share).sqrt() * clean + share.sqrt() * noise
        loss = nn.functional.mse_loss(model(noisy, share), noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def linear_layers() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Linear layers with drawn updates, of rank 2 and of full rank."""
    for inputs, outputs in LINEAR:
        torch.manual_seed(inputs)
        layer = nn.Linear(inputs, outputs)
        for rank in (2, min(inputs, outputs)):
            left, right = torch.randn(outputs, rank).double(), torch.randn(rank, inputs).double()
            yield f"Linear {inputs} -> {outputs}, rank {rank}", layer, 1e-2 * left @ right


def measured(name: str, layer: nn.Module, update: Tensor, r: int) -> dict[str, Any]:
    """One spec on one update, beside the same graph from zero."""
    spec = load_spec(name)
    seconds, fits = [], []
    for each in (spec, from_zero(spec)):
        began = time.perf_counter()
        fits.append(tnpeft.fit(each, update, layer, r=r))
        seconds.append(round(time.perf_counter() - began, 2))
    fitted, zero = fits
    return {
        "spec": name,
        "parameters": fitted.adapter.network.num_parameters,
        "energy": float(update.square().sum()),
        "captured": fitted.captured,
        "from zero": zero.captured,
        "margin": round(100 * (fitted.captured - zero.captured), 2),
        "copy": fitted.frozen_copy,
        "by": fitted.method,
        "s": seconds[0],
        "s from zero": seconds[1],
    }


def from_zero(spec: Spec) -> Spec:
    """The same graph with `start: zero` and its last core zeros."""
    document = yaml.safe_load(spec.text)
    name, core = list(document["cores"].items())[-1]
    document["cores"][name] = {"legs": core["legs"] if isinstance(core, dict) else core, "init": "zeros"}
    return Spec.from_yaml(yaml.safe_dump({**document, "start": "zero"}, sort_keys=False))


def totals(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each spec on all convolutions together: the share of their common energy."""
    for spec in CONVOLUTION_SPECS:
        chosen = [row for row in rows if row["spec"] == spec and row["update"].startswith("Conv3d")]
        energy = sum(row["energy"] for row in chosen)
        if chosen:
            shares = {
                key: sum(row["energy"] * row[key] for row in chosen) / energy for key in ("captured", "from zero")
            }
            margin = round(100 * (shares["captured"] - shares["from zero"]), 2)
            parameters = sum(row["parameters"] for row in chosen)
            yield {"update": "all convolutions", "spec": spec, "parameters": parameters, **shares, "margin": margin}


if __name__ == "__main__":
    main()
