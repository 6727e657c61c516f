"""Verifying finds what is wrong, by the right name and on the simplest layer: the library is broken on purpose."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tnpeft
from tnpeft.adapters import Adapter, inits
from tnpeft.adapters import adapter as adapter_module
from tnpeft.adapters.sharing import Sharing
from tnpeft.execution import AdaptedLayer, dispatch, modes
from tnpeft.execution.forward_pass import ForwardPass
from tnpeft.io import saving
from tnpeft.network import bind
from tnpeft.program import ChainProgram, batched, clusters, delta, factored
from tnpeft.program import chain as chains
from tnpeft.program.batched import BatchedTree
from tnpeft.program.weight_layout import WeightLayout
from tnpeft.verify import VerifyReport, checks, engine, run_check, verify

Break = Callable[[pytest.MonkeyPatch], None]

# Two axes of three legs, a scale, both starts: small enough for ten examples a second.
KRON = """
tnpeft: 1
name: kron
layers: [Linear, Conv1d, ConvTranspose1d]
params: {r: 2}
sizes: {o1 o2: "factorize(out_channels, 2)", i1 i2: "factorize(in_channels, 2)"}
bond: r
cores:
  left:  o1 i1 b
  right: o2 b i2 k...
weight: (o1 o2) (i1 i2) k...
scale: 0.5
start: frozen_copy
"""


def report_of(spec: str = KRON, examples: int = 12, **options: Any) -> VerifyReport:
    return verify(tnpeft.Spec.from_yaml(spec), examples=examples, advice=False, **options)


@functools.cache
def is_sound(spec: str) -> bool:
    return report_of(spec, examples=4).ok


def failing(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if check.failure is not None}


def reversed_legs(patch: pytest.MonkeyPatch) -> None:
    """The last step stores the weight's legs in another order."""
    real = WeightLayout.of.__func__
    wrong = lambda cls, *args: dataclasses.replace(made := real(cls, *args), legs=made.legs[::-1])  # noqa: E731
    patch.setattr(WeightLayout, "of", classmethod(wrong))


def forgotten_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchedTree, "_scaled", lambda self, stacked: stacked)


def mixed_groups(patch: pytest.MonkeyPatch) -> None:
    """Blocks of a grouped transposed convolution side by side, as a plain transposed one has them."""
    patch.setattr(WeightLayout, "_stored", lambda self, padded: padded.transpose(0, 1).reshape(self.stored))
    patch.setattr(
        WeightLayout,
        "_canonical",
        lambda self, stored: stored.reshape(self.padded[1], self.padded[0], -1).transpose(0, 1),
    )


def longer_gradient(patch: pytest.MonkeyPatch) -> None:
    """One per cent too long for the last core alone."""
    real = BatchedTree.gradients

    def gradients(self: BatchedTree, *args: Any) -> list[Tensor | None]:
        found = real(self, *args)
        return [*found[:-1], None if found[-1] is None else found[-1] * 1.01]

    patch.setattr(BatchedTree, "gradients", gradients)


def drifting_merge(patch: pytest.MonkeyPatch) -> None:
    """Added to the base weight, then subtracted from it."""
    real = AdaptedLayer.unmerge

    def unmerge(self: AdaptedLayer) -> None:
        real(self)
        delta = self.adapter("default").delta_weight().detach()
        weight = self.base.weight.data
        weight.copy_((weight + delta).to(weight.dtype) - delta.to(weight.dtype))

    patch.setattr(AdaptedLayer, "unmerge", unmerge)


def lost_core(patch: pytest.MonkeyPatch) -> None:
    real = saving._tensors

    def tensors(*args: Any) -> dict[str, Tensor]:
        found = real(*args)
        return {name: torch.zeros_like(one) if "core_right" in name else one for name, one in found.items()}

    patch.setattr(saving, "_tensors", tensors)


def missing_core(patch: pytest.MonkeyPatch) -> None:
    real = saving._tensors
    patch.setattr(saving, "_tensors", lambda *args: dict(list(real(*args).items())[1:]))


def inexact_start(patch: pytest.MonkeyPatch) -> None:
    """The plain difference of two large networks, rounded once each."""
    real = Adapter.delta_weight
    patch.setattr(Adapter, "delta_weight", lambda self: real(self) + 1e-9)


def narrow_start(patch: pytest.MonkeyPatch) -> None:
    """The sum goes through bf16, which a layer of fp32 notices."""
    real = modes.summed_weight
    wrong = lambda site, weight, plain: real(site, weight, plain).bfloat16().to(weight.dtype)  # noqa: E731
    patch.setattr(modes, "summed_weight", wrong)


def wrong_formula(patch: pytest.MonkeyPatch) -> None:
    real = bind.parameter_formula
    patch.setattr(bind, "parameter_formula", lambda *args: f"{real(*args)} + r")


def kept_update(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "detach", lambda model, merge: tnpeft.detach(model, merge=True))


def longer_update(patch: pytest.MonkeyPatch) -> None:
    """What a factored layer adds to its output is one per cent too long; at the start that is nothing."""
    real = ChainProgram.add_output

    def add_output(self: ChainProgram, out: Tensor, x: Tensor, *rest: Any) -> None:
        real(self, out, 1.01 * x, *rest)

    patch.setattr(ChainProgram, "add_output", add_output)


def longer_chain(patch: pytest.MonkeyPatch) -> None:
    """The gradient of the last cluster alone, which dense layers do not take from the chain."""
    real = ChainProgram.gradients

    def gradients(self: ChainProgram, *args: Any) -> tuple[Tensor | None, list[Tensor | None]]:
        made, found = real(self, *args)
        return made, [*found[:-1], None if found[-1] is None else found[-1] * 1.01]

    patch.setattr(ChainProgram, "gradients", gradients)


