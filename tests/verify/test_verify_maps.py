"""Verifying derived cores: the oracle of maps, checks of maps that users register, and what a broken library hides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from test_maps import CASES
from test_maps import Case as MapCase
from torch import Tensor

import tnpeft
from tnpeft.network import Network
from tnpeft.program import maps as program_maps
from tnpeft.program.derived import build_derivations
from tnpeft.spec import map_kinds
from tnpeft.testing import networks
from tnpeft.verify import VerifyReport, verify
from tnpeft.verify.differences import slope_by_differences
from tnpeft.verify.gauge import gauge_of
from tnpeft.verify.model_under_test import fill
from tnpeft.verify.oracle import canonical, dense_weight, entry
from tnpeft.verify.oracle_derived import Definition, derive, size_of
from tnpeft.verify.oracle_linear import LINEAR, matrix_of
from tnpeft.verify.oracle_maps import oracle_map, oracle_slope
