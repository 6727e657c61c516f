"""The table of truth in specs/README.md: each tuner of the installed libraries has a row, and what rows claim holds."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import pkgutil
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import lycoris.modules
import peft
import pytest
import test_zoo_peers
import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from torch import Tensor, nn

import tnpeft
from tnpeft.cli.peers import FACTS, Peer, peer_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own

ROOT = Path(__file__).parents[2]
ROWS = peer_rows()
OLDER = "tests/specs/test_specs_peers.py"
TABLES = runpy.run_path(str(ROOT / OLDER))


def rows_of(library: str, test: str = "") -> list[Peer]:
    return [row for row in ROWS if row.library.startswith(library) and test in row.test]


def test_every_tuner_of_peft_has_a_row():
    assert {row.tuner for row in rows_of("PEFT")} == {kind.value for kind in peft.PeftType}
    assert {row.library for row in rows_of("PEFT")} == {f"PEFT {peft.__version__}"}


def test_every_module_of_lycoris_has_a_row():
    names = [found.name for found in pkgutil.iter_modules(lycoris.modules.__path__)]
    modules = [importlib.import_module(f"lycoris.modules.{name}") for name in names]
    kinds = {each for module in modules for _, each in inspect.getmembers(module, inspect.isclass)}
    shipped = {kind.__name__ for kind in kinds if issubclass(kind, LycorisBaseModule) and kind is not LycorisBaseModule}
    assert {row.tuner for row in rows_of("LyCORIS")} == shipped
    assert {row.library for row in rows_of("LyCORIS")} == {f"LyCORIS {importlib.metadata.version('lycoris_lora')}"}


def test_rows_name_specs_that_ship_and_say_something():
    for row in ROWS:
        assert set(row.agrees) <= set(FACTS), row
        assert row.spec in tnpeft.list_specs() if row.spec else row.note, row
        assert row.note or len(row.agrees) == len(FACTS), row


@cache
def collected() -> tuple[str, ...]:
    """The tests that there are, by pytest itself."""
    files = sorted({row.test.partition("::")[0] for row in ROWS if row.test})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert listed.returncode == 0, listed.stdout[-2000:]
    return tuple(line for line in listed.stdout.splitlines() if "::" in line)


def test_rows_that_claim_a_value_name_a_test_of_it():
    for row in ROWS:
        if "value" in row.agrees:
            cases = [name for name in collected() if name.startswith(f"{row.test}[{row.spec}")]
            exact = [name for name in cases if name[len(row.test) + 1 + len(row.spec)] in "-]"]
            assert exact or row.test in collected() or single(row.test), row


def single(test: str) -> bool:
    """Whether a test is about one spec: its cases, if any, are others than specs."""
    cases = [name for name in collected() if name.startswith(f"{test}[")]
    return bool(cases) and not any(f"[{spec}" in name for name in cases for spec in tnpeft.list_specs())


@pytest.mark.parametrize("row", rows_of("PEFT", "test_zoo_peers"), ids=lambda row: row.spec)
def test_first_values_are_claimed_where_that_test_compares_them(row: Peer):
    assert {"value", "count"} <= set(row.agrees)
    assert ("init" in row.agrees) <= (not test_zoo_peers.PEERS[row.spec].anew)


def agreement(adapter: tnpeft.Adapter, theirs: dict[str, Tensor], trained: int) -> set[str]:
    """`count` and `init` where they hold: of drawn cores the spread."""
    ours = {name: core for name, core in adapter.cores.items() if core.requires_grad}
    found = {"count"} if sum(core.numel() for core in ours.values()) == trained else set()
    return found | {"init"} if all(alike(core.detach(), theirs[name]) for name, core in ours.items()) else found


def alike(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.flatten(), theirs.flatten().to(ours.dtype)
    if (theirs == theirs[0]).all() or (ours == ours[0]).all():
        return torch.equal(ours, theirs)
    ratio = float(ours.square().mean().sqrt() / theirs.square().mean().sqrt())
    return 0.7 < ratio < 1.4


@pytest.mark.parametrize("row", rows_of("PEFT", f"{OLDER}::test_peft"), ids=lambda row: row.spec)
def test_counts_and_first_values_beside_peft(row: Peer):
    config, values, params = TABLES["configs"]()[row.spec]
    torch.manual_seed(0)
    base = nn.Linear(96, 128, bias=False)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    theirs = values(model.base_model.model[0])
    assert agreement(tnpeft.compile(row.spec, base, **params), theirs, trained) == set(row.agrees) - {"value"}


@pytest.mark.parametrize("row", rows_of("LyCORIS", OLDER), ids=lambda row: row.spec)
def test_counts_and_first_values_beside_lycoris(row: Peer):
    module, options, names, params = TABLES["LYCORIS"][row.spec]
    torch.manual_seed(0)
    kinds: dict[str, Any] = vars(importlib.import_module(f"lycoris.modules.{module.partition('.')[0]}"))
    base = nn.Conv2d(96, 128, 3, bias=False)
    settings = {"lora_dim": 4, "alpha": params.get("alpha", 1), **options}
    made = dict(kinds[module.partition(".")[2]]("layer", base, **settings).named_parameters())
    theirs = {core: made[name].detach() for core, name in names.items()}
    trained = sum(tensor.numel() for tensor in theirs.values())
    assert agreement(tnpeft.compile(row.spec, base, **params), theirs, trained) == set(row.agrees) - {"value"}


LAYERS = [nn.Linear(6, 8, bias=False), nn.Conv2d(6, 8, 3, bias=False)]


@pytest.mark.parametrize("base", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("spec", ["full", "ia3", "ia3_input"])
def test_lycoris_scales_and_full_updates(spec: str, base: nn.Module):
    """LyCORIS's IA3 and full: value, count and first values."""
    core = {"full": "update"}.get(spec, "l")
    made = FullModule("layer", base) if spec == "full" else IA3Module("layer", base, train_on_input=spec == "ia3_input")
    adapter = tnpeft.compile(spec, base)
    assert torch.equal(adapter.cores[core].detach().flatten(), made.weight.detach().flatten())
    values = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.weight.copy_(values)
        adapter.cores[core].copy_(values.reshape(adapter.cores[core].shape))
    expected = made.weight.detach() if spec == "full" else made.get_diff_weight()[0].detach()
    torch.testing.assert_close(adapter.delta_weight(), expected.reshape(base.weight.shape))
