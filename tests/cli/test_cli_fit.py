"""`tnpeft fit`: checkpoints in, an adapter file out, and all that can be wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import net, net_input
from terminal import data, mistakes, run, text
from torch import Tensor

import tnpeft

MODEL = ("-m", "small:net")
LORA = ("--spec", "lora", "--match", "wide|head.0", "--set", "r=2")
X = net_input()
RECIPE = """
tnpeft: 1
name: mine
adapters:
  - {spec: lora, match: '^wide$', params: {r: 2}}
  - {spec: full, match: 'head'}
train: {bias: adapted}
"""


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """`base.safetensors` and `tuned.safetensors`, a LoRA of rank 2 apart, in a working directory of their own."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.chdir(tmp_path)
    save_file(net().state_dict(), "base.safetensors")
    model = net()
    handle = tnpeft.attach(model, "lora", match="wide|head.0", r=2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    tnpeft.detach(model, merge=True)
    state = model.state_dict()
    save_file(state, "tuned.safetensors")
    return state


def same_outputs(file: str, tuned: dict[str, Tensor]) -> None:
    model, expected = net(), net()
    expected.load_state_dict(tuned)
    tnpeft.load(model, file)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)


def test_an_exact_lora(tuned: dict[str, Tensor]):
    before = [Path(name).read_bytes() for name in ("base.safetensors", "tuned.safetensors")]
    result = run("fit", "base.safetensors", "tuned.safetensors", *MODEL, *LORA, "-o", "a.safetensors")
    assert result.exit_code == 0, result.output
    printed = [line.split() for line in result.stdout.splitlines()]
    assert printed[0] == ["a.safetensors"]
    assert [line[0] for line in printed[2:4]] == ["wide", "head.0"]
    assert ["layers", "2,", "parameters", "244"] in printed
    assert "unexplained  nothing: the recipe covers all that changed" in result.stdout
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["[1/2]", "[2/2]"]
    same_outputs("a.safetensors", tuned)
    assert [Path(name).read_bytes() for name in ("base.safetensors", "tuned.safetensors")] == before


def test_the_frozen_copy_that_was_chosen(tuned: dict[str, Tensor]):
    arguments = ("fit", "base.safetensors", "tuned.safetensors", *MODEL, "-o", "a.safetensors", "-q")
    printed = text(*arguments, "--spec", "pissa", "--match", "wide|head.0", "--set", "r=2")
    assert "frozen copy  zeros in 2 layers, as drawn in 0" in printed
    same_outputs("a.safetensors", tuned)
    assert "frozen copy" not in text(*arguments, *LORA)


def test_a_recipe_and_what_it_does_not_cover(tuned: dict[str, Tensor]):
    changed = {name: tensor + 0.1 if "weight" in name or "bias" in name else tensor for name, tensor in tuned.items()}
    save_file(changed, "tuned.safetensors")
    Path("mine.yaml").write_text(RECIPE)
    arguments = ("base.safetensors", "tuned.safetensors", *MODEL, "--recipe", "mine.yaml", "-o", "a.safetensors", "-q")
    document = data("fit", *arguments, "--name", "adni")
    assert (document["base"], document["tuned"], document["file"], document["ok"]) == (
        "base.safetensors",
        "tuned.safetensors",
        "a.safetensors",
        True,
    )
    assert [(row["name"], row["spec"]) for row in document["layers"]] == [
        ("wide", "lora"), ("head.0", "full"), ("head.2", "full")
    ]  # fmt: skip
    assert {"head.0.bias", "head.2.bias"} <= set(document["copied"])
    assert {row["name"] for row in document["unexplained"]} == {
        "first.weight", "first.bias", "norm.weight", "norm.bias", "batch_norm.weight", "batch_norm.bias",
        "up.weight", "up.bias",
    }  # fmt: skip
    model = net()
    assert tnpeft.load(model, "a.safetensors").name == "adni"
    torch.testing.assert_close(model.head[0].weight, changed["head.0.weight"])
    torch.testing.assert_close(model.head[2].bias, changed["head.2.bias"])
    printed = text("fit", *arguments)
    assert "in 8 tensors outside the recipe:" in printed


