"""The checks: each takes a subject and raises Mismatch if the adapter is not what its spec says."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tnpeft.errors import TnpeftError
from tnpeft.execution import AdaptedLayer
from tnpeft.execution.dispatch import running_of
from tnpeft.io import load, save
from tnpeft.network import BoundCore
from tnpeft.recipe import Handle
from tnpeft.schedule import MODES
from tnpeft.spec.pattern import expand, expand_axes
from tnpeft.surgery import detach, disabled, merge, unmerge
from tnpeft.verify.exact import Exact
from tnpeft.verify.formula import formula_value
from tnpeft.verify.map_checks import check_difference, check_maps
from tnpeft.verify.model_under_test import Mismatch, Skip, Stack, Subject, adapted_layers, require_close, require_equal
from tnpeft.verify.oracle import canonical, entry

__all__ = ["CHECKS", "Check"]

ENTRIES = 24  # numbers of a weight that are followed index by index


@dataclass(frozen=True)
class Check:
    """A property by its name on the command line; `title` says what holds."""

    name: str
    title: str
    run: Callable[[Subject], None]


def check_sizes(subject: Subject) -> None:
    network, layer = subject.network, subject.case.build()
    axes = list(layer.weight.shape)  # type: ignore[arg-type]
    if network.layer.input_first:
        axes[:2] = [subject.case.out_channels, subject.case.in_channels // subject.case.groups]
    padded = any(rule.expression.pads for rule in subject.spec.sizes)
    for term in network.terms:
        for number, (size, legs) in enumerate(zip(axes, term.weight, strict=True)):
            product = math.prod(network.sizes[leg] for leg in legs)
            if product != size and not (padded and size < product):
                raise Mismatch(
                    f"legs ({' '.join(legs)}) of weight axis {number} multiply to {product}, expected {size}"
                )
    (adapted, *_) = adapted_layers(subject.attached())
    cores = adapted.adapter("default").cores
    bound = {core.name: (core.legs, core.unfolded) for core in network.cores}
    bound |= {core.name: (core.legs, core.shape) for core in network.derived}
    for core in subject.spec.cores:
        legs, sizes = bound[core.name]
        require_equal(f"the legs of core '{core.name}'", legs, expand(core.legs, len(subject.case.kernel_size)))
        shape = tuple(network.sizes[leg] for leg in legs)
        require_equal(f"the sizes of core '{core.name}'", sizes, shape)
        if core.name in cores:
            stored = expand_axes(core.axes, len(subject.case.kernel_size))
            shape = tuple(math.prod(network.sizes[leg] for leg in axis) for axis in stored)
            require_equal(f"the shape of core '{core.name}'", tuple(cores[core.name].shape), shape)


def check_entries(subject: Subject) -> None:
    model = subject.attached(dtype=subject.working, moved=True)
    for layer in adapted_layers(model):
        adapter = layer.adapter("default")
        with torch.no_grad():
            found = adapter.network_weight()
            cores = {name: core.detach() for name, core in Exact(model).cores(layer).items()}
            bound = float(Exact(model, magnitude=True).network_weight(layer).abs().max())
        require_equal("the shape of T", tuple(found.shape), tuple(layer.base.weight.shape))
        for position in _positions(tuple(found.shape), subject.case.seed):
            exact = entry(adapter.network, cores, position)
            if not abs(float(found[position]) - exact) <= subject.tolerance * max(bound, 1e-30):
                raise Mismatch(f"T{list(position)} is {float(found[position]):.8g}, by its index formula {exact:.8g}")


def _positions(shape: tuple[int, ...], seed: int) -> Iterator[tuple[int, ...]]:
    """The first and last entries and some between them."""
    choose = random.Random(seed)
    yield tuple(0 for _ in shape)
    yield tuple(size - 1 for size in shape)
    for _ in range(min(ENTRIES, math.prod(shape))):
        yield tuple(choose.randrange(size) for size in shape)


def check_start(subject: Subject) -> None:
    _check_weights_at_start(subject)
    subject.runs(subject.plain, subject.x)
    contexts = _contexts(subject)
    expected = {}
    for name, training in itertools.product(contexts, (False, True)):
        with contexts[name]():
            expected[name, training] = subject.plain.train(training)(subject.x).detach()
    subject.plain.eval()
    for mode, model in _modes(subject, subject.x):
        for (name, training), wanted in expected.items():
            with contexts[name]():
                found = model.train(training)(subject.x).detach()
            require_equal(f"the output at the start ({mode}, {name}, {'train' if training else 'eval'})", found, wanted)


def _check_weights_at_start(subject: Subject) -> None:
    for layer in adapted_layers(subject.attached()):
        delta = layer.adapter("default").delta_weight()
        require_equal("the update at the start", delta, torch.zeros_like(delta))
        require_equal("the weight at the start", layer.weight, layer.base.weight)


def _modes(
    subject: Subject, x: Tensor, dtype: torch.dtype | None = None, moved: bool = False
) -> Iterator[tuple[str, Stack]]:
    """A model for every mode in which its layers run with this input; `auto` runs in one of the others.

    A mode that falls back to dense gives no further model.
    """
    found: set[str] = set()
    for mode in MODES:
        model = subject.attached(mode, dtype, moved)
        ran = {_mode_of_call(layer, x) for layer in adapted_layers(model)}
        if mode not in ("auto", *ran) and ran != {"dense"}:
            raise Mismatch(f"layers in mode {mode} run {' and '.join(sorted(ran))}")
        if not ran <= found:
            found |= ran
            yield mode, model


def _mode_of_call(layer: AdaptedLayer, x: Tensor) -> str:
    (acting,) = layer.site.acting
    return "dense" if acting.adapter.mode == "dense" else running_of(layer.site, acting, x, ()).mode


def _contexts(subject: Subject) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    contexts: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "with gradients": nullcontext,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    if subject.case.dtype == "float32":
        contexts["autocast"] = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    return contexts


def check_parameters(subject: Subject) -> None:
    network = subject.network
    (layer, *_) = adapted_layers(subject.attached())
    # The first layer holds the shared cores.
    trained = sum(parameter.numel() for parameter in layer.adapter("default").parameters())
    require_equal("the number of parameters", network.num_parameters, trained)
    stated = formula_value(network.formula, network)
    if stated != trained:
        raise Mismatch(f"the formula {network.formula} gives {stated:g}, but {trained} elements train")


def check_origin(subject: Subject) -> None:
    """Cores of the base weight's singular value decomposition multiply to the weight truncated to their bond."""
    network = subject.network
    origins = {core.origin: core for core in network.cores if core.origin not in (None, "weight")}
    if not origins:
        raise Skip("no core is taken from a decomposition")
    for layer in adapted_layers(subject.attached(dtype=torch.float64)):
        cores = layer.adapter("default").cores
        matrix = canonical(layer.base.weight.detach().double(), network.layer).flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        for origin, core in origins.items():
            found = cores[core.name].double()
            if origin == "svd_s":
                require_close(f"core '{core.name}'", found.flatten(), s[: found.numel()], s, 1e-6)
                continue
            rank = math.prod(network.sizes[leg] for leg in core.legs if leg not in network.open_legs)
            vectors = u if origin == "svd_u" else vh.T
            # Vectors are known up to a sign: their squares sum to one, and the space that they span is the same.
            wanted = (vectors[:, :rank] ** 2).sum()
            require_close(f"the norm of core '{core.name}'", (found**2).sum(), wanted, wanted, 1e-6)


