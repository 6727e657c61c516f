"""Which of the layers that an entry's `match` finds remain: without `exclude`, of `kinds`, in numbered `layers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tnpeft.errors import Problem, clip, listed, near_miss, ticked
from tnpeft.network.look_alikes import opaque
from tnpeft.network.signature import kind_of
from tnpeft.recipe.model import Entry
from tnpeft.recipe.selection import Span, block_of, compiled, first_block, in_spans
from tnpeft.surgery import plain_name

__all__ = ["kinds_of", "narrowed", "rank_problems"]


def kinds_of(entry: Entry) -> tuple[str, ...]:
    """The kinds of the layers that an entry takes."""
    return entry.selection.kinds or entry.spec.layers


def narrowed(
    entry: Entry, names: Sequence[str], modules: Mapping[str, nn.Module], problems: list[Problem]
) -> list[str]:
    """The names that the entry's selection leaves, in their order; a part of it without effect is a problem."""
    selection, told = entry.selection, len(problems)
    left = list(names)
    if selection.exclude is not None and names:
        gone = _excluded(entry, left, modules, problems)
        left = [name for name in left if name not in gone]
    if selection.kinds:
        kinds = kinds_of(entry)
        # Parameters are of no kind.
        left = [name for name in left if name not in modules or _is_of(modules[name], kinds)]
    if selection.blocks and left:
        left = _in_blocks(entry, left, modules, problems)
    if names and not left and len(problems) == told:
        keys = {"exclude": selection.exclude is not None, "kinds": selection.kinds, "layers": selection.blocks}
        said = " and ".join(f"`{key}`" for key, given in keys.items() if given)
        found = f"none: {said} leave{'s' * (' and ' not in said)} out all {len(names)} that are matched"
        problems.append(_problem(entry, "at least one layer", found, "Leave out less."))
    return left


def _is_of(layer: nn.Module, kinds: Sequence[str]) -> bool:
    kind: type = type(layer)
    return kind_of(layer) in kinds or opaque(kind) is not None


def rank_problems(entry: Entry, layers: Sequence[str]) -> Iterable[Problem]:
    """The patterns of `ranks` that find none of the entry's layers."""
    for pattern in entry.selection.ranks:
        if layers and not any(compiled(pattern).search(name) for name in layers):
            fix = _near(pattern, layers) or f"The entry has {listed(layers)}."
            yield _problem(entry, "at least one of its layers", "none", fix, f"`ranks` {clip(pattern)}")


def _problem(entry: Entry, expected: str, found: str, fix: str, what: str | None = None) -> Problem:
    return Problem(what or f"spec '{entry.spec.name}', match {clip(entry.match)}", expected, found, fix, entry.where)


def _near(pattern: str, names: Iterable[str]) -> str:
    """A name, or a part of one, that may have been meant."""
    plain, names = pattern.replace("\\", "").strip("^$"), list(names)
    return near_miss(plain, names) or near_miss(plain, {part for name in names for part in name.split(".")})


def _excluded(entry: Entry, names: list[str], modules: Mapping[str, nn.Module], problems: list[Problem]) -> set[str]:
    """The names that `exclude` finds: by its pattern, or by the names of layers or of modules that hold them."""
    exclude = entry.selection.exclude
    if isinstance(exclude, str):
        parts = {exclude: {name for name in names if compiled(exclude).search(name)}}
    else:
        parts = {}
        for given in exclude or ():
            owner = given if given in modules else plain_name(given)
            parts[given] = {name for name in names if name == owner or name.startswith(f"{owner}.")}
    for given, gone in parts.items():
        if not gone:
            fix = _near(given, names) or f"`match` finds {listed(names)}."
            problems.append(
                _problem(entry, "at least one of the layers matched", "none", fix, f"`exclude` {clip(given)}")
            )
    return set().union(*parts.values())


def _in_blocks(entry: Entry, names: list[str], modules: Mapping[str, nn.Module], problems: list[Problem]) -> list[str]:
    """The names in the numbered blocks that `layers` gives."""
    kept: set[str] = set()
    for blocks, spans in entry.selection.blocks.items():
        places = {name: block_of(name, blocks) if blocks else first_block(name) for name in names}
        found = {name: place for name, place in places.items() if place is not None}
        lists = list(dict.fromkeys(place[0] for place in found.values()))
        what = "`layers`" if not blocks else f"`layers` of {ticked(blocks)}"
        if not blocks and len(lists) > 1:
            fix = f"Say of which, for example `layers: {{{lists[0]}: {_in_words(spans)}}}`."
            problems.append(_problem(entry, "blocks of one list", f"those of {listed(lists)}", fix, what))
        elif not found:
            known = dict.fromkeys(place[0] for place in map(first_block, names) if place is not None)
            fix = near_miss(blocks, [*known, *(name.rpartition(".")[2] for name in known)])
            fix = fix or (f"The layers lie in {listed([*known])}." if known else "Leave `layers` out.")
            problems.append(_problem(entry, "layers that lie in numbered blocks", "none", fix, what))
        else:
            last = max(number for each in lists for number in _numbers(each, modules))
            beyond = max(to if to is not None else first for first, to in spans)
            if beyond > last:
                fix = f"The last one is {last}."
                problems.append(_problem(entry, f"blocks from 0 to {last}", f"{beyond}", fix, what))
        kept |= {name for name, place in found.items() if in_spans(place[1], spans)}
    return [name for name in names if name in kept]


def _numbers(blocks: str, modules: Mapping[str, nn.Module]) -> list[int]:
    """The numbers of the blocks of a list."""
    start = f"{blocks}." if blocks else ""
    names = (name.removeprefix(start) for name in modules if name.startswith(start))
    return [int(name) for name in names if name.isdecimal()]


def _in_words(spans: Sequence[Span]) -> str:
    return ", ".join(
        str(first) if first == last else f"{first}-{'' if last is None else last}" for first, last in spans
    )
