"""A user's own map: attached, verified, saved, and loaded where it is registered."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import PAGES, run
from saved import refused
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import ExecutionError
from tnpeft.spec import map_kinds
from tnpeft.verify import verify

SPEC = """
# dW[o,i,k...] = sum_a squash(B)[o,a] (partial sums of A along a)[a,i,k...]
tnpeft: 2
name: squashed
title: A squashed factor, and one of partial sums
layers: any
params: {r: 2, steep: 3}
sizes: {o: out_channels, i: in_channels, a: r, c: r}
cores:
  B: {legs: o a, init: zeros}
  A: {legs: c i k...}
  b: {of: B, legs: o a, map: "squash(steep=steep)"}
  s: {of: A, legs: a i k..., map: summed(c -> a)}
terms:
  - {cores: [b, s], weight: o i k...}
start: zero
"""
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def squash(x: Tensor, steep: float) -> Tensor:
    return x / (1 + (steep * x) ** 2).sqrt()


def summed(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_kinds, "_registered", {})
    tnpeft.register_map("squash", squash, lambda sizes, steep: sizes, zero=True)
    tnpeft.register_map("summed", summed, lambda sizes: sizes, linear=True)


def test_shipped_specs_are_read_beside_a_map_with_arguments():
    assert tnpeft.load_spec("oft").name == "oft"


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def trained(start: str = "zero") -> tuple[nn.Module, tnpeft.Handle]:
    text = SPEC.replace("start: zero", f"start: {start}")
    text = text if start == "zero" else text.replace("init: zeros", "init: normal(0.3)")
    model = base()
    handle = tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="all")
    assert torch.equal(model(X), base()(X))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model, handle


@pytest.mark.parametrize("start", ["zero", "frozen_copy"])
def test_the_update_is_the_formula(start: str, tmp_path: Path):
    model, handle = trained(start)
    wanted = base().double()

    def formula(cores: dict[str, Tensor]) -> Tensor:
        return squash(cores["B"].double(), 3) @ cores["A"].double().cumsum(0)

    with torch.no_grad():
        for layer, adapter in handle.adapters.items():
            delta = formula(adapter.cores) - (formula(adapter.start) if start == "frozen_copy" else 0)
            wanted[int(layer)].weight.add_(delta)
    torch.testing.assert_close(model(X).double(), wanted(X.double()), rtol=1e-5, atol=1e-5)
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = base()
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-6, atol=1e-6)


def test_it_verifies():
    report = verify(tnpeft.Spec.from_yaml(SPEC), examples=5)
    assert report.ok, str(report)


def test_a_file_needs_its_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = trained()
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    pickled, copied = pickle.dumps(model), copy.deepcopy(model)
    squash_map = map_kinds._registered.pop("squash")
    said = "FILE: map `squash`: expected a registered function, found none of that name. "
    said += 'Call `tnpeft.register_map("squash", function, shape)` first.'
    assert refused(base(), path) == said
    assert refused(copied, path, tnpeft.hot_swap) == said
    assert [layer.spec for layer in tnpeft.inspect(path).layers] == ["squashed"] * 2  # which needs no function
    unpickled = pickle.loads(pickled)
    with pytest.raises(ExecutionError, match=r"map `squash`: expected a registered function, found none of that name"):
        unpickled(X)
    map_kinds._registered["squash"] = squash_map
    torch.testing.assert_close(unpickled(X), model(X), rtol=1e-6, atol=1e-6)
    tnpeft.load(base(), path)


@pytest.mark.slow
def test_a_fresh_process_says_which_map_is_missing(tmp_path: Path):
    model, _ = trained()
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    program = (
        "import torch, tnpeft; from torch import nn; torch.manual_seed(0)\n"
        "model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))\n"
        f"try: tnpeft.load(model, {str(path)!r})\n"
        "except tnpeft.AdapterFileError as error: print([problem.what for problem in error.problems])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['map `squash`', 'map `summed`']"


def test_the_page_of_maps_is_what_happens():
    names = run(next(page for page in PAGES if page.stem == "maps"))
    assert len(names["handle"].adapters) == 2
