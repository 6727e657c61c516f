"""Threads that call one adapted model: each gets what it would get alone, and tables die with the last model."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from modes import relative
from small import chain, move
from torch import Tensor, nn
from towers import Tower, X, adapters, results, tower

import tnpeft
from tnpeft import ExecutionError
from tnpeft.execution import calls as calls_module
from tnpeft.execution import dispatch
from tnpeft.execution.forward_pass import ForwardPass
from tnpeft.program import counting
from tnpeft.surgery.adapted_model import record_on

MODES = ("dense", "factored", "hybrid", "auto")
THREADS = 8


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def open_pass(model: nn.Module) -> ForwardPass | None:
    """The pass of a model that this thread has open."""
    return record_on(model).results.current


def at_once(work: Sequence[Callable[[], None]]) -> None:
    """Every piece in a thread of its own; raises the first error of any."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(piece: Callable[[], None]) -> None:
        try:
            start.wait()
            piece()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(piece,)) for piece in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def beside(act: Callable[[], Any]) -> Any:
    """What `act` returns in another thread, while this one waits."""
    found: list[Any] = []
    at_once([lambda: found.append(act())])
    return found[0]


def called(model: nn.Module, x: Tensor, kind: str) -> list[Tensor]:
    """The output and, with gradients, those of the input and of everything that trains."""
    if kind == "inference":
        with torch.inference_mode():
            return [model(x)]
    if kind == "no_grad":
        with torch.no_grad():
            return [model(x)]
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained])]


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


KINDS = ("gradients", "no_grad", "inference")


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_threads_get_the_bits_that_one_gets(mode: str, keeps: bool, hurried: None):
    model = tower(mode)
    inputs = [X + number for number in range(THREADS)]
    kinds = [KINDS[number % 3] for number in range(THREADS)]
    for _ in range(2):  # layers that have run once are grouped
        expected = [called(model, x, kind) for x, kind in zip(inputs, kinds, strict=True)]

    def work(number: int) -> None:
        for _ in range(4):
            with tnpeft.accumulating(model) if keeps and not number else contextlib.nullcontext():
                for _ in range(3):
                    assert equal(called(model, inputs[number], kinds[number]), expected[number])

    at_once([partial(work, number) for number in range(THREADS)])
    assert open_pass(model) is None


@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_many_sizes(mode: str, hurried: None, monkeypatch: pytest.MonkeyPatch):
    """More than are remembered, so that calls are planned and forgotten all the time."""
    monkeypatch.setattr(calls_module, "CALLS", 2)
    model = tower(mode)
    inputs = [X[..., : 3 + number % 4] for number in range(THREADS)]
    expected = [called(tower("dense"), x, "gradients") for x in inputs]

    def work(number: int) -> None:
        for step in range(4):
            place = (number + step) % THREADS
            found = called(model, inputs[place], KINDS[step % 3])
            for one, other in zip(found, expected[place], strict=False):
                assert relative(one, other) < 1e-5

    at_once([partial(work, number) for number in range(THREADS)])


@pytest.mark.parametrize("mode", ["factored", "hybrid"])
def test_passes_of_two_threads_do_not_see_each_other(mode: str):
    model = tower(mode)
    results(model)
    with counting() as counts:
        expected = results(model)["output"]
    alone = counts["clusters"]
    found: list[Tensor] = []

    def meanwhile(*_: object) -> None:
        """Another pass begins and ends; a layer is called on its own, beside a pass and inside of none."""
        handle.remove()
        before = open_pass(model)
        assert before is not None
        assert beside(partial(open_pass, model)) is None
        found.extend((beside(lambda: model(X)), beside(lambda: model.linears[0](ones))))
        assert open_pass(model) is before

    handle = model.linears[2].register_forward_pre_hook(meanwhile)
    ones = torch.ones(2, 8)
    with counting() as counts:
        assert torch.equal(model(X), expected)
    assert sorted(counts["clusters"]) == sorted([*alone, *alone, 1, 1])  # two clusters of the layer on its own
    assert torch.equal(found[0], expected)
    assert relative(found[1], model.linears[0](ones)) < 1e-6
    assert open_pass(model) is None


