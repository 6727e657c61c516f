"""For tests of your own adapters: `assert_adapter_ok(spec)`, and Hypothesis strategies of layers, specs and networks.

    from tnpeft.testing import assert_adapter_ok

    def test_my_adapter():
        assert_adapter_ok("my_adapter.yaml")

Inside a `@given(specs())` of your own, Hypothesis needs `suppress_health_check=[HealthCheck.nested_given]`: the
assertion draws examples too. Needs `pip install 'tnpeft[testing]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tnpeft.errors import Problem, TnpeftError
from tnpeft.network import Layer, Spec, layer_of
from tnpeft.verify import Case, VerifyReport, inputs_for, layers, networks, params_of, run_check, specs, verify

__all__ = [
    "Case",
    "VerifyReport",
    "assert_adapter_ok",
    "inputs_for",
    "layers",
    "networks",
    "params_of",
    "run_check",
    "specs",
    "verify",
]


def assert_adapter_ok(
    spec: Spec | str | Path,
    *,
    examples: int = 20,
    seed: int = 0,
    layer: Layer | nn.Module | None = None,
    seconds: float = 60.0,
    **params: Any,
) -> VerifyReport:
    """Raise AssertionError, with the simplest counter-example of each check, if any check of an adapter fails.

    `spec` is a spec, a shipped name, a path, or YAML text. `layer` and `params` fix what is otherwise drawn. `seconds`
    is the time after which no new example starts. `tnpeft verify` reports more. Raises SpecError for a spec that cannot
    be read.
    """
    if isinstance(spec, str) and "\n" in spec:
        spec = Spec.from_yaml(spec)
    signature = layer_of(layer) if isinstance(layer, nn.Module) else layer
    if signature is not None and not isinstance(signature, Layer):
        fix = "For example `torch.nn.Linear(8, 8)`."
        raise TnpeftError(Problem("`layer`", "a torch.nn layer or a tnpeft.Layer", type(layer).__name__, fix))
    report = verify(spec, examples=examples, seed=seed, layer=signature, seconds=seconds, advice=False, **params)
    if not report.ok:
        raise AssertionError(str(report))
    return report
