"""`tnpeft.accumulating`: what is made of the cores is made once, and every gradient is what it is without."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small import Net, bits, chain, net, net_input, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft import AttachError, ExecutionError
from tnpeft.program import counting
from tnpeft.surgery.adapted_model import record_on

MODES = ("dense", "hybrid", "factored")
WRITTEN = (
    "layer '{layer}': weights inside `tnpeft.accumulating`: expected the values of the first forward pass, found "
    "values that were written since, as by an optimiser step. Step the optimiser after the context, and open one for "
    "each optimiser step."
)

LINEAR: dict[str, dict[str, Any]] = {"fourierft": {}, "metatt": {"scopes": {"layer": r"(\d)", "matrix": r"()\d"}}}


class Twins(nn.Module):
    """Three layers of one signature, which share a contraction, one of another, and a Linear."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList([nn.Conv3d(4, 4, 3, padding=1) for _ in range(3)])
        self.down = nn.Conv3d(4, 6, 3, stride=2)
        self.head = nn.Linear(6, 4)
        self.reentrant = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            if self.reentrant is None:
                x = conv(x).relu()
            else:
                x = checkpoint(lambda y, conv=conv: conv(y).relu(), x, use_reentrant=self.reentrant)
        return self.head(self.down(x).mean((2, 3, 4)))


@pytest.fixture
def made() -> Iterator[dict[str, list[int]]]:
    """The contractions to delta weights and to clusters, and of clusters to delta weights."""
    with counting() as found:
        yield found


def times(made: dict[str, list[int]]) -> dict[str, int]:
    """How often each was run."""
    return {what: len(layers) for what, layers in made.items()}


def inputs(steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 5, 5, 5, generator=generator, requires_grad=True) for _ in range(steps)]


def moved(model: nn.Module) -> nn.Module:
    """The model as training leaves it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def twins(mode: str, spec: Any = None, checkpointed: bool | None = None, **options: Any) -> nn.Module:
    model = Twins(checkpointed)
    tnpeft.attach(model, spec or chain(), match=r"convs|down|head", mode=mode, **options)
    return moved(model)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def micro_steps(model: nn.Module, xs: list[Tensor], once: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients of the inputs and, summed over the steps, those of everything trained."""
    model.zero_grad()
    for x in xs:
        x.grad = None
    outputs = []
    total: Any = 0
    for x in xs:
        out = model(x)
        outputs.append(out.detach())
        loss = out.square().sum()
        if once:
            total = total + loss
        else:
            loss.backward()
    if once:
        total.backward()
    found = {f"output {place}": out for place, out in enumerate(outputs)}
    found |= {f"input {place}": x.grad for place, x in enumerate(xs)}
    return found | {name: parameter.grad.clone() for name, parameter in trained(model).items()}


def assert_same(model: nn.Module, xs: list[Tensor], once: bool = False, exact: bool = True) -> None:
    """Inside is as outside, to the bit."""
    micro_steps(model, xs)  # layers that have run once are grouped
    outside = micro_steps(model, xs, once)
    with tnpeft.accumulating(model):
        inside = micro_steps(model, xs, once)
    if exact:
        assert same_bits(outside, inside)
    else:
        torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_every_micro_step_has_its_own_gradients(mode: str, once: bool):
    assert_same(twins(mode), inputs(), once)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["dora", "hira", "glora", "vera", "lotr", "loha", "lora_xs", "fourierft", "metatt"])
def test_the_whole_language_is_kept(spec: str, mode: str):
    linear = spec in LINEAR
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))) if linear else Twins()
    tnpeft.attach(model, spec, match=r"\d", mode=mode, **LINEAR.get(spec, {}))
    xs = [torch.randn(3, 6, requires_grad=True) for _ in range(3)] if linear else inputs()
    assert_same(moved(model), xs)


def test_contractions_are_made_once(made: dict[str, list[int]]):
    expected = {
        # 5 layers; what is alike is contracted together: three layers, and their clusters with one of the fourth
        "dense": {"deltas": 3},
        "hybrid": {"clusters": 5, "merges": 5},
        "factored": {"clusters": 5},
    }
    for mode, counts in expected.items():
        model, xs = twins(mode), inputs(4)
        model(xs[0])
        made.clear()
        with tnpeft.accumulating(model):
            micro_steps(model, xs)
            with torch.no_grad():
                model(xs[0])
        assert times(made) == counts, mode
        made.clear()
        micro_steps(model, xs)
        assert times(made) == {name: 4 * count for name, count in counts.items()}, mode
        with tnpeft.accumulating(model):
            made.clear()
            micro_steps(model, xs)
        assert times(made) == counts, mode  # nothing was kept from the first context


