"""The shape of a spec file: which keys stand where with which types, checked by pydantic.

pydantic says *where* a value is wrong; the sentence about it comes from the tables here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tnpeft.errors import Position, near_miss
from tnpeft.spec.document import Node, Problems, clip

__all__ = ["LATER", "check_shape"]

Scalar = int | float | str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CoreFile(_File):
    legs: str
    init: str | None = None
    frozen: bool = False


class SpecFile(_File):
    tnpeft: Literal[1]
    name: str
    title: str = ""
    source: str = ""
    layers: str | list[str]
    params: dict[str, Scalar] = {}
    bond: int | str | None = None
    sizes: dict[str, Scalar | list[Scalar]] = {}
    factors: str | dict[int, list[int]] | None = None
    init: str | None = None
    cores: dict[str, str | CoreFile]
    weight: str
    scale: Scalar = 1
    start: Literal["zero", "frozen_copy"]
    seed: int = 0


LATER = {
    "terms": "Sums of networks are not part of this version; write one network with one `weight`.",
    "shared": "Cores shared between layers are not part of this version; give each layer its own.",
    "from": "Cores read from the base weight are not part of this version; give the core an init.",
}

_EXPECTED = {  # key → what should stand there, how to mend it
    "tnpeft": ("the language version 1", "Write `tnpeft: 1`."),
    "name": ("a word", "Write `name: my_adapter`; quote it if it looks like a number."),
    "title": ("a text", "Quote it."),
    "source": ("a text", "Quote it."),
    "layers": ("a layer kind or a list of them", "For example `layers: [Linear, Conv3d]`, or `any`."),
    "params": ("names with numbers", "For example `params: {r: 4, alpha: r}`."),
    "bond": ("a size", "For example `bond: r`."),
    "sizes": ("indices with sizes", "For example `sizes: {o: out_channels, i: in_channels}`."),
    "factors": ("a table's name, or numbers with their factors", "For example `factors: {32: [4, 4, 2]}`."),
    "init": ("an init", "For example `init: normal(0.02)`."),
    "cores": ("names with legs", "For example `cores: {up: o r, down: r i}`."),
    "weight": ("a pattern of open legs", "For example `weight: o i k...`."),
    "scale": ("a number or an expression", "For example `scale: alpha / r`."),
    "start": ("`zero` or `frozen_copy`", "Write `start: zero` where one core is zeros, else `start: frozen_copy`."),
    "seed": ("a whole number", "For example `seed: 0`."),
    "legs": ("the core's indices", 'For example `legs: o r`; `legs: ""` is a scalar.'),
    "frozen": ("`true` or `false`", "Write `frozen: true` for a core that is not trained."),
}


def check_shape(root: Node, problems: Problems, model: type[BaseModel] = SpecFile) -> set[tuple[str | int, ...]]:
    """Report what does not fit `model`; returns the paths of the parts that cannot be used."""
    if root.kind != "mapping":
        fix = "A spec is `key: value` lines, the first one `tnpeft: 1`."
        problems.add(root.position, "the file", "a mapping", root.describe(), fix)
        problems.raise_if_any()
    broken: set[tuple[str | int, ...]] = set()
    try:
        model.model_validate(root.plain())
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            path, node = _follow(root, detail["loc"])
            if path in broken:
                continue
            broken.add(path)
            _report(root, path, node, detail, problems)
    return broken


def _follow(root: Node, loc: tuple[str | int, ...]) -> tuple[tuple[str | int, ...], Node | None]:
    """The part of pydantic's `loc` that exists in the file; the tags of union members are left out."""
    path: list[str | int] = []
    node: Node | None = root
    for step in loc:
        below = node.get(step) if node is not None else None
        if below is not None:
            path.append(step)
            node = below
        elif step == "[key]":
            break
    last = loc[-1] if loc else ""
    if (
        isinstance(last, str)
        and last in _KEYS
        and node is not None
        and node.kind == "mapping"
        and (not path or path[-1] != last)
    ):
        return (*path, last), None
    return tuple(path), node


_KEYS = {*SpecFile.model_fields, *CoreFile.model_fields, *LATER}


def _report(root: Node, path: tuple[str | int, ...], node: Node | None, detail: Any, problems: Problems) -> None:
    key = next((str(step) for step in reversed(path) if step in _EXPECTED), str(path[-1]) if path else "")
    parent = root
    for step in path[:-1]:
        parent = parent.get(step) or parent
    core = str(path[1]) if len(path) > 1 and path[0] == "cores" else None
    owner = f"core '{clip(core)[1:-1]}'" if core else "the file"
    if node is None:  # a key that must be there
        if detail["type"] == "missing":
            expected, fix = _EXPECTED.get(key, ("it", "Add it."))
            where = parent.position
            problems.add(where, f"{owner} has no `{key}`", expected, "nothing", fix, core=core)
        return
    if detail["type"] == "extra_forbidden":
        _unknown_key(parent, path, node, owner, core, problems)
        return
    if core and len(path) == 2:
        expected, fix = (
            "its legs, or a mapping with `legs`",
            "For example `up: o r`, or `up: {legs: o r, init: zeros}`.",
        )
        problems.add(node.position, owner, expected, node.describe(), fix, core=core)
        return
    if len(path) > 1 and path[0] in ("params", "sizes"):
        key = str(path[0])
        expected = "a number or an expression"
        problems.add(node.position, f"`{key}`, {clip(path[1])}", expected, node.describe(), _EXPECTED[key][1])
        return
    expected, fix = _EXPECTED.get(key, ("another value", "Change it."))
    if key == "tnpeft" and isinstance(node.value, int) and node.value > 1:
        fix = "This file needs a newer tnpeft: upgrade it, or write `tnpeft: 1`."
    what = f"{owner}, `{key}`" if core else f"`{key}`"
    problems.add(node.position, what, expected, node.describe(), fix, core=core)


def _unknown_key(
    parent: Node, path: tuple[str | int, ...], node: Node, owner: str, core: str | None, problems: Problems
) -> None:
    key = str(path[-1])
    where = _key_position(parent, key)
    if key in LATER:
        problems.add(where, f"`{key}`", "a construct of this version", f"`{key}`", LATER[key], core=core)
        return
    if key.rstrip().endswith(")") and node.value is None:
        fix = 'A comma ends a value inside `{...}`: quote this, `init: "normal(std=1, ...)"`.'
        problems.add(
            where, f"{owner}, key {clip(key)}", "a quoted value", "the rest of one that a comma split", fix, core=core
        )
        return
    known = sorted((CoreFile if core else SpecFile).model_fields)
    fix = near_miss(key, known) or "Remove it."
    problems.add(where, f"unknown key {clip(key)} in {owner}", f"one of {', '.join(known)}", clip(key), fix, core=core)


def _key_position(parent: Node, key: str) -> Position:
    for name, _ in parent.items():
        if str(name.value) == key:
            return name.position
    return parent.position
