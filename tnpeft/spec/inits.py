"""Initial distributions: their names, their arguments, and those that users register."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problem, Problems, SpecError, clip, near_miss, ticked
from tnpeft.spec.expression import Expression, ExpressionError, is_name, parse_expression, split_at_commas
from tnpeft.spec.pattern import ELLIPSIS, expand

__all__ = [
    "DEFAULT_INIT",
    "INDEX_INITS",
    "SINGULAR_INITS",
    "Entry",
    "Init",
    "Last",
    "Legs",
    "init_function",
    "init_names",
    "parse_init",
    "register_init",
    "registered_inits",
]

# Factors of the base weight U S V^T from its singular value number `skip` on; `us`: times the root of S.
SINGULAR_INITS = ("svd_u", "svd_s", "svd_v", "svd_us", "svd_vs")
_BUILT_IN: dict[str, tuple[str, ...]] = {  # name → arguments in order
    "zeros": (),
    "ones": (),
    "eye": (),
    "constant": ("value",),
    "normal": ("std",),
    "uniform": ("bound",),
    "kaiming_uniform": ("fan", "gain"),
    "orthogonal": ("gain",),
    "cosine": ("draw",),
    "sine": ("draw",),
    **dict.fromkeys(SINGULAR_INITS, ("skip",)),
    "value": ("core",),
    "choice": ("legs",),
    "random": ("legs",),
    "largest": ("legs",),
    "smallest": ("legs",),
    "entries": ("entry",),
    "places": ("entry",),
}
# Whole numbers, for a map's `at=`: flat places without repeat, numbers below a leg's size, places by |weight|, by rule.
INDEX_INITS = ("choice", "random", "largest", "smallest", "places")
_RANDOM = ("normal", "uniform", "kaiming_uniform")
_BUILT_IN.update((name, (*_BUILT_IN[name], "same")) for name in _RANDOM)
_OPTIONAL = {"gain": "1", "std": "1", "bound": "1", "skip": "0"}
_NOT_NEEDED = (*_OPTIONAL, "fan", "same")
_GAINS = {"linear": 1.0, "relu": math.sqrt(2.0), "tanh": 5.0 / 3.0, "sigmoid": 1.0, "selu": 0.75}

InitFunction = Callable[..., Any]
_registered: dict[str, InitFunction] = {}


@dataclass(frozen=True)
class Legs:
    """Legs in an argument: for `fan=[i, k...]` the product of their sizes, for `same=[q]`, `choice(o i)` themselves."""

    legs: tuple[str, ...]


@dataclass(frozen=True)
class Last:
    """`fan=last(n)`: the product of the core's last n legs' sizes."""

    count: int


@dataclass(frozen=True)
class Entry:
    """`entries(x - y)`: each entry by its position. The core's legs stand for the position, other names for numbers."""

    expression: Expression


@dataclass(frozen=True)
class Init:
    """An init as a file writes it; `arguments` are worked out when the layer is known."""

    name: str
    arguments: Mapping[str, Expression | Legs | Last | Entry | str]
    text: str
    position: Position | None = None

    def expressions(self) -> Iterator[tuple[str, Expression]]:
        """The arguments that are expressions, by name."""
        return ((key, value) for key, value in self.arguments.items() if isinstance(value, Expression))

    def legs_of_fan(self, legs: Sequence[str], spatial: int) -> tuple[str, ...] | None:
        """The legs whose sizes multiply to the fan, or None where `fan` is an expression."""
        fan = self.arguments.get("fan")
        if isinstance(fan, Legs):
            return expand(fan.legs, spatial)
        if isinstance(fan, Last):
            return tuple(legs[-fan.count :])
        return None

    @property
    def entry(self) -> Expression | None:
        """The rule that gives each entry by its position, or None for other inits."""
        entry = self.arguments.get("entry")
        return entry.expression if isinstance(entry, Entry) else None

    @property
    def names_legs(self) -> bool:
        """Whether it names legs other than for the product of their sizes."""
        return self.name in INDEX_INITS or "same" in self.arguments

    def __str__(self) -> str:
        return self.text


# What `torch.nn` layers do with a weight of the core's shape: uniform within 1 / sqrt(fan).
DEFAULT_INIT = Init(
    "kaiming_uniform",
    {"gain": parse_expression("1 / sqrt(3)")},
    "kaiming_uniform(fan=product of the legs after the first, gain=1/sqrt(3))",
)


def register_init(name: str, function: InitFunction) -> None:
    """Make `name` an init of the language: `function(shape, generator, **arguments) -> Tensor`.

    `shape` is the core's shape as a tuple, `generator` a CPU `torch.Generator` of the core's own. The function's
    further parameters are arguments that a spec may pass. Raises SpecError for a name that is built in or no ASCII
    word, and for a function that cannot be called with these.
    """
    if not isinstance(name, str) or not is_name(name) or name in _BUILT_IN:
        fix = "Choose another name."
        raise SpecError(Problem("register_init", "a new ASCII word", clip(name), fix))
    fix = "Pass `function(shape, generator, **arguments) -> Tensor`."
    if not callable(function):
        raise SpecError(Problem(f"register_init '{name}'", "a function", clip(function), fix))
    if not _takes_two(function):
        expected = "a function of a shape and a generator"
        raise SpecError(Problem(f"register_init '{name}'", expected, "one that cannot be called so", fix))
    _registered[name] = function


