"""Models whose adapters have derived and index cores, through all that models go through; oracles are the formulas."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from formulas_recent import METHODS
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft.adapters import Adapter

PARAMS: dict[str, dict[str, Any]] = {
    "oft": {"b": 4}, "boft_2": {"b": 4}, "hra": {"rank": 4}, "shira": {"r": 1}, "supertuning": {"sparsity": 0.9},
    "vblora": {"length": 4, "vectors": 6, "r": 2}, "delora": {"r": 2}, "c3a": {"b": 4}, "deft": {"rank": 2},
    "adamss": {"clusters": 3, "s": 2, "r": 3}, "psoft": {"r": 2}, "gralora": {"r": 4}, "waveft": {"waves": 30},
}  # fmt: skip
SOME = ("oft", "shira", "vblora", "delora", "deft", "waveft")  # a map of each kind, both starts, cores that are shared
ALL = tuple(PARAMS)
ANY_LAYER = tuple(name for name in ALL if name != "waveft")
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
SIDE = 16


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE))


def move(model: nn.Module, seed: int = 0, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(step.to(parameter.dtype))


def attached(model: nn.Module, spec: str, match: Any = "all", **options: Any) -> tnpeft.Handle:
    return tnpeft.attach(model, spec, match=match, **PARAMS[spec], **options)


def adapted(spec: str, seed: int = 0) -> tuple[nn.Sequential, tnpeft.Handle]:
    """A model after some training, moved so far that a wrong map shows."""
    model = base()
    handle = attached(model, spec, seed=seed)
    move(model)
    return model, handle


def canonical(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in // groups, k...) of a stored weight; its own inverse."""
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)]) if transposed else weight


def formula(adapter: Adapter, weight: Tensor) -> Tensor:
    """scale * (T(cores) - T(start)) in float64, in the shape of the canonical base weight, by the spec's formula."""
    network, weight = adapter.network, weight.detach().double()
    dense, flat = METHODS[network.spec.name][0], weight.reshape(*weight.shape[:2], -1)

    def value(cores: Mapping[str, Tensor]) -> Tensor:
        wide = {name: core.detach().double() if core.is_floating_point() else core for name, core in cores.items()}
        return dense(wide, flat, tuple(weight.shape)).reshape(weight.shape)

    delta = value(adapter.cores)
    if network.start == "frozen_copy":
        delta = delta - value({**adapter.cores, **adapter.start})
    return network.scale * delta


def oracle(handles: Mapping[tnpeft.Handle, float], model: Callable[[], nn.Module] = base) -> nn.Module:
    """The plain model in float64 with the summed weights."""
    plain = model().double()
    for layer in dict.fromkeys(layer for handle in handles for layer in handle.adapters):
        module = plain.get_submodule(layer)
        weight = canonical(module, module.weight.detach())
        total = sum(scale * formula(handle.adapters[layer], weight.float()) for handle, scale in handles.items())
        with torch.no_grad():
            module.weight.add_(canonical(module, total))
    return plain


def close(found: Tensor, exact: Tensor, tolerance: float = 2e-4) -> None:
    found, exact = found.detach().double(), exact.detach().double()
    assert float((found - exact).abs().max()) <= tolerance * float(exact.abs().max())


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("spec", ALL)
def test_several_adapters_merged_disabled_and_detached(spec: str):
    model = base()
    first = attached(model, spec, name="first")
    move(model)
    close(model(X), oracle({first: 1.0})(X.double()))
    second = attached(model, spec, name="second", seed=5)
    move(model, 3)
    tnpeft.activate(model, {"first": 0.5, "second": 2.0})
    exact = oracle({first: 0.5, second: 2.0})(X.double())
    close(model(X), exact)
    tnpeft.merge(model)
    close(model(X), exact)
    tnpeft.unmerge(model)
    with tnpeft.disabled(model):
        assert torch.equal(model(X), base()(X))
    with tnpeft.rows(model, ["first", "second", None, "first"]):
        mixed = model(X)
    one, other = (oracle({handle: scale})(X.double()) for handle, scale in ((first, 0.5), (second, 2.0)))
    for row, expected in enumerate((one, other, base()(X), one)):
        close(mixed[row], expected[row])
    tnpeft.activate(model, "first")
    close(model(X), oracle({first: 1.0})(X.double()))
    tnpeft.detach(model)
    assert torch.equal(model(X), base()(X))


@pytest.mark.parametrize("spec", SOME)
def test_gradients_while_accumulating_and_checkpointing(spec: str):
    model, _ = adapted(spec)
    wanted = gradients(model, lambda: model(X))
    with tnpeft.accumulating(model):
        model.zero_grad()
        for half in X.chunk(2):
            model(half).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            close(parameter.grad, wanted[name])
    for reentrant in (False, True):
        x = X.clone().requires_grad_()
        found = gradients(model, lambda x=x, how=reentrant: checkpoint(model, x, use_reentrant=how))
        for name, gradient in wanted.items():
            close(found[name], gradient)


