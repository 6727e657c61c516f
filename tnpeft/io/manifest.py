"""What an adapter file says beside its tensors: enough to rebuild the adapter from the base model alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tnpeft.adapters.hashing import add_bytes

__all__ = [
    "FITTED_AS",
    "FORMAT",
    "KEY",
    "BaseTensor",
    "LayerEntry",
    "Manifest",
    "SpecEntry",
    "digest",
    "digest_of",
    "dtype_name",
    "encode",
]

# 3 knew no digests of the base, and named layers with what torch.compile puts around them; 2 knew no choices, 1 neither
# shared cores nor cores that are left out.
FORMAT = 4
FITTED_AS = "fitted_as"  # in `about`: the layers of an adapter that was fitted to checkpoints without their model
KEY = "tnpeft"  # the one entry of the safetensors metadata: two would be written in any order

_Names = Annotated[tuple[str, ...], Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SpecEntry(_Entry):
    """A spec's text and the factor tables that it uses, so that the file needs no other file."""

    text: str
    file: str
    tables: dict[str, dict[int, tuple[int, ...]]]


class LayerEntry(_Entry):
    """How one layer's adapter was compiled; `spec` counts into the manifest's specs.

    `choices` are the modes that were found fastest, call by call. `captured` has what each scope captured, which says
    with which layers it shares cores. `drawn` are the frozen cores that the seed gives again and the file therefore
    leaves out, each with the SHA-256 of its bytes. `label` is the name under which the seed draws its cores, if that is
    not the layer's. `orientation` is set for a parameter that is adapted by itself, whose name takes the layer's place.
    It gives the stored axes, `o i` or `i o`, for a stack `e o i` or `e i o`. Cores of a stack, except for shared ones,
    have the axis of its slices first. `dropout` has the probabilities of dropout, for when training goes on.
    """

    spec: int
    params: dict[str, int | float]
    seed: int
    mode: str
    choices: dict[str, str] = Field(default_factory=dict)
    captured: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    drawn: dict[str, str] = Field(default_factory=dict)
    label: str | None = None
    orientation: str | None = None
    dropout: dict[str, float] = Field(default_factory=dict)


class BaseTensor(_Entry):
    """A parameter or buffer of the base model, for its fingerprint; `tied` is the first name of a tied one."""

    shape: tuple[int, ...]
    dtype: str
    tied: str | None = None

    @property
    def is_floating(self) -> bool:
        return "float" in self.dtype

    def like(self, other: BaseTensor) -> bool:
        """Equal but for the type."""
        return (self.shape, self.tied) == (other.shape, other.tied)

    def __str__(self) -> str:
        shape = f"{self.dtype}({', '.join(map(str, self.shape))})"
        return f"{shape} tied to '{self.tied}'" if self.tied else shape


class Manifest(_Entry):
    """The metadata of an adapter file. Names are those of the plain model; names of a tied tensor are together.

    `digests` has the SHA-256 of the bytes of every parameter of the base that the adapter adapts or trains.
    """

    library: str
    name: str
    scale: float
    specs: tuple[SpecEntry, ...]
    layers: dict[str, LayerEntry]
    trained: tuple[_Names, ...]
    statistics: tuple[_Names, ...]
    base: dict[str, BaseTensor]
    digests: dict[str, str] = Field(default_factory=dict)
    about: dict[str, Any]


def encode(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
    """The manifest as metadata text, with the format's number and the digest of everything."""
    fields = manifest.model_dump(mode="json")
    return _canonical({"format": FORMAT, "sha256": digest(fields, tensors), **fields})


def digest(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the manifest's fields and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(_canonical(fields).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(_canonical([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        add_bytes(total, tensor)
    return total.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in the order of its axes."""
    total = hashlib.sha256()
    add_bytes(total, tensor)
    return total.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _canonical(value: object) -> str:
    """JSON text with its keys in their order, which reading keeps: writing what was read gives the same text."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
