"""Property tests of any spec, to run before trusting a new adapter. `tnpeft.testing` has the public names."""

from tnpeft.verify.case import Case, sample_input
from tnpeft.verify.checks import CHECKS, Check
from tnpeft.verify.conditioning import Conditioning
from tnpeft.verify.directions import Directions
from tnpeft.verify.engine import run_check, verify
from tnpeft.verify.gauge import Gauge
from tnpeft.verify.random_specs import networks, specs
from tnpeft.verify.report import CheckResult, Counterexample, VerifyReport
from tnpeft.verify.strategies import inputs_for, layers, params_of

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "CheckResult",
    "Conditioning",
    "Counterexample",
    "Directions",
    "Gauge",
    "VerifyReport",
    "inputs_for",
    "layers",
    "networks",
    "params_of",
    "run_check",
    "sample_input",
    "specs",
    "verify",
]
