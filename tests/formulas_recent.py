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


def dense_prolora(c: Cores, w: Tensor, shape: Shape, m: int = 2, n: int = 2) -> Tensor:
    """The shared ranks in chunks: `first` and `second` have one at the multiples of the strides, and zeros between."""

    def chunks(shared: Tensor, count: int, marks: Tensor) -> Tensor:
        each = [sum(mark * shared.roll(chunk * len(marks) + place, 0) for place, mark in enumerate(marks.flatten()))
                for chunk in range(count)]  # fmt: skip
        return torch.cat(each, dim=1)

    columns, rows = chunks(flat(c["down_0"], 2), m, c["first"]), chunks(c["up_0"], n, c["second"])
    return torch.einsum("ou,uik->oik", c["up"], flat(c["down"], 2)) + torch.einsum("yo,yik->oik", rows, columns)


def dense_gsoft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    """W' = gain * W Q: blocks, the shuffle of their entries, blocks, and back."""
    blocks, size = c["L"].shape[:2]
    left, right = (torch.block_diag(*(cayley((x - x.T) / 2) for x in c[name])) for name in ("L", "R"))
    order = torch.arange(blocks * size).reshape(size, blocks).T.flatten()  # (r l) read as (l r)
    shuffle = torch.eye(blocks * size, dtype=w.dtype)[order]
    turn = shuffle.T @ left @ shuffle @ right
    return c["gain"][:, None, None] * torch.einsum("ojk,ji->oik", w, turn)


def dense_bora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    moved = w + torch.einsum("or,rik->oik", c["B"], flat(c["A"], 2))
    columns = flat(c["column"], 1) * moved / moved.norm(dim=0)
    lengths = columns.square().sum((1, 2)).sqrt()
    return (c["row"] / lengths)[:, None, None] * columns


def dense_svft_banded(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    middle = c["s"][c["at"]] * c["mask"]
    return (c["U"] @ middle @ c["V"].flatten(1)).reshape(w.shape) / (1 + torch.exp(-c["gate"]))


def dense_loca(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    spectrum = w.new_zeros(w.numel()).index_put((c["places"],), c["spectrum"]).reshape(w.shape)
    return torch.einsum("fo,fgk,gi->oik", c["C_out"], spectrum, c["C_in"])


def dense_qwha(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    spectrum = w.new_zeros(w.numel()).index_put((c["places"],), c["spectrum"]).reshape(w.shape)
    return torch.einsum("ogk,gi->oik", spectrum, torch.block_diag(*[c["H"]] * (w.shape[1] // len(c["H"]))))


def dense_cdvft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    size = c["left"].shape[1]
    blocks = torch.stack([flat(c["kernel"], 3).roll(row, 2) for row in range(size)], 2)  # (m, n, x, y, k)
    return torch.einsum("mx,mnxyk,ny->mxnyk", c["left"], blocks, c["right"]).flatten(2, 3).flatten(0, 1)


def mirrors(columns: Tensor) -> Tensor:
    """The product of the reflections at a matrix's columns."""
    product = torch.eye(len(columns), dtype=columns.dtype)
    for column in columns.T:
        product = product @ (
            torch.eye(len(columns), dtype=columns.dtype) - 2 * torch.outer(column, column) / (column @ column)
        )
    return product


def dense_hoft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("oj,jlk,li->oik", mirrors(c["u"]), w, mirrors(c["v"])) - w


def dense_salt(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    kept = torch.diag((c["A"] * c["S"] + c["B"]).clamp(min=0))
    return (c["U"] @ kept @ c["V"].flatten(1) + c["X"] @ c["Y"].flatten(1)).reshape(w.shape)


def dense_sorsa(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["B"] @ torch.diag(c["S"]) @ c["A"].flatten(1)).reshape(w.shape)


def dense_milora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["up"] @ c["down"].flatten(1)).reshape(w.shape)


def dense_liera(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return w * torch.exp((c["up"] @ c["down"].flatten(1)).reshape(w.shape))


def dense_capaboost(c: Cores, w: Tensor, shape: Shape, masks: int = 2) -> Tensor:
    total = torch.zeros_like(w)
    for number in range(masks):
        pair = {}
        for name in ("A", "B"):
            flat_core = c[name].flatten()
            kept = torch.zeros_like(flat_core)
            for place, one in zip(c[f"at_{name}"].tolist(), c[f"one_{name}"], strict=True):
                if place // len(kept) == number:
                    kept[place % len(kept)] = one
            pair[name] = (flat_core * kept).reshape(c[name].shape).flatten(1)
        total = total + (pair["B"] @ pair["A"]).reshape(w.shape)
    return total


HEADS = (nn.Linear(12, 20), nn.Conv2d(6, 9, (3, 2), groups=3), nn.Conv3d(4, 6, (1, 2, 3)))
SQUARE = (nn.Linear(12, 20), nn.Conv1d(24, 20, 5, groups=2), nn.ConvTranspose2d(8, 4, (2, 3)))

SHUFFLED = (nn.Linear(16, 12), nn.Conv2d(32, 6, (3, 2), groups=2), nn.ConvTranspose1d(8, 6, 3))

RECENT: dict[str, tuple[Callable[[Cores, Tensor, Shape], Tensor], tuple[nn.Module, ...]]] = {
    "cara": (dense_cara, HEADS),
    "ether": (dense_ether, EVEN),
    "ether_plus": (dense_ether_plus, EVEN),
    "miss_bat": (dense_miss_bat, SQUARE),
    "curlora": (dense_curlora, FLAT),
    "prolora": (dense_prolora, EVEN),
    "spectral_adapter_r": (dense_spectral_adapter_r, BROAD),
    "gsoft": (dense_gsoft, SHUFFLED),
    "bora": (dense_bora, BROAD),
    "hoft": (dense_hoft, BROAD),
}
_EVERYWHERE = ("tera", "tensorguide", "hyperadapt", "moslora", "mora", "tlora", "svdiff", "spectral_adapter",
               "svft_banded", "loca", "qwha", "cdvft", "salt", "sorsa", "milora", "liera", "capaboost")  # fmt: skip
for _name in _EVERYWHERE:
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
    "gsoft": {"b": 4},
    "capaboost": {"r": 3, "masks": 2},
    "hoft": {"rank": 4},
    "salt": {"r": 3, "values": 3},
}


def small_params(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The params of a spec, given its own, at which the layers of METHODS are quick to try."""
    small = {param: 3 for param in ("r", "inner", "minis", "bases", "u", "waves") if param in params}
    return {**small, **PARAMS.get(name, {})}


__all__ = ["METHODS", "PARAMS", "small_params"]