def _takes_two(function: InitFunction) -> bool:
    """Whether a function takes a shape and a generator, and has a signature that names its other parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return False
    places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(places) >= 2 or any(one.kind is one.VAR_POSITIONAL for one in parameters)


def init_function(name: str) -> InitFunction | None:
    """The function registered under `name`, or None for built-in inits."""
    return _registered.get(name)


def registered_inits() -> tuple[tuple[str, InitFunction], ...]:
    """All registered inits: what a spec means depends on them."""
    return tuple(_registered.items())


def init_names() -> tuple[str, ...]:
    """Every init a spec may name."""
    return (*_BUILT_IN, *_registered)


def _arguments(name: str) -> dict[str, bool]:
    """The arguments of an init besides shape and generator, each with whether it is required; none if it is unknown."""
    if name in _BUILT_IN:
        return {key: key not in _NOT_NEEDED for key in _BUILT_IN[name]}
    if name not in _registered:
        return {}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [*inspect.signature(_registered[name]).parameters.values()][2:]
    return {each.name: each.default is each.empty and each.kind not in variadic for each in parameters}


def parse_init(node: Node, problems: Problems, known: bool = True) -> Init | None:
    """`name` or `name(argument, key=argument)`; None, with the reason reported, where it is neither.

    If it need not be `known`, an unregistered name with any arguments is accepted.
    """
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", node.text, re.ASCII | re.DOTALL)
    if match is None:
        fix = "For example `kaiming_uniform(fan=last(2), gain=relu)`."
        problems.add(node.position, "init", "a name with arguments in parentheses", clip(node.text), fix)
        return None
    name = match.group(1)
    if name not in init_names() and known:
        fix = near_miss(name, init_names()) or "Use one of them, or register yours with `tnpeft.register_init`."
        problems.add(
            node.position, f"unknown init '{clip(name)[1:-1]}'", f"one of {', '.join(init_names())}", ticked(name), fix
        )
        return None
    given = _bind_arguments(
        name, split_at_commas(match.group(2) or ""), node, problems if known or name in _BUILT_IN else None
    )
    parsed: dict[str, Expression | Legs | Last | Entry | str] = {}
    for key, text in given.items():
        value = _parse_argument(key, text, node, problems)
        if value is None:
            return None
        parsed[key] = value
    for key in _BUILT_IN.get(name, ()):
        if key in _OPTIONAL and key not in parsed:
            parsed[key] = parse_expression(_OPTIONAL[key])
    missing = [key for key, required in _arguments(name).items() if required and key not in parsed]
    if missing and (known or name in _BUILT_IN):
        problems.add(
            node.position, f"init `{name}`", f"`{missing[0]}`", "it missing", f"Write `{name}({missing[0]}=...)`."
        )
        return None
    return Init(name, parsed, node.text.strip(), node.position)


def _bind_arguments(name: str, parts: list[str], node: Node, problems: Problems | None) -> dict[str, str]:
    """The text of each argument by its name; without `problems`, unknown arguments are accepted too."""
    known = tuple(_arguments(name))
    given: dict[str, str] = {}
    for place, part in enumerate(parts):
        match = re.match(r"([A-Za-z_]\w*)\s*=(?!=)\s*(.*)", part, re.ASCII | re.DOTALL)
        key, text = match.groups() if match else (known[place] if place < len(known) else "", part)
        if problems is None:
            given[key or str(place)] = text
        elif key not in known or key in given:
            expected = " and ".join(f"`{word}`" for word in known) or "no arguments"
            fix = near_miss(key, known) or "Remove it."
            problems.add(node.position, f"init `{name}`", expected, clip(part), fix)
        else:
            given[key] = text
    return given


def _parse_argument(
    key: str, text: str, node: Node, problems: Problems
) -> Expression | Legs | Last | Entry | str | None:
    if key == "core":
        return text
    if key in ("legs", "same"):
        return Legs(tuple(re.findall(r"[^\s,]+", text.strip("[] "))))
    if key == "fan":
        if match := re.fullmatch(r"last\(\s*([1-9]\d{0,2})\s*\)", text):
            return Last(int(match.group(1)))
        if match := re.fullmatch(r"\[(.*)\]", text, re.DOTALL):
            words = tuple(re.split(r"[\s,]+", match.group(1).strip()))
            return Legs(words)
        if ELLIPSIS in text.split():
            return Legs(tuple(text.split()))
        text = re.sub(r"\bk\.\.\.", "prod(kernel_size)", text)
    if key == "gain" and text in _GAINS:
        text = repr(_GAINS[text])
    try:
        return Entry(parse_expression(text, positions=True)) if key == "entry" else parse_expression(text)
    except ExpressionError as error:
        fix = f"Gains are {', '.join(_GAINS)} or a number." if key == "gain" else error.fix
        problems.add(node.position, f"`{key}` of init", error.expected, error.found, fix)
        return None
