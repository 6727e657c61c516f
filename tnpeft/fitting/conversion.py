"""Torch files: the state dict in one, or the line of Python that turns another into safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tnpeft.io.foreign.archive import LOAD_ERRORS, archive_problem, load_archive
from tnpeft.io.foreign.source import tensor_problem

__all__ = ["how_to_convert", "state_dict_of"]

_ENDING = ".safetensors"
_DEEPEST = 8  # mappings in mappings
_LONGEST = 100  # characters of a place


def state_dict_of(path: Path) -> Mapping[str, Tensor] | None:
    """The tensors of a file that holds a state dict and nothing else, with each tensor whole; None for other files."""
    content = _content(path)
    if not isinstance(content, Mapping) or not content:
        return None
    plain = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    return content if plain and not any(map(tensor_problem, content.values())) else None


def how_to_convert(path: Path) -> str:
    """The advice for a zip file of `torch.save` with one or several state dicts; no code is run."""
    places = sorted(_places(_content(path)), key=lambda place: -place[1])
    target = path.with_suffix(_ENDING).name
    misnamed = path.suffix == _ENDING  # torch reads a path by its ending
    name = path.with_suffix(".pt").name if misnamed else path.name
    if not places:
        return f"Load its state dict and write it with `safetensors.torch.save_file(state_dict, {target!r})`."
    where, most, alone = places[0]
    only = "" if alone else " if isinstance(v, torch.Tensor)"
    loaded = f"torch.load({name!r}, weights_only=True){where}"
    tensors = f"{{k: v.clone().contiguous() for k, v in {loaded}.items(){only}}}"
    start = f"Rename it to `{name}`, then write" if misnamed else "Write"
    advice = f"{start} `safetensors.torch.save_file({tensors}, {target!r})` once."
    others = " or ".join(f"`{other}`" for other, count, _ in places[1:] if count == most)
    return f"{advice} It takes `{where}`: write {others} there for the other tensors." if others and where else advice


def _content(path: Path) -> Any:
    try:
        return None if archive_problem(path) else load_archive(path, mapped=True)
    except LOAD_ERRORS:
        return None


def _places(content: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, int, bool]]:
    """Where mappings of names to tensors stand, as subscripts, how many tensors each has, and whether nothing else."""
    if not isinstance(content, Mapping) or depth > _DEEPEST or len(where) > _LONGEST:
        return
    count = sum(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    if count:
        yield where, count, count == len(content)
    for key, value in content.items():
        if isinstance(key, str) and key.isprintable() and "`" not in key:
            yield from _places(value, f"{where}[{key!r}]", depth + 1)
