"""The driver's data: folder layouts, damaged files, axes, the split and the made-up population."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import nibabel
from ddpm_lab.config.settings import Data
from ddpm_lab.data.anatomies import Tissues, tissues_of
from ddpm_lab.data.files import check_volumes, find_volumes, split_volumes
from ddpm_lab.data.population import paint_subject, write_population
from ddpm_lab.data.volumes import check_sizes, dataset
from ddpm_lab.support.faults import LabError
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform


def write_nifti(path: Path, shape: tuple[int, ...] = (8, 8, 8), seed: int = 0, dtype: type = np.float32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).uniform(0, 100, shape).astype(dtype)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


LAYOUT_FILES = {
    "plain": ["a.nii", "b/c/d.nii.gz"],
    "ukb": ["1/20252_2_0/T1/T1_brain_to_MNI.nii.gz", "2/20252_2_0/T1/T1_brain_to_MNI.nii.gz"],
    "adni": ["s1/MPR/2006/I1/scan.nii", "s2/MPR/2007/I2/scan.nii.gz"],
    "ppmi": ["s1/v1/scan.nii", "s2/v1/scan.nii"],
    "brats": ["BraTS2021_00014/BraTS2021_00014_t1.nii.gz", "BraTS2021_00016/BraTS2021_00016_t1.nii.gz"],
}


@pytest.mark.parametrize("layout", LAYOUT_FILES)
def test_each_layout_finds_its_files_and_no_others(tmp_path: Path, layout: str) -> None:
    wanted = sorted(write_nifti(tmp_path / name) for name in LAYOUT_FILES[layout])
    if layout != "plain":
        write_nifti(tmp_path / "elsewhere.nii.gz")
        write_nifti(wanted[0].parent / "deeper" / "still" / "T1.nii.gz")
    if layout == "brats":
        write_nifti(wanted[0].parent / "BraTS2021_00014_t1ce.nii.gz")
    assert find_volumes(Data(root=tmp_path, layout=layout)) == wanted  # type: ignore[arg-type]


def test_a_keep_list_chooses_brats_files(tmp_path: Path) -> None:
    paths = [write_nifti(tmp_path / f"B{number}" / f"B{number}_t1.nii.gz") for number in range(4)]
    keep = tmp_path / "clean.txt"
    keep.write_text("B1_t1.nii.gz\nB3_t1.nii.gz\nB9_t1.nii.gz\n", encoding="utf-8")
    data = Data(root=tmp_path, layout="brats", keep=keep)
    assert find_volumes(data) == [paths[1], paths[3]]
    spaced = write_nifti(tmp_path / "B9" / "B 9_t1.nii.gz")
    keep.write_bytes(b"\xef\xbb\xbfB1_t1.nii.gz\r\n\r\n B 9_t1.nii.gz \r\n")  # as an editor on Windows leaves it
    assert find_volumes(data) == [paths[1], spaced]


def voxels(volumes: Iterable[torch.Tensor]) -> torch.Tensor:
    """All volumes of a dataset as one tensor, (N, 1, D, H, W)."""
    return torch.stack(list(volumes))


def refused(data: Data) -> str:
    with pytest.raises(LabError) as excinfo:
        find_volumes(data)
    return str(excinfo.value)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    gone, file = tmp_path / "gone", write_nifti(tmp_path / "one.nii")
    assert refused(Data(root=gone)) == (
        f"{gone}: `data.root`: expected a folder of NIfTI files, found nothing there. Check the path."
    )
    assert refused(Data(root=file)) == (
        f"{file}: `data.root`: expected a folder of NIfTI files, found a file. Check the path."
    )
    assert refused(Data()) == (
        "data.root: the data: expected a folder of NIfTI files, found nothing. Pass `--set data.root=FOLDER`."
    )


def test_empty_and_nearly_empty_folders_are_named(tmp_path: Path) -> None:
    expected = (
        "{}: layout `plain`: expected at least 2 files matching **/*.nii or **/*.nii.gz, found {}. "
        "Check the folder and `data.layout` (plain, ukb, adni, ppmi, brats)."
    )
    assert refused(Data(root=tmp_path)) == expected.format(tmp_path, 0)
    write_nifti(tmp_path / "one.nii")
    assert refused(Data(root=tmp_path)) == expected.format(tmp_path, 1)


def test_a_keep_list_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        write_nifti(tmp_path / f"B{number}" / f"B{number}_t1.nii.gz")
    keep = tmp_path / "clean.txt"
    keep.write_text("other_t1.nii.gz\n", encoding="utf-8")
    assert refused(Data(root=tmp_path, layout="brats", keep=keep)) == (
        f"{keep}: the keep-list: expected names of files to keep, found none of 1 names among 2 files. "
        "Write one file name a line."
    )
    missing = tmp_path / "missing.txt"
    assert refused(Data(root=tmp_path, layout="brats", keep=missing)) == (
        f"{missing}: `data.keep`: expected a readable text file, found No such file or directory. Check the path."
    )
    assert refused(Data(root=tmp_path, keep=keep)) == (
        "data.keep: a list of files: expected layout brats, found layout plain. Remove `data.keep`."
    )


def damaged(kind: str, folder: Path) -> tuple[Path, str]:
    """A file that is wrong in one way, and what must be said of it."""
    path = folder / "bad.nii.gz"
    good = write_nifti(folder / "good.nii.gz", (16, 16, 16))
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-2000])
        return path, "expected a NIfTI file, found Compressed file ended before the end-of-stream marker was reached"
    if kind == "one bit":
        content = bytearray(gzip.compress(gzip.decompress(good.read_bytes()), 0))  # stored: any bit is a voxel's
        content[5000] ^= 1
        path.write_bytes(content)
        assert np.isfinite(nibabel.load(path).get_fdata()).all(), "nibabel sees nothing"
        return path, "expected a NIfTI file, found CRC check failed "
    if kind == "no NIfTI":
        path.write_bytes(gzip.compress(b"hello, this is no volume" * 40))
        return path, "expected a NIfTI file, found "
    if kind == "not zipped":
        path.write_text("hello", encoding="utf-8")
        return path, "expected a NIfTI file, found "
    if kind == "empty":
        path.write_bytes(b"")
        return path, "expected a NIfTI file, found Empty file: "
    if kind == "a series":
        return write_nifti(path, (8, 8, 8, 3)), "expected one 3D volume, found shape 8x8x8x3"
    if kind == "a series of series":
        return write_nifti(path, (8, 8, 8, 1, 1)), "expected one 3D volume, found shape 8x8x8x1x1"
    if kind == "a slice":
        return write_nifti(path, (8, 8)), "expected one 3D volume, found shape 8x8"
    if kind == "flat":
        nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 8), 3.0), np.eye(4)), path)
        return path, "expected an image, found the same value everywhere, 3"
    if kind == "no axes":
        image = nibabel.Nifti1Image(np.random.default_rng(0).uniform(size=(8, 8, 8)), np.eye(4))
        nibabel.save(image, path)
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[280:296] = bytes(16)  # srow_x, the first row of the affine
        path.write_bytes(gzip.compress(bytes(content)))
        return path, "expected an affine that places the voxels, found one that is singular"
    if kind in ("no type", "no room"):
        content = bytearray(gzip.decompress(good.read_bytes()))
        if kind == "no type":
            content[70:72] = (9999).to_bytes(2, "little")
        else:
            content[42:44] = (-16).to_bytes(2, "little", signed=True)  # the length of the first axis
        path = path.with_suffix("")  # nibabel maps this one into memory
        path.write_bytes(content)
        found = "data code 9999 not recognized" if kind == "no type" else "memory mapped length must be positive"
        return path, f"expected a NIfTI file, found {found}"
    voxels = np.ones((8, 8, 8))
    if kind == "too large":
        voxels[0, 0, 0] = 1e300
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
        return path, "expected numbers that float32 can hold, found voxels from 1 to 1e+300"
    voxels[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path, "expected finite numbers, found voxels that are infinite or not a number"


KINDS = ["truncated", "no NIfTI", "not zipped", "empty", "a series", "a slice", "flat", "no axes", "not finite"]
KINDS += ["one bit", "a series of series", "no type", "no room", "too large"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_volumes_are_named(tmp_path: Path, kind: str) -> None:
    path, expected = damaged(kind, tmp_path)
    with pytest.raises(LabError) as excinfo:
        check_volumes([write_nifti(tmp_path / "fine.nii"), path])
    text = str(excinfo.value)
    assert text.startswith(f"{path}: an unreadable volume: {expected}")
    assert text.endswith(". Replace or remove the file.")
    assert "\n" not in text


def test_many_damaged_volumes_are_counted(tmp_path: Path) -> None:
    paths = [write_nifti(tmp_path / f"{number:02d}.nii", (8, 8)) for number in range(12)]
    with pytest.raises(LabError) as excinfo:
        check_volumes(paths)
    lines = str(excinfo.value).splitlines()
    assert len(lines) == 9
    assert lines[-1] == f"{tmp_path}: 4 more like these: expected none, found 12 in all. Mend or move them."


def test_good_volumes_pass_and_progress_counts_them(tmp_path: Path) -> None:
    paths = [
        write_nifti(tmp_path / "a.nii"),
        write_nifti(tmp_path / "b.nii.gz", (8, 8, 8, 1)),
        write_nifti(tmp_path / "c.nii", dtype=np.int16),
    ]
    seen: list[int] = []
    check_volumes(paths, seen.append)
    assert seen == [1, 2, 3]


def test_the_split_is_fixed_by_its_seed_and_written_down(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:03d}.nii" for number in range(60)]
    split = split_volumes(paths, Data())
    assert (len(split.train), len(split.validation)) == (54, 6)
    assert sorted([*split.train, *split.validation]) == paths
    assert split == split_volumes(paths, Data())
    assert split.validation != split_volumes(paths, Data(split_seed=1)).validation
    split.write(tmp_path / "split.json", tmp_path)
    written = json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))
    assert written["seed"] == 0
    assert written["validation"] == [path.name for path in split.validation]
    tested = split_volumes(paths, Data(test_share=0.2))
    assert (len(tested.train), len(tested.validation), len(tested.test)) == (42, 6, 12)
    assert tested.validation == split.validation, "subjects to test on are taken from those that train"
    assert sorted([*tested.train, *tested.validation, *tested.test]) == paths
    small = split_volumes(paths[:2], Data())
    assert (len(small.train), len(small.validation)) == (1, 1)


def stored_along(source: Path, axes: str, target: Path) -> Path:
    """The same brain in the same space, with the file's voxel axes turned."""
    image = nibabel.load(source)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(axes)))
    nibabel.save(image.as_reoriented(turn), target)
    return target


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_stored_axes_do_not_matter_when_orienting_first(tmp_path: Path, cache: str) -> None:
    first = write_nifti(tmp_path / "ras.nii", (11, 13, 9))
    paths = [first, stored_along(first, "LPS", tmp_path / "lps.nii"), stored_along(first, "PIR", tmp_path / "pir.nii")]
    data = Data(root=tmp_path, crop=(8, 10, 6), cache=cache)  # type: ignore[arg-type]
    volumes = voxels(dataset(paths, data, tmp_path / "cache"))
    assert volumes.shape == (3, 1, 8, 10, 6)
    assert type(volumes[0]) is torch.Tensor
    torch.testing.assert_close(volumes[1], volumes[0])
    torch.testing.assert_close(volumes[2], volumes[0])


