"""What narrows an entry's layers (`exclude`, `kinds`, `layers`), and params of some layers (`ranks`).

Files and `attach` take the same. A problem comes with the keys under which its value stands.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tnpeft.errors import Problem, SpecError, clip, near_miss, ticked
from tnpeft.network import Spec, param_problems
from tnpeft.spec.reader import SHORT_KINDS

__all__ = ["ALL", "SPANS", "Selection", "Span", "block_of", "compiled", "first_block", "in_spans", "selection_of"]

ALL = "all"
"""What `match` says for every layer of the spec's kinds."""

Span = tuple[int, int | None]
"""Numbers of blocks: the first and the last, None where there is no last."""

Told = Iterator[tuple[tuple[str, ...], Problem]]

_SPAN = re.compile(r"([0-9]{1,6})(?:\s*(-)\s*([0-9]{1,6})?)?")
SPANS = r"^\s*[0-9]+(\s*-\s*[0-9]*)?(\s*,\s*[0-9]+(\s*-\s*[0-9]*)?)*\s*$"
"""A regular expression for the texts that `layers` takes, for editors."""

_BLOCKS = "numbers of blocks"
_BLOCKS_FIX = "For example `0-5, 8`, or `{decoder.layers: 0-5}` of one of several lists."


@dataclass(frozen=True)
class Selection:
    """What narrows an entry's `match`, and the params that some of its layers get.

    `exclude` is a regular expression or names, of layers or of what holds them. `kinds` are the spec's kinds that are
    adapted, all if empty. `blocks` has numbers of blocks by the name of their list, or its end; `""` stands for the
    only list. `ranks` has params by regular expressions: for each param, the first expression that finds a layer
    counts.
    """

    exclude: str | tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ()
    blocks: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    ranks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def params_at(self, layer: str) -> dict[str, Any]:
        """The params that `ranks` has for a layer."""
        found: dict[str, Any] = {}
        for pattern, params in self.ranks.items():
            if compiled(pattern).search(layer):
                found = {**params, **found}
        return found


