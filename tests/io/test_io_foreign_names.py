"""Names of layers: patterns on inner models, layers of two names, saved norms, and what is not adapted here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Net, X, adapted, assert_same, loaded, lycoris_of, peft_of, with_lycoris, with_peft
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_io_foreign_refusals import cannot, refused
from torch import Tensor, nn

import tnpeft
from tnpeft.io.foreign.key_names import dotted, underscored

peft = pytest.importorskip("peft")
with_warnings = pytest.mark.filterwarnings("ignore::UserWarning")
unmatched = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")

KINDS = "one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"
OUTSIDE = "tnpeft adapts no such layer and loads no part of a file: merge the adapter in the library that made it."
MADE_FOR = "Load the file onto the model it was made for."


class Outer(nn.Module):
    """A model with another inside, under a name that PEFT's patterns may use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


SIX = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
PATTERNS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha_pattern": {"model.0": 20}},
    "rank": {"rank_pattern": {"model.2": 4}},
    "anchored": {"alpha_pattern": {"^model.0": 20, "^2": 7}, "rank_pattern": {r"^model\.2": 3}},
    "a suffix": {"alpha_pattern": {"0": 20}, "rank_pattern": {"2": 1}},
    "the first that fits": {"alpha_pattern": {"model.2": 3, r"model\.\d": 20, "0": 5}},
    "rslora": {"alpha_pattern": {"model.0": 20}, "rank_pattern": {"model.0": 5}, "use_rslora": True},
}


@unmatched
@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("method", ["LoraConfig", "LoHaConfig", "LoKrConfig"])
def test_patterns_mean_the_names_of_the_file(method: str, case: str, tmp_path: Path):
    options = dict(PATTERNS[case])
    if method != "LoraConfig" and options.pop("use_rslora", False):
        options["alpha_pattern"] = {"model.0": 2}
    alpha = {"lora_alpha" if method == "LoraConfig" else "alpha": 2}
    config = getattr(peft, method)(r=2, target_modules=["0", "2"], **alpha, **options)
    with_peft(config, Outer()).save_pretrained(tmp_path)
    theirs = peft_of(tmp_path, Outer())  # PEFT sorts the patterns that it saves
    assert_same(loaded(tmp_path, Outer())(SIX), theirs(SIX))
    inner = Outer()
    tnpeft.load_foreign(inner.model, tmp_path)
    assert_same(inner(SIX), theirs(SIX))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.lists(st.sampled_from("ab01"), min_size=1, max_size=3), min_size=1, max_size=4),
    patterns=st.dictionaries(
        st.one_of(
            st.lists(st.sampled_from(["a", "b", r"\.", "0", "1", "^", ".*", "[ab]"]), min_size=1, max_size=4).map(
                "".join
            )
        ),
        st.integers(1, 9),
        max_size=4,
    ),
)
def test_patterns_are_looked_up_as_peft_does(names: list[list[str]], patterns: dict[str, int]):
    from peft.utils.other import get_pattern_key

    from tnpeft.io.foreign.peft import _by_pattern
    from tnpeft.io.foreign.source import Source

    source = Source(Path("a"), "peft", {})
    for name in map(".".join, names):
        expected = patterns.get(get_pattern_key(patterns.keys(), name), 0)
        assert _by_pattern(source, {"alpha_pattern": patterns}, "alpha_pattern", name, 0) == expected


def test_saved_modules_of_an_inner_model(tmp_path: Path):
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], bias="all"), Outer())
    theirs.save_pretrained(tmp_path)
    inner = Outer()
    tnpeft.load_foreign(inner.model, tmp_path)
    assert_same(inner(SIX), theirs(SIX))


def test_lycoris_alphas_of_an_inner_model(tmp_path: Path):
    network, theirs = with_lycoris(Outer(), algo="locon", linear_dim=2, linear_alpha=20)
    network.loras[0].alpha.fill_(3.0)
    network.loras[0].scale = 1.5
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    inner = Outer()
    tnpeft.load_foreign(inner.model, tmp_path / "a.safetensors")
    assert_same(inner(SIX), theirs(SIX))


