"""Which encoder the settings mean, deepbet's network beside one written anew, and whether an encoder sees a domain."""

from __future__ import annotations

import itertools
import math
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Config, Metrics
from ddpm_lab.evaluation import deepbet
from ddpm_lab.evaluation.encoder import load_encoder
from ddpm_lab.evaluation.metrics import mmd_rbf
from ddpm_lab.evaluation.permutation import p_value
from ddpm_lab.study.run import made_of
from ddpm_lab.support.faults import LabError
from deepbet_network import install_small, plain_features, record, tensors_of, write_network

AGAIN = "Run `pip install --force-reinstall --no-deps deepbet==1.0.2`."


def volumes(count: int, side: int = 48) -> torch.Tensor:
    return torch.rand((count, 1, side, side, side), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network's file in a package that is found before any other of the name."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    file = install_small(folder)
    monkeypatch.syspath_prepend(folder)
    return file


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if deepbet were not installed."""

    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(deepbet.metadata, "distribution", missing)


def refused(metrics: Metrics) -> str:
    with pytest.raises(LabError) as excinfo:
        load_encoder(metrics)
    return str(excinfo.value)


def test_the_encoder_equals_its_network_written_anew(package: Path) -> None:
    encoder = load_encoder(Metrics(encoder="deepbet"))
    drawn = volumes(2)
    expected = plain_features(tensors_of(package), drawn.numpy())
    found = encoder.features(drawn)
    assert found.shape == (2, 14)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_depend_on_the_volume_alone(package: Path) -> None:
    encoder = load_encoder(Metrics())
    drawn = volumes(5, 16)
    found = encoder.features(drawn)
    assert torch.equal(encoder.features(drawn), found)
    assert torch.equal(load_encoder(Metrics(encoder="deepbet")).features(drawn), found)
    for batch in (1, 2, 5):
        torch.testing.assert_close(encoder.features(drawn, batch=batch), found, rtol=1e-4, atol=1e-5)
    # Neither the unit of intensities nor a volume that is all alike is a difficulty, and any size is taken.
    torch.testing.assert_close(encoder.features(1000 * drawn - 7), found, rtol=1e-3, atol=1e-4)
    for odd in (torch.zeros(1, 1, 8, 8, 8), volumes(1, 60)[..., :20]):
        assert encoder.features(odd).isfinite().all()


def test_auto_takes_deepbet_and_says_so(package: Path) -> None:
    encoder = load_encoder(Metrics())
    note = "* features of deepbet 1.0.2, comparable between methods and not with the paper"
    assert (encoder.mark, encoder.note) == ("*", note)
    assert encoder.digest.startswith("deepbet at 48 voxels, ")
    assert encoder.digest != load_encoder(Metrics(encoder="random")).digest
    path = package.with_name("resnet_50.pth")
    path.write_bytes(b"hello")
    assert refused(Metrics(medicalnet=path)).startswith(f"{path}: `metrics.medicalnet`: "), "MedicalNet comes first"


@pytest.mark.usefixtures("without")
def test_auto_falls_back_on_random_features() -> None:
    assert load_encoder(Metrics()).note == "* random features, not comparable"


@pytest.mark.usefixtures("without")
def test_an_encoder_that_is_asked_for_by_name_must_be_there() -> None:
    assert refused(Metrics(encoder="deepbet")) == (
        "metrics.encoder: deepbet's encoder: expected the package deepbet, found none installed. "
        "Run `pip install 'tnpeft[encoder]'`, or write `metrics: {encoder: auto}`."
    )
    assert refused(Metrics(encoder="medicalnet")) == (
        "metrics.encoder: weights in `metrics.medicalnet`: expected with `medicalnet` and with no other, "
        "found `encoder: medicalnet` without them. "
        "Write `metrics: {encoder: auto}`, or set `metrics.medicalnet` to the file."
    )
    assert refused(Metrics(encoder="random", medicalnet=Path("resnet_50.pth"))) == (
        "metrics.encoder: weights in `metrics.medicalnet`: expected with `medicalnet` and with no other, "
        "found `encoder: random` with them. Write `metrics: {encoder: auto}`, or set `metrics.medicalnet` to null."
    )


def test_a_damaged_package_is_refused_also_by_auto(package: Path) -> None:
    text = "{}: deepbet's encoder: expected the file of an installed deepbet, found {}. {}"
    whole = package.read_bytes()
    package.write_bytes(whole[:100] + b"x" + whole[101:])
    assert refused(Metrics()) == text.format(package, "other bytes than the package lists", AGAIN)
    site = package.parents[2]
    for content in (whole[: len(whole) // 2], b"hello", b""):
        package.write_bytes(content)
        record(site, package)
        assert refused(Metrics(encoder="deepbet")) == text.format(package, "another network, or none", AGAIN)
    write_network(torch.nn.ReLU(), torch.zeros(1), package)
    record(site, package)
    assert refused(Metrics()) == text.format(package, "another network, or none", AGAIN)
    package.unlink()
    assert refused(Metrics()) == text.format(package, "nothing there", AGAIN)


def test_no_run_is_named_by_the_encoder() -> None:
    """Nor is one that tries a rate: what trains does not depend on it."""
    plain = made_of(Config(), {}, "")
    for metrics in (Metrics(encoder="deepbet"), Metrics(encoder="random"), Metrics(medicalnet=Path("a.pth"))):
        assert made_of(Config(metrics=metrics), {}, "") == plain
    assert made_of(Config(metrics=Metrics(pairs=7)), {}, "") != plain


# Whether an encoder tells two domains apart


def drawn(generator: np.random.Generator, count: int, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(generator.normal(shift, 1.0, (count, 6)))


@pytest.mark.parametrize(("first", "second", "shift"), [(3, 4, 0.0), (2, 5, 1.0), (4, 4, 0.5), (5, 3, 3.0)])
def test_few_volumes_are_dealt_in_every_way(first: int, second: int, shift: float) -> None:
    generator = np.random.default_rng(first)
    every = torch.cat([drawn(generator, first), drawn(generator, second, shift)])
    places = set(range(first + second))
    found = []
    for chosen in itertools.combinations(sorted(places), first):
        rest = sorted(places - set(chosen))
        found.append(mmd_rbf(every[list(chosen)], every[rest]))  # the first deal is the given one
    expected = sum(each >= found[0] - 1e-12 for each in found) / math.comb(first + second, first)
    assert p_value(every[:first], every[first:], seed=0) == pytest.approx(expected, abs=1e-12)


def test_the_given_deal_is_one_of_them() -> None:
    generator = np.random.default_rng(0)
    one, other = drawn(generator, 10), drawn(generator, 12, 50.0)
    assert p_value(one, other, seed=0, permutations=99) == pytest.approx(1 / 100)
    assert p_value(one, other, seed=0) == pytest.approx(1 / 10_000)
    assert p_value(one, one[:1], seed=0) is None


def test_the_same_seed_deals_the_same() -> None:
    generator = np.random.default_rng(1)
    one, other = drawn(generator, 15), drawn(generator, 25, 0.2)
    found = [p_value(one, other, seed, permutations=199) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_domains_that_are_alike_are_told_apart_in_one_of_twenty_draws() -> None:
    """600 draws: the share of p-values up to 0.05 has a spread of 0.9 points, and all p-values are alike frequent."""
    generator = np.random.default_rng(7)
    found = [p_value(drawn(generator, 8), drawn(generator, 16), seed, permutations=99) for seed in range(600)]
    small = np.mean([p is not None and p <= 0.05 for p in found])
    assert 0.023 <= small <= 0.077
    assert np.mean([p is not None and p <= 0.5 for p in found]) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("spread", [False, True])
def test_domains_that_differ_are_told_apart(spread: bool) -> None:
    """A shift, and a spread that leaves the mean."""
    generator = np.random.default_rng(8)
    found = []
    for seed in range(60):
        one, other = drawn(generator, 20), drawn(generator, 40)
        other = 2.5 * other if spread else other + 0.7
        found.append(p_value(one, other, seed, permutations=199))
    assert np.mean([p is not None and p <= 0.05 for p in found]) > 0.9