@lru_cache(maxsize=256)
def compiled(pattern: str) -> re.Pattern[str]:
    """The compiled regular expression. Raises SpecError, which says where it is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set": it means what it always meant
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        fix = r"A dot of a module's name is written `\.`." if pattern.strip("*. ") else f"Write `{ALL}` for all layers."
        problem = Problem(f"pattern {clip(pattern)}", "a regular expression", clip(str(error))[1:-1], fix)
        raise SpecError(problem) from None


def selection_of(
    given: Mapping[str, Any], spec: Spec | None, also: tuple[str, ...] = ()
) -> tuple[Selection, list[tuple[tuple[str, ...], Problem]]]:
    """The selection that `exclude`, `kinds`, `layers` and `ranks` give, and what is wrong with them.

    Without a `spec`, kinds and params are not checked. `also` are names that may stand beside params.
    """
    known = {key: value for key, value in given.items() if value is not None}
    told: list[tuple[tuple[str, ...], Problem]] = [
        *_exclude_problems(known.get("exclude", "")),
        *_kind_problems(known.get("kinds", ()), spec),
        *_rank_problems(known.get("ranks", {}), spec, also),
    ]
    blocks: dict[str, tuple[Span, ...]] = {}
    if "layers" in known:
        told += _read_blocks(known["layers"], blocks)
    if told:
        return Selection(), told
    exclude, kinds = known.get("exclude"), known.get("kinds", ())
    words = (kinds,) if isinstance(kinds, str) else kinds
    meant = {kind for word in words for kind in SHORT_KINDS.get(word, (word,))}
    return Selection(
        exclude if exclude is None or isinstance(exclude, str) else tuple(exclude),
        tuple(kind for kind in (spec.layers if spec is not None else ()) if kind in meant),
        blocks,
        {pattern: dict(params) for pattern, params in known.get("ranks", {}).items()},
    ), []


def _texts(value: object) -> list[str] | None:
    """A tuple of texts, none of them empty; None for anything else."""
    texts = list(value) if isinstance(value, list | tuple | set | frozenset) else []
    return texts if texts and all(isinstance(text, str) and text for text in texts) else None


def _exclude_problems(exclude: object) -> Told:
    if isinstance(exclude, str):
        yield from _pattern_problems(exclude, ("exclude",))
    elif _texts(exclude) is None:
        fix = "For example `exclude: 'lm_head$'`."
        yield ("exclude",), Problem("`exclude`", "a regular expression or names", clip(exclude), fix)


def _pattern_problems(pattern: str, path: tuple[str, ...]) -> Told:
    try:
        compiled(pattern)
    except SpecError as error:
        yield path, error.problems[0]


def _kind_problems(kinds: object, spec: Spec | None) -> Told:
    words = [kinds] if isinstance(kinds, str) else _texts(kinds)
    if kinds == ():
        return
    if words is None:
        yield ("kinds",), Problem("`kinds`", "kinds of layers", clip(kinds), "For example `kinds: Linear`.")
        return
    if spec is None:
        return
    for word in words:
        if set(spec.layers).isdisjoint(SHORT_KINDS.get(word, (word,))):
            expected = f"one of those that '{spec.name}' takes, {', '.join(spec.layers)}"
            fix = near_miss(word, spec.layers) or "Choose one of them, or another spec."
            yield ("kinds",), Problem("`kinds`", expected, ticked(word), fix)


def _rank_problems(ranks: object, spec: Spec | None, also: tuple[str, ...]) -> Told:
    if not isinstance(ranks, Mapping):
        fix = "For example `ranks: {'q_proj$': {r: 8}}`."
        yield ("ranks",), Problem("`ranks`", "params by regular expressions on layers' names", clip(ranks), fix)
        return
    for pattern, params in ranks.items():
        if not isinstance(pattern, str) or not isinstance(params, Mapping) or not params:
            found = f"{clip(pattern)}: {clip(params)}"
            fix = "For example `ranks: {'q_proj$': {r: 8}}`."
            yield ("ranks",), Problem("`ranks`", "params by regular expressions on layers' names", found, fix)
            continue
        yield from _pattern_problems(pattern, ("ranks", pattern))
        for problem in param_problems(spec, params, also) if spec is not None else ():
            yield ("ranks", pattern), problem


def _read_blocks(value: object, found: dict[str, tuple[Span, ...]]) -> Told:
    """Put the numbers of blocks in `layers` into `found`."""
    lists = value if isinstance(value, Mapping) else {"": value}
    if not lists or not all(isinstance(name, str) for name in lists):
        yield ("layers",), Problem("`layers`", f"{_BLOCKS} by the names of their lists", clip(value), _BLOCKS_FIX)
        return
    for name, numbers in lists.items():
        path = ("layers", name) if isinstance(value, Mapping) else ("layers",)
        spans, odd = _spans(numbers)
        if odd is not None:
            yield path, Problem("`layers`", _BLOCKS, odd, _BLOCKS_FIX)
        found[name.strip(".")] = tuple(spans)


def _spans(value: object) -> tuple[list[Span], str | None]:
    """The spans of numbers in a text, a number, a list or a range, or the part that is none."""
    if isinstance(value, str):
        words = value.split(",")
        matches = [_SPAN.fullmatch(word.strip()) for word in words]
        spans = [_span(match) for match in matches if match is not None]
        odd = next((word.strip() for word, match in zip(words, matches, strict=True) if match is None), None)
        backwards = next((span for span in spans if span[1] is not None and span[1] < span[0]), None)
        if odd is None and backwards is not None:
            return spans, f"`{backwards[0]}-{backwards[1]}`, which goes backwards"
        return spans, None if odd is None else ticked(odd)
    numbers: list[Any] = list(value) if isinstance(value, list | tuple | range | set | frozenset) else [value]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        return [], clip(value)
    return [(number, number) for number in numbers], None


def _span(match: re.Match[str]) -> Span:
    first, to, last = match.groups()
    return (int(first), int(first)) if to is None else (int(first), None if last is None else int(last))


def in_spans(number: int, spans: tuple[Span, ...]) -> bool:
    return any(first <= number and (last is None or number <= last) for first, last in spans)


def first_block(layer: str) -> tuple[str, int] | None:
    """The outermost numbered block that holds a layer, or is it: the name of its list, and its number."""
    parts = layer.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))


def block_of(layer: str, blocks: str) -> tuple[str, int] | None:
    """The outermost block that holds a layer, of a list whose name is or ends with `blocks`; see `first_block`."""
    found = re.search(rf"(?:^|\.){re.escape(blocks)}\.(\d+)(?=\.|$)", layer)
    return None if found is None else (layer[: found.start(1) - 1], int(found[1]))
