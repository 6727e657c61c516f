"""Texts of the command line → layers and parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction

from tnpeft.cli.output import UsageError
from tnpeft.errors import Problem, clip, near_miss
from tnpeft.network import Layer
from tnpeft.planning import Call, nominal_call
from tnpeft.spec.pattern import KINDS

__all__ = ["EXAMPLE", "parse_input", "parse_layer", "parse_number", "parse_scopes", "parse_settings"]

EXAMPLE = "Conv3d:64,128,3"
_NUMBERS = re.compile(
    r"(?P<ends>\d{1,9},\d{1,9})(,(?P<kernel>\d{1,9}(x\d{1,9})*))?(,groups=(?P<groups>\d{1,9}))?", re.ASCII
)
_COUNT = re.compile(r"(?P<digits>\d[\d_,]{0,18}(\.\d{1,9})?)\s?(?P<unit>[kKMG]?)", re.ASCII)

_UNITS = {"": 1, "k": 1_000, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}


def parse_layer(text: str) -> Layer:
    """`Kind:in,out,k[xkxk][,groups=g]` → its signature; one `k` stands for every kernel axis."""
    where = f"--layer {text[:80]}"
    kind, _, numbers = text.partition(":")
    if kind not in KINDS:
        closest = near_miss(kind, KINDS)
        fix = closest or f"Write it like {EXAMPLE}."
        raise UsageError(Problem("the kind of layer", f"one of {', '.join(KINDS)}", f"{kind[:40]!r}", fix, where))
    axes = KINDS[kind]
    match = _NUMBERS.fullmatch(numbers.replace(" ", ""))
    if match is None:
        shape = {0: "in,out", 1: "in,out,k"}.get(axes, f"in,out,k or in,out,{'x'.join('k' * axes)}")
        expected = f"{shape}[,groups=g]" if axes else shape
        fix = f"Write it like {kind}:64,128{',3' if axes else ''}."
        raise UsageError(Problem("the layer's numbers", expected, f"{numbers[:40]!r}", fix, where))
    kernel = tuple(int(size) for size in match["kernel"].split("x")) if match["kernel"] else ()
    if axes > 1 and len(kernel) == 1:
        kernel *= axes
    in_channels, out_channels = (int(size) for size in match["ends"].split(","))
    layer = Layer(kind, in_channels, out_channels, kernel, int(match["groups"] or 1))
    _check(layer, axes, where)
    return layer


def _check(layer: Layer, axes: int, where: str) -> None:
    if len(layer.kernel_size) != axes:
        found = f"{len(layer.kernel_size)}"
        fix = "A Linear has no kernel: leave it out." if not axes else f"Write it like {layer.kind}:64,128,3."
        raise UsageError(Problem("the kernel's axes", f"{axes} for {layer.kind}", found, fix, where))
    if min(layer.in_channels, layer.out_channels, layer.groups, *layer.kernel_size) < 1:
        raise UsageError(Problem("the layer's numbers", "positive numbers", "a zero", "Mend that number.", where))
    if layer.groups > 1 and not axes:
        raise UsageError(Problem("groups", "none for Linear", f"{layer.groups}", "Leave `groups` out.", where))
    if layer.in_channels % layer.groups or layer.out_channels % layer.groups:
        found = f"{layer.in_channels} and {layer.out_channels}"
        expected = f"channel counts that {layer.groups} divides"
        raise UsageError(Problem("groups", expected, found, "Mend `groups` or the channel counts.", where))


def parse_input(text: str, layer: Layer) -> Call:
    """`batch,channels,sizes...` → a call of the layer; for a Linear the last number is its features."""
    where = f"--input {text[:80]}"
    axes = len(layer.kernel_size)
    fix = f"Write it like --input {','.join(map(str, (1, layer.in_channels, *(24,) * axes)))}."
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text.replace(" ", ""), re.ASCII):
        raise UsageError(Problem("the input's sizes", "whole numbers with commas", f"{text[:40]!r}", fix, where))
    sizes = [int(size) for size in text.split(",")]
    if axes and len(sizes) != axes + 2:
        expected = f"{axes + 2} for {layer.kind}: batch, channels and the kernel's {axes}"
        raise UsageError(Problem("the input's axes", expected, f"{len(sizes)}", fix, where))
    if min(sizes) < 1:
        raise UsageError(Problem("the input's sizes", "positive numbers", "a zero", "Mend that number.", where))
    channels = sizes[1] if axes else sizes[-1]
    if channels != layer.in_channels:
        raise UsageError(Problem("the input's channels", f"{layer.in_channels}", f"{channels}", fix, where))
    return nominal_call(layer, sizes[0], sizes[2:]) if axes else nominal_call(layer, math.prod(sizes[:-1]))


def parse_settings(settings: Iterable[str]) -> dict[str, int | float]:
    """`["r=8", "alpha=0.5"]` → params; later ones win, as on any command line."""
    params: dict[str, int | float] = {}
    for text in settings:
        name, equals, value = (part.strip() for part in text.partition("="))
        where = f"--set {text[:80]}"
        if not equals or not name:
            raise UsageError(Problem("a setting", "name=number", f"{text[:40]!r}", "Write it like --set r=8.", where))
        params[name] = _number(value, where)
    return params


def parse_number(text: str, option: str) -> int:
    """`600000`, `5k` or `1.2M`, which must come out whole."""
    match = _COUNT.fullmatch(text.strip())
    count = Fraction(re.sub("[_,]", "", match["digits"])) * _UNITS[match["unit"]] if match else None
    if count is None or count < 1 or count.denominator != 1:
        found = text if re.fullmatch(r"-?\d{1,20}", text, re.ASCII) else clip(text)
        fix = f"For example {option} 600000, or 5k, or 1.2M."
        raise UsageError(Problem(option, "a positive whole number", found, fix))
    return int(count)


def parse_scopes(texts: Iterable[str]) -> dict[str, str]:
    r"""`["block=layers\.(\d+)\."]` → scopes with their regular expressions."""
    scopes: dict[str, str] = {}
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not equals or not name.strip():
            fix = r"Write it like --scope 'block=layers\.(\d+)\.'."
            raise UsageError(
                Problem("a scope", "name=regular expression", f"{text[:40]!r}", fix, f"--scope {text[:80]}")
            )
        scopes[name.strip()] = pattern
    return scopes


def _number(text: str, where: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not math.isfinite(value):
        expected = "a number" if value is None else "a finite number"
        raise UsageError(Problem("a setting", expected, f"{text[:40]!r}", "Write it like --set r=8.", where))
    return value
