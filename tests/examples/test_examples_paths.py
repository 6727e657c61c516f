"""Paths in settings that no file can have, and links in a circle: each is a mistake of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Config, Data, Method
from ddpm_lab.data.files import find_volumes
from ddpm_lab.data.manifest import root_of
from ddpm_lab.evaluation.encoder import _read
from ddpm_lab.model.base_file import model_tensors
from ddpm_lab.sampling.sample import _check_apart
from ddpm_lab.sampling.variants import find_variants
from ddpm_lab.study.dry_run import _files
from ddpm_lab.support.faults import LabError
from ddpm_lab.support.locks import at_work

NAMES = ["y" * 400, "y/" * 3000 + "y", "a\0b", "circle"]
LINKS = "Too many levels of symbolic links"


@pytest.fixture(autouse=True)
def circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")


def message(use) -> str:
    with pytest.raises(LabError) as excinfo:
        use()
    return str(excinfo.value)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_there(name: str) -> None:
    path = Path(name)
    assert message(lambda: find_volumes(Data(root=path))) == (
        f"{name}: `data.root`: expected a folder of NIfTI files, found nothing there. Check the path."
    )
    for adapter in (path, path / "adapter.safetensors"):
        settings = Config.model_validate({"sampling": {"adapters": (adapter,)}})
        assert message(lambda settings=settings: find_variants(settings, Path())) == (
            f"{adapter}: `sampling.adapters`: expected a file, found nothing there. Check the path."
        )
    assert message(lambda: _read(path)) == (
        f"{name}: `metrics.medicalnet`: expected a file, found nothing there. Check the path, or leave it out."
    )
    assert message(lambda: root_of(Data(root=path), None)) == (
        f"data.root: the manifest's root: expected a folder, found none at {name}. "
        "Pass `--set data.root=FOLDER` where the data moved."
    )
    assert _files(Data(manifest=path)) == {"manifest": name, "there": False}
    _check_apart(Data(root=path), Path("out"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_recipe_is_left_to_who_reads_it(name: str) -> None:
    for key in ("recipe", "spec"):
        values = {key: name, "match": "all"} if key == "spec" else {key: name}
        method = Method.model_validate(values, context={"folder": Path("configs")})
        assert getattr(method, key) == name


@pytest.mark.parametrize(
    ("name", "found"),
    [("y" * 400, "File name too long"), ("y/" * 3000 + "y", "File name too long"), ("circle/y", LINKS)],
)
def test_a_folder_of_results_that_cannot_be(name: str, found: str) -> None:
    def use() -> None:
        with at_work("finetune", Path(name)):
            pass

    assert message(use) == f"{name}: `--out`: expected a folder to write to, found {found}. Choose another."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("y" * 400, "a file that can be read, found File name too long"),
        ("a\0b", "a file, found nothing there"),
        ("circle", f"a file that can be read, found {LINKS}"),
    ],
)
def test_a_checkpoint_that_cannot_be(name: str, text: str) -> None:
    assert message(lambda: model_tensors(Path(name), ["x"], print)) == (
        f"{name}: `base.checkpoint`: expected {text}. Check the path."
    )


def test_a_link_to_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    """It is found, as links that lead nowhere are, and told by name when it is read."""
    for number in range(2):
        Path(f"{number}.nii").symlink_to("y" * 400)
    assert [path.name for path in find_volumes(Data(root=tmp_path))] == ["0.nii", "1.nii"]
