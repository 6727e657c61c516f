"""Do random specs with derived cores compute what an independent float64 sum says, in every way they can be run?

    python benchmarks/random_specs.py --count 600

Seed n draws the same specs in every run. Each is attached to one random layer that it supports. It goes through all
checks of `tnpeft verify` and through those below: the plain path, a state dict, two adapters in one pass, finite
differences, bf16. Failures are written down with spec and case; `--only N` runs the specs of one seed.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import common
import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor, nn
from torch.autograd import forward_ad

import tnpeft
from tnpeft.schedule import MODES
from tnpeft.testing import specs
from tnpeft.verify.case import Case
from tnpeft.verify.checks import CHECKS, Check, _compare_with_exact, _modes
from tnpeft.verify.engine import failure_of
from tnpeft.verify.exact import Exact
from tnpeft.verify.model_under_test import (
    SCOPE,
    Mismatch,
    Skip,
    Subject,
    adapted_layers,
    fill,
    require_close,
    require_equal,
)
from tnpeft.verify.strategies import cases, params_of, signatures

DRAWS = 12  # of which the first ones are the simplest
SCALES = {"default": 1.0, "other": -0.5}
STEP = 1e-6


def drawn(number: int) -> list[Subject]:
    """Those of a few specs of this seed that have derived cores, on layers that they take."""
    found: dict[str, Subject] = {}

    def look(pair: tuple[tnpeft.Spec, Case]) -> bool:
        spec, case = pair
        if any(core.derivation is not None for core in spec.cores):
            with contextlib.suppress(tnpeft.TnpeftError):
                found.setdefault(spec.to_yaml(), Subject(spec, case))
        return False

    chosen = settings(
        max_examples=DRAWS,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    with contextlib.suppress(NoSuchExample):
        find(_specs_and_cases(), look, settings=chosen, random=random.Random(number))
    return list(found.values())


@st.composite
def _specs_and_cases(draw: st.DrawFn) -> tuple[tnpeft.Spec, Case]:
    spec = draw(specs(max_cores=4))
    return spec, draw(cases(signatures(spec.layers, max_channels=8), params_of(spec)))


def check_plain(subject: Subject) -> None:
    """The start on the plain path, and its values and gradients in every mode."""
    with forward_ad.dual_level():
        subject.runs(subject.plain, subject.x)
        expected = subject.plain(subject.x)
        for mode in MODES:
            require_equal(f"the output at the start ({mode}, plain)", subject.attached(mode)(subject.x), expected)
        x = subject.x.to(subject.working)
        _compare_with_exact(subject, _modes(subject, x, x.dtype, True))


def check_state_dict(subject: Subject) -> None:
    """What one model's state dict holds is all that another needs."""
    subject.runs(subject.plain, subject.x)
    model, fresh = subject.attached(moved=True), subject.attached()
    fresh.load_state_dict(model.state_dict(), strict=True)
    for name, tensor in model.state_dict().items():
        require_equal(f"'{name}'", fresh.state_dict()[name], tensor)
    with torch.no_grad():
        require_equal("the output after load_state_dict", fresh(subject.x), model(subject.x))


def check_two(subject: Subject) -> None:
    """Two adapters act in one pass: output and gradients of W + the scaled sum of both, then of the first alone."""
    model = subject.attached("auto", subject.working, moved=True)
    scopes = dict.fromkeys(subject.spec.scopes, SCOPE)
    params: dict[str, Any] = dict(subject.case.params)
    tnpeft.attach(model, subject.spec, match=subject.names, name="other", seed=77, scopes=scopes, **params)
    for number, layer in enumerate(adapted_layers(model)):
        fill(layer.adapter("other"), 100 + number)
    x = subject.x.to(subject.working)
    subject.runs(subject.model().to(subject.working), x)
    for scales in (SCALES, {"default": 1.0}, SCALES):
        tnpeft.activate(model, scales)
        _agree_summed(subject, model, x, scales)
    with torch.no_grad():
        before = torch.stack([layer(x) for layer in model.layers()])
        tnpeft.merge(model)
        require_equal("the merged output of two adapters", model(x), before)
        tnpeft.unmerge(model)
        require_equal("the output of two adapters after unmerge", torch.stack([la(x) for la in model.layers()]), before)


