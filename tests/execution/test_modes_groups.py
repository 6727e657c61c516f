"""Models in the factored and hybrid modes: layers that contract their clusters together compute as each does alone."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import FAST, relative
from small import chain, move, quick_if
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from towers import SHARED, Tower, X, adapters, results, same, tower

import tnpeft
from tnpeft.adapters import Adapter
from tnpeft.execution import AdaptedLayer, ForwardPass
from tnpeft.network import Spec
from tnpeft.program import counting
from tnpeft.program.clusters import BatchedCluster, Cluster, ClusterProgram
from tnpeft.surgery import adapters_of


@pytest.fixture
def contracted() -> Iterator[list[int]]:
    """For how many layers at once clusters were contracted, call by call."""
    with counting() as found:
        yield found["clusters"]


@pytest.mark.parametrize("spec", [chain(), chain("zero"), chain(frozen=True), SHARED, "loha", "lora"], ids=str)
@pytest.mark.parametrize("mode", [*FAST, "auto"])
def test_groups_compute_what_layers_do_alone(mode: str, spec: Spec | str):
    dense = results(tower("dense", spec))
    model, alone = tower(mode, spec), tower(mode, spec, alone=True)
    for _ in range(3):
        found = results(model)
        same(found, dense)
        same(found, results(alone))
    start = tower(mode, spec, moved=False)
    torch.manual_seed(0)
    plain = Tower()
    for _ in range(2):
        assert torch.equal(start(X), plain(X))


@pytest.mark.parametrize("mode", FAST)
def test_clusters_that_are_alike_are_contracted_once_in_a_pass(mode: str, contracted: list[int]):
    model = tower(mode)
    results(model)
    clusters = len(contracted)
    assert clusters >= 14
    assert contracted == [1] * clusters  # nothing is known of the first calls
    contracted.clear()
    results(model)
    assert sum(contracted) == clusters
    assert len(contracted) <= 6
    assert max(contracted) >= 4
    contracted.clear()
    gc.collect()  # a pass that is left would keep the graph and the layers
    passes = [one for one in gc.get_objects() if type(one) is ForwardPass]
    assert not [one for one in passes if any(member.layer is model.convs[0] for member in one._groups.members)]
    model(X[:, :, :3, :3])  # another size, other plans, and perhaps the same clusters
    assert sum(contracted) >= clusters
    same(results(model), results(tower("dense")))


@pytest.mark.parametrize("mode", FAST)
def test_optimiser_steps_between_passes_are_seen(mode: str):
    losses = {}
    for chosen in ("dense", mode):
        model = tower(chosen)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-2, weight_decay=0.1)
        losses[chosen] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = (model(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[chosen].append(loss.item())
    assert losses[mode] == pytest.approx(losses["dense"], rel=1e-3)
    assert losses[mode][-1] < 0.9 * losses[mode][0]


@pytest.mark.parametrize("mode", FAST)
def test_a_layer_between_passes_sees_its_cores_as_they_are(mode: str):
    model = tower(mode)
    results(model)
    results(model)
    layer, adapter = model.convs[1], adapters(model)[1]
    before = layer(X)
    move(adapter, 0.5, 9)
    with torch.no_grad():
        expected = nn.functional.conv2d(X, layer.weight, layer.bias, padding=1)
        assert relative(layer(X), expected) < 1e-5
        assert relative(before, expected) > 1e-2
        assert torch.equal(layer(X), layer(X))


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("mode", FAST)
def test_a_pass_that_breaks_off_leaves_nothing_behind(mode: str, error: BaseException):
    model, dense = tower(mode), tower("dense")
    results(model)
    model.fails = error
    with pytest.raises(type(error)):
        model(X)
    model.fails = None
    for one in (model, dense):
        for number, adapter in enumerate(adapters(one)):
            move(adapter, 0.3, 20 + number)
    if isinstance(error, Exception):  # torch runs no hook after an interrupt
        assert relative(model.convs[0](X), dense.convs[0](X)) < 1e-5
    same(results(model), results(dense))


@pytest.mark.parametrize("mode", FAST)
def test_a_layer_may_be_called_twice_or_not_at_all(mode: str):
    """Whatever a pass does not call gets no gradient: a zero would be a step of weight decay and of momentum."""
    model, dense = tower(mode), tower("dense")
    results(model)
    for one in (model, dense):
        one.twice = 1
    same(results(model), results(dense))
    for one in (model, dense):
        one.skips = {0, 3}
    found = results(model)
    same(found, results(dense))
    assert not any(name.startswith(("convs.0", "convs.3")) for name in found)


@pytest.mark.parametrize("mode", FAST)
def test_each_of_several_losses_has_its_own_backward_pass(mode: str):
    """Branches that share no layer share no graph."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    gradients = {}
    for chosen in ("dense", mode):
        torch.manual_seed(0)
        model = Branches()
        tnpeft.attach(model, chain(), match="left|right", mode=chosen)
        for _ in range(2):
            model.zero_grad()
            for output in model(X[0, :, :, 0].T):
                output.square().sum().backward()
        gradients[chosen] = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    same(gradients[mode], gradients["dense"])
    assert len(gradients[mode]) == 6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", FAST)
