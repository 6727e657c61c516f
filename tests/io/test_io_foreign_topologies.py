"""Finding a topology in a network, whatever cores and indices are called, and writing specs of given sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import X, adapted, assert_same, loaded, lycoris_of, peft_of, specs_of
from torch import Tensor, nn

import tnpeft
from tnpeft.io.foreign.layer_update import LayerUpdate, adapter_of
from tnpeft.io.foreign.topologies import TOPOLOGIES, WRITABLE, found_in, topology_named
from tnpeft.network import layer_of

SHIPPED = (
    "lora",
    "locon_tucker",
    "loha",
    "loha_tucker",
    "lokr",
    "lokr_both",
    "krona",
    "tenvoo_l",
    "tenvoo_q",
    "quanta",
)
SIZES = {"o": 18, "i": 12, "oa": 9, "ob": 2, "ia": 2, "ib": 6, "r": 3, "s": 2, "q": 2, "t": 4, "p": 3}
ROUND = {"i1": 2, "i2": 3, "i3": 2, "o1": 3, "o2": 3, "o3": 2, "kd": 3, "kh": 2, "kw": 1}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_are_found(name: str):
    layer = nn.Linear(16, 24) if name == "quanta" else nn.Conv3d(16, 24, 3)
    network = tnpeft.load_spec(name).bind(layer)
    found = found_in(network, topology_named(name))
    assert found is not None
    assert {core for core, _ in found.values()} == {core.name for core in network.cores}
    others = [topology for topology in TOPOLOGIES if found_in(network, topology_named(topology))]
    assert others == [name]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_bond_joins_two_cores(name: str):
    """Topologies put together of two shipped specs' cores must not join bonds that have one name there."""
    topology = topology_named(name)
    joined = Counter(leg for legs in topology.cores.values() for leg in legs)
    opened = {leg for axis in topology.weight for leg in axis}
    assert {count for leg, count in joined.items() if leg not in opened} <= {2}


def random_part(name: str, layer: nn.Module, sizes: dict[str, int], **options: Any) -> LayerUpdate:
    topology, axes = topology_named(name), len(layer_of(layer).kernel_size)
    sizes = sizes | {f"k.{axis}": size for axis, size in enumerate(layer_of(layer).kernel_size)}
    generator = torch.Generator().manual_seed(4)

    def draw() -> dict[str, Tensor]:
        shapes = {core: [sizes[leg] for leg in topology.legs(core, axes)] for core in topology.cores}
        return {core: torch.randn(shape, generator=generator).double() for core, shape in shapes.items()}

    start = draw() if topology.start == "frozen_copy" else {}
    return LayerUpdate(name, draw(), 0.7 if topology.start == "zero" else 1.0, start=start, **options)


def dense(part: LayerUpdate, tensors: Any, layer: nn.Module) -> Tensor:
    """One einsum over all cores, the definition."""
    axes = len(layer_of(layer).kernel_size)
    legs = [part.shape.legs(core, axes) for core in part.tensors]
    letters = {leg: chr(97 + place) for place, leg in enumerate(dict.fromkeys(leg for core in legs for leg in core))}
    inputs = ",".join("".join(letters[leg] for leg in core) for core in legs)
    output = "".join(letters[leg] for group in part.shape.axes(axes) for leg in group)
    total = torch.einsum(f"{inputs}->{output}", *(tensors[core] for core in part.tensors))
    return total.reshape(layer_of(layer).weight_shape) * part.scale


def layers_of(name: str) -> list[tuple[nn.Module, dict[str, int]]]:
    if name.startswith("tenvoo"):
        bonds = dict.fromkeys("defghijklmnpqstu", 2)
        return [(nn.Conv3d(12, 18, (3, 2, 1)), bonds | ROUND), (nn.Conv3d(12, 18, (3, 2, 1)), bonds | ROUND | {"d": 3})]
    if name == "quanta":
        return [(nn.Linear(12, 18), ROUND | {"d": 2, "e": 3, "f": 4})]
    if name == "loha_viewed_wide":
        return [(nn.Linear(12, 24), {"p": 12, "oa": 2, "ib": 12, "r": 3, "s": 3})]
    if name == "loha_viewed_tall":
        return [(nn.Linear(24, 12), {"oa": 12, "ia": 2, "q": 12, "r": 3, "s": 3})]
    kinds = [nn.Conv1d(12, 18, 3), nn.Conv3d(12, 18, (3, 1, 2)), nn.ConvTranspose2d(12, 18, 2)]
    return [(layer, SIZES) for layer in ([] if "tucker" in name else [nn.Linear(12, 18)]) + kinds]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_spec_for_any_sizes(name: str):
    for layer, sizes in layers_of(name):
        layer = layer.double()
        part = random_part(name, layer, sizes)
        adapter = adapter_of(part, layer, "x")
        expected = dense(part, part.tensors, layer) - (dense(part, part.start, layer) if part.start else 0)
        stored = expected.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else expected
        torch.testing.assert_close(adapter.delta_weight(), stored, rtol=1e-10, atol=1e-10)


