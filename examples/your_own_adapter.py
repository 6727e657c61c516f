"""Write an adapter of your own: declare it, check it, count it, draw it, test it, attach it.

    python examples/your_own_adapter.py

A few seconds on a CPU. The adapter is `stencils`: r small kernels, each between one direction of the inputs and one of
the outputs. It is the text below, and no code. The picture and the property tests need
`pip install 'tnpeft[draw,testing]'`; without it the script says so and goes on. The picture is left in
runs/your_own_adapter.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import tnpeft

PICTURE = Path("runs/your_own_adapter/stencils.svg")

# dW[o,i,h,w] = sum_a out[o,a] in[i,a] stencil[a,h,w]
STENCILS = """
tnpeft: 1
name: stencils
layers: [Conv2d]
params: {r: 4}
bond: r                          # the size of `a`, which joins three cores
sizes: {o: out_channels, i: in_channels, h w: kernel_size}
cores:
  out: {legs: o a, init: zeros}  # so that the first update is zero
  in: i a
  stencil: a h w
weight: o i h w                  # which indices stay open, and which axis of the weight they make
start: zero
"""


def same(actual: Tensor, expected: Tensor) -> str:
    """Bit for bit, without a tolerance."""
    return "exact: yes" if torch.equal(actual, expected) else "exact: no"


def main() -> None:
    # 1. Check. A mistake is told with its place and how to mend it; `tnpeft check FILE` does it for files.
    mistaken = STENCILS.replace("stencil: a h w", "stencil: a h v")
    try:
        tnpeft.Spec.from_yaml(mistaken)
    except tnpeft.SpecError as mistake:
        print(f"With a slip of the pen in it:\n  {str(mistake).replace(chr(10), chr(10) + '  ')}\n")
    spec = tnpeft.Spec.from_yaml(STENCILS)
    print(f"Without it, the spec '{spec.name}' is sound.")

    # 2. Count. Bound to a layer, every size is a number; no torch is needed for this.
    network = spec.bind("Conv2d", in_channels=8, out_channels=16, kernel_size=3, r=2)
    print(f"On {network.layer} it trains {network.num_parameters} parameters = {network.formula}")
    print(f"Making its update takes {tnpeft.plan(network).flops:,} operations: {network.einsum}")

    # 3. Draw, where matplotlib is installed.
    if find_spec("matplotlib"):
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        tnpeft.draw_network(network, PICTURE)
        print(f"Its picture is in {PICTURE}.")
    else:
        print("No picture: `pip install 'tnpeft[draw]'` brings matplotlib.")

    # 4. Test it on random layers, where hypothesis is installed. `tnpeft verify FILE` says more.
    if find_spec("hypothesis"):
        from tnpeft.testing import assert_adapter_ok

        report = assert_adapter_ok(spec, examples=3)
        print(f"It holds on random layers: {', '.join(check.name for check in report.checks)}.")
    else:
        print("No property tests: `pip install 'tnpeft[testing]'` brings hypothesis.")

    # 5. Attach and train it, as any that ships.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 3))
    images, targets = torch.randn(8, 1, 12, 12), torch.randn(8, 1, 6, 6)
    weight = model.get_parameter("2.weight").detach().clone()
    with torch.no_grad():
        before = model(images)
    handle = tnpeft.attach(model, spec, match=["2"], r=2)
    with torch.no_grad():
        print(f"\nAttached, the model gives what it gave before: {same(model(images), before)}")
    optimiser = torch.optim.Adam(handle.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = (model(images) - targets).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    falls = "yes" if losses[-1] < losses[0] else "no"
    print(f"In 50 steps the loss falls: {falls} ({losses[0]:.3f} to {losses[-1]:.3f})")

    # 6. What the layer adds is what the formula says.
    cores = {name.removeprefix("2."): core.detach().double() for name, core in handle.named_parameters()}
    by_hand = torch.einsum("oa,ia,ahw->oihw", cores["out"], cores["in"], cores["stencil"])
    change = torch.as_tensor(model[2].weight).detach() - weight  # an adapted layer's weight reads W + dW
    apart = float((change - by_hand).abs().max() / by_hand.abs().max())
    print(f"The weight's change is the formula's, but for rounding: {'yes' if apart < 1e-5 else 'no'} ({apart:.0e})")


if __name__ == "__main__":
    main()
