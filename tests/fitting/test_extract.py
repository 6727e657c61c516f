"""`tnpeft.extract`: a full fine-tune as an adapter, what it leaves out, and checkpoints that are none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small import Net, bits, net, net_input, same_bits
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AttachError, BindError

MATCH = "first|wide|up|head.0"
X = net_input()


def tuned_by(spec: str, seed: int = 3, **params: float) -> nn.Module:
    """The small model after an adapter with random cores was merged into it."""
    model = net()
    handle = tnpeft.attach(model, spec, match=MATCH, **params)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    tnpeft.detach(model, merge=True)
    return model.eval()


def tuned_at_random(seed: int = 5) -> dict[str, Tensor]:
    """Every floating-point tensor of the small model a little changed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in net().state_dict().items()
    }


@pytest.mark.parametrize("spec", ["lora", "lokr", "tt_lora"])
def test_what_an_adapter_made_is_found_again(spec: str, tmp_path: Path):
    tuned = tuned_by(spec, r=2)
    model = net()
    extraction = tnpeft.extract(model, tuned.state_dict(), spec, match=MATCH, r=2)
    assert max(row.error for row in extraction.layers) < 1e-4
    assert extraction.unexplained == ()
    assert extraction.captured == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(model(X), tuned(X), rtol=1e-5, atol=1e-5)
    tnpeft.save(model, tmp_path / "a.safetensors")
    fresh = net()
    tnpeft.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(X), tuned(X), rtol=1e-5, atol=1e-5)
    tnpeft.detach(fresh)
    assert same_bits(bits(fresh), bits(net()))


def test_a_random_change_is_cut_at_the_rank():
    base, tuned = net().state_dict(), tuned_at_random()
    calls = []
    extraction = tnpeft.extract(
        net(), tuned, "lora", match=MATCH, r=2, progress=lambda row, number, total: calls.append((row, number, total))
    )
    assert [row.name for row in extraction.layers] == ["first", "wide", "up", "head.0"]
    assert [(number, total) for _, number, total in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert tuple(row for row, _, _ in calls) == extraction.layers
    lost = 0.0
    for row in extraction.layers:
        delta = tuned[f"{row.name}.weight"].double() - base[f"{row.name}.weight"].double()
        matrix = torch.cat([part.transpose(0, 1).flatten(1) for part in delta.chunk(2)]) if row.name == "up" else delta
        singular = torch.linalg.svdvals(matrix.flatten(1))
        assert row.error == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)
        assert row.norm == pytest.approx(float(delta.norm()), rel=1e-9)
        assert row.captured == pytest.approx(1 - row.error**2)
        lost += float(singular[2:].square().sum())
    # Nothing but the weights was asked for: the rest is told, the largest change first.
    changed = {name for name, tensor in tuned.items() if tensor.is_floating_point()}
    rest = changed - {f"{row.name}.weight" for row in extraction.layers} - set(extraction.copied)
    assert {row.name for row in extraction.unexplained} == rest
    norms = [row.norm for row in extraction.unexplained]
    assert norms == sorted(norms, reverse=True)
    assert extraction.missing == pytest.approx(math.hypot(*norms))
    whole = sum(float((tuned[name].double() - base[name].double()).square().sum()) for name in changed)
    assert extraction.norm == pytest.approx(math.sqrt(whole))
    assert extraction.captured == pytest.approx(1 - (lost + extraction.missing**2) / whole)
    assert "4 layers" in str(extraction)
    assert extraction.as_dict()["unexplained_norm"] == extraction.missing


def test_biases_and_norms_are_taken_as_the_recipe_trains_them():
    tuned = tuned_at_random()
    model = net()
    train = {"bias": "adapted", "norm": True}
    extraction = tnpeft.extract(model, tuned, "full", match=MATCH, train=train)
    assert {"first.bias", "up.bias", "head.0.bias", "norm.weight", "batch_norm.running_mean"} <= set(extraction.copied)
    assert [row.name for row in extraction.unexplained] == ["head.2.weight", "head.2.bias"]
    tnpeft.detach(model, merge=True)
    state = bits(model)
    for name in extraction.copied:
        assert torch.equal(state[name], tuned[name]), name
    for row in extraction.layers:
        torch.testing.assert_close(state[f"{row.name}.weight"], tuned[f"{row.name}.weight"])


def test_the_recipes_also_covers_what_it_names():
    extraction = tnpeft.extract(net(), tuned_at_random(), "full", match=MATCH, train={"also": [r"head\.2"]})
    assert {"head.2.weight", "head.2.bias"} <= set(extraction.copied)


def test_nothing_changed():
    extraction = tnpeft.extract(net(), net().state_dict(), "lora", match=MATCH)
    assert {(row.error, row.norm, row.captured, row.method) for row in extraction.layers} == {(0.0, 0.0, 1.0, "start")}
    assert (extraction.captured, extraction.norm, extraction.unexplained) == (1.0, 0.0, ())


