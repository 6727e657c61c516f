"""Adapters of the TenVOO paper's code, in its layout, against the numbers that code gave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import loaded, specs_of
from golden import SKIPPED, Case, committed_cases, shared_cases
from torch import Tensor, nn

import tnpeft
from tnpeft.surgery import adapters_of

PUBLISHED = ("tenvoo", "quanta", "ref-")  # the cases that the paper's code gave
COMMITTED = {name: case for name, case in committed_cases().items() if name.startswith(PUBLISHED)}
SHARED = {name: case for name, case in shared_cases().items() if name.startswith(PUBLISHED)}
LAYER = "down.0.conv"


def model_for(layer: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("down", nn.Sequential(nn.Sequential()))
    model.down[0].add_module("conv", copy.deepcopy(layer))
    return model


def published(case: Case) -> dict[str, Tensor]:
    """The case's cores under the keys that `save_peft` gives them, its frozen copies (or zeros) beside them."""
    tensors: dict[str, Tensor] = {}
    names = [core["name"] for core in case.facts["cores"]]
    for name in names:
        value = case.tensors[name].double()
        if name.startswith("core["):
            key = f"quanta_weights.{name[5:-1]}"
        elif name.startswith("core"):
            key = f"tenvoo_weights.{name[4:]}"
        elif name.startswith("frozen."):
            key = f"tenvoo_weights2.{name[7:]}"
        else:
            key = name
        tensors[key] = value
    for key in list(tensors):
        if key.startswith(("tenvoo_weights.", "quanta_weights.")):
            tensors.setdefault(key.replace("_weights.", "_weights2."), torch.zeros_like(tensors[key]))
    return {f"model.{LAYER}.{key}": value for key, value in tensors.items()}


def alpha_of(case: Case) -> dict[str, float]:
    return {} if case.facts.get("alpha") is None else {"alpha": case.facts["alpha"]}


def check(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    torch.save(published(case), path)
    base = model_for(case.layer())
    if "W0" in case.tensors:
        with torch.no_grad():
            base.down[0].conv.weight.copy_(case.tensors["W0"])
            base.down[0].conv.bias.copy_(case.tensors["bias"])
    ours = loaded(path, base, **alpha_of(case))
    adapter = adapters_of(ours, "default")[LAYER]
    case.check(adapter.network_weight() * adapter.network.scale, 2e-6)
    if "y" in case.tensors:  # the whole layer, with a frozen copy
        y = ours(case.tensors["x"].double())
        assert (y - case.tensors["y"]).norm() <= 2e-6 * case.tensors["y"].norm()


@pytest.mark.parametrize("case", COMMITTED.values(), ids=COMMITTED)
def test_the_update_is_the_published_one(case: Case, tmp_path: Path):
    check(case, tmp_path)


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", SHARED.values() or [pytest.param(None, marks=pytest.mark.skip(SKIPPED))], ids=SHARED or None
)
def test_every_update_is_the_published_one(case: Case, tmp_path: Path):
    check(case, tmp_path)


L_CORES = "bade,cefg,xghi,yijk,zklm,Cmno,BopA,fdqh,lrpn,jqr->ABCabcxyz"
Q_CORES = "bade,cefg,xghi,yijk,zjlm,Cmop,BpqA,oqrs,dftr,hlst->ABCabcxyz"


def tenvoo(variant: str, ins: tuple[int, ...], outs: tuple[int, ...], kernel: tuple[int, ...], rank: int, seed: int):
    """Random cores of the published shapes, and the update they make by the published einsum."""
    generator = torch.Generator().manual_seed(seed)
    equation = L_CORES if variant == "l" else Q_CORES
    sizes = dict(zip("abcABCxyz", (*ins, *outs, *kernel), strict=True))
    cores = {}
    for number, legs in enumerate(equation.split("->")[0].split(",")):
        shape = [sizes.get(leg, rank) for leg in legs]
        if variant == "q" and number == 3:
            shape[1] = 1
        cores[str(number)] = torch.randn(shape, generator=generator, dtype=torch.float64)
    operands = list(cores.values())
    if variant == "q":
        operands[3] = operands[3].expand(-1, rank, -1, -1)
    update = torch.einsum(equation, *operands)
    return cores, update.flatten(0, 2).flatten(1, 3)