def test_checkpointing_a_part_of_the_model_changes_nothing(mode: str, reentrant: bool):
    model, dense = tower(mode), tower("dense")
    for _ in range(2):
        same(results(model), results(dense))
    for one in (model, dense):
        one.checkpointed = {1: reentrant, 2: reentrant}
    for _ in range(2):
        same(results(model), results(dense))


@pytest.mark.parametrize("mode", FAST)
def test_passes_with_and_without_gradients_follow_each_other(mode: str):
    model = tower(mode)
    expected = model(X).detach()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with context():
            assert relative(model(X).detach().clone(), expected) < 1e-5
    same(results(model), results(tower("dense")))
    for adapter in (adapters(model)[0], adapters(model)[5]):
        adapter.cores["middle"].requires_grad_(False)
    found = results(model)
    frozen = {name for name, one in model.named_parameters() if name.endswith("middle") and not one.requires_grad}
    assert len(frozen) == 2
    assert frozen.isdisjoint(found)


@pytest.mark.parametrize("mode", FAST)
def test_switching_adapters_between_passes(mode: str):
    model, dense = tower(mode), tower("dense")
    results(model)
    for one in (model, dense):
        tnpeft.attach(
            one, chain("zero"), match=r"convs\.[01]|linears", name="second", mode=mode if one is model else "dense"
        )
        for adapter in adapters_of(one, "second").values():
            move(adapter, 0.2, 7)
    actions: list[Callable[[nn.Module], object]] = [
        lambda one: None,
        lambda one: tnpeft.activate(one, "default"),
        lambda one: tnpeft.activate(one, {"default": 1.0, "second": 0.5}),
        lambda one: tnpeft.activate(one, {"default": 0.5}),
        lambda one: tnpeft.activate(one, "second"),
        lambda one: tnpeft.detach(one, name="default"),
    ]
    for action in actions:
        action(model)
        action(dense)
        for _ in range(2):
            same(results(model), results(dense))
    tnpeft.merge(model)
    tnpeft.merge(dense)
    assert torch.equal(model(X), dense(X))
    tnpeft.unmerge(model)
    with tnpeft.disabled(model):
        torch.manual_seed(0)
        assert torch.equal(model(X), Tower()(X))
    tnpeft.unmerge(dense)
    same(results(model), results(dense))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("mode", FAST)
def test_detaching_leaves_no_hook(mode: str, merge: bool):
    torch.manual_seed(0)
    plain = Tower()
    model = tower(mode)
    tnpeft.attach(model, chain(), match="linears", name="second", mode=mode)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    results(model)
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks), len(model._forward_hooks_always_called)
    assert hooks == (1, 2, 1)
    tnpeft.activate(model, "default")
    expected = model(X)
    tnpeft.detach(model, merge=merge)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    assert len(model._forward_hooks) == 1
    assert not any(isinstance(one, AdaptedLayer) for one in model.modules())
    found = model(X)
    assert torch.equal(found, plain(X)) if not merge else relative(found, expected) < 1e-5
    assert len(calls) == 3


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
@pytest.mark.parametrize("mode", FAST)
def test_copies_of_a_model_have_groups_of_their_own(mode: str, trip: Callable[[Tower], Tower], contracted: list[int]):
    model = tower(mode)
    results(model)
    contracted.clear()
    expected = results(model)
    grouped, other = sorted(contracted), trip(model)
    contracted.clear()
    same(results(other), expected)
    alone = len(contracted)
    assert contracted == [1] * alone
    same(results(other), expected)
    assert sorted(contracted[alone:]) == grouped
    for number, adapter in enumerate(adapters(other)):
        move(adapter, 0.5, number)
    assert relative(other(X), expected["output"]) > 1e-2
    same(results(model), expected)
    tnpeft.detach(other)
    same(results(model), expected)