def test_two_names_of_the_file_that_are_one_layer_here(tmp_path: Path):
    class Both(Outer):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(6, 8))

    with_peft(peft.LoraConfig(r=2, target_modules=["0"]), Both()).save_pretrained(tmp_path)
    assert refused(tmp_path, base=Outer().model) == (
        f"PATH: layer '0': tensors: expected those of one layer of the file, found tensors of '0' and of 'model.0'. "
        f"{MADE_FOR}"
    )


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.c = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_a_layer_in_two_places(tmp_path: Path):
    """PEFT adapts the first place alone, LyCORIS and tnpeft both."""
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["a", "c"]), Twice())
    theirs.save_pretrained(tmp_path / "theirs")
    assert refused(tmp_path / "theirs", base=Twice()) == (
        "PATH: layer 'a', which is also 'b': expected a layer in one place of the model, found one in several, of "
        "which PEFT adapts the first alone. Give each place a layer of its own, for example a `copy.deepcopy`."
    )
    base = Twice()
    base.b = copy.deepcopy(base.a)
    assert_same(loaded(tmp_path / "theirs", base)(SIX), theirs(SIX))
    with_peft(peft.LoraConfig(r=2, target_modules=["c"]), Twice()).save_pretrained(tmp_path / "others")
    assert loaded(tmp_path / "others", Twice())(SIX).shape == SIX.shape

    ours = adapted("lora", "a|b", base=Twice(), r=2)
    for kind in ("peft", "diffusers"):
        assert cannot(ours, tmp_path / "ours", kind) == (
            "PATH: layer 'a': place: expected one in the model, found also that of 'b': PEFT would adapt the first "
            "alone. Merge it into the model instead, or keep it in tnpeft's own file."
        )
    tnpeft.save_foreign(ours, tmp_path / "ours.safetensors", "lycoris")
    assert_same(lycoris_of(tmp_path / "ours.safetensors", Twice())(SIX), ours(SIX))
    assert_same(loaded(tmp_path / "ours.safetensors", Twice())(SIX), ours(SIX))


class Normed(nn.Module):
    """Norms of both kinds that keep statistics, and a buffer that is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(6, 8)
        self.batch = nn.BatchNorm1d(8, momentum=None)
        self.conv = nn.Conv1d(8, 4, 3, padding=1)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.head = nn.Module()
        self.head.norm = nn.BatchNorm1d(4)
        self.head.register_buffer("factor", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.line(x)).unflatten(1, (8, 1)).expand(-1, -1, 5)
        return self.head.norm(self.instance(self.conv(x + torch.arange(5.0)))) * self.head.factor


def trained_norms(saved: list[str]) -> Any:
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["line"], modules_to_save=saved), Normed())
    theirs.train()
    for seed in range(3):
        theirs(torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1)
    return theirs.eval()


@pytest.mark.parametrize("saved", [["batch", "instance", "head"], ["batch", "instance", "norm"]], ids=["head", "norm"])
def test_norms_with_statistics(saved: list[str], tmp_path: Path):
    theirs = trained_norms(saved)
    theirs.save_pretrained(tmp_path)
    ours, again = loaded(tmp_path, Normed()), peft_of(tmp_path, Normed())
    assert_same(ours(SIX), theirs(SIX))
    for model in (ours, again, theirs):
        model.train()
    assert_same(ours(SIX), again(SIX))  # and both have learned the same statistics
    for model in (ours, again, theirs):
        model.eval()
    assert_same(ours(SIX), again(SIX))
    with tnpeft.disabled(ours):
        assert torch.equal(ours(SIX), Normed().eval()(SIX))
    tnpeft.save(ours, tmp_path / "ours.safetensors")
    fresh = Normed()
    tnpeft.load(fresh, tmp_path / "ours.safetensors")
    assert torch.equal(fresh.eval()(SIX), ours(SIX))


def edited(path: Path, **changes: Tensor | None) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    for key, value in changes.items():
        name = "base_model.model." + key.replace("__", ".")
        tensors.pop(name, None)
        tensors |= {} if value is None else {name: value}
    save_file(tensors, path / "adapter_model.safetensors")


BUFFERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "another buffer": (
        {"head__factor": torch.tensor([3.0])},
        "tensor 'base_model.model.head.factor': expected the values of the buffer 'head.factor' of this model, found "
        "others. An adapter trains no buffers but the running statistics of norms: set this one in the model first.",
    ),
    "shape": (
        {"batch__running_mean": torch.ones(7)},
        f"running statistics 'batch.running_mean': expected (8,), found (7,). {MADE_FOR}",
    ),
    "type": (
        {"batch__num_batches_tracked": torch.tensor(2.5)},
        f"running statistics 'batch.num_batches_tracked': expected int64(), found float32(). {MADE_FOR}",
    ),
    "no norm": (
        {"line__running_mean": torch.ones(8)},
        "method: expected LoRA, LoHa and LoKr of PEFT, LyCORIS, diffusers, kohya and ComfyUI, or TenVOO, QuanTA, "
        "LoCon, LoHa and LoKr of the TenVOO paper, found 'base_model.model.line.running_mean'. Convert such adapters "
        "with the library that made them.",
    ),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_that_do_not_fit(case: str, tmp_path: Path):
    changes, text = BUFFERS[case]
    trained_norms(["batch", "head"]).save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    assert refused(tmp_path, base=Normed()) == f"PATH: {text}"


ATTENTION = "MultiheadAttention, whose q, k and v weights are parameters of its own"


class Words(nn.Module):
    """Layers that PEFT adapts; tnpeft adapts some of them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.words = nn.Embedding(10, 8)
        self.attend = nn.MultiheadAttention(8, 2)
        self.mix = Conv1D(8, 8)
        self.line = nn.Linear(8, 8)


