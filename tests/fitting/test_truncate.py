"""`tnpeft.truncate`: smaller ranks whose update is the nearest; for LoRA the truncated singular value decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import bits, net, net_input, same_bits
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AttachError

X = net_input()


def adapted(spec: str, match: str = "first|wide|up|head.0", size: float = 0.3, **how: Any) -> tuple[nn.Module, Any]:
    """The small model with an adapter whose cores have moved."""
    model = net()
    scopes = dict.fromkeys(tnpeft.load_spec(spec).scopes, "head") or None
    handle = tnpeft.attach(model, spec, match=match, scopes=scopes, **how)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model, handle


def updates(handle: tnpeft.Handle) -> dict[str, Tensor]:
    return {layer: adapter.delta_weight().detach().double() for layer, adapter in handle.adapters.items()}


def truncated(delta: Tensor, rank: int, transposed: bool) -> float:
    """The relative error of the best matrix of a rank, of a weight as out x rest."""
    weight = delta.transpose(0, 1) if transposed else delta
    values = torch.linalg.svdvals(weight.reshape(len(weight), -1))
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("how", [{}, {"alpha": 9}, {"mode": "factored"}])
def test_lora_keeps_the_truncated_svd(rank: int, how: dict[str, Any]):
    model, handle = adapted("lora", match="first|wide|head.0", r=4, **how)
    before = updates(handle)
    result = handle.truncate(r=rank)
    assert [row.name for row in result.layers] == [*before]
    for row in result.layers:
        expected = truncated(before[row.name], rank, False)
        after = handle.adapters[row.name].delta_weight().detach().double()
        assert row.error == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert float((after - before[row.name]).norm() / before[row.name].norm()) == pytest.approx(row.error, abs=1e-5)
        assert handle.adapters[row.name].network.params == {"r": rank, "alpha": how.get("alpha", rank)}
    assert result.after == sum(parameter.numel() for parameter in handle.parameters())
    assert result.after * 4 == result.before * rank
    assert result.captured == pytest.approx(result.as_dict()["captured"])
    assert str(result).startswith(f"Adapter 'default': {result.before:,} parameters became {result.after:,}, ")
    plain = net()  # in float64, with the summed weight
    for layer, delta in updates(handle).items():
        plain.get_submodule(layer).weight.data += delta.float()
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)


SPECS = ("loha", "lokr_both", "tt_lora", "pissa", "dora", "hira", "quanta", "mpo", "glora", "lora_xs")


@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_spec_is_fitted_or_told(spec: str, tmp_path: Path):
    _, handle = adapted(spec, match="head.0", **({"r": 3} if "r" in tnpeft.load_spec(spec).params else {}))
    before = updates(handle)
    result = handle.truncate(r=2)
    for row in result.layers:
        after = handle.adapters[row.name].delta_weight().detach().double()
        error = float((after - before[row.name]).norm() / before[row.name].norm())
        assert error == pytest.approx(row.error, abs=1e-4)
        assert handle.adapters[row.name].network.params["r"] == 2
    handle.save(tmp_path / "a.safetensors")
    fresh = net()
    tnpeft.load(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(X), handle.model(X))
    handle.detach()
    assert torch.equal(handle.model(X), net()(X))


def test_an_update_of_less_rank_is_kept_whole():
    for spec, params in (("tt_lora", {}), ("lora", {}), ("pissa", {})):
        model, handle = adapted(spec, match="head.0", r=1, **params)
        small = updates(handle)["head.0"]
        fit = tnpeft.fit(spec, small.float(), model.get_submodule("head.0"), r=3)
        assert fit.error < 1e-4
        handle.detach()
        handle = tnpeft.attach(model, spec, match="head.0", r=3)
        tnpeft.fitting.fit_adapter(handle.adapters["head.0"], model.head[0].weight.detach(), small.float())
        result = handle.truncate(r=1)
        assert result.captured == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(updates(handle)["head.0"], small, rtol=1e-3, atol=1e-4)


def test_a_budget_takes_the_largest_rank_with_which_no_more_train():
    model, handle = adapted("lora", r=4, train={"bias": "adapted"})
    answers = {
        r: tnpeft.attach(net(), "lora", match="first|wide|up|head.0", r=r, train={"bias": "adapted"})
        for r in (1, 2, 3, 4)
    }
    sizes = {r: sum(p.numel() for p in each.parameters()) for r, each in answers.items()}
    biases = {name: tensor.clone() for name, tensor in handle.named_parameters() if name.endswith("bias")}
    assert handle.truncate(sizes[4]).layers == ()
    result = tnpeft.truncate(model, sizes[3] - 1)
    assert result.after == sizes[2]
    assert {adapter.network.params["r"] for adapter in handle.adapters.values()} == {2}
    assert all(torch.equal(dict(handle.named_parameters())[name], bias) for name, bias in biases.items())
    with pytest.raises(AttachError) as caught:
        handle.truncate(5)
    assert str(caught.value) == (
        f"budget of 5: expected room for the smallest adapter, found {sizes[1]} at r=1, the least it takes. "
        f"Allow {sizes[1]}."
    )
    assert handle.truncate(sizes[1]).after == sizes[1]


def test_ranks_of_single_layers_and_layers_that_stay():
    _, handle = adapted("lora", r=3)
    kept = handle.adapters["wide"]
    result = handle.truncate(ranks={"head": {"r": 1}, "first": {"r": 2}})
    assert {row.name for row in result.layers} == {"head.0", "first"}
    assert handle.adapters["wide"] is kept
    assert [int(adapter.network.params["r"]) for adapter in handle.adapters.values()] == [2, 3, 3, 1]
    result = handle.truncate(r=2)  # what is smaller already stays
    assert [row.name for row in result.layers] == ["wide", "up"]
    assert handle.truncate(r=9).layers == ()


def test_untrained_adapters_still_start_exactly():
    model = net()
    for spec in ("lora", "tt_lora", "dora"):
        handle = tnpeft.attach(model, spec, match="head.0", r=3, name=spec)
        handle.truncate(r=2)
        assert torch.equal(model(X), net()(X))
        assert handle.adapters["head.0"].network.params["r"] == 2


def test_several_adapters_scales_and_training_go_on():
    model, handle = adapted("lora", r=4)
    tnpeft.attach(model, "loha", match="head.0", name="other")
    tnpeft.activate(model, {"default": 0.5, "other": 1.0})
    handle.truncate(r=2)
    assert tnpeft.scales_of(model) == {"default": 0.5, "other": 1.0}
    with pytest.raises(AttachError) as caught:
        tnpeft.truncate(model, r=1)
    assert str(caught.value) == "adapter name: expected one of 'default', 'other', found none. Pass `name=`."
    handle.activate()
    assert all(parameter.requires_grad for parameter in handle.parameters())
    assert not any(parameter.requires_grad for parameter in tnpeft.Handle(model, "other").parameters())
    first = model(X).square().mean()
    optimiser = torch.optim.SGD(handle.parameter_groups(lr=0.01, lr_factors={"up": 4}))
    first.backward()
    optimiser.step()
    assert model(X).square().mean() < first
    with torch.no_grad(), tnpeft.accumulating(model):
        expected = model(X)
        handle.truncate(r=2, alpha=4)  # the same update at another scale
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


SHARING = """
tnpeft: 1
name: sharing
layers: any
params: {r: 4, s: 2}
sizes: {o: out_channels, i: in_channels, a: s}
bond: r
cores: {up: {legs: o r, init: zeros}, mix: r a, fixed: {legs: a i, frozen: true, shared: model}}
weight: o i
start: zero
"""


def test_shared_frozen_cores_hang_together(tmp_path: Path):
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    handle = tnpeft.attach(layers, tnpeft.Spec.from_yaml(SHARING.replace("any", "[Linear]")), match="all")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = updates(handle)
    result = handle.truncate(ranks={"[01]": {"r": 2}})  # as much as the shared core's size lets through
    assert [row.name for row in result.layers] == ["0", "1"]
    for layer, kept in before.items():
        torch.testing.assert_close(updates(handle)[layer], kept, rtol=1e-4, atol=1e-5)
    assert torch.equal(updates(handle)["2"], before["2"])
    assert [len(adapter.shared) for adapter in handle.adapters.values()] == [0, 1, 1]
    handle.save(tmp_path / "a")
    fresh = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    fresh.load_state_dict(state)
    tnpeft.load(fresh, tmp_path / "a")
    x = torch.randn(2, 6)
    torch.testing.assert_close(fresh(x), layers(x))


@pytest.mark.parametrize(("spec", "core"), [("lora_fa", "down"), ("vera", "A")])
def test_frozen_random_cores_of_another_size_are_refused(spec: str, core: str):
    model, handle = adapted(spec, match="head.0")
    before = bits(model)
    with pytest.raises(AttachError) as caught:
        handle.truncate(r=1)
    assert {problem.core for problem in caught.value.problems} >= {core}
    assert str(caught.value).splitlines()[0] == (
        f"layer 'head.0': spec '{spec}', core '{core}': expected one that trains, or keeps its size, found a frozen "
        "one that is drawn anew at another size, to which the trained ones do not fit. Attach it anew at the smaller "
        "rank, or take a spec whose cores all train."
    )
    assert same_bits(bits(model), before)


def test_a_schedule_is_a_loop():
    """As AdaLoRA does: ranks go where the singular values are, fewer with time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    handle = tnpeft.attach(model, "lora", match="all", r=6)
    losses = []
    for budget in (12, 8, 4):
        optimiser = torch.optim.Adam(handle.parameter_groups(lr=0.01, lr_factors={"up": 4}))
        for _ in range(20):
            loss = (model(x) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
        values = {
            layer: torch.linalg.svdvals(adapter.delta_weight().detach()) for layer, adapter in handle.adapters.items()
        }
        bar = torch.cat([*values.values()]).sort(descending=True).values[budget - 1]
        handle.truncate(ranks={f"^{layer}$": {"r": max(1, int((own >= bar).sum()))} for layer, own in values.items()})
        assert sum(adapter.network.params["r"] for adapter in handle.adapters.values()) <= budget
    assert losses == sorted(losses, reverse=True)


def test_what_cannot_be_truncated_is_refused_and_nothing_changes():
    model, handle = adapted("lora", r=3)
    for arguments, params, said in (
        ((), {}, "truncate: expected a budget or smaller params, found neither. For example `r=4`, or a number of "
                 "parameters."),
        ((9,), {"r": 2}, "truncate: expected a budget or `r`, found both. Leave one of them out."),
        ((0,), {}, "budget: expected a positive whole number of parameters, found 0. For example 600_000."),
        ((), {"rank": 2}, "params of adapter 'default': expected one of r, alpha, found `rank`. Did you mean `r`?"),
        ((9,), {"param": "rnk"}, "params of adapter 'default': expected one of r, alpha, found `rnk`. Remove it."),
        ((), {"r": "two"}, "spec 'lora', param 'r': expected a finite number, found 'two'. Write `r=4`."),
        ((), {"ranks": {"hed": {"r": 1}}}, "`ranks` 'hed': expected at least one layer of the adapter, found none. "
                                           "It adapts 'first', 'wide', 'up', 'head.0'."),
    ):  # fmt: skip
        with pytest.raises(AttachError) as caught:
            handle.truncate(*arguments, **params)
        assert str(caught.value) == said
    with tnpeft.disabled(model), pytest.raises(AttachError, match="Leave the `disabled` context first"):
        handle.truncate(r=1)
    handle.merge()
    with pytest.raises(AttachError, match="unmerge"):
        handle.truncate(r=1)
    handle.unmerge()
    with pytest.raises(tnpeft.BindError):
        handle.truncate(r=-1)
    with torch.no_grad():
        handle.adapters["up"].cores["up"].fill_(float("inf"))
    before = bits(model)
    with pytest.raises(AttachError) as caught:
        handle.truncate(r=1)
    assert str(caught.value) == (
        "layer 'up': delta: expected finite numbers, found nan or inf. Check both weights: training may have diverged."
    )
    assert same_bits(bits(model), before)
    _, lotr = adapted("lotr", match="head", r=3)
    with pytest.raises(AttachError) as caught:
        lotr.truncate(r=2)
    assert str(caught.value) == (
        "spec 'lotr', core 'left': expected cores that each belong to one layer: layers are fitted one by one, found "
        "one shared by layers, such as 'head.0'. Freeze it (`frozen: true`), or truncate with a spec without shared "
        "cores."
    )


@pytest.mark.parametrize("spec", ["lora", "hira", "dora"])
@pytest.mark.parametrize("kind", ["computed", "packed"])
def test_opaque_layers_are_truncated(spec: str, kind: str):
    """Specs that are made of the weight get the dequantised one, others none."""
    torch.manual_seed(0)
    layer: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    weight = layer.weight.detach()
    if kind == "packed":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        layer.load_state_dict(nn.Linear(64, 64).state_dict())
        layer = layer.to("cpu")
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    model = nn.Sequential(layer)
    handle = tnpeft.attach(model, spec, match="0", r=4)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = handle.adapters["0"].delta_weight(weight).detach()
    (row,) = handle.truncate(r=2).layers
    error = (handle.adapters["0"].delta_weight(weight).detach() - before).norm() / before.norm()
    assert row.error == pytest.approx(float(error), rel=1e-3)
    if spec == "lora":
        assert row.error == pytest.approx(truncated(before, 2, False), rel=1e-3)