@pytest.mark.parametrize("variant", ["l", "q"])
@pytest.mark.parametrize("ins", [(4, 2, 2), (2, 4, 2)], ids=["table", "another"])
def test_a_trained_adapter_and_its_frozen_copy(variant: str, ins: tuple[int, ...], tmp_path: Path):
    """A whole model's state dict: cores, copies, flags, trained biases and norms, folded weights."""
    kernel, rank = (3, 2, 1), 2
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("block", nn.Sequential(nn.Conv3d(16, 12, kernel), nn.GroupNorm(2, 12)))
    now, update = tenvoo(variant, ins, (4, 3, 1), kernel, rank, 1)
    then, start = tenvoo(variant, ins, (4, 3, 1), kernel, rank, 2)
    state = {f"module.model.{key}": value.clone() for key, value in base.state_dict().items()}
    layer = "module.model.block.0"
    state[f"{layer}.weight"] -= start.float()  # the published code folds the copy into the weight
    state[f"{layer}.bias"] += 1
    state["module.model.block.1.weight"] += 1
    state |= {f"{layer}.tenvoo_weights.{core}": value for core, value in now.items()}
    state |= {f"{layer}.tenvoo_weights2.{core}": value for core, value in then.items()}
    state |= {f"{layer}.{flag}merged.merged": torch.tensor(flag != "") for flag in ("", "frozen_")}
    torch.save({"state_dict": state}, tmp_path / "last.pth")

    x = torch.randn(1, 16, 5, 5, 5)
    weight = base.block[0].weight.double() + update - start
    y = nn.functional.conv3d(x.double(), weight, base.block[0].bias.double() + 1)
    expected = nn.functional.group_norm(y, 2, base.block[1].weight.double() + 1, base.block[1].bias.double())
    ours = loaded(tmp_path / "last.pth", copy.deepcopy(base))
    torch.testing.assert_close(ours(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert specs_of(ours) == {f"tenvoo_{variant}" if ins == (4, 2, 2) else f"tenvoo_{variant}_sizes"}
    report = tnpeft.Handle(ours, "default").report()
    assert (report.bias, report.also) == (12, 12)

    tnpeft.save(ours, tmp_path / "ours.safetensors")
    again = copy.deepcopy(base)
    tnpeft.load(again, tmp_path / "ours.safetensors")
    assert torch.equal(again.eval()(x), ours(x))


def test_the_broadcast_leg_stays_out_of_training(tmp_path: Path):
    """What the published TenVOO-Q sums away gets no gradient here either: the adapter trains as it trained there."""
    cores, _ = tenvoo("q", (2, 2, 1), (2, 2, 1), (3, 3, 3), 2, 1)
    state = {f"0.tenvoo_weights{two}.{core}": value for core, value in cores.items() for two in ("", "2")}
    torch.save(state, tmp_path / "last.pth")
    ours = loaded(tmp_path / "last.pth", nn.Sequential(nn.Conv3d(4, 4, 3)))
    ours(torch.randn(1, 4, 4, 4, 4)).square().sum().backward()
    gradients = {key: tensor.grad for key, tensor in adapters_of(ours, "default")["0"].trained.items()}
    assert torch.count_nonzero(gradients["kernel_d"][..., 1:]) == 0
    assert torch.count_nonzero(gradients["kernel_h"][:, 1:]) == 0
    assert torch.count_nonzero(gradients["kernel_d"][..., 0]) > 0
    assert torch.count_nonzero(gradients["kernel_h"][:, 0]) > 0


def saved(tmp_path: Path, **tensors: Tensor) -> Path:
    path = tmp_path / "last.pth"
    torch.save({f"model.0.{key.replace('__', '.')}": value for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("ins", "outs"), [(6, 6), (6, 12), (12, 6)])
def test_loha_of_a_linear_is_viewed_not_transposed(ins: int, outs: int, tmp_path: Path):
    names = {"loha_w1_a": (ins, 4), "loha_w1_b": (4, outs), "loha_w2_a": (ins, 4), "loha_w2_b": (4, outs)}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in names.items()}
    base = nn.Sequential(nn.Linear(ins, outs))
    a, b, c, d = tensors.values()
    expected = base[0].weight + 2 / 4 * ((a @ b) * (c @ d)).view(outs, ins)
    ours = loaded(saved(tmp_path, **tensors), base, alpha=2)
    torch.testing.assert_close(ours[0].weight, expected)


def lora_of_rank(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"lora_down__weight": torch.randn(rank, 6), "lora_up__weight": torch.randn(12, rank)}


def test_rank_2_as_published(tmp_path: Path):
    """The paper's LoRA: its code takes an alpha of 2 // 4, and the update does nothing until it is trained here."""
    path, base = saved(tmp_path, **lora_of_rank(2)), nn.Sequential(nn.Linear(6, 12))
    x = torch.randn(3, 6)
    expected = base(x)
    ours = loaded(path, base, alpha=0)
    assert torch.equal(ours(x), expected)
    assert specs_of(ours) == {"lora"}


def test_running_statistics_in_a_whole_models_state_dict(tmp_path: Path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12))
    trained = copy.deepcopy(base)
    trained[1](torch.randn(5, 12) * 3 + 1)
    state = {f"model.{key}": value for key, value in trained.state_dict().items()}
    cores = lora_of_rank(4)
    state |= {f"model.0.{key.replace('__', '.')}": value for key, value in cores.items()}
    torch.save(state, tmp_path / "last.pth")
    with torch.no_grad():
        trained[0].weight += cores["lora_up__weight"] @ cores["lora_down__weight"] / 4
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded(tmp_path / "last.pth", base)(x), trained.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_alpha_of_the_published_code_or_the_callers(tmp_path: Path):
    tensors = lora_of_rank(6)
    down, up = tensors.values()
    base = nn.Sequential(nn.Linear(6, 12))
    for options, scale in (({}, 1 / 6), ({"alpha": 3}, 0.5)):
        ours = loaded(saved(tmp_path, **tensors), copy.deepcopy(base), **options)
        torch.testing.assert_close(ours[0].weight, base[0].weight + scale * up @ down)


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "an alpha of 0": (
        lora_of_rank(3),
        {},
        "layer '0': `alpha`: expected the number that the update was scaled with, found none in the file, and rank 3, "
        "for which the published code takes 0: its update does nothing. Pass `alpha=0`, as published, or the alpha "
        "that it was trained with, for example `alpha=1`.",
    ),
    "an alpha that is none": (
        lora_of_rank(3),
        {"alpha": float("nan")},
        "`alpha`: expected a finite number, found nan. For example `alpha=1`.",
    ),
    "no frozen copies": (
        {f"quanta_weights__{key}": torch.ones(2, 2, 2, 2) for key in ("-1 -2", "-1 -3", "-2 -3")},
        {},
        "layer '0': start: expected the frozen copies, `..._weights2`, beside 'model.0.quanta_weights.-1 -2', found "
        "none. The update is T(now) - T(start): save the adapter with its frozen copies, as `save_peft` does.",
    ),
    "a core that is missing": (
        {f"quanta_weights__{key}": torch.ones(2, 2, 2, 2) for key in ("-1 -2", "-1 -3")},
        {},
        "layer '0': cores: expected '-1 -2', '-1 -3', '-2 -3', found '-1 -2', '-1 -3'. The file is incomplete: copy it "
        "again, or save the adapter once more.",
    ),
    "LoHa of sizes that no view allows": (
        {
            "loha_w1_a": torch.ones(6, 4),
            "loha_w1_b": torch.ones(4, 9),
            "loha_w2_a": torch.ones(6, 4),
            "loha_w2_b": torch.ones(4, 9),
        },
        {"layer": nn.Linear(6, 9)},
        "layer '0': LoHa: expected in and out features that divide each other, found Linear(6, 9), one of which does "
        "not divide the other. The published code views an (in, out) matrix as (out, in), which is no network of its "
        "cores then.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path):
    tensors, options, text = REFUSED[case]
    path = saved(tmp_path, **tensors)
    layer = options.get("layer", nn.Linear(6, 12))
    model = nn.Sequential(layer)
    with pytest.raises(tnpeft.AdapterFileError) as excinfo:
        tnpeft.load_foreign(model, path, **{key: value for key, value in options.items() if key != "layer"})
    assert str(excinfo.value) == f"{path}: {text}"
    assert model[0] is layer
