"""The error for cores without values."""

from __future__ import annotations

from tnpeft.errors import ExecutionError, Problem

__all__ = ["without_values"]


def without_values(layer_name: str, on_meta: bool) -> ExecutionError:
    """The error for cores that were neither drawn nor loaded: they are on meta, or have come from there."""
    found = "memory without values (they were made on the meta device)"
    if on_meta:
        found = "none (they are on the meta device, and the layer is not)"
    fix = "Call `reset_parameters` of the adapted layer, or load the adapter, before the first forward."
    where = f"layer '{layer_name}'" if layer_name else None
    return ExecutionError(Problem("cores", "initial or loaded values", found, fix, where=where))
