"""A network's parts in words, for tables of cores."""

from __future__ import annotations

from tnpeft.network.model import BoundCore, Network
from tnpeft.spec import Core
from tnpeft.spec.pattern import Axes, expand_axes

__all__ = ["axes_text", "core_rows", "declared_text"]


def core_rows(network: Network) -> list[tuple[str, ...]]:
    """For each core its name, legs, shape, the origin of its values, and its number of elements."""
    rows: list[tuple[str, ...]] = []
    for core in network.cores:
        shape = " x ".join(map(str, core.shape)) or "scalar"
        init = ", ".join(text for text in (_init_text(core), _marks(core.frozen, core.shared, core.origin)) if text)
        rows.append((core.name, _legs_text(network, core), shape, init, f"{core.numel:,}"))
    for made in network.derived:
        shape = " x ".join(map(str, made.shape)) or "scalar"
        rows.append((made.name, " ".join(made.legs), shape, str(made).partition(" = ")[2], "derived"))
    return rows


def _legs_text(network: Network, core: BoundCore) -> str:
    """Its legs in storage order, several of one axis in parentheses."""
    if core.split is None:
        return " ".join(core.legs)
    axes = next(declared.axes for declared in network.spec.cores if declared.name == core.name)
    return axes_text(expand_axes(axes, len(network.layer.kernel_size)))


def axes_text(axes: Axes) -> str:
    """`(i k...) r`, as a file writes it."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" if axis else "1" for axis in axes)


def declared_text(core: Core) -> str:
    """What is special about a core, without a layer: marks, or what it is made of."""
    if core.derivation is None:
        init = core.init.text if core.is_index else ""
        return ", ".join(text for text in (init, _marks(core.frozen, core.shared, core.origin)) if text)
    parts = [" * ".join(reference.label for reference in summand.references) for summand in core.derivation.summands]
    maps = "".join(f"{call}, " for call in core.derivation.maps)[:-2]
    return f"{maps} of {' + '.join(parts)}" if maps else " + ".join(parts)


def _marks(frozen: bool, shared: str | None, origin: str | None) -> str:
    """What is special about a core, in words."""
    if origin is not None:
        return "the base weight" if origin == "weight" else f"{origin} of the base weight"
    scope = {None: None, "model": "shared by all layers"}.get(shared, f"shared within {shared}")
    return ", ".join(mark for mark in ("frozen" if frozen else None, scope) if mark)


def _init_text(core: BoundCore) -> str:
    init = core.init
    if core.origin is not None:
        return ""
    arguments = [f"{name}={value:.4g}" for name, value in sorted(init.arguments.items())]
    legs = " ".join(init.legs)
    arguments += [f"same=[{', '.join(init.legs)}]" if arguments and legs else legs] if legs else []
    arguments += [init.core] if init.core is not None else []
    arguments += [init.entry.text] if init.entry is not None else []
    return f"{init.name}({', '.join(arguments)})" if arguments else init.name
