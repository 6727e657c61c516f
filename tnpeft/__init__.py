"""tnpeft: a compiler for parameter-efficient fine-tuning adapters.

A YAML file declares the adapter's tensor network; `attach` puts it on a model:

    handle = tnpeft.attach(model, "tenvoo_l", match=r"conv[12]\\.conv$", r=4)

The rooms import only to the left:

    errors <- documents <- spec <- network <- planning <- schedule <- program <- adapters
           <- execution <- surgery <- recipe <- io <- integrations <- fitting <- verify <- draw
           <- searching <- editing <- cli

`tnpeft.integrations` has what other libraries call; import its modules by name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tnpeft import earlier
from tnpeft.errors import (
    AdapterFileError,
    AttachError,
    BindError,
    DrawError,
    ExecutionError,
    Position,
    Problem,
    SpecError,
    TnpeftError,
    TnpeftWarning,
)
from tnpeft.network import Layer, Network, Spec, layer_of, load_spec
from tnpeft.schedule import Plan, plan
from tnpeft.spec import list_specs, register_init, register_map
from tnpeft.version import __version__

earlier.register()

if TYPE_CHECKING:
    from tnpeft.adapters import Adapter, memory_limit
    from tnpeft.draw import draw_network
    from tnpeft.execution import compile
    from tnpeft.fitting import (
        Budget,
        Extraction,
        Fit,
        TangentSpace,
        Truncation,
        budget,
        extract,
        fit,
        tangent_space,
        truncate,
    )
    from tnpeft.io import Inspection, hot_swap, inspect, load, load_foreign, save, save_foreign
    from tnpeft.recipe import Handle, Recipe, Report, attach, list_recipes, load_recipe
    from tnpeft.searching import Search, search, search_report
    from tnpeft.surgery import (
        accumulating,
        activate,
        anchor,
        detach,
        disabled,
        merge,
        names_of,
        plain_state_dict,
        rows,
        scales_of,
        serving,
        unmerge,
    )


__all__ = [
    "Adapter",
    "AdapterFileError",
    "AttachError",
    "BindError",
    "Budget",
    "DrawError",
    "ExecutionError",
    "Extraction",
    "Fit",
    "Handle",
    "Inspection",
    "Layer",
    "Network",
    "Plan",
    "Position",
    "Problem",
    "Recipe",
    "Report",
    "Search",
    "Spec",
    "SpecError",
    "TangentSpace",
    "TnpeftError",
    "TnpeftWarning",
    "Truncation",
    "__version__",
    "accumulating",
    "activate",
    "anchor",
    "attach",
    "budget",
    "compile",
    "detach",
    "disabled",
    "draw_network",
    "extract",
    "fit",
    "hot_swap",
    "inspect",
    "layer_of",
    "list_recipes",
    "list_specs",
    "load",
    "load_foreign",
    "load_recipe",
    "load_spec",
    "memory_limit",
    "merge",
    "names_of",
    "plain_state_dict",
    "plan",
    "register_init",
    "register_map",
    "rows",
    "save",
    "save_foreign",
    "scales_of",
    "search",
    "search_report",
    "serving",
    "tangent_space",
    "truncate",
    "unmerge",
]

# The rooms that need torch load on first use, so that checking a spec takes no torch import.
_LAZY = {
    name: room
    for room, names in {
        "adapters": "Adapter memory_limit",
        "execution": "compile",
        "surgery": "accumulating activate anchor detach disabled merge names_of plain_state_dict rows scales_of "
        "serving unmerge",
        "recipe": "Handle Recipe Report attach list_recipes load_recipe",
        "io": "Inspection hot_swap inspect load load_foreign save save_foreign",
        "fitting": "Budget Extraction Fit TangentSpace Truncation budget extract fit tangent_space truncate",
        "draw": "draw_network",
        "searching": "Search search search_report",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name in ("starts", "testing"):  # as `numpy.testing` is there without an import of its own
        return importlib.import_module(f"tnpeft.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'tnpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tnpeft.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
