"""The driver's metrics against independent implementations, and the encoder against MedicalNet's own definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.encoder import load_encoder, medicalnet_resnet50
from ddpm_lab.faults import LabError
from ddpm_lab.metrics import frechet_distance, mmd_gaussian, mmd_linear, ms_ssim, ssim_scales
from monai.metrics import MMDMetric
from scipy.linalg import sqrtm


def features(seed: int, count: int, width: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.floats(-2, 2))
def test_fid_equals_the_root_of_the_covariances(count: int, other: int, width: int, shift: float) -> None:
    one, two = features(0, count, width).numpy(), features(1, other, width, shift).numpy()
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, two)]
    mean = np.square(one.mean(0) - two.mean(0)).sum()
    # A shift keeps scipy's root of a singular product accurate enough to compare with.
    root = sqrtm(covariances[0] @ covariances[1] + 1e-14 * np.eye(width))
    expected = mean + sum(np.trace(c) for c in covariances) - 2 * np.trace(root).real
    found = frechet_distance(torch.from_numpy(one), torch.from_numpy(two))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_fid_of_wide_features_and_of_equal_sets() -> None:
    wide = features(0, 6, 2048)
    assert frechet_distance(wide, wide) == pytest.approx(0.0, abs=1e-8)
    assert frechet_distance(wide, wide + 1) == pytest.approx(2048.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 5))
def test_both_mmds_equal_plain_loops(count: int, other: int, width: int) -> None:
    one, two = features(0, count, width).numpy(), features(1, other, width, 0.5).numpy()
    distances = sorted(float(np.linalg.norm(x - y)) for x in one for y in two)
    alpha = distances[(len(distances) - 1) // 2]

    def unbiased(kernel) -> float:  # type: ignore[no-untyped-def]
        def within(x) -> float:  # type: ignore[no-untyped-def]
            pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
            return sum(pairs) / len(pairs)

        across = [kernel(x, y) for x in one for y in two]
        return within(one) + within(two) - 2 * sum(across) / len(across)

    linear = unbiased(lambda x, y: float(x @ y))
    gaussian = unbiased(lambda x, y: float(np.exp(-alpha * (np.sum((x - y) ** 2) + 1e-5))))
    tensors = torch.from_numpy(one), torch.from_numpy(two)
    assert mmd_linear(*tensors) == pytest.approx(linear, rel=1e-9, abs=1e-12)
    assert mmd_gaussian(*tensors) == pytest.approx(gaussian, rel=1e-9, abs=1e-12)


def test_the_linear_mmd_is_monais() -> None:
    one, two = features(0, 9, 16), features(1, 9, 16, 0.3)
    assert mmd_linear(one, two) == pytest.approx(MMDMetric()(one, two).item())


@pytest.mark.parametrize(
    ("shape", "note"),
    [
        ((160, 224, 160), "5 scales, window 7"),
        ((128, 128, 96), "5 scales, window 5"),
        ((64, 64, 64), "4 scales, window 5: non-standard, the volumes are small"),
        ((16, 16, 16), "3 scales, window 3: non-standard, the volumes are small"),
        ((8, 8, 8), "2 scales, window 3: non-standard, the volumes are small"),
        ((3, 3, 3), "1 scale, window 3: non-standard, the volumes are small"),
    ],
)
def test_ms_ssim_says_which_scales_it_used(shape: tuple[int, ...], note: str) -> None:
    assert ssim_scales(shape).note == note


def test_ms_ssim_of_equal_and_of_noisy_volumes() -> None:
    generator = torch.Generator().manual_seed(0)
    smooth = nn.functional.interpolate(
        torch.rand((3, 1, 4, 4, 4), generator=generator), size=(16, 16, 16), mode="trilinear"
    )
    noisy = (smooth + 0.2 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
    assert ms_ssim(smooth[:1], smooth[:1], 1.0) == pytest.approx(1.0, abs=1e-5)
    assert ms_ssim(noisy, smooth, 1.0) < ms_ssim(smooth, smooth, 1.0)
    assert ms_ssim(smooth, smooth, 1.0, pairs=4) <= 1.0


def test_the_random_encoder_is_the_same_everywhere_and_says_what_it_is() -> None:
    volumes = torch.rand((3, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = load_encoder(None), load_encoder(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.features(volumes), second.features(volumes))
    torch.testing.assert_close(first.features(volumes), second.features(volumes, batch=2), rtol=1e-3, atol=1e-5)
    assert (first.mark, first.note) == ("*", "* random features, not comparable")


class Bottleneck(nn.Module):
    """MedicalNet's block as its paper's code describes it, written anew for this test."""

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * planes)
        if stride != 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv3d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm3d(4 * planes)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class MedicalNet(nn.Module):
    """ResNet-50 of Med3D: layer3 and layer4 keep layer2's resolution and are dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        inputs = 64
        for name, planes, blocks, stride, dilation in (
            ("layer1", 64, 3, 1, 1),
            ("layer2", 128, 4, 2, 1),
            ("layer3", 256, 6, 1, 2),
            ("layer4", 512, 3, 1, 4),
        ):
            layer = nn.Sequential()
            for number in range(blocks):
                layer.append(Bottleneck(inputs, planes, stride if number == 0 else 1, dilation))
                inputs = 4 * planes
            self.add_module(name, layer)
        self.conv_seg = nn.Conv3d(2048, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool3d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        return x.mean((2, 3, 4))


@pytest.fixture(scope="module")
def medicalnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[MedicalNet, Path]:
    """A network with made-up weights and statistics, saved as MedicalNet's files are."""
    torch.manual_seed(0)
    network = MedicalNet().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    path = tmp_path_factory.mktemp("medicalnet") / "resnet_50.pth"
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    return network, path


@torch.no_grad()
def test_medicalnet_features_need_the_dilations(medicalnet: tuple[MedicalNet, Path]) -> None:
    network, path = medicalnet
    encoder = load_encoder(path)
    assert (encoder.mark, encoder.note) == ("", "MedicalNet ResNet-50 features")
    volumes = torch.rand((1, 1, 40, 40, 40), generator=torch.Generator().manual_seed(1))
    expected = network(volumes).double()
    torch.testing.assert_close(encoder.features(volumes), expected, rtol=1e-4, atol=1e-5)
    for module in encoder.network.layer3.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            module.dilation = module.padding = (1, 1, 1)
    wrong = (encoder.features(volumes) - expected).abs().max() / expected.abs().max()
    assert wrong > 0.01, "without the dilations the same weights give other features"


def test_other_encoder_files_are_refused(tmp_path: Path) -> None:
    gone, other, broken = tmp_path / "gone.pth", tmp_path / "other.pth", tmp_path / "broken.pth"
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(3)}}, other)
    broken.write_bytes(b"hello")
    with pytest.raises(LabError) as excinfo:
        medicalnet_resnet50(gone)
    assert str(excinfo.value) == (
        f"{gone}: `metrics.medicalnet`: expected a file, found nothing there. Check the path, or leave it out."
    )
    with pytest.raises(LabError) as excinfo:
        medicalnet_resnet50(other)
    assert str(excinfo.value).splitlines()[0] == (
        f"{other}: tensor `bn1.bias`: expected 64, found no such tensor. "
        "Give MedicalNet's resnet_50.pth or resnet_50_23dataset.pth."
    )
    with pytest.raises(LabError) as excinfo:
        medicalnet_resnet50(broken)
    assert str(excinfo.value).startswith(f"{broken}: `metrics.medicalnet`: expected a state dict, found ")
