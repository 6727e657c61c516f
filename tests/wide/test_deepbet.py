"""The real deepbet: its encoder beside one written anew, and what it tells apart of the made-up domains."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Metrics
from ddpm_lab.data.anatomies import tissues_of
from ddpm_lab.data.population import Domain, paint_subject
from ddpm_lab.evaluation.deepbet import has_deepbet
from ddpm_lab.evaluation.encoder import Encoder, load_encoder
from ddpm_lab.evaluation.permutation import LEVEL, p_value
from deepbet_network import plain_features, tensors_of
from torch.nn.functional import avg_pool3d

if not has_deepbet():
    pytest.skip("deepbet is not installed (extra `encoder`)", allow_module_level=True)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_encoder(Metrics())


def test_the_encoder_equals_its_network_written_anew(encoder: Encoder) -> None:
    path = Path(str(metadata.distribution("deepbet").locate_file("data/models/model.pt")))
    volumes = torch.rand((2, 1, 48, 48, 48), generator=torch.Generator().manual_seed(0))
    found = encoder.features(volumes)
    assert found.shape == (2, 240)
    torch.testing.assert_close(found, plain_features(tensors_of(path), volumes.numpy()), rtol=1e-3, atol=1e-4)


def test_features_are_the_same_whatever_the_batch(encoder: Encoder) -> None:
    volumes = torch.rand((5, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    found = encoder.features(volumes)
    assert torch.equal(encoder.features(volumes), found)
    for batch in (1, 2, 5):
        torch.testing.assert_close(encoder.features(volumes, batch=batch), found, rtol=1e-4, atol=1e-5)


def test_a_contrast_and_a_wide_ventricle_are_seen_and_healthy_subjects_are_not(encoder: Encoder) -> None:
    tissues = tissues_of("mni152", 32)

    def features(domain: Domain, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        subjects = torch.stack([paint_subject(tissues, domain, generator)[None] for _ in range(count)])
        return encoder.features(avg_pool3d(subjects, 2))  # 16 voxels a side

    source = features("t1", 60, 0)
    found = {
        domain: p_value(features(domain, 20, seed), source, seed=0)
        for domain, seed in (("t1", 1), ("t2", 2), ("atrophy", 3))
    }
    assert found["t2"] == pytest.approx(1e-4)
    assert found["atrophy"] is not None
    assert found["atrophy"] <= LEVEL
    assert found["t1"] is not None
    assert found["t1"] > LEVEL
