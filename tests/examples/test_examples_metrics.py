"""The driver's metrics against independent implementations, and the encoder against MedicalNet's own definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Metrics
from ddpm_lab.evaluation.bootstrap import Estimate, estimate
from ddpm_lab.evaluation.encoder import load_encoder, medicalnet_resnet50
from ddpm_lab.evaluation.metrics import (
    Products,
    frechet_distance,
    linear_kernels,
    mmd_gaussian,
    mmd_linear,
    mmd_rbf,
    ms_ssim,
    similar_pairs,
    ssim_scales,
)
from ddpm_lab.support.faults import LabError
from monai.metrics import MMDMetric
from scipy.linalg import sqrtm
from scipy.ndimage import correlate1d

RANDOM = Metrics(encoder="random")


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
    first, second = load_encoder(RANDOM), load_encoder(RANDOM)
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
    renamed = path.with_suffix(".safetensors")  # torch would read it by its ending
    renamed.write_bytes(path.read_bytes())
    encoder = load_encoder(Metrics(medicalnet=renamed))
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
    text = "{}: `metrics.medicalnet`: expected a state dict, found {}. Check the file."
    assert str(excinfo.value) == text.format(broken, "other objects than tensors, or another kind of file")
    torch.save({"epoch": 3, "conv1.weight": torch.zeros(3)}, other)
    with pytest.raises(LabError) as excinfo:
        medicalnet_resnet50(other)
    assert str(excinfo.value) == text.format(other, "values that are no tensors")


def test_encoder_weights_that_are_no_numbers_are_named(medicalnet: tuple[MedicalNet, Path], tmp_path: Path) -> None:
    network, _ = medicalnet
    path = tmp_path / "nan.pth"
    torch.save({**network.state_dict(), "bn1.bias": torch.full((64,), math.nan)}, path)
    with pytest.raises(LabError) as excinfo:
        medicalnet_resnet50(path)
    assert str(excinfo.value) == (
        f"{path}: tensor `bn1.bias`: expected finite numbers, found some that are infinite or not a number. "
        "Give MedicalNet's resnet_50.pth or resnet_50_23dataset.pth."
    )


# Weights, kernels and similarity


def weights(draw: list[int]) -> torch.Tensor:
    return torch.tensor(draw, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=7), st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_a_weighted_fid_is_that_of_copies(first: list[int], second: list[int]) -> None:
    one, two = features(0, len(first), 5), features(1, len(second), 5, 0.7)
    products = Products.of(one, two)
    found = products.frechet(weights(first), weights(second))
    if min(sum(first), sum(second)) < 2:
        assert math.isnan(found)
        return
    copies = [x.repeat_interleave(torch.tensor(draw), 0) for x, draw in ((one, first), (two, second))]
    assert found == pytest.approx(frechet_distance(*copies), rel=1e-6, abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_a_weighted_mmd_leaves_out_pairs_of_one_volume(first: list[int], second: list[int]) -> None:
    both = features(0, len(first) + len(second), 3)
    both -= both.mean(0)  # as `Products` does; without all pairs the linear kernel has an origin
    one, two = both[: len(first)].numpy(), both[len(first) :].numpy()
    kernels = linear_kernels(Products.of(torch.from_numpy(one), torch.from_numpy(two)))
    found = kernels.mmd(weights(first), weights(second))
    drawn = [[index for index, times in enumerate(draw) for _ in range(times)] for draw in (first, second)]
    if min(len(set(each)) for each in drawn) < 2:
        assert math.isnan(found)
        return

    def within(x: np.ndarray, places: list[int]) -> float:  # type: ignore[type-arg]
        return float(np.mean([x[i] @ x[j] for i in places for j in places if i != j]))

    across = np.mean([one[i] @ two[j] for i in drawn[0] for j in drawn[1]])
    expected = within(one, drawn[0]) + within(two, drawn[1]) - 2 * across
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 5))
def test_the_standard_mmd_equals_plain_loops(count: int, other: int, width: int) -> None:
    one, two = features(0, count, width).numpy(), features(1, other, width, 0.5).numpy()
    every = [*one, *two]
    squares = sorted(float(np.sum((x - y) ** 2)) for place, x in enumerate(every) for y in every[:place])
    scale = squares[(len(squares) - 1) // 2]

    def kernel(x: np.ndarray, y: np.ndarray) -> float:  # type: ignore[type-arg]
        return math.exp(-float(np.sum((x - y) ** 2)) / scale)

    def within(x: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]))

    expected = within(one) + within(two) - 2 * np.mean([kernel(x, y) for x in one for y in two])
    found = mmd_rbf(torch.from_numpy(one), torch.from_numpy(two))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_the_papers_kernel_tells_nothing_on_wide_features_and_the_standard_one_does() -> None:
    """Why both are given: with a median distance far from 1 the paper's kernel is zero between all volumes."""
    one, two = features(0, 20, 512), features(1, 20, 512, 0.5)
    assert abs(mmd_gaussian(one, two)) < 1e-12
    assert mmd_rbf(one, two) > 0.05
    assert mmd_rbf(100 * one, 100 * two) == pytest.approx(mmd_rbf(one, two))


def test_copies_of_one_volume_have_no_distance() -> None:
    one = torch.ones((4, 3), dtype=torch.float64)
    for distance in (frechet_distance, mmd_linear, mmd_gaussian, mmd_rbf):
        assert distance(one, one) == pytest.approx(0.0, abs=1e-12)


