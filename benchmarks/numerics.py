"""How exact is the update of a frozen copy? Relative error against float64 after small steps.

After a step of this size on every entry of the cores, ways to get the update T(cores) - T(start):

* tnpeft: the difference is contracted, in fp32; in bf16 models it is rounded once, at the end (mode `dense`);
* completed: the same, by way of the clusters of the factored chain (mode `hybrid`);
* factored: the chain of clusters meets the layer's input, which gives the update's output without the update itself;
* plain: both networks are contracted in the dtype, and subtracted;
* folded: T(start) is subtracted from the base weight once, and T(cores) added to that.

The first table is of the update, the second of its output for a random input in the dtype. Errors are measured on the
cores as stored in fp32, with T in float64, before the update or its output is added to anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.planning import Axis, Call
from tnpeft.program import (
    FactoredUpdate,
    LayerClusters,
    Program,
    build_chain,
    build_cluster_merge,
    build_clusters,
    build_program,
)
from tnpeft.schedule import Plan, plan

STEPS = (0.0, 1e-5, 1e-4, 1e-3)
CHANNELS = (64, 128)
SIDE = 8
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A layer and the cores of its adapter, at the start and now."""

    layer: nn.Module
    x: Tensor
    program: Program
    factored: Plan
    start: Sequence[Tensor]
    cores: Sequence[Tensor]

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def value(self, cores: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """T(cores), contracted in `dtype`."""
        return self.program.value([core.to(dtype) for core in cores])

    def clusters(self) -> LayerClusters:
        program = build_clusters(self.factored)
        return program(self.cores, program.start(self.start))

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of `x` with another weight and no bias."""
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight)
        return nn.functional.conv3d(x, weight, padding=1)


def main() -> None:
    options = common.parser(__doc__, "numerics.json")
    specs = ["tenvoo_l", "tenvoo_q", "quanta"]
    options.add_argument("--specs", nargs="+", default=specs, help="specs with a frozen copy")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for name in arguments.specs for row in measure(name)]
    for title, ways in (("update", UPDATES), ("update's output", OUTPUTS)):
        keys = [_key(way, dtype) for dtype in DTYPES for way in ways]
        cells = [[row["spec"], *(f"{row[key]:.1e}" for key in ("step", "|dW| / |T|", *keys))] for row in rows]
        columns = ["spec", "step", "|dW| / |T|", *(key.removeprefix("output ") for key in keys)]
        common.show(f"Error of the {title}, relative to its norm (step 0: to that of the base weight)", columns, cells)
    common.write(arguments.out, rows)


def measure(name: str) -> list[dict[str, Any]]:
    """One row for each step, on a layer with the spec's own initialisation."""
    torch.manual_seed(0)
    inputs, outputs = CHANNELS
    convolves = "Conv3d" in tnpeft.load_spec(name).layers
    layer = nn.Conv3d(inputs, outputs, 3, padding=1) if convolves else nn.Linear(inputs, outputs)
    adapter = tnpeft.compile(name, layer)
    network = adapter.network
    space = (SIDE,) * len(network.layer.kernel_size)
    call = Call(1 if convolves else SIDE**3, tuple(Axis(SIDE, SIDE, 3, before=1) for _ in space))
    x = torch.randn(call.batch, inputs, *space)
    start = [core.detach() for core in adapter.cores.values()]
    program = build_program(plan(network), tuple(range(layer.weight.dim())))
    rows = []
    for step in STEPS:
        cores = [core + step * torch.randn_like(core).sign() for core in start]
        case = Case(layer, x, program, plan(network, "factored", call), start, cores)
        first = case.value(start, torch.float64)
        exact = case.value(cores, torch.float64) - first
        # At the start there is no update, and errors are relative to the weight.
        like = exact if step else case.weight.double()
        row = {"spec": name, "step": step, "|dW| / |T|": float(exact.norm() / first.norm())}
        for dtype in DTYPES:
            seen = x.to(dtype)
            wanted, scale = case.output(seen.double(), exact), case.output(seen.double(), like).norm()
            for way, update in UPDATES.items():
                row[_key(way, dtype)] = float((update(case, dtype).double() - exact).norm() / like.norm())
            for way, output in OUTPUTS.items():
                row[_key(way, dtype)] = float((output(case, seen).double() - wanted).norm() / scale)
        rows.append(row)
    return rows


def difference(case: Case, dtype: torch.dtype) -> Tensor:
    return case.program.deltas(case.cores, case.program.start(case.start))[0].to(dtype)


def completed(case: Case, dtype: torch.dtype) -> Tensor:
    merge = build_cluster_merge(case.factored, tuple(range(case.weight.dim())))
    return merge(case.clusters()).to(dtype)


def plain(case: Case, dtype: torch.dtype) -> Tensor:
    return case.value(case.cores, dtype) - case.value(case.start, dtype)


def folded(case: Case, dtype: torch.dtype) -> Tensor:
    """In float64, the difference of what the layer has and had: no further error."""
    base = case.weight.to(dtype)
    kept = base - case.value(case.start, dtype)
    return (kept + case.value(case.cores, dtype)).double() - base.double()


def factored(case: Case, x: Tensor) -> Tensor:
    clusters = case.clusters()
    nothing = torch.zeros_like(case.output(x, case.weight.to(x.dtype)))
    chain = build_chain(case.factored)
    found: Tensor = FactoredUpdate.apply(nothing, x, chain, clusters.dual, *clusters.values)  # type: ignore[no-untyped-call]
    return found


def by_update(update: Callable[[Case, torch.dtype], Tensor]) -> Callable[[Case, Tensor], Tensor]:
    """The output of an update, computed in the update's dtype."""

    def output(case: Case, x: Tensor) -> Tensor:
        weight = update(case, x.dtype)
        return case.output(x.to(weight.dtype), weight)

    return output


UPDATES: Mapping[str, Callable[[Case, torch.dtype], Tensor]] = {
    "tnpeft": difference,
    "completed": completed,
    "plain": plain,
    "folded": folded,
}
OUTPUTS: Mapping[str, Callable[[Case, Tensor], Tensor]] = {
    "output tnpeft": by_update(difference),
    "output factored": factored,
    "output plain": by_update(plain),
    "output folded": by_update(folded),
}


def _key(way: str, dtype: torch.dtype) -> str:
    return f"{way} {str(dtype)[6:]}"


if __name__ == "__main__":
    main()
