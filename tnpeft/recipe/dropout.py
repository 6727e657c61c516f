"""`dropout` in files and in `attach`: a probability for each kind of dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from tnpeft.errors import Problem, clip, near_miss, ticked
from tnpeft.network.dropout import Dropout

__all__ = ["dropout_advice", "dropout_of"]

_KNOWN = tuple(each.name for each in fields(Dropout))
_EXAMPLE = "For example `dropout: {input: 0.05, bond: 0.1, module: 0.0}`."
_MEANT = {
    "input": ("lora_dropout", "dropout", "p", "x", "inputs", "network_dropout"),
    "bond": ("rank_dropout", "rank", "bonds", "ranks", "tensor", "proba"),
    "module": ("module_dropout", "layer", "modules", "drop_path"),
}


def dropout_of(given: object) -> tuple[Dropout | None, list[tuple[tuple[str, ...], Problem]]]:
    """The dropout that is given, or None; and its problems, each with the keys under which it stands."""
    if given is None or isinstance(given, Dropout):
        return given or None, []
    told: list[tuple[tuple[str, ...], Problem]] = []
    if not isinstance(given, Mapping):
        fix = _EXAMPLE
        if isinstance(given, int | float) and not isinstance(given, bool):
            fix = f"Say of what: `{{'input': {given}}}` is PEFT's `lora_dropout`, `bond` LyCORIS's `rank_dropout`."
        told.append(((), Problem("`dropout`", "what is dropped, with probabilities", clip(given), fix)))
        return None, told
    values: dict[str, float] = {}
    for key, value in given.items():
        if key not in _KNOWN:
            fix = dropout_advice(str(key), None) or near_miss(str(key), _KNOWN) or _EXAMPLE
            told.append(((str(key),), Problem("`dropout`", f"some of {', '.join(_KNOWN)}", ticked(str(key)), fix)))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            fix = "Write how likely an entry is to be dropped, such as 0.1."
            if type(value) is not bool and value == 1:
                fix = "Where everything is dropped nothing trains: leave the layers out, or write less than 1."
            told.append(((key,), Problem(f"`dropout`, `{key}`", "a probability below 1", clip(value), fix)))
        else:
            values[key] = float(value)
    return (None if told else Dropout.of(values)), told


def dropout_advice(key: str, value: object) -> str:
    """What to write for another library's key, inside `dropout` (no value) or in its place; empty for other keys."""
    meant = next((name for name, words in _MEANT.items() if key.casefold() in words), None)
    if meant is None or isinstance(value, bool):
        return ""
    if value is None:
        return f"Did you mean `{meant}`?"
    return f"Write `dropout: {{{meant}: {value:g}}}`." if isinstance(value, int | float) else ""
