"""`anchor`: today's cores become the frozen copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tnpeft

SHARED = """\
tnpeft: 1
name: held_together
layers: [Linear]
params: {r: 2}
sizes: {o: out_features, i: in_features}
bond: r
cores:
  up:   {legs: o r, init: normal(1)}
  mid:  {legs: r r2, shared: model, init: normal(1)}
  down: {legs: r2 i, init: normal(1)}
weight: o i
start: frozen_copy
"""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def train(base: nn.Module, handle: tnpeft.Handle, x: torch.Tensor, steps: int = 2) -> None:
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        base(x).square().sum().backward()
        optimiser.step()


def test_the_update_is_exactly_zero_and_the_cores_are_what_they_were(tmp_path: Path):
    base, x = model(), torch.randn(3, 6)
    before = base(x)
    handle = tnpeft.attach(base, tnpeft.Spec.from_yaml(SHARED), match="all")
    train(base, handle, x)
    assert not torch.equal(base(x), before)
    cores = {name: core.detach().clone() for name, core in handle.adapters["0"].cores.items()}
    handle.anchor()
    assert torch.equal(base(x), before)
    for name, core in cores.items():
        assert torch.equal(handle.adapters["0"].cores[name], core)
        for adapter in handle.adapters.values():
            assert torch.equal(adapter.start[name], adapter.cores[name])
    train(base, handle, x)
    after = base(x)
    handle.save(tmp_path / "a.safetensors")
    loaded = model()
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), after)


@pytest.mark.parametrize(
    ("spec", "params"), [("oft", {"b": 2}), ("delora", {"r": 2}), ("gralora", {"r": 2, "k": 2}), ("psoft", {"r": 3})]
)
@pytest.mark.parametrize("mode", ["dense", "auto"])
def test_derived_cores_start_anew(spec: str, params: dict[str, int], mode: str):
    base, x = model(), torch.randn(3, 6)
    before = base(x)
    known = tnpeft.load_spec(spec).params
    text = tnpeft.load_spec(spec).text.replace("start: zero", "start: frozen_copy")
    given = {name: value for name, value in params.items() if name in known}
    handle = tnpeft.attach(base, tnpeft.Spec.from_yaml(text), match="all", mode=mode, **given)
    train(base, handle, x, 3)
    moved = base(x)
    assert not torch.equal(moved, before)
    handle.anchor()
    assert torch.equal(base(x), before)
    train(base, handle, x, 1)
    assert not torch.equal(base(x), before)


def test_a_magnitude_is_relative_to_its_value_of_that_moment():
    text = SHARED.replace("start: frozen_copy", "compose: dora\nstart: frozen_copy")
    base, x = model(), torch.randn(3, 6)
    before = base(x)
    handle = tnpeft.attach(base, tnpeft.Spec.from_yaml(text), match="all")
    train(base, handle, x)
    handle.anchor()
    assert torch.equal(base(x), before)


def test_another_adapter_that_acts_keeps_its_own(tmp_path: Path):
    base, x = model(), torch.randn(3, 6)
    first = tnpeft.attach(base, "pissa", match="0", name="first")
    train(base, first, x)
    only_first = base(x)
    second = tnpeft.attach(base, "pissa", match="all", name="second")
    train(base, second, x)
    tnpeft.activate(base, {"first": 1.0, "second": 1.0})
    base(x)
    second.anchor()
    torch.testing.assert_close(base(x), only_first)


def test_what_was_learned_goes_on_where_it_is_merged_first():
    base, x = model(), torch.randn(3, 6)
    spec = tnpeft.Spec.from_yaml(SHARED)
    handle = tnpeft.attach(base, spec, match="all")
    train(base, handle, x)
    learned = base(x)
    cores = {
        f"{layer}.{core}": value.detach().clone()
        for layer, adapter in handle.adapters.items()
        for core, value in adapter.cores.items()
    }
    handle.detach(merge=True)
    handle = tnpeft.attach(base, spec, match="all", init=cores)
    torch.testing.assert_close(base(x), learned)
    for layer, adapter in handle.adapters.items():
        assert torch.equal(adapter.cores["up"], cores[f"{layer}.up"])


def test_refusals():
    base = model()
    handle = tnpeft.attach(base, "lora", match="all")
    with pytest.raises(tnpeft.AttachError) as caught:
        handle.anchor()
    assert str(caught.value) == (
        "layers '0', '2': anchor: expected `start: frozen_copy`, a copy to write to, found `start: zero` in "
        "spec 'lora'. "
        "Its update is zero where its core of zeros is: write zeros there, or use a spec with a frozen copy."
    )
    handle.detach()
    handle = tnpeft.attach(base, "pissa", match="all")
    handle.merge()
    with pytest.raises(tnpeft.AttachError, match="expected an unmerged model, found a merged one"):
        handle.anchor()
    handle.unmerge()
    with handle.disabled(), pytest.raises(tnpeft.AttachError, match="expected enabled adapters"):
        handle.anchor()
    with pytest.raises(tnpeft.AttachError, match="adapter name"):
        tnpeft.anchor(base, "other")
