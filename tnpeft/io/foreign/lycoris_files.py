"""Writing LyCORIS files: for each layer tensors from which `create_lycoris_from_weights` makes the same module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tnpeft.errors import Problem
from tnpeft.io.foreign.formats import MERGE, trained_problem
from tnpeft.io.foreign.kron import Sizes, lycoris_rebuilds
from tnpeft.io.foreign.layer_tensors import SLOTS
from tnpeft.io.foreign.layer_update import LayerUpdate, silenced
from tnpeft.io.foreign.rewrites import factors_of, half_ranks_equal, lokr_rank, lokr_tensors, untuckered, whole_small
from tnpeft.io.foreign.topologies import KRONS
from tnpeft.network import Layer

__all__ = ["comfyui_parts", "comfyui_problems", "lycoris_contents", "lycoris_problems", "one_alpha"]

_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def lycoris_problems(
    parts: Mapping[str, LayerUpdate],
    layers: Mapping[str, Layer],
    trained: Mapping[str, Tensor],
    names: Mapping[str, str],
) -> Iterator[Problem]:
    """Why LyCORIS cannot hold these parts, all of them; `names` are the layers' names in the file."""
    written: dict[str, str] = {}
    for name, layer in layers.items():
        where = f"layer '{name}'"
        if layer.kind not in _KINDS:
            yield Problem("LyCORIS", f"one of {', '.join(_KINDS)}", str(layer), MERGE, where)
        elif parts[name].topology in KRONS and _lokr(parts[name]) is None:
            small, large = factors_of(parts[name])
            found = f"{tuple(small.shape)} and {tuple(large.shape)}"
            expected = "factors whose sizes its loader finds again"
            yield Problem("LyCORIS's LoKr", expected, found, MERGE, where)
        first = written.setdefault(names[name], name)
        if first != name:
            found = f"that of layer '{first}' too"
            yield Problem(f"LyCORIS's name '{names[name]}'", "one layer", found, "Rename one in the model.", where)
    if trained:
        yield trained_problem(trained, "none: LyCORIS has no place for them")


def lycoris_contents(path: Path, parts: Mapping[str, LayerUpdate], names: Mapping[str, str]) -> dict[Path, bytes]:
    tensors = {
        f"{names[name]}.{key}": tensor.contiguous()
        for name, part in parts.items()
        for key, tensor in _tensors(part).items()
    }
    return {path: safetensors.torch.save(tensors, {"format": "pt"})}


def one_alpha(parts: Mapping[str, LayerUpdate]) -> dict[str, LayerUpdate]:
    """LoRAs with one alpha, the most frequent one; for others the ratio is multiplied into their cores.

    diffusers loses an attention layer's alpha in a kohya file if it is not that of most layers.
    """
    loras = {name: part for name, part in parts.items() if part.topology == "lora" and part.scale}
    alphas = {name: part.scale * part.tensors["down"].shape[0] for name, part in loras.items()}
    usual = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    changed: dict[str, LayerUpdate] = {}
    for name, part in loras.items():
        more = alphas[name] / usual
        if more != 1.0:
            tensors = {**part.tensors, "up": part.tensors["up"] * more}
            changed[name] = replace(part, scale=part.scale / more, tensors=tensors)
    return {**parts, **changed}


def comfyui_problems(parts: Mapping[str, LayerUpdate], layers: Mapping[str, Layer]) -> Iterator[Problem]:
    """What ComfyUI would compute differently: its Kronecker product takes only matrices and two kernel axes."""
    for name, layer in layers.items():
        if parts[name].topology in KRONS and layer.kind in ("Conv1d", "Conv3d"):
            yield Problem("ComfyUI's LoKr", "one of Linear, Conv2d", str(layer), MERGE, f"layer '{name}'")


def comfyui_parts(parts: Mapping[str, LayerUpdate]) -> dict[str, LayerUpdate]:
    """The same updates without kernel cores other than those of two axes, which are all that ComfyUI takes."""
    return {
        name: untuckered(part) if any(tensor.ndim in (3, 5) for tensor in part.tensors.values()) else part
        for name, part in parts.items()
    }


def _tensors(part: LayerUpdate) -> dict[str, Tensor]:
    if part.scale == 0:  # an alpha of 0 would mean the rank
        part = silenced(part)
    write = _lokr if part.topology in KRONS else _loha if part.topology.startswith("loha") else _locon
    tensors = write(part)
    assert tensors is not None  # `lycoris_problems` said so
    if part.magnitude is not None:
        kernel = max(tensor.ndim for tensor in part.tensors.values()) - 2
        tensors["dora_scale"] = part.magnitude.reshape(-1, 1, *(1,) * kernel)
    return tensors


def _alpha(scale: float, rank: int) -> Tensor:
    return torch.tensor(scale * rank)


def _has_window(kernel: torch.Size) -> bool:
    """LyCORIS has a core for the kernel only where one of its axes is longer than 1."""
    return any(size > 1 for size in kernel)


def _locon(part: LayerUpdate) -> dict[str, Tensor]:
    tensors = part.tensors
    if "mid" in tensors:
        mid = tensors["mid"]
        if mid.shape[0] != mid.shape[1] or not _has_window(mid.shape[2:]):
            return _locon(untuckered(part))
    up, down = tensors["up"], tensors["down"]
    units = (1,) * (tensors.get("mid", down).ndim - 2)
    written = {"alpha": _alpha(part.scale, down.shape[0]), "lora_up.weight": up.reshape(*up.shape, *units)}
    if "mid" in tensors:
        down = down.reshape(*down.shape, *units)
        written["lora_mid.weight"] = tensors["mid"]
    return {**written, "lora_down.weight": down}


def _loha(part: LayerUpdate) -> dict[str, Tensor]:
    mids = [part.tensors[core] for core in ("mid_1", "mid_2") if core in part.tensors]
    if mids and (len({size for mid in mids for size in mid.shape[:2]}) > 1 or not _has_window(mids[0].shape[2:])):
        return _loha(untuckered(part))
    if not mids:
        part = half_ranks_equal(part)
    written = {
        f"hada_{SLOTS['loha'][core]}": tensor.flatten(1) if core.startswith("down") else tensor
        for core, tensor in part.tensors.items()
    }
    return {"alpha": _alpha(part.scale, part.tensors["down_1"].shape[0]), **written}


def _lokr(part: LayerUpdate) -> dict[str, Tensor] | None:
    """The first way of storing the factors that LyCORIS's loader makes the same product of, or None.

    It reads no core for the kernel, a low-rank small factor only beside a low-rank large one, and a
    low-rank factor only where the rank is less than half its larger side; two whole ones are not scaled.
    """
    small, large = factors_of(part)
    size = Sizes(*small.shape, *large.shape[:2])
    if KRONS[part.topology][2]:
        return None  # the small factor as the inner one
    low = untuckered(part)
    rank = lokr_rank(low)
    if rank and 2 * rank < max(size.b, size.d) and lycoris_rebuilds(size, low.tensors["down"][0].numel()):
        written = low if 2 * rank < max(size.a, size.c) else whole_small(low)
        return {"alpha": _alpha(part.scale, rank), **lokr_tensors(written, rank)}
    if not lycoris_rebuilds(size, size.d):
        return None
    return {"alpha": _alpha(1.0, 1), "lokr_w1": small, "lokr_w2": large * part.scale}
