"""Channel counts that do not factor, and the padding that helps."""

from __future__ import annotations

import ast
import math

from tnpeft.errors import TnpeftError
from tnpeft.network.model import Network
from tnpeft.network.spec import Spec
from tnpeft.spec.declaration import SizeRule
from tnpeft.spec.factorize import factorize, times

__all__ = ["factor_notes"]

SMALLEST = 5  # counts below it are their own best factors


def factor_notes(network: Network) -> tuple[str, ...]:
    """A sentence for each count of which all factors but one are 1, if padding gives better ones on this layer."""
    return tuple(note for rule in network.spec.sizes if (note := _note(network, rule)) is not None)


def _note(network: Network, rule: SizeRule) -> str | None:
    sizes = [network.sizes.get(name, 0) for name in rule.names]
    count = math.prod(sizes)
    if not _factorises(rule) or count < SMALLEST or max(sizes) != count:
        return None
    padded = factorize(count, len(sizes), pad=True)
    call = f"{rule.expression.text[:-1]}, pad=true)"
    mended = _mended(network, rule, call) if sum(padded) < sum(sizes) else None
    if mended is None or mended.num_parameters >= network.num_parameters:
        return None
    why = "is prime" if all(count % divisor for divisor in range(2, math.isqrt(count) + 1)) else "does not factor"
    names = " ".join(rule.names)
    return (
        f"{count} {why}: {names} are {times(sizes)}. With `{names}: {call}` they are "
        f"{times([mended.sizes[name] for name in rule.names])}, and {mended.num_parameters:,} parameters train "
        f"instead of {network.num_parameters:,}."
    )


def _factorises(rule: SizeRule) -> bool:
    """Whether several indices are an unpadded `factorize(...)`."""
    tree = rule.expression.tree
    called = isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "factorize"
    return called and len(rule.names) > 1 and not rule.expression.pads


def _mended(network: Network, rule: SizeRule, call: str) -> Network | None:
    """The network with the padded rule; None if the spec cannot have it."""
    spec, line = network.spec, rule.node.position.line - 1
    lines = spec.text.splitlines(keepends=True)
    if lines[line].count(rule.expression.text) != 1:
        return None
    lines[line] = lines[line].replace(rule.expression.text, call)
    try:
        return Spec.from_yaml("".join(lines), spec.file, spec.tables).bind(network.layer, **network.params)
    except TnpeftError:
        return None