def test_a_pass_without_gradients_keeps_for_one_with(made: dict[str, list[int]]):
    model, (x, *_) = twins("dense"), inputs()
    model(x)
    outside = micro_steps(model, [x])
    made.clear()
    with tnpeft.accumulating(model):
        with torch.no_grad():
            assert torch.equal(model(x), outside["output 0"])
        assert same_bits(micro_steps(model, [x]), outside)
        assert times(made) == {"deltas": 3}
        with torch.inference_mode():
            assert torch.equal(model(x), outside["output 0"])
    assert times(made) == {"deltas": 6}  # tensors of inference mode are not kept


@pytest.mark.parametrize("mode", MODES)
def test_a_single_layer_keeps_its_own(mode: str, made: dict[str, list[int]]):
    model = twins(mode)
    layer = model.convs[0]
    xs = inputs()
    outside = micro_steps(layer, xs)
    made.clear()
    with tnpeft.accumulating(model):
        assert same_bits(micro_steps(layer, xs), outside)
    once = {"dense": {"deltas": 1}, "hybrid": {"clusters": 2, "merges": 1}, "factored": {"clusters": 2}}
    assert times(made) == once[mode]


def test_inputs_of_several_sizes_share_what_they_can(made: dict[str, list[int]]):
    model = twins("hybrid")
    wide = [torch.randn(1, 4, 7, 6, 5, requires_grad=True), *inputs(2)]
    micro_steps(model, wide)
    outside = micro_steps(model, wide)
    made.clear()
    with tnpeft.accumulating(model):
        assert same_bits(micro_steps(model, wide), outside)
    assert len(made["merges"]) < 3 * 5


@pytest.mark.parametrize("scales", [{"one": 1.0, "two": 0.5}, {"one": 0.5}, {}])
def test_several_adapters_and_scales(scales: dict[str, float], made: dict[str, list[int]]):
    model = Twins()
    for name in ("one", "two"):
        tnpeft.attach(model, chain(), match=r"convs", name=name, mode="factored")
        moved(model)
    tnpeft.activate(model, scales)
    assert_same(model, inputs())
    made.clear()
    with tnpeft.accumulating(model):
        micro_steps(model, inputs())
    assert times(made) == ({"deltas": 3 * len(scales)} if scales else {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside(mode: str, reentrant: bool, made: dict[str, list[int]]):
    model, xs = twins(mode, checkpointed=reentrant), inputs()
    # Called again, a hybrid layer takes the weight of its first call, where it stood in a group.
    assert_same(model, xs, exact=not reentrant)
    contracted = {"dense": 1, "hybrid": 2, "factored": 2}[mode]  # of a layer
    made.clear()
    with tnpeft.accumulating(model):
        micro_steps(model, xs)
    count = len(made["deltas"] + made["clusters"])
    if reentrant:  # hooks nothing
        assert count <= 5 * contracted + 1  # five layers, and perhaps a group
    else:  # three layers are called twice in each step and keep nothing, two are contracted once
        assert 3 * 3 * 2 * contracted <= count <= (3 * 3 * 2 + 2) * contracted


def copied_when_saved() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor)


@pytest.mark.parametrize("hooks", [torch.autograd.graph.save_on_cpu, copied_when_saved])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_kept_within_hooks_on_saved_tensors(mode: str, hooks: Any, made: dict[str, list[int]]):
    """Nor served: what a pass saves goes through its own hooks, as without the context."""
    model, xs = twins(mode), inputs()
    with hooks():
        micro_steps(model, xs)
        made.clear()
        outside, counts = micro_steps(model, xs), times(made)
        with tnpeft.accumulating(model):
            made.clear()
            assert same_bits(outside, micro_steps(model, xs))
            assert times(made) == counts
            assert not record_on(model).results.cache._results


@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_saved_tensors_see_what_one_pass_saves(mode: str):
    model, (x, *_) = twins(mode), inputs()
    seen: list[Tensor] = []

    def count() -> int:
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda t: t):
            model(x)
        return len(seen)

    model(x)
    without = count()
    with tnpeft.accumulating(model):
        model(x)  # keeps
        assert count() == without
        with torch.autograd.graph.save_on_cpu():
            micro_steps(model, [x])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_other_dtypes_and_autocast(mode: str, dtype: torch.dtype):
    model = Twins().to(dtype)
    tnpeft.attach(model, chain(), match=r"convs|down|head", mode=mode)
    assert_same(moved(model), [x.detach().to(dtype).requires_grad_() for x in inputs()])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(twins(mode), inputs())


