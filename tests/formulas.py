"""The formula of every shipped spec, written a second time as one dense einsum, and layers to try it on.

Each function takes the cores, the base weight as (out, in, kernel positions) and the weight's shape, and returns the
network's weight as (out, in, kernel positions), before the crop of padded channels, or leg by leg.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Cores = dict[str, Tensor]
Shape = tuple[int, ...]


def flat(core: Tensor, legs: int) -> Tensor:
    """The core with the kernel's axes, which stand after `legs` others, as one axis."""
    return core.flatten(legs) if core.ndim > legs else core[..., None]


def dense_lora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("or,rik->oik", c["up"], flat(c["down"], 2))


def dense_lora_conv2d(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("owr,rih->oihw", c["up"], c["down"])


def dense_locon_tucker(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("or,rsk,si->oik", c["up"], flat(c["mid"], 2), c["down"])


def dense_loha(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    one = c["up_1"] @ c["down_1"].flatten(1)
    two = c["up_2"] @ c["down_2"].flatten(1)
    return one * two


def dense_loha_tucker(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    one = torch.einsum("pqk,po,qi->oik", flat(c["mid_1"], 2), c["up_1"], c["down_1"])
    two = torch.einsum("stk,so,ti->oik", flat(c["mid_2"], 2), c["up_2"], c["down_2"])
    return one * two


def kron(small: Tensor, large: Tensor, shape: Shape) -> Tensor:
    """(oa, ia) and (ob, ib, K) → (oa ob, ia ib, K)."""
    kernel = math.prod(shape[2:])
    pieces = [torch.kron(small, large.reshape(large.shape[0], -1, kernel)[..., k].contiguous()) for k in range(kernel)]
    return torch.stack(pieces, dim=-1)


def dense_lokr(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return kron(c["small"], c["up"] @ c["down"].flatten(1), shape)


def dense_lokr_both(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return kron(c["small_up"] @ c["small_down"], c["up"] @ c["down"].flatten(1), shape)


def dense_krona(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return kron(c["small"], c["large"], shape)


def dense_quanta(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("efbc,diaf,ghde->ghiabc", *c.values())


def dense_tenvoo_l(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    axes = "bade,cefg,xghi,yijk,zklm,Cmno,BopA,fdqh,lrpn,jqr->ABCabcxyz"
    return torch.einsum(axes, *c.values())


def dense_tenvoo_q(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    axes = "bade,cefg,xghi,yij,zjlm,Cmop,BpqA,oqrs,dftr,hlst->ABCabcxyz"
    return torch.einsum(axes, *c.values())


def dense_lokr_tucker(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return kron(c["small"], torch.einsum("rsk,ro,si->oik", flat(c["mid"], 2), c["up"], c["down"]), shape)


def dense_quanta_4(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("ghcd,flbh,epal,jkfg,ioek,mnij->mnopabcd", *c.values())


def dense_lotr(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("or,rs,sik->oik", c["left"], c["core"], flat(c["right"], 2))


def dense_fact_tt(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("os,rs,rik->oik", c["V"], c["S"], flat(c["U"], 2))


def dense_fact_tk(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("os,rst,t,rik->oik", c["V"], c["C"], c["P"], flat(c["U"], 2))


def dense_lorta(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("or,rik,r,r->oik", c["out"], flat(c["in"], 2), c["layer"], c["matrix"])


def dense_metatt(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    middle = c["layer"] @ c["matrix"] @ c["out"]
    return torch.einsum("rik,ro->oik", flat(c["in"], 2), middle)


def joined(tensor: Tensor, outs: int, ins: int) -> Tensor:
    """Legs of the outputs, of the inputs, kernel → (out, in, kernel positions)."""
    sizes = tensor.shape
    return tensor.reshape(math.prod(sizes[:outs]), math.prod(sizes[outs : outs + ins]), -1)


def dense_tt_lora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    in_2 = c["in_2"].flatten(2, -2) if c["in_2"].ndim > 3 else c["in_2"][:, :, None]
    return joined(torch.einsum("xa,aykb,bpc,cq->pqxyk", c["in_1"], in_2, c["out_1"], c["out_2"]), 2, 2)


def dense_loretta_rep(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    up = torch.einsum("pa,aqr->pqr", c["up_1"], c["up_2"]).flatten(0, 1)
    down = torch.einsum("rxb,byk->rxyk", c["down_1"], flat(c["down_2"], 2)).flatten(1, 2)
    return torch.einsum("or,rik->oik", up, down)


def dense_mpo(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    third = flat(c["third"], 3)
    return joined(torch.einsum("pxa,aqyb,brzk->pqrxyzk", c["first"], c["second"], third), 3, 3)


def dense_tensor_ring(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    in_2 = c["in_2"].flatten(2, -2) if c["in_2"].ndim > 3 else c["in_2"][:, :, None]
    return joined(torch.einsum("axb,bykc,cpd,dqa->pqxyk", c["in_1"], in_2, c["out_1"], c["out_2"]), 2, 2)


def dense_cp(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("or,ir,xr,yr,zr->oixyz", c["out"], c["in"], c["depth"], c["height"], c["width"])


def dense_tucker5(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    factors = (c["out"], c["in"], c["depth"], c["height"], c["width"])
    return torch.einsum("abcde,oa,ib,xc,yd,ze->oixyz", c["core"], *factors)


def dense_hierarchical_tucker(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    in_2 = c["in_2"].reshape(c["in_2"].shape[0], -1, c["in_2"].shape[-1])
    inputs = torch.einsum("xp,ykq,pqt->txyk", c["in_1"], in_2, c["in_pair"])
    outputs = torch.einsum("os,pv,svu->uop", c["out_1"], c["out_2"], c["out_pair"])
    return joined(torch.einsum("tu,txyk,uop->opxyk", c["root"], inputs, outputs), 2, 2)


def dense_vera(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (torch.diag(c["b"]) @ c["B"] @ torch.diag(c["d"]) @ c["A"].flatten(1)).reshape(*w.shape)


def dense_lora_xs(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["U"] @ torch.diag(c["S"]) @ c["R"] @ c["V"].flatten(1)).reshape(*w.shape)


def dense_tinylora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    mixed = (c["v"][:, None, None] * c["P"]).sum(0)
    return (c["U"] @ torch.diag(c["S"]) @ mixed @ c["V"].flatten(1)).reshape(*w.shape)


def dense_nola(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    up = (c["b"][:, None, None] * c["B"]).sum(0)
    down = sum(weight * base for weight, base in zip(c["a"], c["A"], strict=True))
    return (up @ down.flatten(1)).reshape(*w.shape)


def dense_randlora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    bases = range(c["L"].shape[1])
    down, gains = c["A"].flatten(1), c["G"].flatten(1)
    return sum(c["B"][:, n] @ torch.diag(c["L"][:, n]) @ down @ torch.diag(gains[n]) for n in bases).reshape(*w.shape)


def dense_monarch(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    right = c["right"].reshape(*c["right"].shape[:3], -1, c["right"].shape[-1])
    return joined(torch.einsum("jlnr,njikr->ljnik", c["left"], right), 2, 2)


def dense_miss(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("g,osk->ogsk", c["repeat"], flat(c["block"], 2)).flatten(1, 2)


def dense_kradapter(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    left, right = flat(c["left"], 2), flat(c["right"], 2)
    return (left[:, None] * right[None]).flatten(0, 1)


def dense_adalora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["P"] @ torch.diag(c["E"]) @ c["Q"].flatten(1)).reshape(*w.shape)


def dense_svft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return (c["U"] @ torch.diag(c["M"]) @ c["V"].flatten(1)).reshape(*w.shape)


def dense_hira(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return w * (c["up"] @ c["down"].flatten(1)).reshape(*w.shape)


def dense_ia3(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return w * c["l"][:, None, None]


def dense_ia3_input(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return w * c["l"][None, :, None]


def dense_glora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    before = torch.einsum("ojk,jr,ri->oik", w, c["a_up"], c["a_down"])
    return before + torch.einsum("os,sik->oik", c["b_up"], flat(c["b_down"], 2))


def dense_fourierft(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return torch.einsum("n,no,ni->oi", c["c"], c["cos_o"], c["cos_i"]) - torch.einsum(
        "n,no,ni->oi", c["c"], c["sin_o"], c["sin_i"]
    )


def dense_melora(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    small = torch.einsum("aor,brik->aobik", c["up"], flat(c["down"], 3))
    return joined(small * c["same"][:, None, :, None, None], 2, 2)


def dense_full(c: Cores, w: Tensor, shape: Shape) -> Tensor:
    return c["update"]


ANY = (
    nn.Linear(12, 20),
    nn.Conv1d(12, 20, 5, groups=2),
    nn.Conv2d(6, 9, (3, 2), groups=3),
    nn.Conv3d(4, 6, (1, 2, 3)),
    nn.ConvTranspose1d(12, 20, 3, groups=4),
    nn.ConvTranspose2d(6, 4, (2, 3), groups=2),
    nn.ConvTranspose3d(4, 7, (2, 1, 3)),
)
CONVOLUTIONS = ANY[1:]
# One channel, primes, and more outputs than inputs.
ODD = (nn.Linear(13, 7), nn.Linear(1, 5), nn.Conv2d(1, 1, 3), nn.ConvTranspose1d(11, 1, 2), nn.Conv3d(7, 5, (2, 1, 2)))
VOLUMES = (
    nn.Conv3d(32, 48, (1, 3, 2)),
    nn.Conv3d(1, 12, 3),
    nn.Conv3d(10, 24, (3, 1, 2)),
    nn.Conv3d(64, 24, 2, groups=2),
)

SQUARES = (nn.Linear(32, 48), nn.Linear(32, 32), nn.Linear(10, 64), nn.Linear(13, 7))
THREE_AXES = (*VOLUMES, nn.ConvTranspose3d(6, 4, (2, 1, 3), groups=2), nn.Conv3d(7, 5, (2, 1, 2)))

METHODS: dict[str, tuple[Callable[[Cores, Tensor, Shape], Tensor], tuple[nn.Module, ...]]] = {
    "lora_conv2d": (
        dense_lora_conv2d,
        (nn.Conv2d(6, 9, (3, 2)), nn.Conv2d(8, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, (2, 3))),
    ),
    "locon_tucker": (dense_locon_tucker, CONVOLUTIONS),
    "loha_tucker": (dense_loha_tucker, CONVOLUTIONS),
    "lokr_tucker": (dense_lokr_tucker, (*CONVOLUTIONS, *ODD[2:])),
    "quanta": (dense_quanta, SQUARES[:3]),
    "quanta_4": (dense_quanta_4, SQUARES),
    "tenvoo_l": (dense_tenvoo_l, VOLUMES),
    "tenvoo_q": (dense_tenvoo_q, VOLUMES),
    "cp": (dense_cp, THREE_AXES),
    "tucker5": (dense_tucker5, THREE_AXES),
    "fourierft": (dense_fourierft, SQUARES),
}
# A row of one entry has no direction: DoRA's norm takes all of its update away.
METHODS["dora"] = (dense_lora, (*ANY, *ODD[:1], *ODD[2:]))
for _name in ("lora", "rslora", "lora_fa", "pissa"):
    METHODS[_name] = (dense_lora, (*ANY, *ODD))
for _name in ("loha", "abba"):
    METHODS[_name] = (dense_loha, (*ANY, *ODD))
for _name in (
    *("lokr", "lokr_both", "krona", "lotr", "fact_tt", "fact_tk", "lorta", "metatt", "tt_lora", "loretta_rep", "mpo"),
    *("tensor_ring", "hierarchical_tucker", "vera", "lora_xs", "tinylora", "nola", "randlora", "monarch", "miss"),
    *("kradapter", "adalora", "svft", "hira", "ia3", "ia3_input", "glora", "melora", "full"),
):
    METHODS[_name] = (globals()[f"dense_{_name}"], (*ANY, *ODD))