@pytest.mark.parametrize("spec", ALL)
def test_state_dicts_averages_copies_and_pickles(spec: str):
    model, handle = adapted(spec)
    output = model(X)
    for assign in (False, True):
        other, _ = adapted(spec, seed=4)
        other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=assign)
        close(other(X), output, 1e-6)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    for seed in (1, 2):
        before = [parameter.detach().clone() for parameter in average.module.parameters()]
        average.update_parameters(model)
        if seed == 2:
            averaged = zip(average.module.parameters(), before, model.parameters(), strict=True)
            for mean, old, new in averaged:
                torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)
        move(model, seed)
    mean = tnpeft.Handle(average.module, "default")
    close(average(X), oracle({mean: 1.0})(X.double()))
    output = model(X)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
        close(copied(X), output, 1e-6)
        move(copied, 7)
        close(model(X), output, 1e-6)  # nothing is shared
        assert {name: core.dtype for name, core in mean.adapters["0"].cores.items()} == {
            name: core.dtype for name, core in handle.adapters["0"].cores.items()
        }


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("spec", ALL)
def test_casts_keep_cores_wide_and_places_whole(spec: str):
    model, handle = adapted(spec)
    exact = oracle({handle: 1.0})(X.double())
    kinds = {name: core.dtype for name, core in handle.adapters["0"].cores.items()}
    places = {name: core.clone() for name, core in handle.adapters["0"].cores.items() if core.dtype == torch.int64}
    with torch.autocast("cpu", torch.bfloat16):
        close(model(X), exact, 0.1)
    model.half()
    assert {name: core.dtype for name, core in handle.adapters["0"].cores.items()} == kinds
    close(model(X.half()), exact, 0.03)
    model.double()
    for name, core in handle.adapters["0"].cores.items():
        assert core.dtype == (torch.int64 if name in places else torch.float64)
        assert name not in places or torch.equal(core, places[name])
    model.to("cpu", torch.float32)
    close(model(X), exact, 0.03)


@pytest.mark.parametrize("spec", ALL)
def test_a_model_on_meta_gets_the_values_that_it_would_have_had(spec: str):
    with torch.device("meta"):
        model = base()
    handle = attached(model, spec)
    assert model(X.to("meta")).shape == X.shape
    model.to_empty(device="cpu")
    plain, wanted = base(), attached(base(), spec)
    model.load_state_dict(plain.state_dict(), strict=False)
    for layer, adapter in handle.adapters.items():
        adapter.reset_parameters(plain.get_submodule(layer).weight)
        for name, core in adapter.cores.items():
            assert torch.equal(core, wanted.adapters[layer].cores[name])
    close(model(X), plain(X), 1e-6)


@pytest.mark.parametrize("spec", ALL)
def test_functorch_and_second_derivatives(spec: str):
    model, _ = adapted(spec)
    params = {name: core.detach() for name, core in model.named_parameters() if core.requires_grad}
    wanted = gradients(model, lambda: model(X))

    def loss(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(params), (x,)).square().sum()

    alike = torch.func.grad(loss)(params, X)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, X[:, None])
    generator = torch.Generator().manual_seed(4)
    along = {name: torch.randn(core.shape, generator=generator) for name, core in params.items()}
    _, slope = torch.func.jvp(lambda params: loss(params, X), (params,), (along,))
    assert slope.dtype == torch.float32
    close(slope, sum((wanted[name] * step).sum() for name, step in along.items()), 1e-3)
    for name, gradient in wanted.items():
        close(alike[name], gradient, 1e-3)
        close(each[name].sum(0), gradient, 1e-3)

    model.double()
    cores = [core for core in model.parameters() if core.requires_grad]

    def sized() -> Tensor:
        first = torch.autograd.grad(model(X.double()).square().sum(), cores, create_graph=True)
        return sum(grad.square().sum() for grad in first)

    second = torch.autograd.grad(sized(), cores)
    steps = [torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in cores]
    ends = []
    for size in (1e-5, -2e-5):
        with torch.no_grad():
            for core, step in zip(cores, steps, strict=True):
                core.add_(size * step)
        ends.append(float(sized().detach()))
    along_steps = sum(float((grad * step).sum()) for grad, step in zip(second, steps, strict=True))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(along_steps, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("spec", SOME)
def test_threads_and_ties(spec: str, tmp_path: Path):
    model, _ = adapted(spec)
    model(X)
    output, outputs = model(X), [Tensor()] * 4

    def run(place: int) -> None:
        for _ in range(3):
            outputs[place] = model(X)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in outputs:
        close(other, output, 1e-6)

    def tied() -> nn.Sequential:
        model = base()
        model[2] = model[0]
        return model

    model = tied()
    handle = attached(model, spec)
    move(model)
    assert list(handle.adapters) == ["0", "4"]
    close(model(X), oracle({handle: 1.0}, tied)(X.double()))
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = tied()
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    close(loaded(X), model(X), 1e-6)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("kind", ["input", "bond", "module"])
def test_dropout_acts_in_training_alone(spec: str, kind: str):
    model = base()
    try:
        handle = attached(model, spec, dropout={kind: 0.5})
    except tnpeft.AttachError as error:
        if kind != "bond" or "expected a bond of two entries or more" not in str(error):
            raise
        return
    move(model)
    model.train()
    torch.manual_seed(0)
    assert len({float(model(X).detach().sum()) for _ in range(8)}) > 1
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model, lambda: model(X)).values())
    model.eval()
    close(model(X), oracle({handle: 1.0})(X.double()))


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.ConvTranspose2d(16, 32, (2, 3), groups=2), (2, 16, 5, 5)),
    (lambda: nn.Conv1d(32, 16, 3, groups=2, padding=1, padding_mode="circular"), (2, 32, 7)),
    (lambda: nn.Conv3d(16, 16, 2), (1, 16, 4, 4, 4)),
]