def check_shared(subject: Subject) -> None:
    """A shared core is one tensor per scope, counted and saved once; all layers here have its shape."""
    shared = [core for core in subject.network.cores if core.shared is not None]
    if not shared:
        raise Skip("no core is shared")
    model = subject.attached(moved=True)
    fresh = subject.model()
    saved = _pass_through_file(model, fresh)
    for made in (model, fresh):
        cores = [layer.adapter("default").cores for layer in adapted_layers(made)]
        for core in shared:
            ones = [0] * len(cores) if core.shared == "model" else subject.blocks
            for left, right in itertools.combinations(range(len(cores)), 2):
                same = cores[left][core.name] is cores[right][core.name]
                require_equal(
                    f"whether layers {left} and {right} share core '{core.name}'", same, ones[left] == ones[right]
                )
    unique = {id(one): one.numel() for one in model.parameters() if one.requires_grad}
    twice = sum(core.numel * (len(subject.blocks) - _tensors(core, subject)) for core in shared if not core.frozen)
    expected = subject.network.num_parameters * len(subject.blocks) - twice
    require_equal("the number of trained elements", sum(unique.values()), expected)
    require_equal("what the report says trains", Handle(model, "default").report().trained, expected)
    for core in shared:
        copies = sum(key.endswith(f".core_{core.name}") for key in saved)
        if not core.frozen and copies != _tensors(core, subject):
            raise Mismatch(f"core '{core.name}' is saved {copies} times, expected {_tensors(core, subject)}")


