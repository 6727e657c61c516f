"""What a spec is tried on: a layer, the input of a call, and params, as the page's fields hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tnpeft.draw.picture import on_typical_layer
from tnpeft.errors import BindError, Problem, clip, near_miss
from tnpeft.network import Layer, Network, Spec
from tnpeft.planning import Call, nominal_call
from tnpeft.spec.pattern import KINDS

__all__ = ["Param", "Trial", "number_of", "params_of", "typical_trial", "which_are_whole"]

_MOST = 10**9
_SIZES = re.compile(r"\s*\d{1,9}(\s*[x,]\s*\d{1,9})*\s*", re.ASCII)


@dataclass(frozen=True)
class Trial:
    """The layer's kind and numbers; `kernel` and `input` are texts like `3` or `3x3x1`; `params` override the spec's.

    An empty `input` means a call of the size that plans assume.
    """

    kind: str = "Linear"
    inputs: int = 64
    outputs: int = 128
    kernel: str = ""
    groups: int = 1
    input: str = ""
    params: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def on(cls, layer: Layer) -> Trial:
        kernel = layer.kernel_size
        text = str(kernel[0]) if kernel and len(set(kernel)) == 1 else "x".join(map(str, kernel))
        return cls(layer.kind, layer.in_channels, layer.out_channels, text, layer.groups)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**{**data, "params": dict(data["params"])})

    def data(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("kind", "inputs", "outputs", "kernel", "groups", "input")}
        return {**own, "params": dict(self.params)}

    def layer(self) -> Layer:
        """The layer of these numbers. Raises BindError if no layer has them."""
        axes = KINDS.get(self.kind)
        if axes is None:
            fix = near_miss(self.kind, KINDS) or "Choose one of them."
            raise BindError(Problem("the kind of layer", f"one of {', '.join(KINDS)}", clip(self.kind), fix))
        for name, value in (("inputs", self.inputs), ("outputs", self.outputs), ("groups", self.groups)):
            if not 1 <= value <= _MOST:
                raise BindError(Problem(f"the layer's {name}", "a positive number", str(value), "Mend that number."))
        kernel = _sizes(self.kernel, "the layer's kernel", "3") if axes else ()
        if len(kernel) == 1:
            kernel *= axes
        if len(kernel) != axes:
            fix = f"Write `3`, or {'x'.join('3' * axes)}."
            raise BindError(Problem("the layer's kernel", f"{axes} sizes", str(len(kernel)), fix))
        groups = self.groups if axes else 1
        if self.inputs % groups or self.outputs % groups:
            found, fix = f"{self.inputs} and {self.outputs}", "Mend `groups` or the channel counts."
            raise BindError(Problem("groups", f"channel counts that {groups} divides", found, fix))
        return Layer(self.kind, self.inputs, self.outputs, kernel, groups)

    def call(self, layer: Layer) -> Call:
        """A call with the input `batch x side x ...` (of a Linear: rows). Raises BindError."""
        axes = len(layer.kernel_size)
        if not self.input.strip():
            return nominal_call(layer)
        sizes = _sizes(self.input, "the input", "1x24x24" if axes > 1 else "64")
        if len(sizes) != axes + 1:
            expected = f"batch and {axes} sizes" if axes else "the number of rows"
            fix = f"Write {'x'.join(['1', *('24' for _ in range(axes))]) if axes else '64'}, say."
            raise BindError(Problem("the input", expected, f"{len(sizes)} numbers", fix))
        return nominal_call(layer, sizes[0], sizes[1:]) if axes else nominal_call(layer, sizes[0])


def _sizes(text: str, what: str, example: str) -> tuple[int, ...]:
    if not _SIZES.fullmatch(text):
        raise BindError(
            Problem(what, "whole numbers with `x` between them", clip(text, 40), f"Write `{example}`, say.")
        )
    sizes = tuple(int(size) for size in re.split("[x,]", text))
    if min(sizes) < 1:
        raise BindError(Problem(what, "positive numbers", "a zero", "Mend that number."))
    return sizes


def typical_trial(spec: Spec, before: Trial | None = None) -> Trial:
    """A trial on a layer that a spec takes: the layer of `before`, if the spec takes its kind."""
    if before is not None and before.kind in spec.layers:
        return Trial.from_data({**before.data(), "params": {}})
    try:
        return Trial.on(on_typical_layer(spec, {}).layer)
    except BindError:
        return Trial(spec.layers[0], kernel="3" if KINDS[spec.layers[0]] else "")


@dataclass(frozen=True)
class Param:
    """One param on a layer: its value, whether the trial sets it, and the file's default."""

    name: str
    value: float
    is_set: bool
    default: str

    @property
    def most(self) -> float:
        """Where its slider ends."""
        if isinstance(self.value, int):
            return max(16, 2 ** (2 * self.value - 1).bit_length()) if self.value > 0 else 16
        return max(4 * abs(self.value), 1.0)


def params_of(network: Network, trial: Trial) -> tuple[Param, ...]:
    """The params of a bound spec in the file's order."""
    declared = network.spec.params
    return tuple(
        Param(name, value, name in trial.params, declared[name].text if name in declared else "")
        for name, value in network.params.items()
    )


def which_are_whole(params: Iterable[Param], before: Mapping[str, bool]) -> dict[str, bool]:
    """The params whose sliders go in whole numbers: by what the file says, whatever is tried meanwhile."""
    return {
        param.name: before[param.name] if param.is_set and param.name in before else isinstance(param.value, int)
        for param in params
    }


def number_of(value: float, whole: bool) -> float:
    """What a slider or field holds, as YAML would have it: browsers know no whole numbers of their own."""
    return round(value) if whole and float(value).is_integer() else float(value)
