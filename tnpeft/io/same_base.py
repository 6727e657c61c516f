"""Whether a model is the base that a file's adapter was trained on.

It is if its parameters and buffers have the file's shapes, types and ties. How a layer stores its weight makes no
difference: it may be quantised there and plain here (trained on 4 bits, used on bf16) or the reverse, or turned
(GPT-2's Conv1D, and a Linear in its place).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from tnpeft.adapters.base_weight import needs_weight
from tnpeft.adapters.distributed import whole
from tnpeft.errors import BindError, Problem, listed
from tnpeft.io.base import base_digests, fingerprint, has_values
from tnpeft.io.checks import MOST_SHOWN
from tnpeft.io.files import refuse, specs_of
from tnpeft.io.manifest import BaseTensor, Manifest, digest_of
from tnpeft.network import Layer, layer_of
from tnpeft.surgery import base_tensors, plain_modules

__all__ = ["check_base", "other_base"]

_SHOWN = 3  # differences named in an error
_Tensors = Mapping[str, BaseTensor]


def check_base(path: Path, manifest: Manifest, model: nn.Module, here: _Tensors) -> None:
    """Raises AdapterFileError where the model, whose fingerprint is `here`, is not the base of a file."""
    saved = manifest.base
    names = _compared(manifest, model, here).differing
    if not names:
        return
    texts = [_in_words(name, saved, here) for name in names[:_SHOWN]]
    more = len(names) - _SHOWN
    found = "; ".join(texts) + (f"; and {more} more" if more > 0 else "")
    fix = "Build the base model as it was when the adapter was saved."
    if all(name in saved and name in here and saved[name].like(here[name]) for name in names):
        fix = "Load the adapter before casting the model to another type."
    raise refuse(path, "base model", "the one the adapter was saved from", found, fix)


def other_base(path: Path, manifest: Manifest, model: nn.Module) -> Problem | None:
    """The warning if the base has other values than the one that a file's adapter was trained on, or None.

    Quantised weights have other values, which matters for specs that read them.
    """
    here = base_digests(model, manifest.layers, (names[0] for names in manifest.trained))
    others = [name for name, digest in manifest.digests.items() if here.get(name, digest) != digest]
    compared = _compared(manifest, model, fingerprint(model))
    tensors = base_tensors(model)
    others = [
        name
        for name in others
        if name not in compared.converted and not _is_turned(tensors[name], manifest.digests[name])
    ]
    owners = dict.fromkeys(name.rpartition(".")[0] or name for name in others)
    if compared.repacked:
        reading = [needs_weight(spec) for spec in specs_of(path, manifest)]
        owners |= {name: None for name in compared.repacked if reading[manifest.layers[name].spec]}
    if not owners:
        return None
    found = f"others in {listed([*owners], MOST_SHOWN)}"
    fix = "Load it onto that base; here it computes something else than it was trained to."
    return Problem("base model", "the values that the adapter was trained on", found, fix)


@dataclass(frozen=True)
class _Compared:
    """`differing` tensors make it another base.

    `converted` tensors belong to layers that are quantised on one side only, or were cast with such a model: their
    bytes differ. `repacked` are those among them whose layers the file adapts.
    """

    differing: tuple[str, ...] = ()
    converted: frozenset[str] = frozenset()
    repacked: tuple[str, ...] = ()


def _compared(manifest: Manifest, model: nn.Module, here: _Tensors) -> _Compared:
    saved = manifest.base
    names = [name for name in saved if name not in here]
    names += [name for name in here if name not in saved]
    names += [name for name in saved if name in here and saved[name] != here[name]]
    if not names:
        return _Compared()
    layers = _layers(model)
    held: dict[str, list[str]] = {}
    for name in names:
        held.setdefault(_owner(name, layers), []).append(name)
    repacked: list[str] = []
    converted: set[str] = set()
    turned: set[str] = set()
    for owner, own in held.items():
        there, now = _tensors_of(owner, saved), _tensors_of(owner, here)
        if owner in layers and _is_repacked(layers[owner], there, now, owner in manifest.layers):
            repacked.append(owner)
            converted.update(own)
        elif owner in layers and _is_turned_layer(layers[owner], there, now):
            turned.add(f"{owner}.weight")
    if repacked:
        # What quantises a model, or prepares it for training, casts the rest of it.
        converted.update(name for name in names if _is_cast(saved.get(name), here.get(name)))
    differing = tuple(name for name in names if name not in converted | turned)
    return _Compared(differing, frozenset(converted), tuple(name for name in repacked if name in manifest.layers))


def _layers(model: nn.Module) -> dict[str, Layer]:
    return dict(_signatures(model))


def _signatures(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, module in plain_modules(model).items():
        try:
            yield name, layer_of(module)
        except BindError:
            continue


def _owner(name: str, layers: Mapping[str, Layer]) -> str:
    """The layer that a tensor belongs to; if there is none, the tensor's own name."""
    owner = name
    while owner not in layers and owner:
        owner = owner.rpartition(".")[0]
    return owner or name


def _tensors_of(owner: str, tensors: _Tensors) -> dict[str, BaseTensor]:
    start = f"{owner}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _is_repacked(layer: Layer, there: _Tensors, here: _Tensors, is_adapted: bool) -> bool:
    """Whether a layer has a plain weight on at most one side, and is the same layer as far as can be seen.

    For adapted layers the cores give the sizes; for others the packed tensors must agree.
    """
    plain = [own["weight"] for own in (there, here) if "weight" in own and own["weight"].is_floating]
    sizes = (layer.stored_shape, layer.stored_shape[::-1]) if layer.kind == "Linear" else (layer.stored_shape,)
    packed = is_adapted or layer.opaque or any(not tensor.is_floating for tensor in there.values())
    return len(plain) < 2 and packed and all(each.shape in sizes for each in plain) and _same_bias(there, here)


def _is_turned_layer(layer: Layer, there: _Tensors, here: _Tensors) -> bool:
    """Whether a Linear's weight has its axes swapped; the bias tells it from a layer of other sizes."""
    if layer.kind != "Linear" or not {"weight", "bias"} <= there.keys() & here.keys():
        return False
    old, new = there["weight"], here["weight"]
    same = (old.dtype, old.shape, old.tied) == (new.dtype, new.shape[::-1], new.tied)
    return same and _same_bias(there, here)


def _same_bias(there: _Tensors, here: _Tensors) -> bool:
    return "bias" not in there or "bias" not in here or there["bias"].shape == here["bias"].shape


def _is_cast(there: BaseTensor | None, here: BaseTensor | None) -> bool:
    return there is not None and here is not None and there.like(here) and there.is_floating and here.is_floating


def _is_turned(tensor: Tensor, digest: str) -> bool:
    """Whether a matrix with its axes swapped has this digest."""
    tensor = whole(tensor)
    return tensor.dim() == 2 and has_values(tensor) and digest_of(tensor.T) == digest


def _in_words(name: str, saved: _Tensors, here: _Tensors) -> str:
    if name not in here:
        return f"'{name}' is {saved[name]} there and missing here"
    if name not in saved:
        return f"'{name}' is {here[name]} here and missing there"
    return f"'{name}' is {saved[name]} there and {here[name]} here"
