"""A method's adapters from a start of another size: the specs of its recipe with `start_std`, or from zero.

`tenvoo_l_std1.yaml` and `tenvoo_l_zero.yaml` in `examples/specs` are such specs of TenVOO-L, written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tnpeft.network import Spec
from tnpeft.recipe import Recipe

__all__ = ["recipe_from", "spec_from"]


def recipe_from(recipe: Recipe, std: float) -> Recipe:
    """The recipe with every adapter from a start of this size. Raises SpecError for one that has none."""
    return replace(recipe, entries=tuple(replace(entry, spec=spec_from(entry.spec, std)) for entry in recipe.entries))


def spec_from(spec: Spec, std: float) -> Spec:
    """The spec with T(start) of `std` standard deviations of the weight, all cores drawn and their frozen copy kept.

    A core of zeros is drawn as the spec's other cores are. With `std` 0 the last core is zeros, without a copy; a spec
    that starts at zero stays as it is. Raises SpecError for a spec whose cores cannot have such a start.
    """
    if not std and spec.start == "zero":
        return spec
    parts = {key: value for key, value in spec.root.plain().items() if key not in ("tnpeft", "start", "start_std")}
    cores = {name: core if isinstance(core, dict) else {"legs": core} for name, core in parts["cores"].items()}
    if std:
        parts |= {"cores": {name: _drawn(core) for name, core in cores.items()}}
        parts |= {"start": "frozen_copy", "start_std": int(std) if std == int(std) else std}
    else:
        last = list(cores)[-1]
        parts |= {"cores": {**cores, last: {**cores[last], "init": "zeros"}}, "start": "zero"}
    return Spec.build(file=f"{spec.file} with start_std {std:g}", tables=spec.tables, **parts)


def _drawn(core: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in core.items() if (key, value) != ("init", "zeros")}