def test_a_part_whose_scale_is_zero_does_nothing():
    layer = nn.Linear(12, 18)
    part = LayerUpdate("lora", {"up": torch.randn(18, 3), "down": torch.randn(3, 12)}, 0.0)
    assert torch.count_nonzero(adapter_of(part, layer, "x").delta_weight()) == 0


MINE = """
tnpeft: 1
name: mine
layers: any
params: {rank: 2}
sizes: {out: out_channels, inn: in_channels}
cores:
  right: {legs: inn rank k..., frozen: FROZEN}
  left:  {legs: rank out, init: INIT}
weight: out inn k...
scale: 0.5
start: START
"""
PRODUCT = """
tnpeft: 1
name: product
layers: any
sizes: {b: out_channels // 2, a: 2, d: in_channels // 2, c: 2}
cores:
  large: {legs: k... d b, init: zeros}
  small: c a
weight: (a b) (c d) k...
start: zero
"""


def mine(start: str = "zero", frozen: str = "false") -> tnpeft.Spec:
    text = MINE.replace("START", start).replace("FROZEN", frozen)
    return tnpeft.Spec.from_yaml(text.replace("INIT", "zeros" if start == "zero" else "normal(0.1)"))


@pytest.mark.parametrize("spec", [mine(), mine(frozen="true"), mine("frozen_copy")], ids=["zero", "frozen", "copy"])
def test_a_users_own_lora_is_lora(spec: tnpeft.Spec, tmp_path: Path):
    ours = adapted(spec, "line|conv|point", rank=3)
    tnpeft.save_foreign(ours, tmp_path / "a", "peft")
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "lycoris")
    assert_same(peft_of(tmp_path / "a")(X), ours(X))
    assert_same(lycoris_of(tmp_path / "a.safetensors")(X), ours(X))
    again = loaded(tmp_path / "a")
    ranks = {row.params["r"] for row in tnpeft.Handle(again, "default").report().layers}
    assert ranks == {6 if spec.start == "frozen_copy" else 3}


def test_a_users_own_kronecker_product(tmp_path: Path):
    ours = adapted(tnpeft.Spec.from_yaml(PRODUCT), "line|conv2|conv3")
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "lycoris")
    assert_same(lycoris_of(tmp_path / "a.safetensors")(X), ours(X))
    assert specs_of(loaded(tmp_path / "a.safetensors")) == {"krona"}


UNEQUAL = """
tnpeft: 1
name: unequal
layers: any
params: {r: 2, s: 3}
sizes: {o: out_channels, i: in_channels}
cores:
  a: o r
  b: r i k...
  c: {legs: o s, init: zeros}
  d: s i k...
weight: o i k...
start: zero
"""


def test_halves_of_unequal_rank_are_filled_up(tmp_path: Path):
    ours = adapted(tnpeft.Spec.from_yaml(UNEQUAL), "line|conv[12]|point")
    tnpeft.save_foreign(ours, tmp_path / "a", "peft")
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "lycoris")
    assert_same(peft_of(tmp_path / "a")(X), ours(X))
    assert_same(lycoris_of(tmp_path / "a.safetensors")(X), ours(X))


SUM = """
tnpeft: 1
name: sum
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels}
cores:
  a: {legs: o r, init: zeros}
  b: r i k...
  c: {legs: o s, init: zeros}
  d: s i k...
bond: r
terms:
  - {cores: [a, b], weight: o i k...}
  - {cores: [c, d], weight: o i k...}
start: zero
"""


def test_a_sum_is_no_loha():
    network = tnpeft.Spec.from_yaml(SUM).bind(nn.Linear(4, 4))
    assert not any(found_in(network, topology_named(topology)) for topology in WRITABLE)
