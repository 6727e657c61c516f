"""The settings of a search on a study's model, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from ddpm_lab.config.reader import read_config
from ddpm_lab.searching.score import score
from ddpm_lab.searching.settings import SearchConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError
from studies import TINY_STUDY

SEARCH = "study: study.yaml\nmatch: conv\nrates: [0.01]\nselected: {contrast: [5]}\ntested: {lesion: [6]}\n"


def search_of(folder: Path, text: str = SEARCH) -> SearchConfig:
    (folder / "study.yaml").write_text(TINY_STUDY, encoding="utf-8")
    (folder / "search.yaml").write_text(text, encoding="utf-8")
    return read_config(folder / "search.yaml", [], SearchConfig)


def test_a_search_is_about_the_study_beside_it(tmp_path: Path):
    config = search_of(tmp_path)
    config.check(config.read_study())
    assert config.study == tmp_path / "study.yaml"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "lesion: [6]", "brain: [6]",
            "tested.brain: a data set: expected one of contrast, lesion, found `brain`. Correct the name.",
        ),
        (
            "lesion: [6]", "contrast: [4, 5]",
            "tested: fine-tunes: expected none that the search has seen, found seed 5 of `contrast` in both. "
            "Remove it from one.",
        ),
    ],
)  # fmt: skip
def test_what_no_search_can_be(tmp_path: Path, old: str, new: str, text: str):
    config = search_of(tmp_path, SEARCH.replace(old, new))
    with pytest.raises(LabError) as caught:
        config.check(config.read_study())
    assert str(caught.value) == text


def test_a_score_is_of_a_data_set_of_the_study(tmp_path: Path):
    with pytest.raises(LabError) as caught:
        score(search_of(tmp_path), tmp_path, Screen(quiet=True), spec=tmp_path, rate=0.1, datasets=["brain"])
    assert str(caught.value) == (
        "--dataset: a data set: expected one of contrast, lesion, found `brain`. Correct the name."
    )