@with_warnings
@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (["attend"], {"attend": ATTENTION}),
        (["attend", "line", "words"], {"attend": ATTENTION}),
    ],
)
def test_layers_that_are_not_adapted_here_are_named(targets: list[str], kinds: dict[str, str], tmp_path: Path):
    with_peft(peft.LoraConfig(r=2, target_modules=targets), Words()).save_pretrained(tmp_path)
    assert refused(tmp_path, base=Words()).splitlines() == [
        f"PATH: layer '{name}': layer type: expected {KINDS}, found {kind}. {OUTSIDE}" for name, kind in kinds.items()
    ]


def test_a_linear_layer_that_is_stored_the_other_way_round(tmp_path: Path):
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["mix"], fan_in_fan_out=True), Words())
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(3, 8)
    model = loaded(tmp_path / "theirs", Words())
    assert_same(model.mix(x), theirs.base_model.model.mix(x))
    tnpeft.save_foreign(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(Words(), tmp_path / "ours")
    assert_same(again.base_model.model.mix(x), model.mix(x))


def test_one_projection_of_an_attention(tmp_path: Path):
    """The output projection alone is a Linear like others."""
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["line"]), Words())
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert_same(loaded(tmp_path, Words()).line(x), theirs.base_model.model.line(x))


def test_the_bias_of_lora_b_alone(tmp_path: Path):
    with_peft(peft.LoraConfig(r=2, target_modules=["line"])).save_pretrained(tmp_path)
    edited(tmp_path, conv2__lora_B__bias=torch.ones(24))
    assert refused(tmp_path) == (
        "PATH: layer 'conv2': expected `lora_A` and `lora_B`, found the bias of `lora_B` alone. "
        "The file is incomplete: copy it again, or save the adapter once more."
    )


@unmatched
def test_a_literal_name_among_patterns(tmp_path: Path):
    """PEFT takes the name itself where no pattern matches it, be it no expression that does."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a+": nn.Linear(6, 6)})

    with_peft(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["a+"]), base()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"a+": 20}}))
    theirs = peft_of(tmp_path, base())
    assert_same(loaded(tmp_path, base())["a+"](SIX), theirs.base_model.model["a+"](SIX))


WORDS = st.sampled_from(["a", "b", "a_b", "0", "model", "module", "unet"])
PATHS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)


@given(names=st.sets(PATHS, min_size=1, max_size=6), data=st.data())
def test_dotted_and_underscored_names_come_back(names: set[str], data: st.DataObject):
    """Whatever stands before it, a model's name is that name again; alike ones are told."""
    name = data.draw(st.sampled_from(sorted(names)))
    assert dotted(name, names) == name
    assert dotted(f"base_model.model.{name}", names | {name}) in {name, *names}
    written = {each: f"lycoris_{each}".replace(".", "_") for each in names}
    found = underscored(written.values(), names)
    for each, flat in written.items():
        alike = tuple(other for other in names if written[other] == flat)
        result = found[flat]
        assert (result == each) if len(alike) == 1 else (isinstance(result, tuple) and set(result) == set(alike))