@pytest.mark.parametrize("mode", FAST)
def test_functional_calls_and_loaded_states_are_seen_by_groups(mode: str):
    model, other = tower(mode), tower(mode)
    for number, adapter in enumerate(adapters(other)):
        move(adapter, 0.5, 30 + number)
        for start in adapter.start.values():
            start.add_(0.1)
    for one in (model, other):
        results(one)
    first, second = model(X), other(X)
    values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert relative(torch.func.functional_call(model, values, (X,)), second) < 1e-6
    assert relative(model(X), first) < 1e-6
    model.load_state_dict(other.state_dict())
    assert relative(model(X), second) < 1e-6
    model.double()
    assert relative(model(X.double()), second) < 1e-5
    model.float()
    assert relative(model(X), second) < 1e-5


@pytest.mark.parametrize("mode", FAST)
def test_files_keep_the_mode(mode: str, tmp_path: Path):
    model = tower(mode)
    expected = results(model)
    tnpeft.save(model, tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    fresh = Tower()
    tnpeft.load(fresh, tmp_path / "adapter.safetensors")
    assert {adapter.mode for adapter in adapters(fresh)} == {mode}
    for _ in range(2):
        same(results(fresh), expected)


@pytest.mark.parametrize("mode", [quick_if(mode == "factored", mode) for mode in FAST])
def test_a_model_with_a_pass_compiles_as_one_graph(mode: str):
    torch.compiler.reset()
    model = tower(mode)
    results(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(compiled(X), model(X)) < 1e-5
    same(results(model), results(tower("dense")))


def test_data_parallel_training_sees_the_same_gradients(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for mode in FAST:
            expected = results(tower("dense"))
            model = tower(mode)
            wrapped = DistributedDataParallel(model)
            for _ in range(3):
                model.zero_grad()
                wrapped(X).square().sum().backward()
                for name, one in model.named_parameters():
                    assert one.grad is None or relative(one.grad, expected[name]) < 1e-5, (mode, name)
                assert sum(one.grad is not None for one in model.parameters()) == len(expected) - 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (12, 8)])
@pytest.mark.parametrize("name", ["quanta_4", "quanta", "lora"])
def test_cores_are_stacked_in_any_order_of_legs(name: str, size: tuple[int, int]):
    """Permuted cores with legs of one entry seem to be in a channels-last format, which a stack would take on."""
    model = nn.Sequential(*(nn.Linear(*size) for _ in range(2)))
    tnpeft.attach(model, name, match=r"\d", mode="factored")
    move(model)
    x = torch.randn(3, size[0])
    for layer in model:
        layer(x)
    adapters = [layer.adapter("default") for layer in model]
    factored = model[0].calls("default").last.plan
    copies = factored.network.start == "frozen_copy"
    program = ClusterProgram(factored)
    for cluster, own in program.clusters:

        def stacked(chosen: list[Adapter], made: str, own: tuple[int, ...] = own) -> list[Tensor]:
            return [getattr(adapter, made)()[core] for core in own for adapter in chosen]

        def contracted(chosen: list[Adapter], cluster: Cluster = cluster, stacked: Any = stacked) -> list[Tensor]:
            code = BatchedCluster(cluster, len(chosen))
            known = code.start(stacked(chosen, "start_tensors") if copies else [])
            return [one.flatten() for one in code(stacked(chosen, "core_tensors"), known)]

        alone = [contracted([adapter]) for adapter in adapters]
        together = contracted(adapters)
        for place, one in enumerate(together):
            assert relative(one, alone[place % 2][place // 2]) < 1e-5
