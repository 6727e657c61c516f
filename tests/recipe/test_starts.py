"""`tnpeft.starts` against their formulas; tests/wide compares them with PEFT's code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tnpeft


def model(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def same_up_to_sign(rows: Tensor, others: Tensor) -> None:
    signs = (rows * others).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(rows, signs * others, rtol=1e-4, atol=1e-5)


def test_eva_spans_the_principal_directions_of_the_inputs():
    torch.manual_seed(0)
    base = model(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [torch.randn(3, 20, 6) * torch.arange(1, 7) + 2 for _ in range(2)]
    start = tnpeft.starts.Eva(base, [*batches, {"input": batches[0]}])
    before = base(batches[0])
    handle = tnpeft.attach(base, "lora", match="all", r=2, init=start)
    assert torch.equal(base(batches[0]), before)
    # Of rank 6, incremental PCA loses nothing.
    full = tnpeft.attach(base, "lora", match="0", r=6, init=tnpeft.starts.Eva(base, batches), name="full")
    rows = torch.cat(batches).reshape(-1, 6).double()
    centred = rows - rows.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2].float()
    same_up_to_sign(full.adapters["0"].cores["down"].detach(), directions)
    down = handle.adapters["0"].cores["down"].detach()
    torch.testing.assert_close(down @ down.T, torch.eye(2))
    assert bool((down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all())


def test_eva_joins_small_batches_and_says_what_it_lacks():
    base = model(nn.Linear(6, 8))
    start = tnpeft.starts.Eva(base, torch.randn(8, 6).split(2))
    many = tnpeft.attach(base, "lora", match="0", r=6, init=start).adapters["0"].cores["down"]
    torch.testing.assert_close(many @ many.T, torch.eye(6))
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(conv := model(nn.Conv1d(6, 8, 1)), "lora", match="all", init=tnpeft.starts.Eva(conv, []))
    assert str(caught.value) == (
        "layer '0': EVA: expected Linear layers, whose inputs are rows, found others. Match Linear layers, "
        "or leave the "
        "others to their inits by a function of your own."
    )
    fresh = model(nn.Linear(6, 8))
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(fresh, "lora", match="all", init=tnpeft.starts.Eva(fresh, [torch.randn(3, 6)]))
    assert str(caught.value) == (
        "layer '0': EVA: expected inputs of at least 4 rows and features, found 3. Give more batches, lower "
        "the rank, or "
        "leave out layers that the model does not call."
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(fresh, "ia3", match="all", init=tnpeft.starts.Eva(fresh, [torch.randn(3, 6)]))
    assert str(caught.value).startswith("spec 'ia3': expected a core 'down', found")


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(3, 8, 2), nn.ConvTranspose1d(8, 6, 3)])
def test_lora_ga_follows_the_gradient(layer: nn.Module):
    torch.manual_seed(0)
    base = model(layer)
    shapes = {nn.Linear: (4, 6), nn.Conv2d: (2, 3, 5, 5), nn.ConvTranspose1d: (2, 8, 5)}
    batches = [torch.randn(shapes[type(layer)]) for _ in range(2)]
    weight = layer.get_parameter("weight")
    gradient = torch.stack([torch.autograd.grad(base(x).square().sum(), weight)[0] for x in batches]).mean(0)
    gradient = gradient.transpose(0, 1) if isinstance(layer, nn.ConvTranspose1d) else gradient
    u, _, vh = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u, vh = u * signs, vh * signs.T
    start = tnpeft.starts.LoraGa(base, batches, lambda net, x: net(x).square().sum())
    before = base(batches[0])
    adapter = tnpeft.attach(base, "pissa", match="0", r=2, init=start).adapters["0"]
    assert torch.equal(base(batches[0]), before)
    factor = gradient.shape[0] ** 0.25 / 4
    up, down = (adapter.start[name].flatten(1) for name in ("up", "down"))
    torch.testing.assert_close(up @ down, (factor**2 * u[:, 2:4] @ vh[:2]).float(), rtol=1e-4, atol=1e-5)
    assert not weight.requires_grad
    assert weight.grad is None


def test_lora_ga_refuses_what_it_cannot_start():
    base, loss = model(nn.Linear(6, 8)), lambda net, x: net(x).sum() * 0 + 1
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(base, "lora", match="0", init=tnpeft.starts.LoraGa(base, [], loss))
    assert str(caught.value) == (
        "layer '0': LoRA-GA: expected a frozen copy, found `start: zero`. Use a spec with `start: "
        "frozen_copy`, such as "
        "`pissa`, whose inits this start replaces."
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(base, "pissa", match="0", init=tnpeft.starts.LoraGa(base, [], loss))
    assert str(caught.value) == (
        "layer '0': LoRA-GA: expected a gradient, found none. Give batches whose loss depends on these "
        "layers, or leave "
        "them out."
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(base, "pissa", match="0", init=tnpeft.starts.LoraGa(base, [torch.randn(2, 6)], loss))
    assert str(caught.value) == (
        "layer '0': LoRA-GA: expected a rank of at most 3, half of the gradient's, found 4. Lower the rank."
    )


def test_frod_joins_the_layers_of_a_role():
    torch.manual_seed(0)
    base = nn.ModuleDict({f"{role}_{n}": nn.Linear(6, 8) for n in range(3) for role in "qv"})
    role = r"^(\w)_"
    start = tnpeft.starts.Frod(base, role)
    handle = tnpeft.attach(base, "frod", match="all", scopes={"matrix": role}, share=0.2, init=start)
    adapters = handle.adapters
    assert adapters["q_0"].cores["V"] is adapters["q_2"].cores["V"]
    assert adapters["q_0"].cores["V"] is not adapters["v_0"].cores["V"]
    for name, adapter in adapters.items():
        weight = base[name].base.weight if hasattr(base[name], "base") else base[name].weight
        torch.testing.assert_close(adapter.network_weight(), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.cores["U"].norm(dim=0), torch.ones(6))
        places = adapter.cores["places"]
        assert bool((places // 6 != places % 6).all())
        assert len(places.unique()) == 7
    with pytest.raises(tnpeft.AttachError, match="FRoD, `role`: expected an expression that finds it, found 'x'"):
        tnpeft.attach(
            base, "frod", match="q_0", scopes={"matrix": role}, init=tnpeft.starts.Frod(base, "x"), name="other"
        )


def test_unilora_uses_every_number_equally_often():
    base = model(nn.Linear(6, 8), nn.Linear(8, 5))
    handle = tnpeft.attach(base, "unilora", match="all", r=2, d=10, init=tnpeft.starts.UniLora(base))
    cores = [adapter.cores for adapter in handle.adapters.values()]
    numbers = torch.cat([each[name].flatten() for each in cores for name in ("index_a", "index_b")])
    uses = numbers.bincount(minlength=10)
    assert uses.tolist().count(5) + uses.tolist().count(6) == 10
    torch.testing.assert_close(cores[0]["norm"], uses.float().rsqrt())
    # The map from theta to all entries keeps lengths.
    theta = cores[0]["theta"].detach()
    torch.testing.assert_close((theta * cores[0]["norm"])[numbers].norm(), theta.norm())


@pytest.mark.parametrize("own", [False, True])
def test_adamss_trains_within_the_directions_of_clusters(own: bool):
    torch.manual_seed(0)
    base = model(nn.Linear(6, 8))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    start = tnpeft.starts.AdaMss(base, cluster=(lambda rows, count: labels) if own else None)
    adapter = tnpeft.attach(base, "adamss", match="0", r=4, clusters=3, s=2, init=start).adapters["0"]
    u = torch.linalg.svd(base[0].weight.detach().double(), full_matrices=False)[0][:, :4]
    found = adapter.cores["cluster"]
    assert found.tolist() == labels.tolist() if own else set(found.tolist()) == {0, 1, 2}
    for number in range(3):
        rows = u[found == number]
        directions = torch.linalg.svd(rows)[2][:2].float()
        same_up_to_sign(adapter.cores["A"].detach()[number][: len(rows)], directions[: len(rows)])
