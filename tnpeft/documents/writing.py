"""Plain data as YAML text that `read_document` reads back to the same data."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from typing import Any

from tnpeft.documents.nodes import MAX_DEPTH
from tnpeft.errors import Problem, SpecError, clip

__all__ = ["as_yaml"]

_PLAIN = re.compile(r"[A-Za-z(](?:[A-Za-z0-9_.+*/()-]| (?! ))*")
_WORDS = re.compile(r"(?i:null|true|false)|.*\s|\.+.*")
_ESCAPES = {'"': '\\"', "\\": "\\\\"}


def as_yaml(data: Mapping[str, Any], what: str = "Spec.build") -> str:
    """YAML text of a mapping: a line for each key, and for each entry of a mapping or list of mappings below it.

    Data are texts, numbers, booleans, None, lists and mappings. Raises SpecError for anything else, in the name `what`.
    """
    lines: list[str] = []
    for key, value in data.items():
        name, owner = _scalar(key, what), f"{what}, `{key}`"
        if isinstance(value, Mapping) and value and any(isinstance(item, Mapping) for item in value.values()):
            lines.append(f"{name}:")
            lines += [f"  {_scalar(inner, owner)}: {_flow(item, owner)}" for inner, item in value.items()]
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            lines.append(f"{name}:")
            lines += [f"  - {_flow(item, owner)}" for item in value]
        else:
            lines.append(f"{name}: {_flow(value, owner)}")
    return "".join(f"{line}\n" for line in lines)


def _flow(value: Any, what: str, depth: int = 1) -> str:
    """A value in one line."""
    if depth > MAX_DEPTH:
        raise SpecError(Problem(what, f"at most {MAX_DEPTH} levels", "more", "Write it flat."))
    if isinstance(value, Mapping):
        pairs = (f"{_scalar(key, what)}: {_flow(item, what, depth + 1)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_flow(item, what, depth + 1) for item in value)}]"
    return _scalar(value, what)


def _scalar(value: Any, what: str) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and not _WORDS.fullmatch(value) else _quoted(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text := repr(float(value)), text)
    fix = "Give it as a text, as a file would have it."
    raise SpecError(Problem(what, "texts, numbers, lists and mappings", clip(value), fix))


def _quoted(text: str) -> str:
    inside = (_ESCAPES.get(char) or (char if " " <= char <= "~" else f"\\U{ord(char):08X}") for char in text)
    return f'"{"".join(inside)}"'