def test_the_papers_order_makes_stored_axes_matter(tmp_path: Path) -> None:
    first = write_nifti(tmp_path / "ras.nii", (11, 13, 9))
    paths = [first, stored_along(first, "LPS", tmp_path / "lps.nii")]
    data = Data(root=tmp_path, crop=(8, 10, 6), paper_order=True)
    volumes = voxels(dataset(paths, data, tmp_path))
    assert (volumes[1] - volumes[0]).abs().max() > 0.5


def test_spacing_resize_and_intensity(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", (12, 12, 12))
    data = Data(root=tmp_path, spacing=(2.0, 2.0, 2.0), crop=(8, 8, 8), resize=(4, 4, 8), intensity=(-1.0, 1.0))
    volume = voxels(dataset([path], data, tmp_path))[0]
    assert volume.shape == (1, 4, 4, 8)
    assert volume.dtype == torch.float32
    assert (volume.min().item(), volume.max().item()) == (-1.0, 1.0)


def test_a_disk_cache_is_not_shared_between_settings(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", (12, 12, 12))
    one, two = (dataset([path], Data(crop=crop, cache="disk"), tmp_path / "cache") for crop in ((8, 8, 8), (4, 4, 4)))
    assert (one[0].shape, two[0].shape, one[0].shape) == ((1, 8, 8, 8), (1, 4, 4, 4), (1, 8, 8, 8))


def test_a_disk_cache_notices_a_replaced_file(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", (8, 8, 8))
    before = dataset([path], Data(cache="disk"), tmp_path / "cache")[0]
    assert torch.equal(dataset([path], Data(cache="disk"), tmp_path / "cache")[0], before)
    write_nifti(path, (8, 8, 8), seed=1)
    assert not torch.equal(dataset([path], Data(cache="disk"), tmp_path / "cache")[0], before)


def test_half_a_file_in_a_disk_cache_is_made_again(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", (8, 8, 8))
    before = dataset([path], Data(cache="disk"), tmp_path / "cache")[0]
    (cached,) = tmp_path.glob("cache/*/*")
    whole = cached.read_bytes()
    for half in (whole[:-1], whole[:4], b""):
        cached.write_bytes(half)
        assert torch.equal(dataset([path], Data(cache="disk"), tmp_path / "cache")[0], before)
        assert cached.read_bytes() == whole


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_a_volume_that_is_damaged_after_prepare_is_named(tmp_path: Path, cache: str) -> None:
    """With a manifest nothing reads the files before the dataset does."""
    paths = [write_nifti(tmp_path / "a.nii"), write_nifti(tmp_path / "b.nii.gz")]
    paths[1].write_bytes(paths[1].read_bytes()[:-400])
    with pytest.raises(LabError) as excinfo:
        check_sizes(dataset(paths, Data(cache=cache), tmp_path / "cache"), paths, 4)  # type: ignore[arg-type]
    assert str(excinfo.value) == (
        f"{paths[1]}: an unreadable volume: expected a NIfTI file, found Compressed file ended before the "
        "end-of-stream marker was reached. Replace or remove the file."
    )


def test_volumes_of_different_or_impossible_sizes_are_named(tmp_path: Path) -> None:
    paths = [write_nifti(tmp_path / "a.nii", (8, 8, 8)), write_nifti(tmp_path / "b.nii", (8, 8, 4))]
    volumes = dataset(paths, Data(), tmp_path)
    with pytest.raises(LabError) as excinfo:
        check_sizes(volumes, paths, 4)
    assert str(excinfo.value) == (
        f"{paths[1]}: a volume of another size: expected 1 channel of 8x8x8, "
        "found 1 channel(s) of 8x8x4 after the transforms. Set `data.crop` or `data.resize`."
    )
    with pytest.raises(LabError) as excinfo:
        check_sizes(volumes, paths[:2], 16)
    assert str(excinfo.value) == (
        f"{paths[0]}: the volume's size: expected multiples of 16, for the network, found 8x8x8. "
        "Set `data.crop` or `data.resize`."
    )


@pytest.fixture(scope="module")
def tissues() -> Tissues:
    return tissues_of("mni152", 16)


def test_tissues_are_probabilities_of_a_whole_brain(tissues: Tissues) -> None:
    assert tissues.maps.shape == (3, 16, 16, 16)
    assert tissues.maps.min() >= 0
    assert tissues.maps.sum(0).max() <= 1 + 1e-5
    litres = tissues.maps.sum().item() * tissues.spacing**3 / 1e6
    assert 1.5 < litres < 2.3  # the template's brain, cerebrospinal fluid included
    border = torch.cat([tissues.maps.sum(0).movedim(axis, 0)[[0, -1]].flatten() for axis in range(3)])
    assert border.max() < 0.05


def test_the_population_is_the_same_every_time(tissues: Tissues, tmp_path: Path) -> None:
    first = write_population(tmp_path / "a", (tissues,), "t1", 3, seed=0)
    again = write_population(tmp_path / "b", (tissues,), "t1", 2, seed=0)
    other = write_population(tmp_path / "c", (tissues,), "t1", 1, seed=1)
    volumes = [nibabel.load(path).get_fdata() for path in [*first, *again, *other]]
    assert [path.name for path in first] == ["sub-001_t1w.nii.gz", "sub-002_t1w.nii.gz", "sub-003_t1w.nii.gz"]
    assert np.array_equal(volumes[0], volumes[3])
    assert np.array_equal(volumes[1], volumes[4])
    assert not np.array_equal(volumes[0], volumes[5])
    check_volumes([*first, *again, *other])


def test_contrasts_differ_as_t1_and_t2_do(tissues: Tissues) -> None:
    t1, t2 = (paint_subject(tissues, name, torch.Generator().manual_seed(3)) for name in ("t1", "t2"))
    assert t1.shape == t2.shape == (16, 16, 16)
    assert 0 <= t1.min() <= t1.max() <= 1
    assert type(t1) is torch.Tensor
    fluid, _, white = (tissues.maps[number] / tissues.maps[number].sum() for number in range(3))
    t1_step, t2_step = (((volume * white).sum() - (volume * fluid).sum()).item() for volume in (t1, t2))
    assert t1_step > 0.15  # at 13 mm every voxel of fluid holds other tissue too
    assert t2_step < t1_step - 0.15
