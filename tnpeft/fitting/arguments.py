"""Checks of the arguments of `fit`, `extract` and `truncate`."""

from __future__ import annotations

import torch
from torch import Tensor

from tnpeft.errors import BindError, Problem, clip

__all__ = ["check_frozen_copy", "check_method", "checked"]

SMALLEST = 1e-100  # of an update's largest entry, and one over it


def checked(delta: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(delta, Tensor):
        fix = "Pass the tuned weight minus the base weight."
        raise BindError(Problem("delta", "a tensor", clip(delta), fix))
    if tuple(delta.shape) != shape:
        fix = "Pass the tuned weight minus the base weight, as the layer stores them."
        raise BindError(Problem("delta", f"the shape of the layer's weight, {shape}", f"{tuple(delta.shape)}", fix))
    if not delta.is_floating_point():
        dtype = str(delta.dtype).removeprefix("torch.")
        raise BindError(Problem("delta", "floating-point numbers", dtype, "Convert it, for example by `.float()`."))
    if delta.layout is not torch.strided:
        layout = str(delta.layout).removeprefix("torch.")
        raise BindError(Problem("delta", "a dense tensor", layout, "Convert it by `.to_dense()`."))
    if delta.device.type == "meta" or not bool(torch.isfinite(delta).all()):
        found = "none (it is on the meta device)" if delta.device.type == "meta" else "nan or inf"
        raise BindError(Problem("delta", "finite numbers", found, "Check both weights: training may have diverged."))
    largest = float(delta.detach().abs().max())
    if largest and not SMALLEST < largest < 1 / SMALLEST:
        fix = "Scale both weights."
        raise BindError(Problem("delta", "numbers whose squares float64 can add up", f"{largest:.1e} at most", fix))
    return delta


def check_frozen_copy(frozen_copy: object) -> None:
    if frozen_copy not in (None, "zeros", "drawn"):
        fix = "Leave it out, or choose one of them."
        raise BindError(Problem("`frozen_copy`", "zeros or drawn", clip(frozen_copy), fix))


def check_method(method: object, iterations: object) -> None:
    if method not in ("auto", "als", "adam"):
        fix = "Leave it out, or choose one of them."
        raise BindError(Problem("`method`", "one of auto, als, adam", clip(method), fix))
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        fix = "For example `iterations=100`."
        raise BindError(Problem("`iterations`", "a positive whole number", clip(iterations), fix))
