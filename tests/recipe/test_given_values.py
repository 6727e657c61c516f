"""`attach(init=...)`: values that a caller gives for cores, by name, by a function, or seen of all layers first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tnpeft

SHARED = """\
tnpeft: 2
name: places
layers: [Linear]
params: {n: 4}
sizes: {o: out_features, i: in_features}
cores:
  at:    {legs: n, frozen: true, init: choice(o i)}
  other: {legs: n, frozen: true, init: random(n)}
  v:     {legs: n, shared: model, init: normal(1)}
  moved: {of: v, legs: n, map: "gather(n -> n, at=other)"}
  T:     {of: v, legs: o i, map: "scatter(n -> o i, at=at)"}
  M:     {of: moved, legs: o i, map: "scatter(n -> o i, at=at)"}
terms:
  - {cores: [T], weight: o i}
  - {cores: [M], weight: o i}
start: frozen_copy
"""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def test_tensors_by_name_are_the_cores_and_their_frozen_copies():
    given = {"0.up": torch.randn(8, 2), "2.down": torch.randn(2, 8, dtype=torch.float64)}
    base, x = model(), torch.randn(3, 6)
    before = base(x)
    handle = tnpeft.attach(base, "pissa", match="all", r=2, init=given)
    first, second = handle.adapters["0"], handle.adapters["2"]
    assert torch.equal(first.cores["up"], given["0.up"])
    assert torch.equal(first.start["up"], given["0.up"])
    assert torch.equal(second.cores["down"], given["2.down"].float())
    assert torch.equal(
        first.cores["down"], tnpeft.attach(model(), "pissa", match="all", r=2).adapters["0"].cores["down"]
    )
    assert torch.equal(base(x), before)


def test_a_function_is_asked_for_every_stored_core():
    asked = []

    def start(layer: str, core: str, network: tnpeft.Network) -> Tensor | None:
        asked.append((layer, core, network.layer.out_channels))
        return torch.ones(4, 6) if (layer, core) == ("0", "down") else None

    handle = tnpeft.attach(model(), "lora", match="all", init=start)
    assert asked == [("0", "down", 8), ("0", "up", 8), ("2", "down", 6), ("2", "up", 6)]
    assert bool((handle.adapters["0"].cores["down"] == 1).all())


def test_an_object_sees_all_layers_first():
    class Start:
        def prepare(self, layers: dict[str, tnpeft.Network]) -> None:
            self.total = sum(network.num_parameters for network in layers.values())

        def __call__(self, layer: str, core: str, network: tnpeft.Network) -> Tensor | None:
            return torch.full((4, network.layer.in_channels), float(self.total)) if core == "down" else None

    handle = tnpeft.attach(model(), "lora", match="all", init=Start())
    assert float(handle.adapters["2"].cores["down"].detach()[0, 0]) == 2 * 4 * (6 + 8)


def test_a_shared_core_is_asked_for_once_and_may_be_named_by_any_layer():
    spec, values, asked = tnpeft.Spec.from_yaml(SHARED), torch.arange(4.0), []
    handle = tnpeft.attach(model(), spec, match="all", init={"2.v": values, "0.at": torch.tensor([0, 47, 3, 5])})
    assert torch.equal(handle.adapters["0"].cores["v"], values)
    assert handle.adapters["2"].cores["v"] is handle.adapters["0"].cores["v"]
    assert handle.adapters["0"].cores["at"].tolist() == [0, 47, 3, 5]
    tnpeft.attach(model(), spec, match="all", init=lambda layer, core, network: asked.append((layer, core)))
    assert ("0", "v") in asked
    assert ("2", "v") not in asked


def test_layers_tied_to_one_another_go_by_either_name():
    base = model()
    base.again = base[0]  # type: ignore[assignment]
    handle = tnpeft.attach(base, "lora", match=["0", "again"], init={"again.down": torch.ones(4, 6)})
    assert bool((next(iter(handle.adapters.values())).cores["down"] == 1).all())


def test_given_frozen_cores_stand_in_files_even_where_the_seed_gives_the_same(tmp_path: Path):
    drawn = tnpeft.attach(model(), "vera", match="0", seed=3).adapters["0"].cores["A"]
    base = model()
    tnpeft.attach(base, "vera", match="0", seed=3, init={"0.A": drawn.clone()})
    tnpeft.save(base, tmp_path / "given.safetensors")
    tnpeft.attach(other := model(), "vera", match="0", seed=3)
    tnpeft.save(other, tmp_path / "drawn.safetensors")
    with safe_open(tmp_path / "given.safetensors", "pt") as file:
        assert "layers.0.core_A" in file.keys()  # noqa: SIM118 - no mapping
    with safe_open(tmp_path / "drawn.safetensors", "pt") as file:
        assert "layers.0.core_A" not in file.keys()  # noqa: SIM118
    loaded = tnpeft.load(model(), tmp_path / "given.safetensors").adapters["0"]
    assert torch.equal(loaded.cores["A"], drawn)


def test_a_model_on_meta_takes_them_with_its_weights():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(6, 8))
    up = torch.randn(8, 2)
    adapter = tnpeft.attach(base, "pissa", match="0", r=2, init={"0.up": up}).adapters["0"]
    assert adapter.cores["up"].is_meta
    weight = torch.randn(8, 6)
    adapter.reset_parameters(weight)
    assert torch.equal(adapter.cores["up"], up)
    with pytest.raises(tnpeft.BindError) as caught:
        adapter.reset_parameters(weight)
    assert str(caught.value) == (
        "core 'up', first value: expected one that its init draws, found one that `attach(init=...)` was "
        "given, which is "
        "not kept. Write it to `adapter.cores`, or attach the adapter anew."
    )


def test_slices_of_a_stack_are_given_together():
    base = nn.Module()
    base.w1 = nn.Parameter(torch.randn(3, 8, 6))
    down = torch.randn(3, 4, 6)
    handle = tnpeft.attach(base, "lora", parameters={"w1": "e o i"}, init={"w1.down": down})
    assert torch.equal(handle.adapters["w1"].cores["down"], down)


def raising(layer: str, core: str, network: tnpeft.Network) -> Tensor | None:
    raise ValueError("no data")


NAN = torch.full((4, 6), torch.nan)
LIKE = "Give it a tensor like the core."
REFUSALS: dict[str, tuple[str, Any, str]] = {
    "kind": (
        "lora",
        3,
        '`init`: expected tensors by name, or a function, found 3. For example `init={"layer.core": tensor}`, or a '
        "function (layer, core, network) -> tensor or None, perhaps of an object with `prepare(layers)`.",
    ),
    "name": (
        "lora",
        {"0.dwn": torch.ones(4, 6)},
        "`init`: expected names of stored cores, found '0.dwn'. Did you mean `0.down`?",
    ),
    "key": (
        "lora",
        {7: torch.ones(4, 6)},
        "`init`: expected names of stored cores, found 7. Name a stored core as `layer.core`: layers as "
        "`model.named_modules()` has them.",
    ),
    "tensor": ("lora", {"0.down": 3.0}, f"layer '0': `init`, core 'down': expected a tensor, found float. {LIKE}"),
    "shape": (
        "lora",
        {"0.down": torch.ones(6, 4)},
        f"layer '0': `init`, core 'down': expected the shape (4, 6), found (6, 4). {LIKE}",
    ),
    "dtype": (
        "lora",
        {"0.down": torch.ones(4, 6, dtype=torch.int64)},
        f"layer '0': `init`, core 'down': expected floating-point numbers, found torch.int64. {LIKE}",
    ),
    "nan": (
        "lora",
        {"0.down": NAN},
        f"layer '0': `init`, core 'down': expected finite numbers, found nan or inf. {LIKE}",
    ),
    "meta": (
        "lora",
        {"0.down": torch.ones(4, 6, device="meta")},
        f"layer '0': `init`, core 'down': expected a dense tensor with values, found one on meta. {LIKE}",
    ),
    "zeros": (
        "lora",
        {"0.up": torch.ones(8, 4)},
        "layer '0': `init`, core 'up': expected zeros: this core makes `start: zero` hold, found other "
        "numbers. Leave it "
        "out, or use a spec with `start: frozen_copy`, whose update is what has changed since the start.",
    ),
    "raises": (
        "lora",
        raising,
        "layer '0': `init`, core 'down': expected a tensor or None, found ValueError: no data. Mend the "
        "function given as "
        "`init`.",
    ),
    "places": (
        SHARED,
        {"0.at": torch.tensor([0, 1, 2, 48])},
        "layer '0': `init`, core 'at': expected places in `o i`, from 0 to 47, found 0 to 48. Count flat places in "
        "row-major order, from 0.",
    ),
    "twice": (
        SHARED,
        {"0.at": torch.tensor([0, 1, 2, 2])},
        "layer '0': `init`, core 'at': expected different places, found one of them twice. Give each place once.",
    ),
    "whole": (
        SHARED,
        {"0.at": torch.ones(4)},
        f"layer '0': `init`, core 'at': expected whole numbers, found torch.float32. {LIKE}",
    ),
    "shared": (
        SHARED,
        {"0.v": torch.ones(4), "2.v": torch.zeros(4)},
        "`init`, '2.v': expected one value for a shared core, found also '0.v'. Give it once: its layers "
        "have one tensor.",
    ),
    "derived": (
        SHARED,
        {"0.T": torch.ones(8, 6)},
        "`init`: expected names of stored cores, found '0.T'. It is derived: give values for 'v', 'at'.",
    ),
    "weight": (
        "deft",
        {"0.W": torch.ones(8, 6)},
        "`init`: expected names of stored cores, found '0.W'. It is the layer's own weight: leave it out.",
    ),
    "start_std": (
        SHARED.replace("start: frozen_copy", "start: frozen_copy\nstart_std: 0.1").replace("shared: model, ", ""),
        {"0.v": torch.ones(4)},
        "layer '0': `init`, core 'v': expected values that inits draw, which `start_std` scales, found a "
        "value for a core "
        "that trains. Remove `start_std` from the spec.",
    ),
}


@pytest.mark.parametrize(("spec", "init", "text"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_given_is_refused_before_anything_changes(
    spec: str, init: Callable[..., Any] | dict[str, Tensor], text: str
):
    base = model()
    modules = dict(base.named_modules())
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(base, spec if len(spec) < 9 else tnpeft.Spec.from_yaml(spec), match=["0", "2"], init=init)
    assert str(caught.value) == text
    assert dict(base.named_modules()) == modules
