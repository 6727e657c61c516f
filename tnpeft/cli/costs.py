"""The execution modes of a layer as `tnpeft show` lists them: predicted time and memory, and the factored chain."""

from __future__ import annotations

from tnpeft.cli.output import Output, table
from tnpeft.schedule.costs import Costs, bytes_text

__all__ = ["Costs", "bytes_text", "print_costs"]


def print_costs(output: Output, costs: Costs) -> None:
    columns = {"mode": "left", "forward": "right", "backward": "right", "step": "right", "FLOPs": "right"}
    columns |= {"peak": "right", "saved": "right", "": "left"}
    output.say()
    output.show(table("", columns, costs.rows()))
    if (chain := costs.plans["factored"]).mode != "factored":
        return
    for number, part in enumerate(chain.terms or (chain,)):
        output.say(f"\nfactored, term {number + 1}" if chain.terms else "\nfactored")
        for line in part.link_lines():
            output.say(line)