def uneven_groups(patch: pytest.MonkeyPatch) -> None:
    """Layers that are contracted together get each other's clusters."""
    real = ForwardPass.results
    patch.setattr(ForwardPass, "results", lambda self, group: [real(self, group)[0]] * len(group.adapters))


def deaf_mode(patch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the factored mode gets the hybrid one."""
    real = dispatch.plan
    patch.setattr(dispatch, "plan", lambda network, mode, call: real(network, mode.replace("factored", "hybrid"), call))


def crash(patch: pytest.MonkeyPatch) -> None:
    real = Adapter.network_weight

    def network_weight(self: Adapter) -> Tensor:
        if self.network.layer.out_channels >= 3:
            raise IndexError("three is too many")
        return real(self)

    patch.setattr(Adapter, "network_weight", network_weight)


def forget_programs() -> None:
    """What was built by a broken library must not outlive it."""
    for cached in (
        delta.build_program,
        factored.build_cluster_merge,
        batched._laid_out,
        chains._products,
    ):
        cached.cache_clear()
    factored._CHAINS.clear()
    clusters._CLUSTERS.clear()


MUTANTS: dict[Break, tuple[set[str], str]] = {
    reversed_legs: ({"entries", "values", "gradients", "merge"}, "entries"),
    forgotten_scale: ({"values", "gradients", "merge"}, "values"),
    mixed_groups: ({"entries", "values", "gradients", "merge"}, "entries"),
    longer_gradient: ({"gradients"}, "gradients"),
    drifting_merge: ({"merge"}, "merge"),
    lost_core: ({"save"}, "save"),
    missing_core: ({"save"}, "save"),
    inexact_start: ({"start"}, "start"),
    narrow_start: ({"start"}, "start"),
    wrong_formula: ({"parameters"}, "parameters"),
    kept_update: ({"detach"}, "detach"),
    longer_update: ({"modes"}, "modes"),
    longer_chain: ({"modes"}, "modes"),
    uneven_groups: ({"modes"}, "modes"),
    deaf_mode: ({"start", "modes"}, "modes"),
    crash: ({"entries", "values"}, "entries"),
}


def unshared(patch: pytest.MonkeyPatch) -> None:
    """Every layer holds the shared cores itself."""
    patch.setattr(Sharing, "holder", lambda self, spec, core, captured, adapter: adapter)


def wrong_vectors(patch: pytest.MonkeyPatch) -> None:
    """Half as long as singular vectors are."""
    real = inits._svd
    patch.setattr(inits, "_svd", lambda *args: 0.5 * real(*args))


def signless_terms(patch: pytest.MonkeyPatch) -> None:
    real = delta.Program.value

    def value(self: delta.Program, cores: Sequence[Tensor]) -> Tensor:
        wrong = copy.copy(self)
        wrong.terms = [(term._replace(scale=abs(term.scale)), tree) for term, tree in self.terms]
        return real(wrong, cores)

    patch.setattr(delta.Program, "value", value)


def rowless_norm(patch: pytest.MonkeyPatch) -> None:
    """DoRA without the change of direction."""
    patch.setattr(adapter_module, "composed", lambda layer, weight, delta, magnitude, start: delta)


SHARED = KRON.replace("o1 i1 b", "{legs: o1 i1 b, shared: block}")
SVD = """
tnpeft: 1
name: xs
layers: Linear
sizes: {o: out_channels, i: in_channels, a: 1, b: 1}
cores:
  u: {legs: o a, from: svd_u}
  m: {legs: a b, init: zeros}
  v: {legs: b i, from: svd_v}
weight: o i
start: zero
"""
SUM = """
tnpeft: 1
name: sum
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels}
cores:
  w:  {legs: o i k..., from: weight}
  up: {legs: o r, init: zeros}
  in: r i
  on: {legs: r k..., init: normal(1)}
  of: {legs: r i k...}
terms:
  - {cores: [w, up, in, on], weight: o i k..., scale: 2}
  - {cores: [up, of], weight: o i k..., scale: -1}
compose: dora
start: zero
"""


@pytest.mark.parametrize(
    ("mutant", "spec", "check"),
    [
        (unshared, SHARED, "shared"),
        (wrong_vectors, SVD, "origin"),
        (signless_terms, SUM, "entries"),
        (rowless_norm, SUM, "values"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_construct_is_looked_at(mutant: Break, spec: str, check: str, monkeypatch: pytest.MonkeyPatch):
    assert is_sound(spec)
    mutant(monkeypatch)
    report = report_of(spec, examples=4)
    assert check in failing(report)
    assert next(failure for failure in report.failures if failure.check == check).case.layer.numel <= 12


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_library_is_found_out(mutant: Break, monkeypatch: pytest.MonkeyPatch):
    forget_programs()
    monkeypatch.setattr(engine, "SHRINKING_SECONDS", 120.0)  # a busy machine must not end it early
    mutant(monkeypatch)
    expected, telling = MUTANTS[mutant]
    # Checks that need not fail would only take time.
    monkeypatch.setattr(engine, "CHECKS", tuple(check for check in checks.CHECKS if check.name in {telling, *expected}))
    try:
        report = report_of(examples=24)
        assert telling in failing(report)
        assert expected <= failing(report)
        counterexample = next(failure for failure in report.failures if failure.check == telling)
        assert counterexample.case.layer.numel <= 24, counterexample
        with pytest.raises(AssertionError) as excinfo:
            run_check(telling, tnpeft.Spec.from_yaml(KRON), counterexample.case)
        assert str(excinfo.value) == f"{telling}: {counterexample.message}"
    finally:
        forget_programs()