def pictures(seed: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth volume and a noisy one like it, (1, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.functional.interpolate(torch.rand((1, 1, 5, 5, 5), generator=generator), size=(side,) * 3)[0]
    return smooth, (smooth + 0.2 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.mark.slow
def test_five_scales_are_those_of_pytorch_msssim() -> None:
    other = pytest.importorskip("pytorch_msssim", reason="an independent MS-SSIM, of the `test` extra")
    one, two = pictures(0, 80)
    assert ssim_scales((80, 80, 80)).note == "5 scales, window 5"
    expected = other.ms_ssim(one[None], two[None], data_range=1.0, win_size=5)
    assert ms_ssim(one[None], two[None], 1.0) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("side", [8, 16, 40])
def test_fewer_scales_are_those_of_a_plain_loop(side: int) -> None:
    """In float64 with scipy's filter: Wang et al. 2003, with the weights of the scales there are."""
    one, two = pictures(1, side)
    scales = ssim_scales((side,) * 3)
    shares = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[: scales.scales]
    places = np.arange(scales.window) - scales.window // 2
    window = np.exp(-(places**2) / (2 * 1.5**2))
    window /= window.sum()
    inside = (slice(scales.window // 2, -(scales.window // 2)),) * 3

    def blurred(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        for axis in range(3):
            x = correlate1d(x, window, axis)
        return x[inside]

    x, y = (volume[0].double().numpy() for volume in (one, two))
    expected = 1.0
    for scale, share in enumerate(shares / shares.sum()):
        mx, my = blurred(x), blurred(y)
        vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
        contrast = (2 * cov + 0.03**2) / (vx + vy + 0.03**2)
        luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        last = scale == scales.scales - 1
        expected *= max(0.0, float(np.mean(luminance * contrast if last else contrast))) ** share
        if not last:
            half = len(x) // 2
            x, y = (v.reshape(half, 2, half, 2, half, 2).mean((1, 3, 5)) for v in (x, y))
    assert ms_ssim(one[None], two[None], 1.0) == pytest.approx(expected, abs=1e-5)


def test_pairs_know_their_volumes_and_take_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, real = (torch.rand((count, 1, 8, 8, 8), generator=generator) for count in (3, 2))
    pairs = similar_pairs(samples, real, 1.0)
    assert len(pairs.values) == 6
    for left, right, value in zip(pairs.left, pairs.right, pairs.values, strict=True):
        assert ms_ssim(samples[left][None], real[right][None], 1.0) == pytest.approx(float(value))
    assert pairs.mean(weights([0, 2, 0]), weights([1, 1])) == pytest.approx(ms_ssim(samples[1:2], real, 1.0))
    few = similar_pairs(samples, real, 1.0, pairs=1)
    assert math.isnan(few.mean(weights([0, 1, 2]), weights([1, 1])))


# Intervals


def test_the_bootstrap_is_a_plain_loop() -> None:
    one, two = features(0, 9, 4), features(1, 7, 4, 0.5)
    products = Products.of(one, two)
    found = estimate(products.frechet, (9, 7), resamples=50, confidence=0.9, seed=3)
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for _ in range(50):
        places = [torch.randint(len(x), (len(x),), generator=generator) for x in (one, two)]
        drawn.append(frechet_distance(one[places[0]], two[places[1]]))
    value = frechet_distance(one, two)
    low, high = np.quantile(np.array(drawn) - np.mean(drawn), [0.05, 0.95])
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == (pytest.approx(value + low), pytest.approx(value + high))
    assert found.low < found.value < found.high  # type: ignore[operator]


def test_the_bootstrap_is_the_same_for_the_same_seed() -> None:
    products = Products.of(features(0, 9, 4), features(1, 7, 4))
    runs = [estimate(products.frechet, (9, 7), 20, 0.95, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_intervals_of_means_cover_what_they_say() -> None:
    """Of Gaussian samples: 90 % intervals hold the true mean in about 90 % of data sets."""
    generator = torch.Generator().manual_seed(0)
    held = []
    for seed in range(250):
        data = 3 + 2 * torch.randn(40, generator=generator, dtype=torch.float64)
        found = estimate(lambda w, data=data: float(w @ data / w.sum()), (40,), 200, 0.9, seed)
        held.append(found.low <= 3 <= found.high)  # type: ignore[operator]
        width = 2 * 1.645 * float(data.std()) / 40**0.5
        assert found.high - found.low == pytest.approx(width, rel=0.4)  # type: ignore[operator]
    assert 0.84 <= np.mean(held) <= 0.95


def test_too_few_volumes_have_no_distance_or_no_interval() -> None:
    products = Products.of(features(0, 1, 4), features(1, 5, 4))
    assert estimate(products.frechet, (1, 5), 20) == Estimate(None, None, None)
    assert estimate(linear_kernels(products).mmd, (1, 5), 20) == Estimate(None, None, None)
    pair = Products.of(features(0, 2, 4), features(1, 2, 4))  # in most resamples one volume is drawn twice
    found = estimate(linear_kernels(pair).mmd, (2, 2), 40)
    assert found.value is not None
    assert (found.low, found.high) == (None, None)
    assert estimate(lambda a, b: float(a.sum() + b.sum()), (1, 1), 20) == Estimate(2.0, None, None)
    assert estimate(pair.frechet, (2, 2), 0).low is None
