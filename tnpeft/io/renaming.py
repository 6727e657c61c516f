"""For files of earlier versions, whose names of layers include wrappers that only run another module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tnpeft.io.manifest import Manifest
from tnpeft.surgery import plain_name

__all__ = ["with_plain_names"]


def with_plain_names(
    manifest: Manifest, tensors: dict[str, Tensor], known: Iterable[str]
) -> tuple[Manifest, dict[str, Tensor]]:
    """A file's content under the plain model's names, if the base has parameters of these names; else as it is.

    Layers keep the names under which their cores were drawn.
    """
    known = set(known)
    odd = [name for name in manifest.base if name not in known]
    if not odd or not all(plain_name(name) in known for name in odd):
        return manifest, tensors
    layers = {
        plain_name(name): entry if plain_name(name) == name else entry.model_copy(update={"label": name})
        for name, entry in manifest.layers.items()
    }
    base = {
        plain_name(name): entry.model_copy(update={"tied": entry.tied and plain_name(entry.tied)})
        for name, entry in manifest.base.items()
    }
    changes = {
        "layers": layers,
        "base": base,
        "trained": tuple(tuple(map(plain_name, names)) for names in manifest.trained),
        "statistics": tuple(tuple(map(plain_name, names)) for names in manifest.statistics),
        "about": _plain_about(manifest.about),
    }
    return manifest.model_copy(update=changes), {plain_name(key): tensor for key, tensor in tensors.items()}


def _plain_about(about: Mapping[str, Any]) -> dict[str, Any]:
    reasons = about.get("trained")
    if not isinstance(reasons, Mapping):
        return dict(about)
    plain = {
        reason: [plain_name(name) if isinstance(name, str) else name for name in names]
        if isinstance(names, list)
        else names
        for reason, names in reasons.items()
    }
    return {**about, "trained": plain}
