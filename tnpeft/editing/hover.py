"""What a word in a spec stands for: the size of an index, the shape of a core, the sentence of a key."""

from __future__ import annotations

from dataclasses import dataclass

from tnpeft.editing.completion import described
from tnpeft.editing.cursor import cursor_at, word_at
from tnpeft.network import Network
from tnpeft.network.wording import core_rows
from tnpeft.spec.pattern import ELLIPSIS

__all__ = ["Hover", "hover_at"]


@dataclass(frozen=True)
class Hover:
    """Sentences about the word from column `start` to before `end`, both from 1."""

    text: str
    line: int
    start: int
    end: int


def hover_at(text: str, line: int, column: int, network: Network | None = None) -> Hover | None:
    """About the word at character `column` of `line`; sizes and shapes are those of `network`, the last valid one."""
    found = word_at(text, line, column)
    if found is None:
        return None
    word, start, end = found
    cursor = cursor_at(text, line, end)
    if cursor.place == "comment":
        return None
    is_key = cursor.place == "key"
    if is_key:  # `up:`, of which the colon comes after
        path = (*cursor.path, word)
        said = described(text, path) if cursor.path not in (("cores",), ("params",), ("sizes",)) else ""
    else:
        said = ""
    parts = [said, *(_of_network(word, network, cursor.path) if network is not None else ())]
    lines = [part for part in parts if part]
    return Hover("\n\n".join(lines), line, start, end) if lines else None


def _of_network(word: str, network: Network, path: tuple[str, ...]) -> list[str]:
    lines = []
    in_cores = path[:1] in (("cores",), ("terms",))
    if in_cores or path == ():
        lines += [
            f"core {name}: {shape}, legs {legs}" + (f", {init}" if init else "")
            for name, legs, shape, init, _ in core_rows(network)
            if name == word
        ]
    if word in network.params and path[:1] != ("cores",):
        lines.append(f"param {word} = {network.params[word]:g}")
    if word == ELLIPSIS:
        sizes = " x ".join(map(str, network.layer.kernel_size)) or "none here"
        lines.append(f"the kernel's axes: {sizes}, on {network.layer}")
    elif word in network.sizes:
        cores = [core.name for core in network.cores if word in core.legs]
        axes = ["out", "in", *(f"k{axis}" for axis in range(len(network.weight) - 2))]
        places = [name for name, legs in zip(axes, network.weight, strict=True) if word in legs]
        ends = ", ".join([*cores, *(f"weight {place}" for place in places)])
        lines.append(f"index {word} = {network.sizes[word]} on {network.layer}" + (f": {ends}" if ends else ""))
    return lines
