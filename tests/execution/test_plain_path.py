"""The plain path of each mode computes what the fast one does: rule R1, for every shipped spec.

Forward-mode differentiation, open around a pass, is one of those who look on.
"""

from __future__ import annotations

import pytest
import torch
from same_bits import pairs, values_of
from small import spec_cases_in
from smallest import attached
from torch import Tensor
from torch.autograd import forward_ad

import tnpeft
from tnpeft.program import counting

PAIRS = pairs()
# Gradients through eight reflections on each side, drawn in pairs that cancel, have a digit less in float32.
# So have those through a QR of all columns, and that of one gate, a sum whose terms cancel.
DIGITS = {"hoft": 5e-6, "para": 5e-6, "svft_banded": 5e-6}
KINDS = {spec: [kind for kind, name in PAIRS if name == spec] for _, spec in PAIRS}


@pytest.mark.parametrize(("spec", "mode", "kinds"), spec_cases_in(("dense", "factored")))
def test_both_paths_agree(spec: str, mode: str, kinds: tuple[str, ...]):
    """Outputs and gradients; that of hybrid is dense's, and auto is one of the three."""
    for kind in kinds:
        fast = values_of(kind, spec, mode)
        with forward_ad.dual_level():
            plain = values_of(kind, spec, mode)
        assert (fast is None) == (plain is None)
        for name, value in (fast or {}).items():
            assert plain is not None
            assert error(plain[name], value) <= DIGITS.get(spec, 1e-6), (kind, name)


@pytest.mark.parametrize("mode", ["dense", "factored", "hybrid"])
@pytest.mark.parametrize("spec", ["lora", "tenvoo_l", "quanta", "dora"])
def test_the_plain_path_starts_as_the_base_and_runs_no_function_of_its_own(spec: str, mode: str):
    model, shape = attached(KINDS[spec][0], spec, mode)
    x = torch.randn(shape)
    with tnpeft.disabled(model):
        base = model(x)
    with counting() as counts:
        with forward_ad.dual_level():
            plain = model(x)
        assert not counts
        model(x)
        assert counts
    torch.testing.assert_close(plain, base, rtol=0, atol=0)


def error(value: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value."""
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
