"""Reading the adapters of the TenVOO paper's code: TenVOO-L and -Q, its QuanTA, LoCon, LoHa and LoKr.

A file holds the adapter alone (`save_peft`), or the whole adapted model's state dict. Neither has the alpha of LoCon,
LoHa and LoKr; if the caller gives none, it is that of the paper's code, `rank // 4`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tnpeft.adapters.distributed import whole
from tnpeft.io.foreign.beside import beside
from tnpeft.io.foreign.formats import INCOMPLETE, MADE_FOR, unsupported
from tnpeft.io.foreign.key_names import check_layers, layer_named
from tnpeft.io.foreign.layer_tensors import LayerTensors, tensors_of_layer, update_of
from tnpeft.io.foreign.layer_update import Foreign, LayerUpdate
from tnpeft.io.foreign.source import Source
from tnpeft.io.foreign.topologies import topology_named
from tnpeft.network import layer_of

__all__ = ["read_tenvoo"]

_SLOT = re.compile(
    r"(?P<module>.+)\.((?P<frozen>(tenvoo|quanta)_weights2)\.|(tenvoo|quanta)_weights\.|lora_|loha_|lokr_)"
    r"(?P<slot>\d|-\d -\d|(up|down)(?=\.weight)|w[12]_[ab])(\.weight)?"
)
_FLAGS = re.compile(r".+\.(frozen_)?merged\.merged")
_GATES = ("-1 -2", "-1 -3", "-2 -3")  # QuanTA's slots; TenVOO's are numbers. Both stand as the shipped specs' cores do.


def read_tenvoo(
    source: Source,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    alpha: float | None = None,
) -> Foreign:
    """The parts by layer and, from a whole model's state dict, what else was trained. Raises AdapterFileError."""
    slots: dict[str, LayerTensors] = {}
    starts: dict[str, LayerTensors] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in source.tensors.items():
        match = _SLOT.fullmatch(key)
        if match is None:
            others |= {} if _FLAGS.fullmatch(key) else {key: tensor}
            continue
        name = layer_named(source, key, match["module"], modules)
        where = starts if match["frozen"] else slots
        tensors_of_layer(where, source.path, name, match["module"]).add(match["slot"], key, tensor)
    if not slots:
        raise unsupported(source.path, source.tensors)
    check_layers(source, {**slots, **starts}, modules)
    parts = {name: _part(slots[name], starts.get(name), modules[name], alpha) for name in slots}
    values, statistics, unknown = beside(source, others, parameters, buffers)
    if unknown:
        raise unsupported(source.path, unknown)
    return Foreign(parts, _changed(values, parts, parameters), statistics)


