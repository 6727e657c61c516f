"""Hypothesis strategies of layers, inputs and params."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tnpeft.errors import Problem, TnpeftError, clip, near_miss
from tnpeft.network import Layer, Spec
from tnpeft.spec.pattern import KINDS
from tnpeft.verify.case import DTYPES, Case, sample_input
from tnpeft.verify.properties import st

__all__ = ["cases", "checked_kinds", "inputs_for", "layers", "params_of", "signatures"]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_WIDE = (5, 7, 8, 11, 12, 13, 16, 24)  # primes, and numbers with many divisors


def layers(
    kinds: Iterable[str] | str = tuple(KINDS),
    *,
    max_channels: int = 12,
    max_kernel: int = 3,
    groups: bool = True,
    dtypes: Sequence[str] = ("float32",),
) -> st.SearchStrategy[nn.Module]:
    """`torch.nn` layers with random weights, strides, dilations, paddings, padding modes and biases.

    `kinds` are names such as "Conv3d". `max_channels` bounds both channel counts; 1 and primes are drawn too.
    """
    chosen = checked_kinds((kinds,) if isinstance(kinds, str) else kinds)
    signature = signatures(chosen, max_channels=max_channels, max_kernel=max_kernel, groups=groups)
    drawn = signature.flatmap(lambda layer: cases(st.just(layer), dtypes=dtypes))
    return drawn.map(lambda case: case.build())


def inputs_for(layer: nn.Module, max_batch: int = 3, more: int = 3) -> st.SearchStrategy[Tensor]:
    """Batches that `layer` accepts, in its dtype; up to `more` voxels wider than the narrowest along each axis."""
    numbers = st.tuples(st.integers(0, 999), st.integers(1, max_batch), st.integers(0, more))
    return numbers.map(lambda drawn: sample_input(layer, *drawn))


def params_of(spec: Spec, fixed: Mapping[str, float] | None = None) -> st.SearchStrategy[dict[str, int | float]]:
    """Values for the params of `spec`, some of them defaults; those in `fixed` are as given."""
    given = dict(fixed or {})
    optional = {name: _numbers(rule.tree) for name, rule in spec.params.items() if name not in given}
    drawn = st.fixed_dictionaries({}, optional=optional)
    return drawn.map(lambda values: {**values, **given})


def _numbers(default: ast.expr) -> st.SearchStrategy[int | float]:
    """A param that is a whole number by default stays one; zero often means `off`, so zero may come again."""
    if isinstance(default, ast.Constant) and isinstance(default.value, float) and not default.value.is_integer():
        return st.sampled_from([default.value, 2 * default.value, default.value / 2])
    low = 0 if isinstance(default, ast.Constant) and default.value == 0 else 1
    return st.integers(low, 4)


@st.composite
def signatures(
    draw: st.DrawFn, kinds: Sequence[str], *, max_channels: int = 24, max_kernel: int = 3, groups: bool = True
) -> Layer:
    """Signatures of layers, which are all that the compiler knows of them."""
    kind = draw(st.sampled_from(kinds))
    axes = KINDS[kind]
    number = draw(st.sampled_from([1, 1, 2, 3])) if axes and groups and max_channels > 2 else 1
    most = max(1, max_channels // number)
    wide = [width for width in _WIDE if width <= most]
    channels = st.integers(1, min(4, most)) | (st.sampled_from(wide) if wide else st.just(most))
    kernel = tuple(draw(st.lists(st.integers(1, max_kernel), min_size=axes, max_size=axes)))
    return Layer(kind, number * draw(channels), number * draw(channels), kernel, number)


@st.composite
def cases(
    draw: st.DrawFn,
    drawn_signatures: st.SearchStrategy[Layer],
    params: st.SearchStrategy[dict[str, int | float]] | None = None,
    dtypes: Sequence[str] = DTYPES,
) -> Case:
    """Layers with options, params and a seed."""
    layer = draw(drawn_signatures)
    return Case.on(
        layer,
        options=draw(_options(layer)),
        params=draw(params) if params is not None else {},
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def _options(draw: st.DrawFn, layer: Layer) -> dict[str, Any]:
    """Keywords of the layer's class, without those that have torch's default."""
    options: dict[str, Any] = {} if draw(st.booleans()) else {"bias": False}
    axes = len(layer.kernel_size)
    if not axes or draw(st.booleans()):
        return options
    each = st.lists(st.integers(1, 2), min_size=axes, max_size=axes).map(tuple)
    stride, dilation = draw(each), draw(each)
    spans = [gap * (size - 1) for gap, size in zip(dilation, layer.kernel_size, strict=True)]
    if layer.transposed:
        options |= {"padding": tuple(draw(st.integers(0, span // 2)) for span in spans)}
        options |= {
            "output_padding": tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True))
        }
    elif draw(st.booleans()) and not any(span % 2 for span in spans):  # torch warns of a copy if both ends differ
        options |= {"padding": "same"}
        stride = (1,) * axes
    else:
        options |= {"padding": tuple(draw(st.integers(0, (span + 1) // 2)) for span in spans)}
    options |= {"stride": stride, "dilation": dilation}
    if not layer.transposed:
        options |= {"padding_mode": draw(st.sampled_from(_PADDING_MODES))}
    zeros, ones = (0,) * axes, (1,) * axes
    usual = {"padding": zeros, "output_padding": zeros, "stride": ones, "dilation": ones, "padding_mode": "zeros"}
    return {key: value for key, value in options.items() if value != usual.get(key)}


def checked_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """`kinds` as a tuple. Raises TnpeftError for what is no kind of layer."""
    found = tuple(kinds)
    for kind in found:
        if kind not in KINDS:
            fix = near_miss(str(kind), KINDS) or "Choose one of them."
            raise TnpeftError(Problem("layer kind", f"one of {', '.join(KINDS)}", clip(kind), fix))
    if not found:
        raise TnpeftError(Problem("layer kinds", f"some of {', '.join(KINDS)}", "none", "Name one."))
    return found
