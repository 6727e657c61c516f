"""The formulas of shipped specs whose cores are derived by maps, as dense sums that know nothing of the language.

As in formulas.py a function takes the stored cores, the base weight as (out, in, kernel positions) and the weight's
shape, and returns the network's weight as (out, in, kernel positions), without the spec's scale. Numbers that no core's
shape tells (a group's size, a frequency) are keywords.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from formulas import ANY, ODD, Cores, Shape, flat
from torch import Tensor, nn


def skewed(entries: Tensor) -> Tensor:
    """(..., e) → (..., x, x): the strict upper triangle row by row, and minus it below."""
    size = round((1 + math.sqrt(1 + 8 * entries.shape[-1])) / 2)
    square = entries.new_zeros(*entries.shape[:-1], size, size)
    place = 0
    for row in range(size):
        for column in range(row + 1, size):
            square[..., row, column] = entries[..., place]
            square[..., column, row] = -entries[..., place]
            place += 1
    return square


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (one + skew) @ torch.linalg.inv(one - skew)


def turned(matrix: Tensor, w: Tensor) -> Tensor:
    """W with its inputs (axis 1) multiplied by a square matrix."""
    return torch.einsum("xy,oyk->oxk", matrix, w)


def spread(blocks: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """The square matrix with one block on each set of rows and columns that `places` names."""
    size = sum(map(len, places))
    whole = blocks.new_zeros(size, size)
    for block, at in zip(blocks, places, strict=True):
        for row, to in enumerate(at):
            for column, source in enumerate(at):
                whole[to, source] = block[row, column]
    return whole


def dense_oft(c: Cores, w: Tensor, shape: Shape, order: int = 5) -> Tensor:
    q = skewed(c["R"])
    one = torch.eye(q.shape[-1], dtype=q.dtype)
    turn = one + 2 * sum(torch.linalg.matrix_power(q, power) for power in range(1, order - 1))
    return turned(torch.block_diag(*(turn + torch.linalg.matrix_power(q, order - 1))), w)


def dense_oft_cayley(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return turned(torch.block_diag(*cayley(-skewed(c["R"]))), w)


def _butterfly(stored: Tensor) -> Tensor:
    return cayley((stored.mT - stored) / 2)


def dense_boft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return c["s"].reshape(-1, 1, 1) * turned(torch.block_diag(*_butterfly(c["X"])), w)


def dense_boft_2(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    blocks, size, _ = c["X_1"].shape
    half, inputs = size // 2, torch.arange(blocks * size).reshape(-1, 2, 2, size // 2)
    pairs = [[*inputs[pair, :, v].flatten().tolist()] for pair in range(blocks // 2) for v in range(2)]
    assert all(len(places) == 2 * half for places in pairs)
    second = spread(_butterfly(c["X_2"]), pairs)
    return c["s"].reshape(-1, 1, 1) * turned(second @ torch.block_diag(*_butterfly(c["X_1"])), w)


def dense_diag_oft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    turn = torch.block_diag(*cayley(c["X"] - c["X"].mT))
    return torch.einsum("xy,xik->yik", turn, w)


def dense_boft_lycoris(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    size = c["X_0"].shape[-1]
    for stage in range(6):
        half = 2**stage * size // 2
        order = [
            group * 2 * half + bit * half + k
            for group in range(len(w) // 2 // half)
            for k in range(half)
            for bit in (0, 1)
        ]
        blocks = [order[at : at + size] for at in range(0, len(order), size)]
        skew = c[f"X_{stage}"] - c[f"X_{stage}"].mT
        w = torch.einsum("xy,yik->xik", spread(cayley(skew), blocks), w)
    return w


def dense_hra(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    reflected = w.flatten(1)
    for column in c["u"].flatten(1).T:
        unit = column / column.norm()
        reflected = reflected - 2 * torch.outer(reflected @ unit, unit)
    return (reflected - w.flatten(1)).reshape(w.shape)


def dense_hra_gs(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    kept: list[Tensor] = []
    for column in c["u"].T:
        for earlier in kept:
            column = column - (earlier @ column) * earlier
        kept.append(column / column.norm())
    return -2 * sum(torch.outer(w.flatten(1) @ unit, unit) for unit in kept).reshape(w.shape)


def dense_psoft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    between = torch.diag(c["b"]) @ cayley(skewed(c["angles"])) @ torch.diag(c["a"])
    return (c["U"] @ torch.diag(c["S"]) @ between @ c["V"].flatten(1)).reshape(w.shape)


def dense_c3a(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    kernel = flat(c["kernel"], 3)  # (m, n, b, k)
    rows = [kernel.roll(row, dims=2) for row in range(kernel.shape[2])]
    return torch.stack(rows, dim=1).flatten(2, 3).flatten(0, 1)


def placed(values: Tensor, places: Tensor, w: Tensor) -> Tensor:
    """Zeros of the weight's shape with the values at flat places."""
    update = torch.zeros(w.numel(), dtype=values.dtype)
    for value, place in zip(values, places.tolist(), strict=True):
        update[place] = value
    return update.reshape(w.shape)


