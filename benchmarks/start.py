"""How much of a real update can an adapter reach from its start, depending on the size of that start?

The update is that of `capture.py`'s middle convolution, 32 -> 32, fully fine-tuned from T1-like to T2-like volumes.
TenVOO-L's init is scaled by a gain for each core. `directions` is the rank of the Jacobian at the start as a share of
the weight's entries: in so many directions the first steps move. `tangent` is the share of the update's energy in these
directions, `noise` the same for white noise. `from here` is the share that `fit` reaches with the frozen copy as it was
drawn. Gain zero is the same graph from zero.
"""

from __future__ import annotations

import math
import time
from typing import Any

import common
import torch
from capture import convolutions, from_zero
from torch import Tensor, nn

import tnpeft
from tnpeft.network import Spec, load_spec

GAINS = (1.0, 0.6, 0.3, 0.1, 0.0)  # 0: from zero
SWEEPS = 40  # of alternating least squares
COLUMNS = ("gain", "std T / std W", "directions", "tangent", "from here", "noise", "s")


def main() -> None:
    options = common.parser(__doc__, "start.json")
    options.add_argument("--spec", default="tenvoo_l", help="a spec whose inits have `gain=relu`")
    options.add_argument("--r", type=int, default=4, help="rank of the spec")
    options.add_argument(
        "--gains", type=float, nargs="+", default=GAINS, help="gains of the init; 0 is the start from zero"
    )
    options.add_argument("--steps", nargs=2, type=int, default=(200, 200), help="steps of training and of fine-tuning")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    _, (name, layer, update), _ = convolutions(*arguments.steps)
    spec = load_spec(arguments.spec)
    rows = []
    for gain in arguments.gains:
        rows.append(measured(spec, gain, layer, update, arguments.r))
        print(rows[-1], flush=True)
    cells = [[str(row["gain"]), f"{row['std T / std W']:.3g}", *shares(row), str(row["s"])] for row in rows]
    common.show(f"{arguments.spec} on {name}: what its start reaches of the update", COLUMNS, cells)
    common.write(arguments.out, {"layer": name, "spec": arguments.spec, "r": arguments.r, "rows": rows})


def shares(row: dict[str, Any]) -> list[str]:
    return [f"{row[key]:.1%}" for key in COLUMNS[2:-1]]


def measured(spec: Spec, gain: float, layer: nn.Module, update: Tensor, r: int) -> dict[str, Any]:
    """One start: the shares that its tangent space and the whole network reach."""
    began = time.perf_counter()
    scaled = with_gain(spec, gain) if gain else from_zero(spec)
    adapter = tnpeft.compile(scaled, layer, r=r)
    space = tnpeft.tangent_space(scaled, layer, r=r)
    noise = torch.randn(update.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight: Any = layer.weight
    return {
        "gain": gain or "zero",
        "std T / std W": float(adapter.network_weight().detach().std() / weight.detach().std()),
        "parameters": space.parameters,
        "rank": space.rank,
        "entries": space.entries,
        "directions": space.share,
        "tangent": space.captured(update),
        "from here": tnpeft.fit(
            scaled, update, layer, method="als", iterations=SWEEPS, r=r, frozen_copy="drawn"
        ).captured,
        "noise": space.captured(noise),
        "s": round(time.perf_counter() - began, 1),
    }


def with_gain(spec: Spec, gain: float) -> Spec:
    """The spec with `gain` times the deviation of every core's init."""
    return Spec.from_yaml(spec.text.replace("gain=relu", f"gain={gain * math.sqrt(2)!r}"))


if __name__ == "__main__":
    main()