def test_the_whole_net_still_loads(tmp_path: Path):
    """A name with a wrapper's word inside is not cut there."""
    theirs = with_peft(peft.LoraConfig(r=2, target_modules=["line"]), Net())
    theirs.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path)(X), theirs(X))


def flat_lora(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}0.lora_down.weight": torch.ones(2, 6), f"{prefix}0.lora_up.weight": torch.ones(8, 2)}


@pytest.mark.parametrize("prefix", ["tower.", "vision.tower."])
@pytest.mark.parametrize("library", ["lycoris", "peft", "diffusers"])
def test_a_file_for_a_whole_of_which_the_model_is_a_part(library: str, prefix: str, tmp_path: Path):
    """The advice is what then works."""
    path = tmp_path / "adapter_model.safetensors"
    tensors, key = flat_lora(prefix), f"{prefix}0.lora_down.weight"
    if library != "lycoris":
        head = "base_model.model." if library == "peft" else ""
        tensors = {f"{head}{name}".replace("down", "A").replace("up", "B"): tensor for name, tensor in tensors.items()}
        key = next(iter(tensors))
        if library == "peft":
            config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        else:
            path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    inner = Outer().model
    whole = {"tower.": '{"tower": model}', "vision.tower.": '{"vision": torch.nn.ModuleDict({"tower": model})}'}[prefix]
    assert refused(path, base=inner) == (
        f"PATH: tensor '{key}': expected a layer of this model, found no such layer. "
        f"This model has '0': load the file onto `torch.nn.ModuleDict({whole})`."
    )
    before = inner(SIX)
    tnpeft.load_foreign(eval(f"torch.nn.ModuleDict({whole})", {"torch": torch, "model": inner}), path)
    torch.testing.assert_close(inner[0](SIX), Outer().model[0](SIX) + 2 * SIX.sum(1, keepdim=True).expand(4, 8))
    assert not torch.equal(inner(SIX), before)


def test_a_file_for_a_part_of_the_model(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({f"a.{key}": tensor for key, tensor in flat_lora("").items()}, path)
    base = nn.ModuleDict({"one": nn.ModuleDict({"a": Outer().model})})
    assert refused(path, base=base) == (
        "PATH: tensor 'a.0.lora_down.weight': expected a layer of this model, found no such layer. "
        "This model has 'one.a.0': load the file onto `model.one`, if it was made for that part."
    )
    tnpeft.load_foreign(base["one"], path)
    base = nn.ModuleDict({"one": nn.ModuleDict({"a": Outer().model})})
    base["two"] = nn.ModuleDict({"a": Outer().model})  # which of them is not known
    assert refused(path, base=base) == (
        "PATH: tensor 'a.0.lora_down.weight': expected a layer of this model, found no such layer. " + MADE_FOR
    )


def test_a_checkpoint_is_no_adapter(tmp_path: Path):
    torch.save(Net().state_dict(), tmp_path / "base.pt")
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    for name in ("base.pt", "base.safetensors"):
        message = refused(tmp_path / name, base=Net())
        assert message.startswith("PATH: file: expected an adapter: LoRA, LoHa and LoKr of PEFT, ")
        first = "'line.weight', 'line.bias', 'conv1.weight'"
        if name != "base.pt":
            first = "'conv1.bias', 'conv1.weight', 'conv2.bias'"  # in the alphabet's order
        assert message.endswith(
            f", found a model's own weights ({first}). "
            "`tnpeft fit` makes an adapter of a fine-tuned checkpoint and its base."
        )


def test_numbers_that_are_none_are_warned_of(tmp_path: Path):
    tensors = flat_lora("")
    tensors["0.lora_up.weight"][3, 1] = torch.nan
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(tnpeft.TnpeftWarning) as caught:
        tnpeft.load_foreign(Outer().model, tmp_path / "a.safetensors")
    assert [str(one.message) for one in caught] == [
        f"{tmp_path / 'a.safetensors'}: values of the adapter: expected finite numbers, found NaN or infinity in '0'. "
        "Training may have diverged: go back to an earlier file, or train with a smaller learning rate."
    ]
    assert caught[0].filename == __file__