@pytest.mark.parametrize("spec", ANY_LAYER)
@pytest.mark.parametrize(("make", "shape"), LAYERS, ids=["transposed", "groups", "volumes"])
def test_convolutions(spec: str, make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path):
    def plain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(make())

    model = plain()
    handle = attached(model, spec)
    move(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = oracle({handle: 1.0}, plain)(x.double())
    close(model(x), exact)
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = plain()
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    close(loaded(x), exact)
    tnpeft.merge(model)
    close(model(x), exact)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, SIDE, SIDE) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.w, x)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("axes", ["e o i", "e i o"])
def test_stacks_of_slices(spec: str, axes: str, tmp_path: Path):
    model = Experts()
    handle = attached(model, spec, match=(), parameters={"w": axes})
    close(model(X), Experts()(X), 1e-6)
    move(model)
    (adapter,), weight = handle.adapters.values(), Experts().w.detach()
    turned = weight.transpose(1, 2) if axes == "e i o" else weight
    deltas = []
    for place in range(3):
        shared = {core.name for core in adapter.network.cores if core.shared is not None}

        def sliced(cores: Mapping[str, Tensor], shared: set[str] = shared, place: int = place) -> dict[str, Tensor]:
            return {name: core if name in shared else core[place] for name, core in cores.items()}

        one = _Slice(adapter, sliced(adapter.cores), sliced(adapter.start))
        deltas.append(formula(one, turned[place]))  # type: ignore[arg-type]
    delta = torch.stack(deltas)
    delta = delta.transpose(1, 2) if axes == "e i o" else delta
    exact = torch.einsum("eoi,bi->beo", weight.double() + delta, X.double())
    close(model(X), exact)
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = Experts()
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    close(loaded(X), exact)


class _Slice:
    """An adapter of one slice, as the formula asks it."""

    def __init__(self, adapter: Adapter, cores: dict[str, Tensor], start: dict[str, Tensor]) -> None:
        self.network, self.cores, self.start = adapter.network, cores, start


@pytest.mark.parametrize("spec", ALL)
def test_embeddings_and_computed_weights(spec: str, tmp_path: Path):
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(32, SIDE))
    weight, ids = table[0].weight.detach().clone(), torch.tensor([[0, 31, 7], [7, 7, 2]])
    handle = attached(table, spec, match=["0"])
    move(table)
    delta = formula(handle.adapters["0"], weight.T).T
    close(table(ids), nn.functional.embedding(ids, weight.double() + delta))

    def normed() -> nn.Sequential:  # a base whose weight is made anew whenever it is asked for
        model = base()
        parametrizations.weight_norm(model[2])
        return model

    model, start = normed(), normed()
    handle = attached(model, spec)
    close(model(X), start(X), 1e-6)
    move(model)
    exact = oracle({handle: 1.0})(X.double())
    close(model(X), exact)
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = normed()
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    close(loaded(X), exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("spec", SOME)
def test_exported_traced_and_compiled(spec: str):
    model, handle = adapted(spec)
    exact = oracle({handle: 1.0})(X.double())
    wanted = gradients(model, lambda: model(X))
    close(torch.export.export(model, (X,)).module()(X), exact)
    close(torch.jit.trace(model, X, check_trace=False)(X), exact)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(X), exact)
    for name, gradient in gradients(model, lambda: compiled(X)).items():
        close(gradient, wanted[name], 1e-3)
    move(model, 9)
    close(compiled(X), oracle({handle: 1.0})(X.double()))
    tnpeft.merge(model)
    close(torch.export.export(model, (X,)).module()(X), model(X), 1e-6)
