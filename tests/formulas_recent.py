"""More formulas of shipped specs, in the format of formulas_maps.py, and every spec's formula by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import formulas
import formulas_maps
import torch
from formulas import ANY, ODD, Cores, Shape, flat, joined
from formulas_maps import BROAD, EVEN, FLAT, cayley
from torch import Tensor, nn


def dense_tera(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    core = torch.einsum("pqst,p,q,s,t->pqst", c["G"], c["d_1"], c["d_2"], c["d_3"], c["d_4"])
    return joined(torch.einsum("pqst,ap,bq,cs,dtk->abcdk", core, c["O1"], c["O2"], c["I1"], flat(c["I2"], 2)), 2, 2)


def dense_cara(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    inputs = c["in"].reshape(c["in"].shape[0], -1, c["in"].shape[-1])
    outputs = torch.einsum("hr,dr->hdr", c["head"], c["channel"]).flatten(0, 1)
    return torch.einsum("r,r,or,ikr->oik", c["rank"], c["layer"], outputs, inputs)


def dense_tensorguide(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    trunk = torch.einsum("x,y,xa,ayb->b", c["noise_1"], c["noise_2"], c["train_1"], c["train_2"])
    up = (trunk[:, None, None] * c["head_up"]).sum(0)
    down = sum(weight * head for weight, head in zip(trunk, c["head_down"], strict=True))
    return torch.einsum("or,rik->oik", up, flat(down, 2))


def mirrored(rows: Tensor, w: Tensor) -> Tensor:
    """W times the projector on one direction for each block of inputs."""
    units = [row / row.norm() for row in rows]
    projector = torch.block_diag(*(torch.outer(unit, unit) for unit in units))
    return torch.einsum("xy,oyk->oxk", projector, w)


def dense_ether(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return -2 * mirrored(c["R"], w)


def dense_ether_plus(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return mirrored(c["R2"], w) - mirrored(c["R"], w)


def dense_hyperadapt(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return c["a"][:, None, None] * w * c["b"][None, :, None]


def dense_moslora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["up"] @ c["mixer"] @ c["down"].flatten(1)).reshape(w.shape)


def dense_mora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    rows = c["rows"].repeat_interleave(c["M"].shape[0])
    columns = c["columns"].repeat_interleave(c["M"].shape[1])
    tiled = flat(c["M"], 2).repeat(len(c["rows"]), len(c["columns"]), 1)
    return rows[:, None, None] * tiled * columns[None, :, None]


def dense_miss_bat(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    size, every = c["M"].shape[-1], flat(c["every"], 1)  # (n, k)
    update = torch.zeros_like(w)
    for m, block in enumerate(c["M"]):
        rows = slice(m * size, (m + 1) * size)
        for n, row in enumerate(every):
            columns = slice(n * size, (n + 1) * size)
            update[rows, columns] = torch.einsum("xzk,zy->xyk", w[rows, columns], block) + block[..., None] * row
    return update


def dense_tlora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["P"] @ torch.diag(c["lambda_"]) @ c["Q"].flatten(1)).reshape(w.shape)


def dense_svdiff(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["U"] @ torch.diag((c["S"] + c["shift"]).relu()) @ c["V"].flatten(1)).reshape(w.shape)


def dense_spectral_adapter(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    right = (c["V"] + c["B"]).flatten(1)
    return ((c["U"] + c["A"]) @ torch.diag(c["S"] + c["C"]) @ right).reshape(w.shape)


def dense_spectral_adapter_r(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    left, right = (cayley((c[name].T - c[name]) / 2) for name in ("A", "B"))
    return (c["U"] @ left @ torch.diag(c["C"] * c["S"]) @ right.T @ c["V"].flatten(1)).reshape(w.shape)


def dense_curlora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    matrix = w[..., 0]
    return (matrix[:, c["columns"]] @ c["U"] @ matrix[c["rows"]])[..., None]


HEADS = (nn.Linear(12, 20), nn.Conv2d(6, 9, (3, 2), groups=3), nn.Conv3d(4, 6, (1, 2, 3)))
SQUARE = (nn.Linear(12, 20), nn.Conv1d(24, 20, 5, groups=2), nn.ConvTranspose2d(8, 4, (2, 3)))

RECENT: dict[str, tuple[Callable[[Cores, Tensor, Shape], Tensor], tuple[nn.Module, ...]]] = {
    "cara": (dense_cara, HEADS),
    "ether": (dense_ether, EVEN),
    "ether_plus": (dense_ether_plus, EVEN),
    "miss_bat": (dense_miss_bat, SQUARE),
    "curlora": (dense_curlora, FLAT),
    "spectral_adapter_r": (dense_spectral_adapter_r, BROAD),
}
for _name in (*("tera", "tensorguide", "hyperadapt", "moslora", "mora", "tlora", "svdiff", "spectral_adapter"),):
    RECENT[_name] = (globals()[f"dense_{_name}"], (*ANY, *ODD))

METHODS = {**formulas.METHODS, **formulas_maps.METHODS, **RECENT}

# Params that the layers above need: numbers that divide their sides, and few enough entries.
_ALIKE: dict[str, tuple[str, ...]] = {
    "b": ("oft", "oft_cayley", "boft", "boft_2", "c3a"),
    "group": ("road", "road_2"),
    "rank": ("hra", "hra_gs", "deft", "para", "curlora"),
    "blocks": ("ether", "ether_plus"),
}
_NUMBER = {"b": 4, "group": 4, "rank": 2, "blocks": 2}
PARAMS: dict[str, dict[str, Any]] = {
    **{name: {param: _NUMBER[param]} for param, names in _ALIKE.items() for name in names},
    "supertuning": {"sparsity": 0.9},
    "supra": {"sparsity": 0.9, "r": 3},
    "shira": {"r": 1},
    "rosa": {"density": 0.2, "r": 3},
    "vblora": {"length": 4, "vectors": 6, "r": 3},
    "gralora": {"r": 4},
    "waveft": {"waves": 30},
    "frod": {"share": 0.1},
    "unilora": {"d": 9, "r": 3},
    "adamss": {"clusters": 3, "s": 2, "r": 3},
    "cara": {"heads": 1, "r": 3},
    "tensorguide": {"r": 3, "width": 2, "noise": 3},
    "miss_bat": {"r": 4},
    "mora": {"r": 1},
}


def small_params(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The params of a spec, given its own, at which the layers of METHODS are quick to try."""
    small = {param: 3 for param in ("r", "inner", "minis", "bases", "u", "waves") if param in params}
    return {**small, **PARAMS.get(name, {})}


__all__ = ["METHODS", "PARAMS", "small_params"]
