"""What a start holds of a real update: its tangent space, what lies within its reach, and what both hold of noise.

The update is that of a run of the method `start.update`, full fine-tuning of the same base, with the first seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tnpeft.surgery
from ddpm_lab.config.settings import Config
from ddpm_lab.model.method import apply_method
from ddpm_lab.model.unet import build_unet, load_base
from ddpm_lab.study.run import Run
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import read_json, write_json
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone
from ddpm_lab.training.driver import finetune
from tnpeft.adapters import Adapter
from tnpeft.fitting import fit_adapter, tangent_space_of

__all__ = ["SHARES", "ShareRun", "measured", "spaced"]

SHARES = ("tangent", "noise", "reach", "free")


@dataclass(frozen=True)
class ShareRun(Run):
    """The shares of one method's start on one data set: a run whose result are numbers in `summary.json`."""

    update: Run | None = None  # whose weights less the base's are the update
    layers: int = 1
    sweeps: int = 1

    def __str__(self) -> str:
        return f"shares of {self.method} on {self.dataset}"

    @property
    def lock(self) -> str:
        return f"shares--{self.method}--{self.dataset}"

    def _stages(self, screen: Screen) -> None:
        numbers = measured(self.config, self._updated(screen), self.layers, self.sweeps, screen)
        about = {"training": {"learning_rate": self.config.training.learning_rate}}
        write_json(self.folder / "summary.json", {"run": numbers, "config": about})

    def _updated(self, screen: Screen) -> Path:
        """The weights of the update's run; it trains again, once a data set, where a row stands for that run."""
        assert self.update is not None
        own = self.update.folder / "model.safetensors"
        if own.is_file():
            return own
        folder = self.folder.parents[1] / f"update-{self.dataset}"
        make_folder(folder)
        with alone(folder.with_name(f".{folder.name}.lock"), wait=True):
            found = read_json(folder / "summary.json") or finetune(self.update.config, folder, screen)
        assert found is not None  # this is the only process
        return folder / str(found["result"])


def measured(config: Config, updated: Path, layers: int, sweeps: int, screen: Screen) -> dict[str, Any]:
    """The shares of the update in `updated` over some layers together, by its energy in each.

    `tangent` is what the tangent space at the start holds, `noise` its share of all directions, `reach` what `fit`
    finds from there and `free` what it finds from zero as well; `std` is the median of std(T) / std(W) at the start.
    """
    unet: nn.Module = build_unet(config.model, config.base, config.training.seed)
    load_base(unet, config.base)
    before = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    after = load_file(updated)
    torch.manual_seed(config.training.seed)
    apply_method(unet, config.method)
    (name,) = tnpeft.surgery.names_of(unet)
    adapters = tnpeft.surgery.adapters_of(unet, name)
    chosen = spaced(adapters, layers)
    found = []
    with screen.bar("shares of the update", len(chosen)) as bar:
        for number, layer in enumerate(chosen, 1):
            weight = before[f"{layer}.weight"]
            found.append(_of_layer(adapters[layer], weight, after[f"{layer}.weight"] - weight, sweeps))
            bar(number, layer)
    energy = sum(each["energy"] for each in found)
    shares = {key: sum(each["energy"] * each[key] for each in found) / energy if energy else 0.0 for key in SHARES}
    sizes = sorted(each["std"] for each in found)
    return {**shares, "std": sizes[len(sizes) // 2], "layers": ", ".join(chosen)}


def spaced(adapters: Mapping[str, Adapter], number: int) -> list[str]:
    """So many adapted layers of each kind, evenly spaced in the model's order."""
    kinds: dict[str, list[str]] = {}
    for layer, adapter in adapters.items():
        kinds.setdefault(adapter.network.layer.kind, []).append(layer)
    chosen = [each for names in kinds.values() for each in _evenly(names, number)]
    return [layer for layer in adapters if layer in chosen]


def _evenly(names: Sequence[str], number: int) -> list[str]:
    number = min(number, len(names))
    return [names[(2 * place + 1) * len(names) // (2 * number)] for place in range(number)]


def _of_layer(adapter: Adapter, weight: Tensor, update: Tensor, sweeps: int) -> dict[str, float]:
    space = tangent_space_of(adapter, weight)
    size = float(adapter.network_weight(weight).detach().double().std() / weight.double().std())
    free = _fitted(adapter, weight, update, sweeps, from_there=False)
    copied = adapter.network.spec.start == "frozen_copy"
    reach = _fitted(adapter, weight, update, sweeps, from_there=True) if copied else free
    return {
        "energy": float(update.double().square().sum()),
        "tangent": space.captured(update),
        "noise": space.share,
        "reach": reach,
        "free": max(free, reach),
        "std": size,
    }


def _fitted(adapter: Adapter, weight: Tensor, update: Tensor, sweeps: int, from_there: bool) -> float:
    """What a copy of the adapter captures of the update, counted from its frozen copy or from zero as well."""
    where: Literal["drawn"] | None = "drawn" if from_there else None
    fitted = fit_adapter(copy.deepcopy(adapter), weight, update, method="als", iterations=sweeps, frozen_copy=where)
    return fitted.captured
