"""The two diseases of the made-up population."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.data.anatomies import Tissues, tissues_of
from ddpm_lab.data.population import Domain, paint_subject, write_population

SIDE = 32


@pytest.fixture(scope="module")
def tissues() -> Tissues:
    return tissues_of("mni152", SIDE)


def subject(tissues: Tissues, domain: Domain, seed: int) -> torch.Tensor:
    return paint_subject(tissues, domain, torch.Generator().manual_seed(seed))


def voxels_near(place: tuple[float, float, float], reach: float) -> torch.Tensor:
    """Where a voxel lies within `reach` of a place; lengths are shares of half the field of view."""
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    return (points - torch.tensor(place)).norm(dim=-1) < reach


def test_atrophy_widens_the_ventricles_and_leaves_the_brain_its_size(tissues: Tissues) -> None:
    """Fluid is dark: near the ventricles the diseased brain is darker than the same brain without the disease."""
    middle = voxels_near((0.0, 0.13, 0.06), 0.35)
    darker, sizes = [], []
    for seed in range(4):
        healthy, diseased = subject(tissues, "t1", seed), subject(tissues, "atrophy", seed)
        darker.append((healthy[middle].mean() - diseased[middle].mean()).item())
        sizes.append(((diseased > 0.25).sum() / (healthy > 0.25).sum()).item())
    assert min(darker) > 0.015
    assert 0.95 < min(sizes) <= max(sizes) < 1.05


def test_a_lesion_has_a_dark_core_in_a_bright_rim_and_lies_in_the_brain(tissues: Tissues) -> None:
    for seed in range(4):
        # Without the lesion, the same stream paints the same brain up to the scanner's noise.
        change = subject(tissues, "lesion", seed) - subject(tissues, "t1", seed)
        brain = tissues.maps.sum(0) > 0.5
        assert change[brain].min() < -0.3  # the core, where white matter was
        assert change[brain].abs().mean() > 3 * change[~brain].abs().mean()
        touched = (change.abs() > 0.15) & brain
        # One place: a few per cent of the brain, not all over it.
        assert 0.005 < touched.sum() / brain.sum() < 0.25


def test_healthy_subjects_are_what_they_were_before_there_were_diseases(tissues: Tissues) -> None:
    """Streams are drawn in the same order: results of the demonstration do not move."""
    assert subject(tissues, "t1", 0).sum().item() == pytest.approx(PINNED["t1"], rel=1e-4)
    assert subject(tissues, "t2", 0).sum().item() == pytest.approx(PINNED["t2"], rel=1e-4)


def test_files_are_named_after_their_domain(tissues: Tissues, tmp_path: Path) -> None:
    names = [write_population(tmp_path / each, (tissues,), each, 1, 0)[0].name for each in ("t2", "atrophy", "lesion")]
    assert names == ["sub-001_t2w.nii.gz", "sub-001_atrophy.nii.gz", "sub-001_lesion.nii.gz"]


# Of the code before the diseases: the sum over the voxels of the subject with seed 0.
PINNED = {"t1": 4705.009, "t2": 4168.701}