def _tensors(core: BoundCore, subject: Subject) -> int:
    """How many tensors a shared core has in the model."""
    return 1 if core.shared == "model" else len(set(subject.blocks))


def check_values(subject: Subject) -> None:
    model = subject.attached(dtype=subject.working, moved=True)
    exact, bound = Exact(model), Exact(model, magnitude=True)
    with torch.no_grad():
        for layer in adapted_layers(model):
            adapter = layer.adapter("default")
            pairs = {
                "the network's weight": (
                    adapter.network_weight(),
                    exact.network_weight(layer),
                    bound.network_weight(layer),
                ),
                "the update": (adapter.delta_weight(), exact.delta(layer), bound.delta(layer)),
                "the weight": (layer.weight, exact.weight(layer), bound.weight(layer)),
            }
            for what, (found, wanted, size) in pairs.items():
                require_close(what, found, wanted, size, subject.tolerance)


def check_gradients(subject: Subject) -> None:
    _compare_with_exact(subject, [("dense", subject.attached("dense", subject.working, moved=True))])


def check_modes(subject: Subject) -> None:
    x = subject.x.to(subject.working)
    _compare_with_exact(subject, ((mode, one) for mode, one in _modes(subject, x, x.dtype, True) if mode != "dense"))


def _compare_with_exact(subject: Subject, models: Iterable[tuple[str, Stack]]) -> None:
    """Output and all gradients of the whole model, in some execution modes; the cores are the same in each."""
    exact: list[Tensor] | None = None
    for mode, model in models:
        x = subject.x.to(subject.working).requires_grad_()
        subject.runs(subject.model().to(subject.working), x)
        output = model(x)
        generator = torch.Generator().manual_seed(subject.case.seed)
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        cores = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad((output * upstream.to(output.dtype)).sum(), [*cores, x])
        if exact is None:
            exact = _exact_gradients(model, cores, x.detach(), upstream, magnitude=False)
            bound = _exact_gradients(model, cores, x.detach(), upstream, magnitude=True)
        trained = {
            id(one): name for layer in adapted_layers(model) for name, one in layer.adapter("default").trained.items()
        }
        names = [*(f"the gradient of '{trained.get(id(core), '?')}'" for core in cores), "the input's gradient"]
        for what, one, wanted, size in zip(
            ("the output", *names), (output.detach(), *found), exact, bound, strict=True
        ):
            require_close(f"{what} ({mode})", one, wanted, size, subject.tolerance)


def _exact_gradients(
    model: Stack, cores: list[nn.Parameter], x: Tensor, upstream: Tensor, magnitude: bool
) -> list[Tensor]:
    """The output, then the gradients of the cores and of the input."""
    exact = Exact(model, magnitude)
    x = (x.abs() if magnitude else x).double().requires_grad_()
    output = exact.output(x)
    leaves = [exact.leaves[id(core)] for core in cores]
    loss = (output * (upstream.abs() if magnitude else upstream)).sum()
    return [output.detach(), *torch.autograd.grad(loss, [*leaves, x])]


def check_merge(subject: Subject) -> None:
    model = subject.attached(moved=True)
    layers = list(adapted_layers(model))
    base = [layer.base.weight.clone() for layer in layers]
    with torch.no_grad():
        summed = [layer.weight.clone() for layer in layers]
        subject.runs(subject.plain, subject.x)
        before = _alone(model, subject.x)
        exact, bound = Exact(model), Exact(model, magnitude=True)
        for cycle in range(3):
            merge(model)
            require_equal("the merged model's output", model(subject.x), before)
            for layer, weight in zip(layers, summed, strict=True):
                require_equal("the merged weight", layer.weight, weight)
            unmerge(model)
            for layer, weight in zip(layers, base, strict=True):
                require_equal(
                    f"the base weight after {cycle + 1} cycles of merge and unmerge", layer.base.weight, weight
                )
            require_equal("the output after unmerge", _alone(model, subject.x), before)
        rounding = torch.finfo(subject.case.torch_dtype).eps
        for layer, weight in zip(layers, summed, strict=True):
            size = bound.weight(layer)
            require_close("the merged weight", weight, exact.weight(layer), size, max(subject.tolerance, rounding))