def dense_shira(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return placed(c["values"], c["places"], w)


def dense_supra(c: Cores, w: Tensor, shape: Shape, scale: float = 1.0) -> Tensor:
    return placed(c["values"], c["places"], w) + scale * (c["up"] @ c["down"].flatten(1)).reshape(w.shape)


def dense_rosa(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return dense_supra(c, w, shape)


def dense_paca(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    update = torch.zeros_like(w)
    update[:, c["places"]] = flat(c["values"], 2)
    return update


def dense_unilora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    numbers = c["theta"] * c["norm"]
    return torch.einsum("or,rik->oik", numbers[c["index_b"]], flat(numbers[c["index_a"]], 2))


def picks(logits: Tensor, top: int) -> Tensor:
    """Softmax over the largest `top` of the last axis, zeros at the others."""
    largest = logits.topk(top, dim=-1)
    return torch.zeros_like(logits).scatter(-1, largest.indices, largest.values.softmax(-1))


def dense_vblora(c: Cores, w: Tensor, shape: Shape, top: int = 2) -> Tensor:
    logits_a = c["logits_a"].flatten(2, -2) if c["logits_a"].ndim > 3 else c["logits_a"][:, :, None]
    down = torch.einsum("rtkv,vx->rtxk", picks(logits_a, top), c["bank"]).flatten(1, 2)
    up = torch.einsum("urw,wy->uyr", picks(c["logits_b"], top), c["bank"]).flatten(0, 1)
    return torch.einsum("or,rik->oik", up, down)


DB2 = tuple((1 + sign * math.sqrt(3)) / (4 * math.sqrt(2)) for sign in (1, 1, -1, -1))
FAMILIES = {
    "db1": (math.sqrt(0.5), math.sqrt(0.5)),
    "db2": (DB2[0], DB2[1] + 2 / (4 * math.sqrt(2)), DB2[2] + 2 / (4 * math.sqrt(2)), DB2[3]),
}


def synthesis(bands: int, out: int, family: str) -> Tensor:
    """(out, 2, bands): what each entry of the low and the high band adds to each place, cut in the middle."""
    low = FAMILIES[family]
    high = [(-1) ** tap * low[len(low) - 1 - tap] for tap in range(len(low))]
    whole = torch.zeros(2 * (bands - 1) + len(low), 2, bands, dtype=torch.float64)
    for half, taps in enumerate((low, high)):
        for band in range(bands):
            for tap, value in enumerate(taps):
                whole[2 * band + tap, half, band] += value
    first = (len(whole) - out) // 2
    return whole[first : first + out]


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros around, fewer of them first."""
    whole = matrix.new_zeros(rows, columns)
    top, left = (rows - matrix.shape[0]) // 2, (columns - matrix.shape[1]) // 2
    whole[top : top + matrix.shape[0], left : left + matrix.shape[1]] = matrix
    return whole


def dense_waveft(c: Cores, w: Tensor, shape: Shape, family: str = "db1") -> Tensor:
    halves = [math.ceil((size + len(FAMILIES[family]) - 2) / 2) for size in shape]
    spectrum = padded(placed(c["spectrum"], c["places"], w)[..., 0], 2 * halves[0], 2 * halves[1])
    quarters = spectrum.reshape(2, halves[0], 2, halves[1])  # (p, a, q, b)
    rows, columns = (synthesis(half, size, family) for half, size in zip(halves, shape, strict=True))
    return torch.einsum("paqb,oqa,ipb->oi", quarters, rows, columns)[..., None]


def dense_delora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    up = c["B"] / c["B"].norm(dim=0).clamp(min=1e-4)
    down = c["A"].flatten(1) / c["A"].flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-4)
    return c["lambda_"] * (up @ down).reshape(w.shape) * w.norm(dim=0)


def dense_deft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    taken = c["P"].relu().T @ w.flatten(1)
    return (c["P"] @ (c["R"].flatten(1) - taken)).reshape(w.shape)


def dense_para(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    projector = c["P"] @ torch.linalg.inv(c["P"].T @ c["P"]) @ c["P"].T
    return -(projector @ w.flatten(1)).reshape(w.shape)


def dense_frod(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    inputs = len(c["l"])
    scaled = torch.diag(c["l"]) + placed(c["s"], c["places"], w.new_zeros(inputs, inputs))
    return (c["U"] @ scaled @ c["V"].T)[..., None]


def dense_gralora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    down, blocks = flat(c["A"], 3), len(c["A"])  # (n, i, j s, k) and (j, n s, o)
    rank = c["B"].shape[1] // blocks
    rows = []
    for j in range(blocks):
        parts = [slice(n * rank, (n + 1) * rank) for n in range(blocks)]
        cells = [torch.einsum("isk,so->oik", down[n][:, parts[j]], c["B"][j, parts[n]]) for n in range(blocks)]
        rows.append(torch.cat(cells, dim=1))
    return torch.cat(rows, dim=0)


def dense_lorma(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("oj,jik->oik", c["B"] @ c["A"], w)


def dense_lorma_pi(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    rolled = torch.stack([row.roll(place) for place, row in enumerate(c["B"] @ c["A"])])
    return torch.einsum("oj,jik->oik", rolled, w)


def dense_sinelora(c: Cores, w: Tensor, shape: Shape, freq: float = 200.0) -> Tensor:
    return torch.sin(freq * (c["up"] @ c["down"].flatten(1))).reshape(w.shape)


def dense_fedpara_tanh(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    one, two = (c[f"up_{side}"] @ c[f"down_{side}"].flatten(1) for side in (1, 2))
    return (one.tanh() * two.tanh()).reshape(w.shape)


def road_turn(first: Tensor, second: Tensor, w: Tensor) -> Tensor:
    """(groups, 2, half) factors of each output and of its partner."""
    groups, _, half = first.shape
    left, right = w.reshape(groups, 2, half, *w.shape[1:]).unbind(1)
    first, second = first[..., None, None], second[..., None, None]
    pairs = (first[:, 0] * left - second[:, 0] * right, first[:, 1] * right + second[:, 1] * left)
    return torch.stack(pairs, dim=1).reshape(w.shape)


def dense_road(c: Cores, w: Tensor, shape: Shape, group: int = 64) -> Tensor:
    theta, alpha = (c[name].reshape(-1, 1, group // 2).expand(-1, 2, -1) for name in ("theta", "alpha"))
    return road_turn(alpha * theta.cos(), c["one"] * alpha * theta.sin(), w)


def dense_road_2(c: Cores, w: Tensor, shape: Shape, group: int = 64) -> Tensor:
    theta, alpha = (c[name].reshape(-1, 2, group // 2) for name in ("theta", "alpha"))
    return road_turn(alpha * theta.cos(), c["one"] * alpha * theta.sin(), w)


def dense_peanut(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["B"] @ (c["A"] @ w.flatten(1)).relu()).reshape(w.shape)


def dense_peanut_2(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    first = (c["A"] @ w.flatten(1)).relu()
    second = (c["E1"] @ first).relu()
    hidden = (c["D1"] @ (c["E2"] @ second).relu()).relu() + second
    return (c["B"] @ ((c["D2"] @ hidden).relu() + first)).reshape(w.shape)


def dense_adamss(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    v = c["V"].flatten(1)
    rows = [weights @ c["A"][cluster] @ v for weights, cluster in zip(c["B"], c["cluster"].tolist(), strict=True)]
    return torch.stack(rows).reshape(w.shape)


EVEN = (nn.Linear(12, 20), nn.Conv1d(12, 20, 5, groups=2), nn.Conv3d(4, 8, (1, 2, 3)), nn.ConvTranspose2d(8, 4, (2, 3)))
FOURS = (
    nn.Linear(12, 20),
    nn.Conv1d(24, 20, 5, groups=2),
    nn.Conv3d(4, 8, (1, 2, 3)),
    nn.ConvTranspose2d(8, 4, (2, 3)),
)
WIDE = (nn.Linear(12, 64), nn.Conv3d(3, 128, (1, 2, 1)), nn.ConvTranspose1d(6, 64, 3))
FLAT = (nn.Linear(12, 20), nn.Linear(32, 48), nn.Linear(13, 7))
BROAD = (*ANY, ODD[0], ODD[4])  # more than one output, more than one input

METHODS: dict[str, tuple[Callable[[Cores, Tensor, Shape], Tensor], tuple[nn.Module, ...]]] = {
    "oft": (dense_oft, FOURS),
    "oft_cayley": (dense_oft_cayley, FOURS),
    "boft": (dense_boft, FOURS),
    "boft_2": (dense_boft_2, (nn.Linear(16, 10), nn.Conv2d(32, 6, (3, 2), groups=2), nn.ConvTranspose3d(8, 4, 2))),
    "diag_oft": (dense_diag_oft, (*ANY[:5], nn.ConvTranspose3d(4, 8, (2, 1, 3)))),
    "boft_lycoris": (dense_boft_lycoris, WIDE),
    "c3a": (dense_c3a, FOURS),
    "supertuning": (dense_shira, (*ANY, *ODD)),
    "shira": (dense_shira, BROAD),
    "hra": (dense_hra, BROAD),
    "hra_gs": (dense_hra_gs, BROAD),
    "psoft": (dense_psoft, BROAD),
    "delora": (dense_delora, BROAD),
    "para": (dense_para, BROAD),
    "vblora": (dense_vblora, FOURS),
    "waveft": (dense_waveft, FLAT),
    "frod": (dense_frod, FLAT),
    "gralora": (dense_gralora, EVEN),
    "road": (partial(dense_road, group=4), FOURS),
    "road_2": (partial(dense_road_2, group=4), FOURS),
}
for _name in (
    *("supra", "rosa", "paca", "unilora", "deft", "lorma"),
    *("lorma_pi", "sinelora", "fedpara_tanh", "peanut", "peanut_2", "adamss"),
):
    METHODS[_name] = (globals()[f"dense_{_name}"], (*ANY, *ODD))
