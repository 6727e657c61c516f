"""The network as text: a row for each core, a column for each index."""

from __future__ import annotations

from collections.abc import Container, Sequence

from tnpeft.network import Network

__all__ = ["picture"]


ASCII = str.maketrans("●◆─│┼", "ox-|+")

_LEGEND = "● a leg of a core, ◆ of a core that is made of others"

Cores = Sequence[tuple[str, tuple[str, ...]]]  # names, and the legs under which they are named


def picture(network: Network, width: int, encoding: str = "utf-8", whole: Network | None = None) -> str:
    """Draw the cores as horizontal wires and the indices as vertical ones; a dot is a leg.

    An index with dots in two rows is a bond, one that runs down to the last row is an open leg of the weight; LoHa's
    indices are both. The two lines on top are the names and sizes. A picture that does not fit in `width` columns
    becomes a list, with a line for each index. Signs that `encoding` lacks become ASCII. `whole` is the network whose
    factors the cores are: they have their cores' names. Derived cores have other dots, which a line below explains.
    """
    names = {factor.label: factor.reference.core for factor in whole.factors} if whole is not None else {}
    made = {core.name for core in whole.derived} if whole is not None else set()
    cores = [(names.get(core.name, core.name), core.legs) for core in network.cores if not core.is_index]
    drawn = _draw(network, cores, made)
    if not made.isdisjoint(name for name, _ in cores):
        drawn += "\n" + _LEGEND
    if max(map(len, drawn.splitlines())) > width:
        return _write(network, cores)
    try:
        drawn.encode(encoding)
    except UnicodeEncodeError:
        return drawn.translate(ASCII)
    return drawn


def _write(network: Network, cores: Cores) -> str:
    """`d (8)  in_12, join_in`: the cores at each index."""
    axis_of = _axes(network)
    lines = []
    for leg in _indices(cores):
        ends = [name for name, legs in cores if leg in legs]
        ends += [f"weight {axis_of[leg]}"] if leg in axis_of else []
        lines.append(f"{leg} ({network.sizes[leg]})".ljust(12) + "  " + ", ".join(ends))
    return "\n".join(lines)


def _draw(network: Network, cores: Cores, made: Container[str]) -> str:
    indices = _indices(cores)
    rows = [set(legs) for _, legs in cores]
    axis_of = _axes(network)
    rows_of = {leg: [number for number, legs in enumerate(rows) if leg in legs] for leg in indices}
    last_row = {leg: len(rows) if leg in axis_of else rows_of[leg][-1] for leg in indices}
    widths = [max(len(leg), len(str(network.sizes[leg])), len(axis_of.get(leg, ""))) + 1 for leg in indices]
    margin = max(len("weight"), *(len(name) for name, _ in cores)) + 2

    lines = [
        " " * margin + _cells(indices, widths),
        " " * margin + _cells([str(network.sizes[leg]) for leg in indices], widths),
    ]
    for number, (name, _) in enumerate(cores):
        crossing = [rows_of[leg][0] < number < last_row[leg] for leg in indices]
        dots = [leg in rows[number] for leg in indices]
        lines.append(name.ljust(margin) + _wire(dots, crossing, widths, "◆" if name in made else "●"))
    lines.append("weight".ljust(margin) + _cells([axis_of.get(leg, "") for leg in indices], widths))
    return "\n".join(line.rstrip() for line in lines)


def _indices(cores: Cores) -> list[str]:
    return list(dict.fromkeys(leg for _, legs in cores for leg in legs))


def _axes(network: Network) -> dict[str, str]:
    """For each open leg the name of its axis of the canonical weight: out, in, k0, k1, ..."""
    names = ["out", "in", *(f"k{axis}" for axis in range(len(network.weight) - 2))]
    return {leg: name for name, axis in zip(names, network.weight, strict=True) for leg in axis}


def _cells(texts: list[str], widths: list[int]) -> str:
    return "".join(text.ljust(width) for text, width in zip(texts, widths, strict=True))


def _wire(dots: list[bool], crossing: list[bool], widths: list[int], dot: str) -> str:
    """One core's row: dots joined by a wire, other indices passing through."""
    ends = [column for column, dot in enumerate(dots) if dot]
    first, last = (ends[0], ends[-1]) if ends else (0, -1)
    line = ""
    for column, width in enumerate(widths):
        inside = first <= column <= last
        if dots[column]:
            mark = dot
        elif crossing[column]:
            mark = "┼" if inside else "│"
        else:
            mark = "─" if inside else " "
        line += mark + ("─" if inside and column < last else " ") * (width - 1)
    return line