def _alone(model: Stack, x: Tensor) -> Tensor:
    """The model's output by calls of each layer on its own, which round as merging does."""
    return torch.stack([layer(x) for layer in model.layers()])


def check_save(subject: Subject) -> None:
    model = subject.attached(moved=True)
    subject.runs(subject.plain, subject.x)
    fresh = subject.model()
    _pass_through_file(model, fresh)
    for saved, loaded in zip(adapted_layers(model), adapted_layers(fresh), strict=True):
        before, after = saved.adapter("default"), loaded.adapter("default")
        for kind, left, right in (
            ("core", before.cores, after.cores),
            ("frozen copy of core", before.start, after.start),
        ):
            require_equal(f"the saved {kind}s", list(right), list(left))
            for name in left:
                require_equal(f"the loaded {kind} '{name}'", right[name].detach(), left[name].detach())
                require_equal(
                    f"whether the loaded {kind} '{name}' trains",
                    *(isinstance(t[name], nn.Parameter) for t in (right, left)),
                )
    with torch.no_grad():
        require_equal("the loaded model's output", fresh(subject.x), model(subject.x))


def _pass_through_file(model: nn.Module, fresh: nn.Module) -> list[str]:
    """Save one model and load the other; the names of the tensors in the file."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "adapter.safetensors"
        try:
            save(model, file)
            load(fresh, file)
        except TnpeftError as error:  # equal mistakes have equal texts, wherever the folder is
            text = str(error).replace(str(file), file.name)
            raise Mismatch(f"the file is refused, {type(error).__name__}: {text}") from error
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())


def check_detach(subject: Subject) -> None:
    expected = subject.runs(subject.plain, subject.x)
    plain = subject.plain.state_dict()
    model = subject.attached(moved=True)
    with torch.no_grad():
        adapted, alone = model(subject.x), _alone(model, subject.x)
        weights = [layer.weight.clone() for layer in adapted_layers(model)]
        with disabled(model):
            require_equal("the output of the disabled model", model(subject.x), expected)
        require_equal("the output after `disabled`", model(subject.x), adapted)
        detach(model, merge=False)
        require_equal("the state-dict keys after detach", list(model.state_dict()), list(plain))
        for name, tensor in model.state_dict().items():
            require_equal(f"'{name}' after detach", tensor, plain[name])
        require_equal("the output after detach", model(subject.x), expected)
        model = subject.attached(moved=True)
        detach(model, merge=True)
        require_equal("the output after detach(merge=True)", model(subject.x), alone)
        kept = [layer.weight for layer in model.layers()]
        for weight, before in zip(kept, weights, strict=True):
            require_equal("the weight after detach(merge=True)", weight, before)


CHECKS: tuple[Check, ...] = (
    Check("sizes", "legs multiply to the weight's axes, cores have the stated legs", check_sizes),
    Check("entries", "entries of T follow the index formula", check_entries),
    Check("start", "the adapted model starts as the base model, bit for bit", check_start),
    Check("parameters", "formula, count and tensors agree", check_parameters),
    Check("origin", "cores taken from the weight's decomposition are those", check_origin),
    Check("shared", "shared cores are one tensor, trained, counted and saved once", check_shared),
    Check("maps", "maps have their value and gradient, and do what their flags say", check_maps),
    Check("difference", "the update has its digits after a step of 1e-5 from the start", check_difference),
    Check("values", "T, the update and the weight equal a dense float64 sum", check_values),
    Check("gradients", "output, core and input gradients equal those of float64", check_gradients),
    Check("modes", f"every execution mode agrees ({', '.join(MODES)})", check_modes),
    Check("merge", "merge and unmerge are exact", check_merge),
    Check("save", "save and load give the same bits on a fresh base", check_save),
    Check("detach", "disable and detach give the base back; detach(merge=True) keeps the update", check_detach),
)
