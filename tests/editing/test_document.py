"""The file of a page: whole or not at all, and never over what nobody has seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tnpeft.editing.document import NEW, Document, shipped_text
from tnpeft.errors import TnpeftError
from tnpeft.network import Spec, load_spec
from tnpeft.spec import list_specs


def test_a_file_is_read_changed_and_saved(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(NEW)
    document = Document.open(str(path))
    assert document.text == NEW
    assert document.save(NEW + "# more\n")
    assert path.read_text() == NEW + "# more\n"
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_new_file_is_made_when_it_is_saved(tmp_path: Path):
    path = tmp_path / "new.yaml"
    document = Document.open(str(path), "loha")
    assert not path.exists()
    assert document.save(document.text)
    assert load_spec(path).canonical() == load_spec("loha").canonical()


@pytest.mark.parametrize("before", [NEW, None], ids=["changed", "made"])
def test_a_change_on_the_disk_is_not_written_over(tmp_path: Path, before: str | None):
    path = tmp_path / "mine.yaml"
    if before is not None:
        path.write_text(before)
    document = Document.open(str(path))
    path.write_text("theirs")
    assert document.changed_on_disk()
    assert not document.save("ours")
    assert path.read_text() == "theirs"
    assert document.save("ours", over_changes=True)
    assert path.read_text() == "ours"
    assert document.save("ours again")


def test_a_file_that_went_away_is_a_change(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(NEW)
    document = Document.open(str(path))
    path.unlink()
    assert not document.save("ours")
    assert not path.exists()


def test_reading_again_takes_what_is_there(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(NEW)
    document = Document.open(str(path))
    path.write_text("theirs")
    assert document.reload() == "theirs"
    assert document.save("ours")


def test_a_folder_that_cannot_be_written_leaves_the_file(tmp_path: Path):
    path = tmp_path / "gone" / "mine.yaml"
    path.parent.mkdir()
    document = Document.open(str(path))
    path.parent.rmdir()
    with pytest.raises(TnpeftError) as error:
        document.save(NEW)
    assert str(error.value) == (
        f"{path}: save: expected a file that can be written, found No such file or directory. "
        "Choose a folder that exists and can be written to."
    )


def test_more_than_a_spec_may_be_is_not_saved(tmp_path: Path):
    document = Document.open(str(tmp_path / "mine.yaml"))
    with pytest.raises(TnpeftError) as error:
        document.save("x" * 65_537)
    assert str(error.value) == f"{tmp_path / 'mine.yaml'}: save: expected at most 65536 bytes, found more. Split it."


def test_a_shipped_name_is_a_copy_without_a_file():
    document = Document.open("lora")
    assert document.path is None
    with pytest.raises(TnpeftError) as error:
        document.save(document.text)
    assert str(error.value) == (
        "save: expected a file, found a text without one. "
        "Start again with `tnpeft edit FILE.yaml`, or download the text."
    )


def test_shipped_texts_are_the_specs_without_the_schema_beside_them():
    for name in list_specs():
        text = shipped_text(name)
        assert "yaml-language-server" not in text
    for name in list_specs()[::10]:
        text = shipped_text(name)
        assert Spec.from_yaml(text).canonical() == load_spec(name).canonical()


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        (
            "lorra",
            None,
            "spec 'lorra': expected a YAML file, or the name of a shipped spec, found neither. Did you mean `lora`?",
        ),
        ("{}", None, "{}: edit: expected a YAML file, found a folder. Name a file in it."),
        ("{}/there.yaml", "lora", "{}/there.yaml: --from: expected a new file, found one that is there. "
         "Name a file that is not there yet, or leave `--from` out."),
        ("{}/no/new.yaml", None, "{}/no: edit: expected a folder that exists, found none. "
         "Make the folder first, or name another."),
    ],
)  # fmt: skip
def test_what_cannot_be_edited(tmp_path: Path, name: str, start: str | None, said: str):
    folder = tmp_path / "a.yaml"
    folder.mkdir()
    (folder / "there.yaml").write_text(NEW)
    with pytest.raises(TnpeftError) as error:
        Document.open(name.format(folder), start)
    assert str(error.value) == said.format(folder)


def test_a_page_loaded_anew_keeps_what_it_had_seen(tmp_path: Path):
    """What another program wrote before the page was loaded again is still a change that nobody has seen."""
    path = tmp_path / "a.yaml"
    path.write_text("one")
    first = Document.open(str(path))
    assert first.unsaved("one") is None
    path.write_text("by another program")
    again = first.unsaved("mine")
    assert again is not None
    assert not again.save("mine")
    assert path.read_text() == "by another program"
    assert again.save("mine", over_changes=True)
    assert not first.save("of the other page")
    assert path.read_text() == "mine"
