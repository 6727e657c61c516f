"""How exact is the delta weight of a frozen copy? Relative error against float64 after small steps.

After a step of this size on every entry of the cores, three ways to get T(cores) - T(start):

* tnpeft: the difference is contracted, in fp32; in bf16 models it is rounded once, at the end;
* plain: both networks are contracted in the dtype, and subtracted;
* folded: T(start) is subtracted from the base weight once, and T(cores) added to that.

The error is measured on the cores as stored in fp32, with T in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from torch import Tensor

import tnpeft
from tnpeft.plan import plan
from tnpeft.program import Program, build_program

STEPS = (0.0, 1e-5, 1e-4, 1e-3)
CHANNELS = (64, 128)


def main() -> None:
    options = common.parser(__doc__, "numerics.json")
    options.add_argument("--specs", nargs="+", default=["tenvoo_l", "tenvoo_q"], help="specs with a frozen copy")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for name in arguments.specs for row in measure(name)]
    columns = ["spec", "step", "|dW| / |T|", *(key for key in rows[0] if " " in key and "/" not in key)]
    cells = [[row["spec"], f"{row['step']:.0e}", *(f"{row[key]:.1e}" for key in columns[2:])] for row in rows]
    common.show("Error of the delta weight, relative to its norm (step 0: to the base weight's)", columns, cells)
    common.write(arguments.out, rows)


def measure(name: str) -> list[dict[str, Any]]:
    """One row for each step, on a Conv3d of kernel 3 and the spec's own initialisation."""
    torch.manual_seed(0)
    inputs, outputs = CHANNELS
    layer = torch.nn.Conv3d(inputs, outputs, 3)
    adapter = tnpeft.compile(name, layer)
    start = [core.detach() for core in adapter.cores.values()]
    program = build_program(plan(adapter.network), tuple(range(5)))
    ways = {"tnpeft": difference, "plain": plain, "folded": folded}
    rows = []
    for step in STEPS:
        cores = [core + step * torch.randn_like(core).sign() for core in start]
        exact = program.value([core.double() for core in cores]) - program.value([core.double() for core in start])
        norm = exact.norm() if step else layer.weight.detach().double().norm()
        row: dict[str, Any] = {"spec": name, "step": step, "|dW| / |T|": _ratio(exact, program, start)}
        for dtype in (torch.float32, torch.bfloat16):
            for way, function in ways.items():
                found = function(program, cores, start, layer.weight.detach(), dtype).double()
                row[f"{way} {str(dtype)[6:]}"] = float((found - exact).norm() / norm)
        rows.append(row)
    return rows


Way = Callable[[Program, Sequence[Tensor], Sequence[Tensor], Tensor, torch.dtype], Tensor]


def difference(
    program: Program, cores: Sequence[Tensor], start: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
) -> Tensor:
    return program.delta(cores, start, program.constants(start)).to(dtype)


def plain(
    program: Program, cores: Sequence[Tensor], start: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
) -> Tensor:
    return value(program, cores, dtype) - value(program, start, dtype)


def folded(
    program: Program, cores: Sequence[Tensor], start: Sequence[Tensor], weight: Tensor, dtype: torch.dtype
) -> Tensor:
    base = weight.to(dtype)
    kept = base - value(program, start, dtype)
    return (kept + value(program, cores, dtype)).double() - base.double()


def value(program: Program, cores: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return program.value([core.to(dtype) for core in cores])


def _ratio(exact: Tensor, program: Program, start: Sequence[Tensor]) -> float:
    ratio = float(exact.norm() / program.value([core.double() for core in start]).norm())
    return ratio if math.isfinite(ratio) else 0.0


if __name__ == "__main__":
    main()
