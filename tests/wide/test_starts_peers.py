"""The starts of `tnpeft.starts` against HF PEFT's code on the same models and data."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from sklearn.cluster import KMeans
from torch import Tensor, nn

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 16, bias=False)
        self.v_proj = nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}


def decomposed(matrix: Tensor, q: int, niter: int = 2, M: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].mH


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """With theirs, singular vectors come from random projections: here from LAPACK, so that they can be compared."""
    monkeypatch.setattr(torch, "svd_lowrank", decomposed)
    torch.manual_seed(0)
    return Model()


def of(values: Any) -> Tensor:
    value = values["default"]
    return (value.weight if isinstance(value, nn.Module) else value).detach()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach().to(found.dtype), rtol=1e-3, atol=3e-4)


def test_eva(model: Model):
    batch = torch.randn(64, 12) * torch.arange(1, 13) + 1
    config = peft.LoraConfig(r=3, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **TARGETS)
    theirs = get_eva_state_dict(
        model,
        [{"x": batch}],
        config,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = tnpeft.attach(model, "lora", match="proj", r=3, init=tnpeft.starts.Eva(model, [{"x": batch}]))
    assert theirs.keys() == ours.adapters.keys()
    for name, directions in theirs.items():
        close(ours.adapters[name].cores["down"], directions)


def test_lora_ga(model: Model):
    batches = [torch.randn(8, 12) for _ in range(3)]
    base = copy.deepcopy(model)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean()

    def step() -> None:
        for batch in batches:
            loss(base, batch).backward()

    config = peft.LoraConfig(
        r=3, lora_alpha=3, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **TARGETS
    )
    preprocess_loraga(base, config, step)
    theirs = peft.get_peft_model(base, config).base_model.model
    start = tnpeft.starts.LoraGa(model, batches, loss, peft=True)
    ours = tnpeft.attach(model, "pissa", match="proj", r=3, init=start)
    for name, adapter in ours.adapters.items():
        layer = theirs.get_submodule(name)
        # Singular vectors have signs of their own; `up` and `down` have those of different pairs.
        for core, other in ((adapter.cores["down"], of(layer.lora_A)), (adapter.cores["up"].T, of(layer.lora_B).T)):
            close(core, (core * other).sum(1, keepdim=True).sign().detach() * other)


def test_frod(model: Model):
    role = r"layers\.\d+\.(.*)$"
    config = peft.FrodConfig(sparse_rate=0.1, progressbar=False, **TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    start = tnpeft.starts.Frod(model, role, ridge=config.regularization_alpha, seed=config.projection_prng_key)
    ours = tnpeft.attach(model, "frod", match="proj", scopes={"matrix": role}, share=0.1, init=start)
    for name, adapter in ours.adapters.items():
        layer = theirs.get_submodule(name)
        # Eigenvectors of `V` have signs of their own, which U undoes.
        signs = (of(layer.frod_V) * adapter.cores["V"]).sum(0).sign()
        close(adapter.cores["V"], signs * of(layer.frod_V))
        close(adapter.cores["U"], signs * of(layer.frod_U))
        close(adapter.cores["l"], of(layer.frod_lambda_l))
    # Their generator goes on from role to role; the first role has the same places.
    first = theirs.get_submodule("layers.0.q_proj")
    rows, columns = of(first.frod_s_indices)
    assert ours.adapters["layers.0.q_proj"].cores["places"].tolist() == (rows * 12 + columns).tolist()


def test_unilora(model: Model):
    config = peft.UniLoraConfig(r=2, theta_d_length=20, **TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    start = tnpeft.starts.UniLora(model, seed=config.proj_seed)
    ours = tnpeft.attach(model, "unilora", match="proj", r=2, d=20, init=start)
    for name, adapter in ours.adapters.items():
        layer = theirs.get_submodule(name)
        assert torch.equal(adapter.cores["index_a"], of(layer.unilora_indices_A))
        assert torch.equal(adapter.cores["index_b"], of(layer.unilora_indices_B))
        close(adapter.cores["norm"][adapter.cores["index_a"]], of(layer.unilora_scales_A))


def test_adamss(model: Model):
    config = peft.AdamssConfig(r=5, num_subspaces=3, subspace_rank=2, **TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model

    def cluster(rows: Tensor, count: int) -> Tensor:
        means = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
        return torch.from_numpy(means.fit_predict(rows.numpy())).long()

    start = tnpeft.starts.AdaMss(model, cluster=cluster)
    ours = tnpeft.attach(model, "adamss", match="proj", r=5, clusters=3, s=2, init=start)
    compared = 0
    for name, adapter in ours.adapters.items():
        layer = theirs.get_submodule(name)
        labels = torch.zeros(layer.out_features, dtype=torch.int64)
        for number, rows in layer.seg_result["default"].items():
            labels[rows] = number
        # Signs of singular vectors turn rows of U, not their distances; k-means then draws the same centres.
        assert torch.equal(adapter.cores["cluster"], labels)
        for number, part in enumerate(layer.adamss_A["default"]):
            ours_in = adapter.cores["A"][number, : len(part)] @ adapter.cores["V"]
            theirs_in = part @ of(layer.adamss_newB)
            close(ours_in.T @ ours_in, theirs_in.T @ theirs_in)
            compared += 1
    assert compared == 18