def test_biases_and_norms_train_beside():
    model = net()
    tnpeft.attach(model, chain(), match=r"first|wide|up|head\.0", train={"bias": "adapted", "norm": True})
    xs = [net_input(seed).requires_grad_() for seed in range(3)]
    assert_same(moved(model), xs)


# The end of what is kept.


def changes() -> Iterator[tuple[str, Callable[[nn.Module], object]]]:
    saved = bits(twins("dense"))
    yield "load_state_dict", lambda model: model.load_state_dict(saved)
    yield "to", lambda model: model.to(torch.float64).to(torch.float32)
    yield "reset_parameters", lambda model: [layer.reset_parameters() for layer in (*model.convs, model.head)]
    yield "activate", lambda model: tnpeft.activate(model, {"default": 0.5})
    yield "merge", tnpeft.merge
    yield "attach", lambda model: tnpeft.attach(model, chain("zero"), match="convs", name="other")
    yield "detach", tnpeft.detach
    yield "freeze", lambda model: trained(model)["convs.0.adapters.default.core_left"].requires_grad_(False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "change"), [pytest.param(*pair, id=pair[0]) for pair in changes()])
def test_a_change_of_the_model_is_seen(name: str, change: Callable[[nn.Module], object], mode: str):
    model, other, xs = twins(mode), twins(mode), inputs(1)
    moved(model)
    other.load_state_dict(model.state_dict())
    micro_steps(model, xs), micro_steps(other, xs)  # grouped from here on
    with tnpeft.accumulating(model):
        model(xs[0])
        change(model)
        change(other)
        with torch.no_grad():
            assert torch.equal(model(xs[0]), other(xs[0]))
        if trained(model):
            assert same_bits(micro_steps(model, xs), micro_steps(other, xs))


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_dropped_at_the_end(mode: str):
    model, (x, *_) = twins(mode), inputs()
    cache = record_on(model).results.cache
    with tnpeft.accumulating(model):
        loss = model(x).sum()
        assert cache.opened
        assert cache._results
    assert not cache.opened
    assert not cache._results
    loss.backward()  # it holds what it needs
    with pytest.raises(IndexError), tnpeft.accumulating(model):
        fails(model, x)
    assert not cache.opened
    assert not cache._results
    move = trained(model)["convs.0.adapters.default.core_left"]
    before = model(x)
    with torch.no_grad():
        move.add_(1)
    assert not torch.equal(model(x), before)


def fails(model: nn.Module, x: Tensor) -> None:
    model(x)
    raise IndexError


def test_contexts_nest(made: dict[str, list[int]]):
    model, (x, *_) = twins("dense"), inputs()
    model(x)
    made.clear()
    with tnpeft.accumulating(model):
        with tnpeft.accumulating(model):
            model(x)
        model(x)
        with tnpeft.accumulating(model):
            model(x)
    assert times(made) == {"deltas": 3}
    model(x)
    assert times(made) == {"deltas": 6}


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_made_inside_keep_nothing(mode: str):
    model, (x, *_) = twins(mode), inputs()
    with tnpeft.accumulating(model):
        out = model(x)
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copied, loaded):
            torch.testing.assert_close(other(x), out)  # its first pass groups nothing
            with torch.no_grad():
                trained(other)["convs.0.adapters.default.core_left"].add_(1)
            assert not torch.allclose(other(x), out)  # and it may be trained
        torch.testing.assert_close(model(x), out)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimiser_step_inside_is_refused(mode: str):
    model, (x, *_) = twins(mode), inputs()
    optimiser = torch.optim.SGD(trained(model).values(), 0.1)
    with tnpeft.accumulating(model):
        micro_steps(model, [x])
        optimiser.step()
        with pytest.raises(ExecutionError) as caught:
            model(x)
        assert str(caught.value) == WRITTEN.format(layer="convs.0")
    micro_steps(model, [x])


def test_a_base_weight_that_is_written_to_is_refused():
    model, (x, *_) = twins("dense"), inputs()
    with tnpeft.accumulating(model):
        model(x)
        with torch.no_grad():
            model.down.base.weight.mul_(2)
        with pytest.raises(ExecutionError) as caught:
            model(x)
    assert str(caught.value) == WRITTEN.format(layer="down")


