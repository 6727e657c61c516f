"""Random lives of several adapters on one base, against plain float64 layers with summed weights."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small import CHAIN, Net, net, net_input, quick_if
from torch import Tensor, nn

import tnpeft
from tnpeft import AttachError, Spec
from tnpeft.adapters.parked import own_weight
from tnpeft.surgery import adapters_of, plain_modules, plain_parameters, statistics_of, trained_of
from tnpeft.surgery.tree import slots

X = net_input()
SHARED = Spec.from_yaml(CHAIN.replace("middle: a b", "middle: {legs: a b, shared: model}"))
Values = dict[str, Tensor]


class Kind(NamedTuple):
    """What is attached: a spec, its layers, and what trains beside the cores."""

    spec: str | Spec
    layers: tuple[str, ...]
    train: Mapping[str, Any]
    joint: tuple[str, ...] = ()  # layers that train as a whole


KINDS = {
    "shared": Kind(SHARED, ("first", "wide", "up", "head.0"), {"bias": "adapted", "norm": True}),
    "lora": Kind("lora", ("first", "head.2"), {"also": [r"^norm\.weight$"]}),
    "hira": Kind("hira", ("wide", "head.2"), {}),
    "joint": Kind("lora", ("up",), {"bias": "adapted", "also": [r"^head\.2\."]}, ("head.2",)),
}
NAMES = ("adni", "ppmi", "keys")
SCALES = (1.0, 1.0, 0.5, -1.5, 0.0)


def update(kind: Kind, cores: Values, start: Values, weight: Tensor) -> Tensor:
    """ΔW as (out, in // groups, kernel), by its formula."""
    if kind.spec is SHARED:
        one, two = (torch.einsum("oa,ab,bi...->oi...", c["left"], c["middle"], c["right"]) for c in (cores, start))
        return 0.5 * (one - two)
    product = torch.einsum("or,ri...->oi...", cores["up"], cores["down"])
    return weight * product if kind.spec == "hira" else product


def stored(delta: Tensor, layer: nn.Module) -> Tensor:
    """The update in the order in which the layer stores its weight."""
    if not isinstance(layer, nn.ConvTranspose3d):
        return delta
    groups = layer.groups
    return delta.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


class Known:
    """What an attached adapter is, and the values that it must have."""

    def __init__(self, model: nn.Module, name: str, kind: Kind) -> None:
        self.kind = kind
        self.optimizer = torch.optim.SGD(tnpeft.Handle(model, name).parameters(), 0.05)
        self.look(model, name)

    def look(self, model: nn.Module, name: str) -> None:
        """Take its values from the model."""
        self.values = values_of(model, name)
        self.beside = beside_of(model, name)

    def update_of(self, layer: str, plain: nn.Module) -> Tensor:
        cores, start = (
            {key.removeprefix(where): own.double() for key, own in self.values.items() if key.startswith(where)}
            for where in (f"{layer}.core.", f"{layer}.start.")
        )
        return stored(update(self.kind, cores, start, plain.weight), plain)


def values_of(model: nn.Module, name: str) -> Values:
    """The bits of cores and frozen copies."""
    found = {}
    for layer, adapter in adapters_of(model, name).items():
        found |= {f"{layer}.core.{key}": core for key, core in adapter.cores.items()}
        found |= {f"{layer}.start.{key}": core for key, core in adapter.start.items()}
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def beside_of(model: nn.Module, name: str) -> Values:
    """The bits of what trains beside the cores."""
    found = {**trained_of(model, name), **statistics_of(model, name)}
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def same(left: Values, right: Values) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def plain_values(model: nn.Module) -> Values:
    """Parameters and buffers of the plain model as they act."""
    found = {**plain_parameters(model), **{key: slot.acting for key, slot in slots(model, "_buffers").items()}}
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    (model(X) - 1).square().mean().backward()
    for optimizer in optimizers:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()


class Several:
    """What the model should be: its base, the adapters' values, and which of them act."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.model: nn.Module = net()
        self.known: dict[str, Known] = {}
        self.files: dict[int, tuple[Kind, Values, Values, float]] = {}
        self.active: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self.merged = False
        self.see_base()

    def act(self) -> str:
        """Do one thing that can be tried now, and return its name."""
        chances = {"copied": 1}
        if len(self.known) < len(NAMES):
            chances |= {"attach": 6, "load": 4 * bool(self.files)}
        if self.known:
            chances |= {"activate": 6, "save": 2, "remove": 1, "keep": 1, "merge": 2, "unmerge": 6 * self.merged}
        if self.active and not self.merged:
            chances |= {"train": 6}
        (name,) = self.random.choices([*chances], [*chances.values()])
        getattr(self, name)()
        return name

    def check(self) -> None:
        """All that must hold between any two acts."""
        self.names_and_scales()
        self.nobody_else_changed()
        self.the_base_is_untouched()
        self.only_what_acts_trains()
        self.it_computes_the_sum()
        self.alone_it_is_what_it_is_without_others()

    def one(self) -> str:
        return self.random.choice(sorted(self.known))

    def free(self) -> str:
        return self.random.choice([name for name in NAMES if name not in self.known])

    def see_base(self) -> None:
        self.base = plain_values(self.base_view())
        self.places = self.weights()

    def base_view(self) -> nn.Module:
        """A copy of the model that computes what the base does."""
        if not self.known:
            return self.model
        with tnpeft.disabled(self.model):
            return copy.deepcopy(self.model)

    # What may be done.

    def attach(self) -> None:
        name, what = self.free(), KINDS[self.random.choice(sorted(KINDS))]
        adapted = {layer for one in self.known.values() for layer in one.kind.layers}
        if self.merged or adapted & {*what.joint}:
            with pytest.raises(AttachError):
                put(self.model, what, name)
            return
        put(self.model, what, name)
        self.known[name] = Known(self.model, name, what)
        self.active = {name: 1.0}
        self.train()

    def activate(self) -> None:
        names = self.random.sample(sorted(self.known), self.random.randint(0, len(self.known)))
        scales = {name: self.random.choice(SCALES) for name in names}
        scales = {self.one(): 1.0} if self.random.random() < 0.4 else scales
        if self.merged:
            with pytest.raises(AttachError):
                tnpeft.activate(self.model, scales)
            return
        tnpeft.activate(self.model, scales)
        self.active = scales

    def train(self) -> None:
        alone, norms = self.alone(), self.random.random() < 0.5
        twin = self.reference() if alone else None
        self.model.train(norms and alone is not None)
        step(self.model, [self.known[name].optimizer for name in self.active])
        self.model.eval()
        for name in self.active:
            self.known[name].look(self.model, name)
        if twin is not None:  # with the same bits as where nothing else is attached
            twin.train(norms)
            step(twin, [torch.optim.SGD(tnpeft.Handle(twin, "twin").parameters(), 0.05)])
            assert same(values_of(twin, "twin"), self.known[alone].values)
            assert same(beside_of(twin, "twin"), self.known[alone].beside)

    def save(self) -> None:
        name, number = self.one(), self.random.randint(0, 1)
        path = self.folder / str(number)
        if self.merged:
            with pytest.raises(tnpeft.AdapterFileError):
                tnpeft.save(self.model, path, name)
            return
        tnpeft.save(self.model, path, name)
        one = self.known[name]
        self.files[number] = (one.kind, one.values, one.beside, self.active.get(name, 1.0))

    def load(self) -> None:
        number, name = self.random.choice(sorted(self.files)), self.free()
        kind, values, beside, scale = self.files[number]
        path = self.folder / str(number)
        adapted = {layer for one in self.known.values() for layer in one.kind.layers}
        if self.merged or adapted & {*kind.joint}:
            with pytest.raises(AttachError):
                tnpeft.load(self.model, path, name)
            return
        tnpeft.load(self.model, path, name)
        self.known[name] = Known(self.model, name, kind)
        assert same(self.known[name].values, values)
        assert same(self.known[name].beside, beside)
        self.active = {name: scale}

    def remove(self) -> None:
        name = self.one()
        if self.merged and name in self.active and len(self.known) > 1:
            with pytest.raises(AttachError):
                tnpeft.detach(self.model, name=name)
            return
        tnpeft.detach(self.model, name=name)
        self.forget(name)

    def keep(self) -> None:
        """Merge one for good."""
        name = self.one()
        scale, one = self.active.get(name, 1.0), self.known[name]
        refused = self.merged and (len(self.known) > 1 or self.active != {name: scale})
        if refused or self.depends_on(name):
            with pytest.raises(AttachError):
                tnpeft.detach(self.model, merge=True, name=name)
            return
        expected = plain_values(self.summed({name: scale}).float())
        old, others = self.base, {other: known for other, known in self.known.items() if other != name}
        tnpeft.detach(self.model, merge=True, name=name)
        self.forget(name)
        self.see_base()
        close(self.base, expected)
        for other, known in others.items():
            moved = {key: own + (self.base[key] - old[key]) for key, own in known.beside.items() if key in one.beside}
            moved = {key: own.clamp(min=0) if key.endswith("var") else own for key, own in moved.items()}
            expected = known.beside | {key: own for key, own in moved.items() if own.is_floating_point()}
            cores = known.values
            known.look(self.model, other)
            assert same(known.values, cores)
            close(known.beside, expected)

    def merge(self) -> None:
        name = self.random.choice([None, self.one()])
        wanted = self.active if name is None else {name: self.active.get(name, 1.0)}
        if self.merged and wanted != self.active:
            with pytest.raises(AttachError):
                tnpeft.merge(self.model, name)
            return
        tnpeft.merge(self.model, name)
        if not self.merged:
            self.merged, self.before, self.active = True, self.active, wanted

    def unmerge(self) -> None:
        tnpeft.unmerge(self.model)
        if self.merged:
            self.merged, self.active, self.before = False, self.before, {}

    def copied(self) -> None:
        twice = self.random.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
        self.model = twice(self.model)
        for name, one in self.known.items():
            one.optimizer = torch.optim.SGD(tnpeft.Handle(self.model, name).parameters(), 0.05)
        self.see_base()

    # What must hold.

    def names_and_scales(self) -> None:
        if not self.known:
            assert self.model.__class__ is Net
            assert not any("_tnpeft_" in key or "adapters" in key for key in self.model.state_dict())
            return
        assert tnpeft.names_of(self.model) == tuple(self.known)
        assert tnpeft.scales_of(self.model) == self.active

    def nobody_else_changed(self) -> None:
        for name, one in self.known.items():
            assert same(values_of(self.model, name), one.values), name
            assert same(beside_of(self.model, name), one.beside), name

    def the_base_is_untouched(self) -> None:
        view = self.base_view()
        assert same(plain_values(view), self.base)
        plain = net()
        plain.load_state_dict(self.base)
        assert torch.equal(view(X), plain(X))
        assert self.weights() == self.places

    def only_what_acts_trains(self) -> None:
        if not self.known:
            assert all(parameter.requires_grad for parameter in self.model.parameters())
            return
        wanted: set[int] = set()
        for name in {} if self.merged else self.active:
            wanted |= {id(core) for own in adapters_of(self.model, name).values() for core in own.trained.values()}
            for key, tensor in trained_of(self.model, name).items():
                trainers = [other for other in self.active if key in trained_of(self.model, other)]
                wanted |= {id(tensor)} if trainers == [name] and self.active[name] == 1.0 else set()
        assert {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad} == wanted

    def it_computes_the_sum(self) -> None:
        if self.known:
            torch.testing.assert_close(
                self.model(X).double(), self.summed(self.active)(X.double()), rtol=1e-3, atol=1e-4
            )

    def alone_it_is_what_it_is_without_others(self) -> None:
        if self.alone():
            assert torch.equal(self.model(X), self.reference()(X))

    # Other models.

    def weights(self) -> dict[str, int]:
        """Where the base's weights lie in memory; not that of `head.2`, which an adapter may train as a whole."""
        layers = {name: plain_modules(self.model)[name] for name in ("first", "wide", "up", "head.0")}
        return {name: own_weight(layer).data_ptr() for name, layer in layers.items()}

    def forget(self, name: str) -> None:
        del self.known[name]
        self.active = {other: scale for other, scale in self.active.items() if other != name}
        self.before.pop(name, None)
        if not self.known:
            self.merged, self.active, self.before = False, {}, {}

    def alone(self) -> str | None:
        """The adapter that alone acts, at scale 1."""
        return next(iter(self.active)) if list(self.active.values()) == [1.0] else None

    def depends_on(self, name: str) -> bool:
        """Whether another adapter is made for a weight that `name` changes."""
        own = self.known[name].kind
        others = [one.kind for other, one in self.known.items() if other != name]
        return any(
            {*own.layers} & {*kind.joint} or (kind.spec == "hira" and {*own.layers, *own.joint} & {*kind.layers})
            for kind in others
        )

    def reference(self) -> nn.Module:
        """A model that has the one active adapter and no other."""
        one, model = self.known[self.alone() or ""], net()
        model.load_state_dict(self.base)
        put(model, one.kind, "twin")
        with torch.no_grad():
            for layer, adapter in adapters_of(model, "twin").items():
                for key, core in adapter.cores.items():
                    core.copy_(one.values[f"{layer}.core.{key}"])
                for key, core in adapter.start.items():
                    core.copy_(one.values[f"{layer}.start.{key}"])
            for key, tensor in {**trained_of(model, "twin"), **statistics_of(model, "twin")}.items():
                tensor.copy_(one.beside[key])
        return tnpeft.merge(model) or model if self.merged else model

    def summed(self, scales: Mapping[str, float]) -> nn.Module:
        """A plain float64 model with all that the scales ask for in its weights."""
        plain = net().double()
        plain.load_state_dict(self.base)
        original = {key: tensor.double() for key, tensor in self.base.items()}
        deltas: dict[str, Tensor] = {}
        for name, scale in scales.items():
            one = self.known[name]
            for key, tensor in one.beside.items():
                deltas[key] = deltas.get(key, 0) + scale * (tensor.double() - original[key])
            for layer in one.kind.layers:
                key = f"{layer}.weight"
                deltas[key] = deltas.get(key, 0) + scale * one.update_of(layer, plain.get_submodule(layer))
        with torch.no_grad():
            for key, tensor in plain.state_dict().items():
                if key in deltas and tensor.is_floating_point():
                    tensor.copy_(original[key] + deltas[key])
                    tensor.clamp_(min=0) if key.endswith("running_var") else None
        return plain


def put(model: nn.Module, kind: Kind, name: str) -> None:
    tnpeft.attach(model, kind.spec, match=list(kind.layers), train=kind.train, name=name)


def close(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if tensor.is_floating_point():  # counts of batches do not add up
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6, msg=key)


# Files go onto a base of which another adapter has become a part meanwhile.
@pytest.mark.filterwarnings("ignore::tnpeft.TnpeftWarning")
@pytest.mark.parametrize("seed", [quick_if(seed < 2, seed) for seed in range(8)])
def test_a_random_life_of_several_adapters(seed, tmp_path):
    life, done = Several(seed, tmp_path), []
    for _ in range(30):
        done.append(life.act())
        try:
            life.check()
        except AssertionError as error:
            raise AssertionError(f"after {', '.join(done)}") from error
