"""LyCORIS's adapters: what it saved computes the same here, and what we write computes the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    LAYERS,
    Net,
    X,
    adapted,
    assert_same,
    loaded,
    lycoris_of,
    move,
    save_or_refuse,
    specs_of,
    with_lycoris,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import tnpeft
from tnpeft.io.foreign.kron import Sizes, lycoris_rebuilds, split

pytest.importorskip("lycoris")

ALL = "|".join(LAYERS)
RANKS = {"linear_dim": 2, "linear_alpha": 1.5, "conv_dim": 3, "conv_alpha": 4}

READ: dict[str, tuple[dict[str, Any], set[str] | None]] = {
    "locon": ({"algo": "locon", **RANKS}, {"lora"}),
    "locon tucker": ({"algo": "locon", "use_tucker": True, **RANKS}, {"lora", "locon_tucker"}),
    "locon scalar": ({"algo": "locon", "use_scalar": True, **RANKS}, {"lora"}),
    "locon rs": ({"algo": "locon", "rs_lora": True, **RANKS}, {"lora"}),
    "loha": ({"algo": "loha", **RANKS}, {"loha"}),
    "loha tucker": ({"algo": "loha", "use_tucker": True, **RANKS}, {"loha", "loha_tucker"}),
    "lokr": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 3}, {"lokr"}),
    "lokr tucker": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "use_tucker": True}, None),
    "lokr both": ({"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "decompose_both": True}, {"lokr_both"}),
    "lokr both tucker": ({"algo": "lokr", "linear_dim": 1, "decompose_both": True, "use_tucker": True}, None),
    "lokr full": ({"algo": "lokr", "full_matrix": True, "linear_alpha": 7}, {"krona"}),
    "lokr too large": ({"algo": "lokr", "linear_dim": 99, "linear_alpha": 7}, {"krona"}),
    "lokr factor": ({"algo": "lokr", "linear_dim": 1, "factor": 6}, {"lokr"}),
    "lokr unbalanced": ({"algo": "lokr", "linear_dim": 2, "unbalanced_factorization": True}, None),
    "lokr unbalanced both": (
        {"algo": "lokr", "linear_dim": 2, "unbalanced_factorization": True, "decompose_both": True, "linear_alpha": 3},
        None,
    ),
    "lokr no alpha": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 0, "conv_alpha": 0}, {"lokr"}),
    "norms": ({"algo": "locon", "train_norm": True, **RANKS}, {"lora"}),
    "dora": ({"algo": "locon", "dora_wd": True, **RANKS}, None),
    "dora tucker": ({"algo": "locon", "dora_wd": True, "use_tucker": True, **RANKS}, None),
    "loha dora": ({"algo": "loha", "dora_wd": True, **RANKS}, None),
    "lokr dora": ({"algo": "lokr", "dora_wd": True, "linear_dim": 2, "linear_alpha": 3}, None),
}


@pytest.mark.parametrize("case", READ)
def test_what_lycoris_saved_computes_the_same_here(case: str, tmp_path: Path):
    options, specs = READ[case]
    network, theirs = with_lycoris(Net(groups=2, dilation=2), **options)
    path = tmp_path / "theirs.safetensors"
    network.save_weights(str(path), None, {})
    ours = loaded(path, Net(groups=2, dilation=2))
    assert_same(ours(X), theirs(X))
    assert specs is None or specs_of(ours) == specs


def test_lokr_dora_on_inputs_is_refused(tmp_path: Path):
    network, _ = with_lycoris(algo="lokr", linear_dim=2, dora_wd=True, wd_on_output=False)
    path = tmp_path / "theirs.safetensors"
    network.save_weights(str(path), None, {})
    with pytest.raises(tnpeft.AdapterFileError) as excinfo:
        loaded(path)
    assert str(excinfo.value) == (
        f"{path}: layer 'conv1': `dora_scale`: expected one number for each of 20 output channels, "
        "found the shape (1, 18, 1). LyCORIS's `wd_on_out=False` is not in the language of specs: merge it there."
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    network, theirs = with_lycoris(algo="locon", **RANKS)
    path = tmp_path / "theirs.safetensors"
    network.save_weights(str(path), None, {})
    return path, theirs(X).detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_files(dtype: torch.dtype, saved: tuple[Path, torch.Tensor]):
    path, _ = saved
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    assert_same(loaded(path)(X), lycoris_of(path)(X))


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_", "my_own_", ""])
def test_prefixes(prefix: str, saved: tuple[Path, torch.Tensor]):
    path, expected = saved
    save_file({prefix + key.removeprefix("lycoris_"): tensor for key, tensor in load_file(path).items()}, path)
    assert_same(loaded(path)(X), expected)


def test_names_with_dots_and_files_of_torch(saved: tuple[Path, torch.Tensor]):
    path, expected = saved
    other = path.with_name("theirs.pt")
    torch.save(load_file(path), other)
    assert_same(loaded(other)(X), expected)
    save_file({key.removeprefix("lycoris_"): tensor for key, tensor in load_file(path).items()}, path)
    base = nn.Sequential()
    base.add_module("net", Net())
    save_file({f"net.{key}": tensor for key, tensor in load_file(path).items()}, path)
    assert_same(loaded(path, base)(X), expected)


def test_no_alpha_means_the_rank(saved: tuple[Path, torch.Tensor]):
    path, _ = saved
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    save_file(tensors, path)
    without = loaded(path)(X)
    ranks = {key: tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    alphas = {key.replace("lora_down.weight", "alpha"): torch.tensor(float(rank)) for key, rank in ranks.items()}
    save_file(tensors | alphas, path)
    assert_same(without, lycoris_of(path)(X))


WRITTEN = {
    "lora": ("lora", ALL, {"r": 3, "alpha": 5}),
    "locon_tucker": ("locon_tucker", "conv|point", {"r": 3, "alpha": 5}),
    "loha": ("loha", ALL, {"r": 3, "alpha": 5}),
    "loha_tucker": ("loha_tucker", "conv|point", {"r": 3, "alpha": 5}),
    "lokr": ("lokr", ALL, {"r": 2, "alpha": 5}),
    "lokr factor": ("lokr", ALL, {"r": 1, "factor": 3}),
    "lokr factor whose sizes are found again if whole": ("lokr", ALL, {"r": 1, "factor": 6, "alpha": 3}),
    "lokr whole": ("lokr", ALL, {"r": 9, "alpha": 5}),
    "lokr_both": ("lokr_both", ALL, {"r": 1, "alpha": 3}),
    "lokr_both, one whole": ("lokr_both", ALL, {"r": 2, "alpha": 3}),
    "krona": ("krona", ALL, {}),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", WRITTEN)
def test_what_we_write_computes_the_same_in_lycoris(case: str, groups: int, tmp_path: Path):
    spec, match, params = WRITTEN[case]
    ours = adapted(spec, match, base=Net(groups, dilation=2), **params)
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "lycoris")
    assert_same(lycoris_of(tmp_path / "a.safetensors", Net(groups, dilation=2))(X), ours(X))
    assert_same(loaded(tmp_path / "a.safetensors", Net(groups, dilation=2))(X), ours(X))


@pytest.mark.parametrize("scale", [0.5, 0.0, -2.0])
@pytest.mark.parametrize("spec", ["lora", "loha", "krona"])
def test_scales_go_into_the_file(spec: str, scale: float, tmp_path: Path):
    ours = adapted(spec, ALL)
    tnpeft.activate(ours, {"default": scale})
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "lycoris")
    assert_same(lycoris_of(tmp_path / "a.safetensors")(X), ours(X))
    assert_same(loaded(tmp_path / "a.safetensors")(X), ours(X))


@pytest.mark.parametrize("case", ["dora", "dora tucker", "loha dora", "lokr dora"])
def test_dora_goes_back(case: str, tmp_path: Path):
    network, theirs = with_lycoris(**READ[case][0])
    network.save_weights(str(tmp_path / "theirs.safetensors"), None, {})
    ours = loaded(tmp_path / "theirs.safetensors")
    tnpeft.save_foreign(ours, tmp_path / "ours.safetensors", "lycoris")
    assert_same(lycoris_of(tmp_path / "ours.safetensors")(X), theirs(X))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sizes_both_ways(data: st.DataObject, tmp_path: Path):
    """Every method on one layer of any channels, rank and alpha; what can be written computes the same there."""
    kind = data.draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]))
    groups = 1 if kind is nn.Linear else data.draw(st.sampled_from([1, 2]))
    outs, ins = (groups * data.draw(st.integers(1, 12)) for _ in range(2))
    kernel = () if kind is nn.Linear else (data.draw(st.integers(1, 3)),)

    def base() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(kind(ins, outs, *kernel, **({"groups": groups} if groups > 1 else {})))

    options: dict[str, Any] = {"linear_dim": data.draw(st.integers(1, 6)), "linear_alpha": data.draw(st.floats(0.1, 9))}
    options["algo"] = data.draw(st.sampled_from(["locon", "loha", "lokr"]))
    options["use_tucker"] = data.draw(st.booleans())
    if options["algo"] == "lokr":
        options["factor"] = data.draw(st.sampled_from([-1, 2, 3, 4, 5]))
        options["decompose_both"], options["full_matrix"] = data.draw(st.booleans()), data.draw(st.booleans())
    network, theirs = with_lycoris(base(), **options)
    network.save_weights(str(tmp_path / "theirs.safetensors"), None, {})
    x = torch.randn(2, 3, ins) if kind is nn.Linear else torch.randn(2, ins, *(4,) * (base()[0].weight.ndim - 2))
    ours = loaded(tmp_path / "theirs.safetensors", base())
    assert_same(ours(x), theirs(x))
    why = save_or_refuse(ours, tmp_path / "ours.safetensors", "lycoris")
    if why is None:
        assert_same(lycoris_of(tmp_path / "ours.safetensors", base())(x), theirs(x))
    else:
        assert "LyCORIS's LoKr: expected factors whose sizes its loader finds again" in why


@settings(deadline=None)
@given(channels=st.integers(1, 400), factor=st.one_of(st.just(-1), st.integers(1, 40)))
def test_channels_are_split_as_both_libraries_split_them(channels: int, factor: int):
    peft_lokr = pytest.importorskip("peft.tuners.lokr.layer")
    from lycoris.functional.general import factorization

    assert split(channels, factor, ordered=True) == factorization(channels, factor)
    assert split(channels, factor, ordered=False) == peft_lokr.factorization(channels, factor)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    window=st.sampled_from([(), (2,), (3, 3)]),
    whole=st.booleans(),
)
def test_what_lycoris_rebuilds(sizes: tuple[int, ...], window: tuple[int, ...], whole: bool):
    """`lycoris_rebuilds` says whether its loader makes modules of these sizes, for whole and flattened factors."""
    from lycoris.modules import get_module, make_module

    a, c, b, d = sizes
    kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}
    layer = kinds[len(window)](c * d, a * b, *([window] if window else []))
    if whole or max(b, d) <= 2:
        tensors = {"x.lokr_w2": torch.ones(b, d, *window)}
        columns = d
    else:
        columns = d * torch.Size(window).numel()
        tensors = {"x.lokr_w2_a": torch.ones(b, 1), "x.lokr_w2_b": torch.ones(1, columns)}
    tensors |= {"x.lokr_w1": torch.ones(a, c), "x.alpha": torch.tensor(1.0)}
    method, params = get_module(tensors, "x")
    try:
        module = make_module(method, params, "x", layer)
        found = (*module.lokr_w1.shape, *(module.lokr_w2 if columns == d and module.use_w2 else module.lokr_w2_a).shape)
        rebuilt = found[:3] == (a, c, b)
    except (RuntimeError, AttributeError):
        rebuilt = False
    assert lycoris_rebuilds(Sizes(a, c, b, d), columns) == rebuilt


def test_move_moves_everything():
    network, _ = with_lycoris(algo="lokr", linear_dim=2)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    move(network)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


def test_whole_layers_that_trained(tmp_path: Path):
    network, theirs = with_lycoris(algo="full")
    network.save_weights(str(tmp_path / "theirs.safetensors"), None, {})
    ours = loaded(tmp_path / "theirs.safetensors")
    assert_same(ours(X), theirs(X))
    report = tnpeft.Handle(ours, "default").report()
    assert (report.cores, report.also) == (0, sum(parameter.numel() for parameter in network.parameters()))
    tnpeft.save(ours, tmp_path / "ours.safetensors")
    again = Net()
    tnpeft.load(again, tmp_path / "ours.safetensors")
    assert torch.equal(again.eval()(X), ours(X))
    with pytest.raises(tnpeft.AdapterFileError) as excinfo:
        tnpeft.save_foreign(ours, tmp_path / "again.safetensors", "lycoris")
    assert "expected none: LyCORIS has no place for them" in str(excinfo.value)