def _changed(values: Mapping[str, Tensor], parts: Iterable[str], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a whole model's state dict that are not the base's; adapted weights are the base's own."""
    adapted = {f"{layer}.weight" for layer in parts}
    changed = {}
    for name, value in values.items():
        base = whole(parameters[name].detach()).cpu()
        if name not in adapted and not (value.shape == base.shape and torch.equal(value, base.to(value.dtype))):
            changed[name] = value
    return changed


def _part(slots: LayerTensors, start: LayerTensors | None, module: nn.Module, alpha: float | None) -> LayerUpdate:
    layer = layer_of(module)
    scale = partial(_scale, slots, alpha)
    if "up" in slots.tensors or "down" in slots.tensors:
        return update_of("lora", slots, layer, scale)
    keys = " ".join(slots.keys.values())
    if "loha_" in keys:
        part = update_of("loha", slots, layer, scale)
        return part if layer.kind != "Linear" else _viewed(slots, part, layer.in_channels, layer.out_channels)
    if "lokr_" in keys:
        return update_of("lokr", slots, layer, scale)
    return _network_part(slots, start)


def _scale(slots: LayerTensors, alpha: float | None, rank: int | None) -> float:
    if not rank:
        return 1.0  # no axis may be empty, which is said where the tensors meet the layer
    if alpha is None and rank < 4:
        fix = "Pass `alpha=0`, as published, or the alpha that it was trained with, for example `alpha=1`."
        found = f"none in the file, and rank {rank}, for which the published code takes 0: its update does nothing"
        raise slots.refuse("`alpha`", "the number that the update was scaled with", found, fix)
    return (rank // 4 if alpha is None else alpha) / rank


def _viewed(slots: LayerTensors, part: LayerUpdate, ins: int, outs: int) -> LayerUpdate:
    """LoHa on a Linear: the code makes an (in, out) matrix and views it, without transposing, as (out, in)."""
    cores = dict(part.tensors)
    rows, columns = cores["up_1"].shape[0], cores["down_1"].shape[1]
    if (rows, columns) != (ins, outs):
        found = f"{rows} and {columns}"
        raise slots.refuse("tensors", f"{ins} rows and {outs} columns", found, MADE_FOR)
    if ins == outs:
        return part
    if outs % ins and ins % outs:
        found = f"Linear({ins}, {outs}), one of which does not divide the other"
        fix = "The published code views an (in, out) matrix as (out, in), which is no network of its cores then."
        raise slots.refuse("LoHa", "in and out features that divide each other", found, fix)
    wide_ = outs > ins
    for half in "12":
        if wide_:
            down = cores[f"down_{half}"]
            cores[f"down_{half}"] = down.reshape(down.shape[0], outs // ins, ins)
        else:
            up = cores[f"up_{half}"]
            cores[f"up_{half}"] = up.reshape(outs, ins // outs, up.shape[1])
    return LayerUpdate("loha_viewed_wide" if wide_ else "loha_viewed_tall", cores, part.scale, keys=part.keys)


def _network_part(slots: LayerTensors, start: LayerTensors | None) -> LayerUpdate:
    """TenVOO and QuanTA: the cores as they are, but for TenVOO-Q's broadcast leg, and their frozen copies."""
    last = slots.tensors.get("9")
    tenvoo = "tenvoo_l" if last is not None and last.ndim == 3 else "tenvoo_q"
    name = "quanta" if _GATES[0] in slots.tensors else tenvoo
    cores = topology_named(name).cores
    slot_of = dict(zip(cores, _GATES if name == "quanta" else map(str, range(len(cores))), strict=True))
    if slots.tensors.keys() != {*slot_of.values()}:
        expected, given = (", ".join(f"'{slot}'" for slot in each) for each in (slot_of.values(), slots.tensors))
        raise slots.refuse("cores", expected, given, INCOMPLETE)
    if start is None or not start.tensors.keys() >= {*slot_of.values()}:
        beside = next(iter(slots.keys.values()))
        expected = f"the frozen copies, `..._weights2`, beside '{beside}'"
        fix = "The update is T(now) - T(start): save the adapter with its frozen copies, as `save_peft` does."
        raise slots.refuse("start", expected, "none", fix)
    now, before = (_clean(each) if name == "tenvoo_q" else each.tensors for each in (slots, start))
    return LayerUpdate(
        name,
        {core: now[slot] for core, slot in slot_of.items()},
        start={core: before[slot] for core, slot in slot_of.items()},
        keys={core: slots.keys[slot] for core, slot in slot_of.items()},
    )


def _clean(slots: LayerTensors) -> dict[str, Tensor]:
    """The published TenVOO-Q on the graph of Fig. 2(d).

    There `kernel_h` is (kh, 1, r, r): its second axis is broadcast against the bond with `kernel_d`, its
    last one dangles. Both are summed; the sum over the bond stands in one slice of it, so that what
    trains afterwards is what trained there: elsewhere both cores are zero and receive no gradient.
    """
    cores = dict(slots.tensors)
    kernel_d, kernel_h = cores["2"], cores["3"]
    if kernel_d.ndim != 4 or kernel_h.ndim != 4 or kernel_h.shape[1] != 1:
        if kernel_h.ndim == 3:  # the clean graph itself
            return cores
        found = f"{tuple(kernel_d.shape)} and {tuple(kernel_h.shape)}"
        keys = f"tensors '{slots.keys['2']}' and '{slots.keys['3']}'"
        raise slots.refuse(keys, "(kd, r, r, r) and (kh, 1, r, r)", found, INCOMPLETE)
    summed = kernel_h.sum(3)  # (kh, 1, r)
    bond = kernel_d.shape[3]
    cores["2"] = torch.zeros_like(kernel_d)
    cores["2"][..., 0] = kernel_d.sum(3)
    cores["3"] = summed.new_zeros(summed.shape[0], bond, summed.shape[2])
    cores["3"][:, 0] = summed[:, 0]
    return cores