def test_a_weight_that_two_layers_share():
    """One name of a tied weight is enough, and its change counts once."""

    def tied() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    tuned = {name: tensor.clone() for name, tensor in tied().state_dict().items() if name != "2.weight"}
    tuned["0.weight"] += 0.1
    extraction = tnpeft.extract(tied(), tuned, "full", match="0")
    assert extraction.unexplained == ()
    assert extraction.norm == pytest.approx(0.4, rel=1e-5)


def test_the_same_file_twice(tmp_path: Path):
    files = []
    for number in range(2):
        model = net()
        tnpeft.extract(model, tuned_at_random(), "loha", match="wide|head.0", r=1, iterations=5)
        tnpeft.save(model, tmp_path / f"{number}.safetensors")
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert files[0] == files[1]


def refused(tuned: object, spec: str = "lora", error: type[Exception] = AttachError, **keywords: object) -> str:
    """The text of the error; the model is left as it was."""
    model = net()
    before = bits(model)
    with pytest.raises(error) as excinfo:
        tnpeft.extract(model, tuned, spec, **{"match": MATCH, **keywords})
    assert same_bits(bits(model), before)
    assert type(model.wide) is nn.Conv3d
    return str(excinfo.value)


STATE = net().state_dict()
PASS = "Pass checkpoints of this model."


@pytest.mark.parametrize(
    ("tuned", "text"),
    [
        (3, "tuned checkpoint: expected tensors by name, found 3. Pass the state dict of the full fine-tune."),
        (
            {name: tensor for name, tensor in STATE.items() if name != "wide.weight"},
            f"tuned checkpoint: expected the names of the model's tensors, found no 'wide.weight'. {PASS}",
        ),
        (
            {**STATE, "wide.weigth": STATE["wide.weight"]},
            "tuned checkpoint: expected the names of the model's tensors, found 'wide.weigth' too many. "
            "Did you mean `wide.weight`?",
        ),
        (
            {f"module.{name}": tensor for name, tensor in STATE.items()},
            "tuned checkpoint: expected the names of the model's tensors, found no 'first.weight' and 15 others; "
            "'module.first.weight' and 15 others too many. Remove the prefix 'module.' from its names.",
        ),
        (
            {**STATE, "wide.weight": torch.ones(2, 2)},
            "tuned checkpoint: expected the model's shapes, for 'wide.weight' (4, 4, 3, 3, 3), "
            f"found 'wide.weight' of shape (2, 2). {PASS}",
        ),
        (
            {**STATE, "wide.weight": 3},
            "tuned checkpoint: expected the model's shapes, for 'wide.weight' (4, 4, 3, 3, 3), "
            f"found 'wide.weight', a int. {PASS}",
        ),
        (
            {**STATE, "wide.weight": STATE["wide.weight"] * math.nan},
            "tuned tensor 'wide.weight': expected finite numbers, found nan or inf. "
            "Choose an earlier checkpoint: training has diverged.",
        ),
        (
            {**STATE, "head.2.bias": STATE["head.2.bias"] / 0},
            "tuned tensor 'head.2.bias': expected finite numbers, found nan or inf. "
            "Choose an earlier checkpoint: training has diverged.",
        ),
    ],
)
def test_checkpoints_that_are_none(tuned: object, text: str):
    assert refused(tuned) == text


def test_what_layers_share_is_not_fitted():
    assert refused(STATE, "lotr") == (
        "spec 'lotr', core 'left': expected cores that each belong to one layer: layers are fitted one by one, found "
        "one shared by layers, such as 'first'. Freeze it (`frozen: true`), or extract with a spec without "
        "shared cores."
    )
    # A shared core that is frozen is the same for all, fitted or not.
    assert len(tnpeft.extract(net(), tuned_at_random(), "vera", match=MATCH, r=2).layers) == 4


def test_other_refusals():
    assert refused(STATE, match="nowhere").startswith("spec 'lora', match 'nowhere': expected at least one layer")
    assert refused(STATE, error=BindError, method="sgd").startswith("`method`: expected one of auto, als, adam")
    with pytest.raises(AttachError, match=r"^model: expected the base weights' values, found none"):
        tnpeft.extract(Net().to("meta"), STATE, "lora", match=MATCH)
    model = net()
    tnpeft.attach(model, "lora", match="wide")
    with pytest.raises(AttachError) as excinfo:
        tnpeft.extract(model, STATE, "lora", match="first")
    assert str(excinfo.value) == (
        "model: expected the base model, found one with adapters attached. Detach the adapters first."
    )


def test_an_interruption_takes_the_adapter_off():
    model = net()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tnpeft.extract(model, tuned_at_random(), "lora", match=MATCH, progress=interrupt)
    assert type(model.wide) is nn.Conv3d
    assert same_bits(bits(model), bits(net()))
