"""Every spec in every mode computes what it did: the values are committed, those of float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from same_bits import differences, drawn, pairs, summary_error, values_of
from small import spec_cases_in
from smallest import MODES

VALUES = json.loads((Path(__file__).parents[1] / "data" / "values.json").read_text())
PAIRS = pairs()
SPECS = list(dict.fromkeys(spec for _, spec in PAIRS))
# Of the largest value. On a Xeon most are below 4e-7 and VeRA's gradients, sums of which little is left, at 1.2e-6;
# other processors round otherwise.
TOLERANCE = 5e-6


def test_every_shipped_spec_has_values():
    """`python benchmarks/same_bits.py --write tests/data/values.json` makes them."""
    assert {key.partition(" ")[0] for key in VALUES} == {*SPECS}
    assert VALUES.keys() <= {f"{spec} {kind}" for kind, spec in PAIRS}


@pytest.mark.parametrize(("spec", "mode", "kinds"), spec_cases_in(MODES))
def test_outputs_and_gradients_are_what_they_were(spec: str, mode: str, kinds: tuple[str, ...]):
    for kind in kinds:
        values = values_of(kind, spec, mode)
        assert (values is None) == (f"{spec} {kind}" not in VALUES)
        if values is not None:
            assert summary_error(values, VALUES[f"{spec} {kind}"]) < TOLERANCE, kind


def test_a_summary_sees_every_element():
    values = values_of("Linear", "lora", "dense")
    assert values is not None
    known = VALUES["lora Linear"]
    for name, value in values.items():
        for place in range(value.numel()):
            changed = value.clone().flatten()
            changed[place] += 1e-2 * float(value.abs().max())
            assert summary_error({**values, name: changed.reshape(value.shape)}, known) > TOLERANCE


def test_what_differs_is_named(tmp_path: Path):
    old = {"bits|a": drawn("a", (3,)), "close|b": drawn("b", (3,)), "bits|c": drawn("c", (3,))}
    new = {"bits|a": old["bits|a"].clone(), "close|b": old["close|b"] * (1 + 2e-7), "bits|d": drawn("d", (3,))}
    texts = (
        {"texts|e": '{"f": {"g": 1}}', "refused|h": "no"},
        {"texts|e": '{"f": {"g": 2}, "i": 3}', "refused|h": "so"},
    )
    new["bits|a"][1] = torch.nextafter(new["bits|a"][1], torch.tensor(9.0))
    for name, tensors, text in (("old", old, texts[0]), ("new", new, texts[1])):
        save_file(tensors, tmp_path / name, text)
    found = list(differences(tmp_path / "old", tmp_path / "new"))
    assert found == [
        "bits|c: gone",
        "refused|h: 'no' was, 'so' is",
        "texts|e: other values of f.g",
        found[-1],
    ]
    assert found[-1].startswith("bits|a: other bits, ")