class Nested(Tower):
    """Calls itself, or another model, within its own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        inner, self.inner = self.inner, ()
        out = self.convs[0](x)
        for model in inner:
            out = out + model(x).sum()
        self.inner = inner
        return super().forward(x) + out.mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("itself", [True, False])
def test_a_model_within_a_model(mode: str, itself: bool):
    def made(mode: str, alone: bool) -> Nested:
        torch.manual_seed(0)
        model = Nested()
        tnpeft.attach(model, chain(), match=r"convs|linears", mode=mode)
        for number, adapter in enumerate(adapters(model)):
            move(adapter, 0.2, number)
        model.inner = (model,) if itself else (tower(mode),)
        return model

    model = made(mode, False)
    expected = called(made("dense", True), X, "gradients")
    for _ in range(3):
        found = called(model, X, "gradients")
        assert all(relative(one, other) < 3e-5 for one, other in zip(found, expected, strict=True))
    assert open_pass(model) is None


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_leaves_a_pass_open_in_its_thread_alone(mode: str):
    model = tower(mode)
    for _ in range(2):
        expected = model(X).detach()
    model.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.fails = None
    assert open_pass(model) is not None
    assert beside(partial(open_pass, model)) is None
    assert torch.equal(beside(partial(model, X)), expected)
    assert torch.equal(model(X), expected)
    assert open_pass(model) is None
    model.fails = KeyboardInterrupt()
    with contextlib.suppress(KeyboardInterrupt):
        model(X)
    layer = weakref.ref(model.convs[0])
    del model
    for _ in range(2):  # the pass goes with the model, and then the layers
        gc.collect()
    assert layer() is None


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_made_in_other_threads(mode: str, hurried: None):
    """Of one graph that threads share, kept results in it, and in another thread than the forward pass."""
    model = tower(mode)
    x = X.clone().requires_grad_()
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    for _ in range(2):
        model(X)
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    with tnpeft.accumulating(model):
        losses = [model(x).square().sum() for _ in range(2)]

        def work(number: int) -> None:
            for _ in range(4):
                assert equal(torch.autograd.grad(losses[number % 2], wanted, retain_graph=True), expected)

        at_once([partial(work, number) for number in range(THREADS)])


@pytest.mark.parametrize("mode", MODES)
def test_a_context_that_another_thread_closes(mode: str):
    """In the middle of a pass: what the pass had stays right, and nothing is kept."""
    model = tower(mode)
    for _ in range(2):
        expected = results(model)
    context: contextlib.AbstractContextManager[None] = tnpeft.accumulating(model)
    context.__enter__()

    def close(*_: object) -> None:
        beside(lambda: context.__exit__(None, None, None))

    handle = model.convs[3].register_forward_pre_hook(close)
    cache = record_on(model).results.cache
    out = model(X)
    handle.remove()
    assert torch.equal(out, expected["output"])
    assert not cache._results
    found = results(model)
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_context_that_closes_while_a_thread_makes_something_keeps_nothing():
    model = tower("dense")
    with tnpeft.accumulating(model):
        cache = record_on(model).results.cache
    kept = cache.get("key", adapters(model)[:1], (), (X,), lambda tensors: (2 * tensors[0],))
    assert torch.equal(kept[0], 2 * X)
    assert not cache._results


def test_contexts_of_two_threads_end_with_the_last(hurried: None):
    model = tower("dense")
    first, last = tnpeft.accumulating(model), tnpeft.accumulating(model)
    first.__enter__()
    beside(last.__enter__)
    cache = record_on(model).results.cache
    first.__exit__(None, None, None)
    assert cache.opened
    beside(lambda: last.__exit__(None, None, None))
    assert not cache.opened

    def work() -> None:
        for _ in range(30):
            with tnpeft.accumulating(model):
                assert record_on(model).results.cache.opened

    at_once([work] * THREADS)
    assert not record_on(model).results.cache.opened


def test_a_call_is_timed_once(hurried: None, monkeypatch: pytest.MonkeyPatch):
    """By all threads together: two that time a call may not agree, and activation checkpointing calls again."""
    timed: list[int] = []

    def quickest(site: object, options: Sequence[Any], *_: object) -> str:
        timed.append(len(timed))
        threading.Event().wait(0.01)  # others come meanwhile
        return str(options[timed[-1] % len(options)].mode)

    monkeypatch.setattr(dispatch, "quickest", quickest)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    tnpeft.attach(model, chain(), match="0", mode="auto", autotune=True)
    found: set[Any] = set()

    def work() -> None:
        model(X)
        found.add(model[0].calls("default"))

    at_once([work] * THREADS)
    assert timed == [0]
    assert len(found) == 1


def test_a_memory_format_that_changes_under_threads(hurried: None):
    """Programs write a weight in its own order, and what is folded of a frozen copy goes with its program."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    tnpeft.attach(model, "dora", match="0")
    move(adapters(model)[0])
    adapter, weight = adapters(model)[0], model[0].base.weight.detach()
    layouts = [weight, weight.to(memory_format=torch.channels_last)]
    expected = [adapter.delta_weight(one).detach() for one in layouts]

    def work(number: int) -> None:
        for step in range(40):
            place = (number + step) % 2
            assert relative(adapter.delta_weight(layouts[place]), expected[place]) < 1e-6

    at_once([partial(work, number) for number in range(THREADS)])


def test_replicas_of_one_process_are_refused():
    """What `torch.nn.DataParallel` makes for each of several devices."""
    model = tower("dense")
    with pytest.raises(ExecutionError) as caught:
        model.convs[0]._replicate_for_data_parallel()
    assert str(caught.value) == (
        "layer 'convs.0': copies for several devices: expected a process for each device, found "
        "`torch.nn.DataParallel`. Use `torch.nn.parallel.DistributedDataParallel`, started with torchrun, or show the "
        "process one device alone (CUDA_VISIBLE_DEVICES=0)."
    )


# Tables.


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("spec", ["tenvoo_l", "loha"])
@pytest.mark.parametrize("mode", MODES[:3])
def test_tables_die_with_the_last_model(mode: str, spec: str):
    """Numbers and matrices that move voxels, and those that reorder cores, are no tensors of the process."""

    def use() -> None:
        models = []
        for _ in range(2):
            models.append(nn.Sequential(*(nn.Conv3d(6, 6, 3, padding=1) for _ in range(3))))
            tnpeft.attach(models[-1], spec, match=r"\d", mode=mode, r=2)
        for size in range(3, 6):
            for model in models:
                for _ in range(2):
                    called(model, torch.randn(1, 6, size, size, 4), "gradients")

    use()
    for _ in range(2):
        gc.collect()
    assert not [one for one in gc.get_objects() if issubclass(type(one), Tensor)]


def test_models_that_are_alike_share_programs():
    def made() -> nn.Module:
        model = nn.Sequential(nn.Conv3d(6, 6, 3, padding=1))
        tnpeft.attach(model, "tenvoo_l", match="0", mode="factored", r=2)
        model(torch.randn(1, 6, 5, 5, 4))
        return model

    one, other = made(), made()
    chains = [model[0].calls("default").last.chain for model in (one, other)]
    assert chains[0] is chains[1] is not None