def test_buffers_may_be_written_with_their_own_values(made: dict[str, list[int]]):
    model, (x, *_) = twins("dense", chain(frozen=True)), inputs()  # as DistributedDataParallel broadcasts them
    model(x)
    made.clear()
    with tnpeft.accumulating(model):
        for _ in range(2):
            model(x)
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())
    assert times(made) == {"deltas": 3}


def test_writing_to_an_effective_weight_spoils_nothing():
    model, (x, *_) = twins("dense"), inputs()
    before = model(x)
    with tnpeft.accumulating(model), torch.no_grad():
        model.down.weight.mul_(2)
        assert torch.equal(model(x), before)


def test_second_derivatives_are_refused_or_right():
    model, (x, *_) = twins("dense"), inputs()
    (expected,) = torch.autograd.grad(penalty(model, x), trained(model)["down.adapters.default.core_left"])
    with tnpeft.accumulating(model):
        (found,) = torch.autograd.grad(penalty(model, x), trained(model)["down.adapters.default.core_left"])
        torch.testing.assert_close(found, expected)
        with pytest.raises(ExecutionError) as caught:
            torch.autograd.grad(model(x).square().sum(), list(trained(model).values()), create_graph=True)
    assert str(caught.value) == (
        "double backward through kept weights: expected gradients that are not differentiated, found "
        "`create_graph=True`. Leave `tnpeft.accumulating` for second derivatives."
    )


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    """The squared gradient of the input, which the cores shape."""
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return gradient.square().sum()


def test_other_tensors_in_the_cores_place():
    model, (x, *_) = twins("factored"), inputs()
    name = "down.adapters.default.core_left"
    other = trained(model)[name].detach().clone().add_(1)
    model(x)
    expected = torch.func.functional_call(model, {name: other}, (x,))
    with tnpeft.accumulating(model):
        plain = model(x)
        assert torch.equal(torch.func.functional_call(model, {name: other}, (x,)), expected)
        assert not torch.equal(plain, expected)
        assert torch.equal(model(x), plain)


def test_hooks_on_cores_run_once_a_step():
    model, xs = twins("dense"), inputs(2)
    core = trained(model)["down.adapters.default.core_left"]
    core.register_hook(lambda gradient: 2 * gradient)
    assert_same(model, xs)


def test_nothing_attached_is_an_error():
    with pytest.raises(AttachError) as caught, tnpeft.accumulating(net()):
        pass
    assert str(caught.value) == (
        "model: expected an attached adapter, found none. Attach one with `tnpeft.attach`, or pass the whole model "
        "that it was attached to."
    )


def test_a_compiled_graph_keeps_nothing(made: dict[str, list[int]]):
    model, (x, *_) = twins("dense"), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with tnpeft.accumulating(compiled):
        out = compiled(x)
        with torch.no_grad():
            trained(model)["down.adapters.default.core_left"].add_(1)
        assert not torch.equal(compiled(x), out)
    assert not made


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", MODES)
def test_distributed_data_parallel(mode: str, process_group: None, made: dict[str, list[int]]):
    model, xs = twins(mode, chain(frozen=True)), inputs()
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    plain(xs[0])
    expected = micro_steps(plain, xs)
    wrapped(xs[0]).sum().backward()
    model.zero_grad()
    made.clear()
    with tnpeft.accumulating(wrapped):
        for place, x in enumerate(xs):
            with nullcontext() if place == len(xs) - 1 else wrapped.no_sync():
                wrapped(x).square().sum().backward()
    assert len(made["deltas"] + made["clusters"]) == (3 if mode == "dense" else 5)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-6)


def test_the_model_trains_as_without():
    models = [twins("auto"), twins("auto")]
    for model, kept in zip(models, (True, False), strict=True):
        optimiser = torch.optim.Adam(trained(model).values(), 1e-2)
        for _ in range(3):
            with tnpeft.accumulating(model) if kept else nullcontext():
                micro_steps(model, inputs(2))
            optimiser.step()
    assert same_bits(bits(models[0]), bits(models[1]))


def test_a_net_of_all_kinds_of_layers():
    model: Net = net()
    tnpeft.attach(model, chain(), match=r"first|wide|up|head\.0", mode="auto")
    assert_same(moved(model), [net_input(seed).requires_grad_() for seed in range(3)])