def test_a_largest_error(tuned: dict[str, Tensor]):
    noise = torch.rand(tuned["wide.weight"].shape, generator=torch.Generator().manual_seed(8))
    save_file({**tuned, "wide.weight": tuned["wide.weight"] + 0.1 * noise}, "noisy.safetensors")
    arguments = ("fit", "base.safetensors", "noisy.safetensors", *MODEL, *LORA, "-o", "a.safetensors", "-q")
    result = run(*arguments, "--max-error", "1e-3")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("the largest relative error, ")
    assert result.stderr == ""
    assert Path("a.safetensors").exists()
    document = json.loads(run(*arguments, "--max-error", "1e-3", "--json").stdout)
    assert document["ok"] is False
    assert data(*arguments, "--max-error", "0.99")["ok"] is True


def test_shards(tuned: dict[str, Tensor]):
    for name in ("indexed", "plain"):
        Path(name).mkdir()
        for number in range(2):
            part = {key: tensor for at, (key, tensor) in enumerate(tuned.items()) if at % 2 == number}
            save_file(part, f"{name}/model-{number}.safetensors")
    places = {key: f"model-{at % 2}.safetensors" for at, key in enumerate(tuned)}
    Path("indexed/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for folder in ("indexed", "plain"):
        data("fit", "base.safetensors", folder, *MODEL, *LORA, "-o", f"{folder}.safetensors", "-q")
        same_outputs(f"{folder}.safetensors", tuned)

    def refused(folder: str) -> list[str]:
        return mistakes("fit", "base.safetensors", folder, *MODEL, *LORA, "-o", "x.safetensors", "-q")

    Path("indexed/model-1.safetensors").unlink()
    assert refused("indexed")[0].startswith("indexed/model-1.safetensors: checkpoint: expected a file that can be read")
    outside = {"weight_map": {"wide.weight": "../base.safetensors"}}
    Path("indexed/model.safetensors.index.json").write_text(json.dumps(outside))
    assert "expected names of files beside it, found " in refused("indexed")[0]
    Path("indexed/model.safetensors.index.json").write_text("{}")
    assert "expected a `weight_map` of file names, found KeyError." in refused("indexed")[0]
    save_file({"wide.weight": tuned["wide.weight"]}, "plain/again.safetensors")
    assert "tensor 'wide.weight': expected one of that name, found two, in several files." in refused("plain")[0]
    Path("empty").mkdir()
    assert "empty: checkpoint: expected safetensors files, found a folder without any." in refused("empty")[0]
    assert not Path("x.safetensors").exists()


@pytest.mark.usefixtures("tuned")
def test_checkpoints_that_are_none(tuned: dict[str, Tensor]):
    def refused(file: str, base: str = "base.safetensors") -> str:
        (line,) = mistakes("fit", base, file, *MODEL, *LORA, "-o", "x.safetensors", "-q")
        return line

    assert refused("none.safetensors").startswith("none.safetensors: checkpoint: expected a file that can be read, ")
    torch.save({"model": tuned}, "tuned.pth")
    assert refused("tuned.pth").startswith("tuned.pth: checkpoint: expected a complete safetensors file, found ")
    whole = Path("tuned.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert refused("cut.safetensors").startswith("cut.safetensors: checkpoint: expected a complete safetensors file, ")
    save_file({name: tensor for name, tensor in tuned.items() if name != "up.bias"}, "less.safetensors")
    assert refused("less.safetensors") == (
        "tuned checkpoint: expected the names of the model's tensors, found no 'up.bias'. "
        "Pass checkpoints of this model."
    )
    assert refused("tuned.safetensors", base="less.safetensors") == (
        "checkpoint less.safetensors: expected the names of the model's tensors, found no 'up.bias'. "
        "Pass checkpoints of this model."
    )
    save_file({**tuned, "up.bias": torch.ones(5)}, "other.safetensors")
    assert refused("other.safetensors") == (
        "tuned checkpoint: expected the model's shapes, for 'up.bias' (4,), found 'up.bias' of shape (5,). "
        "Pass checkpoints of this model."
    )
    save_file({**tuned, "wide.weight": tuned["wide.weight"] / 0}, "gone.safetensors")
    assert refused("gone.safetensors") == (
        "tuned tensor 'wide.weight': expected finite numbers, found nan or inf. "
        "Choose an earlier checkpoint: training has diverged."
    )
    assert sorted(Path().glob("*x.safetensors*")) == []


@pytest.mark.usefixtures("tuned")
def test_wrong_options():
    def refused(*arguments: str, status: int = 2, output: str = "x.safetensors") -> str:
        files = ("base.safetensors", "tuned.safetensors", *MODEL, "-o", output)
        (line,) = mistakes("fit", *files, *arguments, status=status)
        return line

    example = r"For example --recipe lora_ddpm, or --spec lora --match 'attn\.to_[qv]$'."
    assert refused() == f"what to fit: expected --recipe, or --spec with --match, found neither. {example}"
    assert refused("--recipe", "lora_ddpm", "--spec", "lora") == (
        f"what to fit: expected --recipe, or --spec with --match, found both. {example}"
    )
    assert refused("--recipe", "lora") == "--recipe: expected a recipe, found a spec, 'lora'. Write `--spec lora`."
    assert refused("--spec", "lora_ddpm") == (
        "--spec: expected a spec, found a recipe, 'lora_ddpm'. Write `--recipe lora_ddpm`."
    )
    assert refused("--spec", "lora").startswith("spec 'lora': expected --match, which layers it goes on, found none.")
    assert refused(*LORA, "--method", "sgd") == (
        "--method: expected one of auto, als, adam, found 'sgd'. Leave it out, or choose one of them."
    )
    assert refused(*LORA, "--iterations", "0") == (
        "--iterations: expected a positive whole number, found 0. Leave it out, or allow 100, say."
    )
    assert refused(*LORA, "--set", "q=1").startswith("--set q: expected one of r, alpha, found `q`.")
    own = "For example -o adapter.safetensors."
    for checkpoint in ("base.safetensors", "./tuned.safetensors"):
        assert refused(*LORA, output=checkpoint) == (
            f"--output: expected a file of its own, found a checkpoint, {Path(checkpoint)}. {own}"
        )
    assert refused(*LORA, output="no/x.safetensors") == (
        f"--output: expected a file name in a folder that exists, found no folder 'no'. {own}"
    )
    assert refused(*LORA, output=".") == (
        f"--output: expected a file name in a folder that exists, found a folder. {own}"
    )
    assert refused("--spec", "lotr", "--match", "wide", status=1).startswith(
        "spec 'lotr', core 'left': expected cores that each belong to one layer"
    )
    assert refused("--spec", "lora", "--match", "nowhere", status=1).startswith("spec 'lora', match 'nowhere': ")
    assert sorted(path.name for path in Path().iterdir()) == ["base.safetensors", "tuned.safetensors"]


# without a model, and from a change


WITHOUT = ("fit", "base.safetensors", "tuned.safetensors", *LORA, "-o", "a.safetensors", "-q")


def test_without_a_model_the_weights_tell_the_layers(tuned: dict[str, Tensor]):
    printed = text(*WITHOUT)
    assert "Conv3d(" in printed
    assert printed.splitlines()[-1] == (
        "layers were taken as their weights' axes say, without groups; the file loads onto no others (see --model)"
    )
    same_outputs("a.safetensors", tuned)
    rows = {row["name"]: row for row in data(*WITHOUT)["layers"]}
    known = {row["name"]: row for row in data(*WITHOUT, *MODEL)["layers"]}
    assert {name: row["layer"] for name, row in rows.items()} == {name: row["layer"] for name, row in known.items()}
    assert all(rows[name]["captured"] == pytest.approx(row["captured"]) for name, row in known.items())
    assert all(row["captured"] == pytest.approx(1, abs=1e-6) for row in rows.values())


@pytest.mark.usefixtures("tuned")
def test_a_file_that_was_fitted_to_other_layers_is_refused(tmp_path: Path):
    weight = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    save_file({"a.weight": weight, "a.bias": torch.zeros(6)}, "base.safetensors")
    save_file({"a.weight": weight + torch.ones(6, 6), "a.bias": torch.zeros(6)}, "tuned.safetensors")
    data("fit", "base.safetensors", "tuned.safetensors", "--spec", "lora", "--match", "a", "-o", "a.safetensors", "-q")
    model = torch.nn.Module()
    model.a = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 6)  # stores (in, out): as square as the other
    with torch.no_grad():
        model.a.weight.copy_(weight)
    with pytest.raises(tnpeft.AdapterFileError) as error:
        tnpeft.load(model, "a.safetensors")
    assert str(error.value) == (
        "a.safetensors: layer 'a': expected a Linear(6, 6), as the adapter was fitted, found Linear(6, 6, turned). "
        "Fit it again with `tnpeft fit --model`, which knows the layers."
    )
    plain = torch.nn.Module()
    plain.a = torch.nn.Linear(6, 6)
    plain.load_state_dict({"a.weight": weight, "a.bias": torch.zeros(6)})
    tnpeft.load(plain, "a.safetensors")
    total = weight + tnpeft.Adapter.delta_weight(tnpeft.surgery.adapters_of(plain, "default")["a"])
    torch.testing.assert_close(total, weight + 1, rtol=1e-4, atol=1e-4)


def test_a_change_in_place_of_the_fine_tune(tuned: dict[str, Tensor]):
    before = net().state_dict()
    change = {name: tuned[name].double() - before[name].double() for name in ("wide.weight", "head.0.weight")}
    torch.save(change, "change.pt")
    arguments = ("fit", "base.safetensors", "--delta", "change.pt", *LORA, "-o", "a.safetensors", "-q")
    document = data(*arguments)
    assert (document["tuned"], document["delta"]) == (None, "change.pt")
    assert document["captured"] == pytest.approx(1, abs=1e-6)
    assert document["unexplained"] == []
    same_outputs("a.safetensors", tuned)
    expected = "what to fit to: expected TUNED or --delta, found {}. "
    fix = "Write `tnpeft fit BASE TUNED ...`, or `tnpeft fit BASE --delta CHANGE ...`."
    both = ("fit", "base.safetensors", "tuned.safetensors", *arguments[2:])
    assert mistakes(*both, status=2) == [expected.format("both") + fix]
    assert mistakes("fit", "base.safetensors", *LORA, "-o", "x", status=2) == [expected.format("neither") + fix]
    torch.save({"wide.weigth": change["wide.weight"]}, "change.pt")
    assert mistakes(*arguments) == [
        "change.pt: change: expected names of the base's tensors, found 'wide.weigth'. Did you mean `wide.weight`?"
    ]
    torch.save({"wide.weight": torch.ones(2)}, "change.pt")
    assert mistakes(*arguments)[0].startswith("change.pt: change of 'wide.weight': expected the shape (")


def test_names_that_no_model_has(tuned: dict[str, Tensor]):
    for names, odd in ((("a", "a.b"), "'a.b'"), (("a.b", "a"), "'a'"), (("training.x",), "'training'")):
        tensors = {name: torch.ones(2, 2) for name in names}
        torch.save(tensors, "odd.pt")  # keeps their order
        (line,) = mistakes("fit", "odd.pt", "odd.pt", *LORA, "-o", "x.safetensors", "-q")
        assert line == f"checkpoint: expected names as a model's tensors have, found {odd}. Name the model: --model."


@pytest.mark.parametrize(
    "statistics",
    [
        {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},  # as before torch 0.4.1
        {"running_mean": torch.tensor(0.0), "running_var": torch.tensor(1.0), "num_batches_tracked": torch.tensor(1)},
        {"running_mean": torch.zeros(4), "running_var": torch.ones(5), "num_batches_tracked": torch.tensor(1)},
    ],
)
def test_statistics_that_no_batch_norm_has_are_tensors_as_any(
    statistics: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    base = {f"norm.{name}": value for name, value in statistics.items()} | {"wide.weight": torch.randn(6, 4)}
    save_file(base, "base.safetensors")
    save_file(base | {"wide.weight": base["wide.weight"] + 1}, "tuned.safetensors")
    fitted = data(
        "fit", "base.safetensors", "tuned.safetensors", "--spec", "lora", "--match", "all", "-o", "a.safetensors"
    )
    assert [(row["name"], row["error"] < 1e-5) for row in fitted["layers"]] == [("wide", True)]
    assert not fitted["unexplained"]


@pytest.mark.usefixtures("tuned")
def test_the_command_has_its_earlier_name_too():
    data("extract", *WITHOUT[1:])
    assert "extract" not in run("--help").stdout