def _agree_summed(subject: Subject, model: Any, x: Tensor, scales: dict[str, float]) -> None:
    x = x.detach().clone().requires_grad_()
    output = model(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [output.detach(), *torch.autograd.grad((output * upstream.to(output.dtype)).sum(), [*cores, x])]
    exact, bound = (_summed(model, cores, x.detach(), upstream, scales, sized) for sized in (False, True))
    for number, (one, wanted, size) in enumerate(zip(found, exact, bound, strict=True)):
        what = "the output" if not number else "the input's gradient" if number == len(cores) + 1 else "a gradient"
        require_close(f"{what} of {' and '.join(scales)}", one, wanted, size, subject.tolerance)


def _summed(
    model: nn.Module, cores: list[nn.Parameter], x: Tensor, upstream: Tensor, scales: dict[str, float], sized: bool
) -> list[Tensor]:
    """Output, then the gradients of the cores and of the input, of torch's own layers with the summed weight."""
    oracles = {name: Exact(model, sized, name) for name in scales}

    def size(tensor: Tensor) -> Tensor:
        return tensor.detach().double().abs() if sized else tensor.detach().double()

    x = size(x).requires_grad_()
    outputs = []
    for layer in adapted_layers(model):
        weight = size(layer.base.weight)
        for name, scale in scales.items():
            weight = weight + (abs(scale) if sized else scale) * oracles[name].delta(layer)
        tensors = {"weight": weight} | ({} if layer.base.bias is None else {"bias": size(layer.base.bias)})
        outputs.append(torch.func.functional_call(layer.base, tensors, (x,)))
    output = torch.stack(outputs)
    leaves = {key: leaf for oracle in oracles.values() for key, leaf in oracle.leaves.items()}
    loss = (output * (upstream.abs() if sized else upstream)).sum()
    wanted = torch.autograd.grad(loss, [*(leaves[id(core)] for core in cores), x])
    return [output.detach(), *wanted]


def check_slopes(subject: Subject) -> None:
    """The update's slope along random directions, by differences of the float64 sum."""
    model = subject.attached(dtype=torch.float64, moved=True)
    layer = next(iter(adapted_layers(model)))
    exact, bound = Exact(model), Exact(model, magnitude=True)
    trained = [core for core in layer.adapter("default").trained.values() if id(core) in exact.leaves]
    generator = torch.Generator().manual_seed(subject.case.seed)
    weight = layer.weight
    upstream = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((weight * upstream).sum(), trained, allow_unused=True)
    largest = float((bound.weight(layer).detach() * upstream.abs()).sum())
    for core, gradient in zip(trained, gradients, strict=True):
        direction = torch.randn(core.shape, generator=generator, dtype=torch.float64)
        slope = 0.0 if gradient is None else float((gradient * direction).sum())
        leaf, ends = exact.leaves[id(core)], []
        with torch.no_grad():
            for step in (STEP, -2 * STEP):
                leaf.add_(direction, alpha=step)
                ends.append(float((exact.weight(layer) * upstream).sum()))
            leaf.add_(direction, alpha=STEP)
        measured = (ends[0] - ends[1]) / (2 * STEP)
        if abs(measured - slope) > 1e-6 * (largest + abs(slope)):
            raise Mismatch(f"a slope is {slope:.8g}, by differences {measured:.8g}")


def check_narrow(subject: Subject) -> None:
    """In bf16: the update of the cores as they are stored, and an output that is near."""
    model = subject.attached(dtype=torch.bfloat16, moved=True)
    exact, bound = Exact(model), Exact(model, magnitude=True)
    x = subject.x.to(torch.bfloat16)
    subject.runs(subject.model().to(torch.bfloat16), x)
    with torch.no_grad():
        for layer in adapted_layers(model):
            found = layer.adapter("default").delta_weight()
            require_close("the update (bf16)", found, exact.delta(layer), bound.delta(layer), 2**-7)
        require_close("the output (bf16)", model(x), exact.output(x.double()), bound.output(x.double().abs()), 2**-6)


MORE = (
    Check("plain", "the plain path", check_plain),
    Check("state_dict", "a state dict", check_state_dict),
    Check("two", "two adapters in one pass", check_two),
    Check("slopes", "slopes by differences", check_slopes),
    Check("narrow", "bf16", check_narrow),
)


def attempt(subject: Subject, tried: Counter[str]) -> Iterator[dict[str, str]]:
    """What fails, by which check."""
    for check in (*CHECKS, *MORE):
        try:
            message = failure_of(check, subject)
        except Skip:
            continue
        tried[check.name] += 1
        if message is not None:
            yield {"check": check.name, "message": message, "case": repr(subject.case), "spec": subject.spec.to_yaml()}


def main() -> None:
    options = common.parser(__doc__, "random_specs.json")
    options.add_argument("--count", type=int, default=600, help="specs with derived cores")
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--only", type=int, help="run only the specs of this seed, and show them")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    started, tried, seen = time.process_time(), Counter[str](), Counter[str]()
    found: list[dict[str, Any]] = []
    number, done = arguments.first if arguments.only is None else arguments.only, 0
    while done < (arguments.count if arguments.only is None else 1):
        for subject in drawn(number):
            done += 1
            seen.update({*constructs(subject)})
            if arguments.only is not None:
                sys.stdout.write(f"{subject.spec.to_yaml()}\n{subject.case!r}\n")
            for failure in attempt(subject, tried):
                found.append({"seed": number, **failure})
                sys.stdout.write(f"{number} {failure['check']}: {failure['message']}\n")
                sys.stdout.flush()
        number += 1
        if arguments.only is not None:
            break
    results = {
        "specs": done,
        "seeds": number - arguments.first,
        "seconds": round(time.process_time() - started),
        "constructs": dict(sorted(seen.items())),
        "checks": dict(tried),
        "findings": len(found),
        "found": found[:50],
    }
    sys.stdout.write(f"{done} specs, {sum(tried.values())} checks: {len(found)} findings\n")
    if arguments.only is None:
        common.write(arguments.out, results)


def constructs(subject: Subject) -> Iterator[str]:
    """What the language's second half has in it."""
    network = subject.network
    yield f"kind {subject.case.kind}"
    yield f"dtype {subject.case.dtype}"
    yield f"start {network.start}"
    yield f"terms {len(network.terms)}"
    yield from (["compose dora"] if network.compose else [])
    for core in network.derived:
        yield from (f"map {each.name}" for each in core.maps)
        yield from (["derived sum"] if len(core.summands) > 1 else [])
        yield from (["derived product"] if any(len(each.references) > 1 for each in core.summands) else [])
    for core in subject.spec.cores:
        yield from (["grouped legs"] if any(len(axis) > 1 for axis in core.axes) else [])
        yield from ([f"init {core.init.name}"] if core.derivation is None else [])
        yield from ([f"shared {core.shared}"] if core.shared else [])


if __name__ == "__main__":
    main()
