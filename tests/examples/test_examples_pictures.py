"""What people see: slices with their letters, montages of few volumes, signs of life without a terminal."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import matplotlib.pyplot as plt
from ddpm_lab.config.reader import read_config
from ddpm_lab.config.settings import DemoConfig, Model, Population, Sampling, Training, Validation
from ddpm_lab.data.slices import CONVENTION, PLANES, draw_slice, middle_slices
from ddpm_lab.study import plots as study_plots
from ddpm_lab.study.dry_run import _explain
from ddpm_lab.study.page import DENSITY
from ddpm_lab.study.results import Results
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.study.study import _Inner
from ddpm_lab.support import console
from ddpm_lab.support.console import Screen
from ddpm_lab.training import plots
from ddpm_lab.training.estimate import expected_time
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from studies import tiny_study

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def gradient(axis: int) -> np.ndarray[Any, Any]:
    """A volume of unequal sides that grows along one axis: towards R, A or S."""
    shape = [4, 6, 8]
    steps = np.arange(shape[axis], dtype=np.float32).reshape([-1 if each == axis else 1 for each in range(3)])
    return np.broadcast_to(steps, shape).copy()


@pytest.mark.parametrize(("axis", "letter"), [(0, "R"), (1, "A"), (2, "S")])
def test_letters_stand_where_the_volume_says(axis: int, letter: str) -> None:
    """The bright end of a gradient towards R, A or S lies at the edge with that letter, in each plane that has it."""
    seen = 0
    for piece in middle_slices(gradient(axis)):
        pixels = piece.pixels
        edges = {
            piece.left: pixels[:, 0],
            piece.right: pixels[:, -1],
            piece.top: pixels[0],
            piece.bottom: pixels[-1],
        }
        opposite = {"R": "L", "A": "P", "S": "I"}
        assert all({one, other} <= edges.keys() or not {one, other} & edges.keys() for one, other in opposite.items())
        if letter in edges:
            seen += 1
            assert (edges[letter] == pixels.max()).all()
            assert (edges[opposite[letter]] == 0).all()
    assert seen == 2


def test_planes_are_the_middle_ones_and_in_radiological_convention() -> None:
    volume = np.arange(4 * 6 * 8).reshape(4, 6, 8)
    axial, coronal, sagittal = middle_slices(volume, (1.0, 2.0, 3.0))
    assert (axial.left, axial.right, axial.top, axial.bottom) == ("R", "L", "A", "P")
    assert (coronal.left, coronal.right, coronal.top, coronal.bottom) == ("R", "L", "S", "I")
    assert (sagittal.left, sagittal.right, sagittal.top, sagittal.bottom) == ("A", "P", "S", "I")
    assert set(axial.pixels.ravel()) == set(volume[:, :, 4].ravel())
    assert set(coronal.pixels.ravel()) == set(volume[:, 3].ravel())
    assert set(sagittal.pixels.ravel()) == set(volume[2].ravel())
    assert (axial.pixels.shape, coronal.pixels.shape, sagittal.pixels.shape) == ((6, 4), (8, 4), (8, 6))
    assert (axial.aspect, coronal.aspect, sagittal.aspect) == (2.0, 3.0, 1.5)
    assert "radiological convention" in CONVENTION
    assert "the patient's right, or front, is on the left" in CONVENTION


def test_a_slice_is_drawn_as_it_is() -> None:
    figure, axes = plt.subplots()
    piece = middle_slices(gradient(0))[0]
    draw_slice(axes, piece, 0, 3)
    (image,) = axes.images
    assert image.get_interpolation() == "nearest"
    assert np.array_equal(image.get_array(), piece.pixels)
    assert {text.get_text() for text in axes.texts} == {"R", "L", "A", "P"}
    plt.close(figure)


def montage(monkeypatch: pytest.MonkeyPatch, draw: Any) -> Figure:
    """The figure that is saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    draw()
    (figure,) = saved
    return figure


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 8, 8), (2, 2, 2), (12, 16, 16)])
def test_no_text_of_a_montage_is_cut(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int, int]) -> None:
    names = ("target (made from MNI152)", "base samples", "fine-tuned samples")
    rows = {name: torch.rand(count, 1, 8, 8, 8) for name, count in zip(names, counts, strict=True)}
    title = "DDIM, 250 steps, 160x224x160 voxels"
    figure = montage(monkeypatch, lambda: plots.plot_montage(Path("x.png"), rows, (0, 1), title))
    assert len(figure.axes) == 3 * sum(min(count, 8) for count in counts)
    texts = [" ".join(text.get_text().split()) for text in figure.texts]
    assert texts[:2] == [title, CONVENTION]
    assert [text for text in texts if text in names] == list(names)
    assert [text for text in texts if text in ("axial", "coronal", "sagittal")] == 3 * ["axial", "coronal", "sagittal"]
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text()]
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    first_axes = max(axes.get_window_extent().y1 for axes in figure.axes)
    assert figure.texts[1].get_window_extent().y0 >= first_axes  # the title stands above the pictures


def test_a_montage_of_a_report_has_three_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = ["Target (made from MNI152)", "TenVOO-L, zero start, own rate"], ["T2-like"]
    volumes = {(row, "T2-like"): [np.zeros((8, 8, 8))] for row in rows}
    figure = montage(monkeypatch, lambda: study_plots.plot_montage_page(Path("x.png"), rows, columns, volumes))
    assert len(figure.axes) == 6
    assert {" ".join(text.get_text().split()) for text in figure.texts} == {*rows, *columns, *PLANES}
    letters = [text for axes in figure.axes for text in axes.texts]
    assert Counter(letter.get_text() for letter in letters) == Counter("RLAP" * 2 + "RLSI" * 2 + "APSI" * 2)


@pytest.mark.parametrize("narrow", [False, True])
def test_labels_of_a_reports_pictures_have_ten_pixels_and_none_is_cut(
    monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    rows, columns = ["Target (made from MNI152)", "TenVOO-L, zero start, own rate"], ["T2-like", "Lesion"]
    volumes = {(row, column): [np.zeros((8, 8, 8))] * 3 for row in rows for column in columns}
    draw = lambda: study_plots.plot_montage_page(Path("x.png"), rows, columns, volumes, narrow=narrow)  # noqa: E731
    figures = [montage(monkeypatch, draw)]
    lines = [study_plots.Line(row, [1, 2], [0.1, 0.2], colour=at) for at, row in enumerate(rows)]
    panels = [study_plots.Panel(column, "rank", lines, marks=True) for column in ("a", "b", "c")]
    chart = lambda: study_plots.plot_panels(Path("x.png"), panels, narrow=narrow)  # noqa: E731
    figures.append(montage(monkeypatch, chart))
    most = 358 if narrow else 1244  # beside the margins of a phone of 390 pixels, and of a screen of 1300
    for figure in figures:
        figure.draw_without_rendering()
        page, texts = figure.bbox, [text for text in figure.findobj(Text) if text.get_text().strip()]
        assert page.width / figure.dpi * 144 / DENSITY <= most
        assert min(text.get_fontsize() * 144 / 72 / DENSITY for text in texts) >= 10
        ticks = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        for text in (text for text in texts if text not in ticks):
            box = text.get_window_extent()
            assert page.x0 <= box.x0, text.get_text()
            assert box.x1 <= page.x1, text.get_text()
            assert page.y0 <= box.y0, text.get_text()
            assert box.y1 <= page.y1, text.get_text()
    columns_of_axes = {round(axes.get_position().x0, 2) for axes in figures[1].axes if axes.get_visible()}
    assert len(columns_of_axes) == (1 if narrow else 2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "made from MNI152"),
        (["datasets.own={data: {root: /data}}"], "real or made from MNI152"),
        (["datasets={own: {data: {root: /data}}}"], "real"),
    ],
)
def test_made_volumes_are_not_called_real(tmp_path: Path, overrides: list[str], expected: str) -> None:
    config = tiny_study(tmp_path, *overrides)
    assert Results(tmp_path, config, (), {}, {}, None, {}, {}, {}).source == expected


class Clock:
    """Seconds that pass as they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("inner", [False, True])
def test_without_a_terminal_a_line_now_and_then_says_how_far_a_phase_is(
    monkeypatch: pytest.MonkeyPatch, inner: bool
) -> None:
    """In runs of a study too, whose bars are left out of a file."""
    clock, text = Clock(), io.StringIO()
    monkeypatch.setattr(console, "time", clock)
    screen = Screen(Console(file=text, width=120))
    shown = _Inner(screen) if inner else screen
    with shown.bar("pretrain", 1000, start=100) as bar:
        for step in range(101, 1001):
            clock.now += 0.125
            bar(step, f"loss {step}")
    lines = [line for line in text.getvalue().splitlines() if " of 1000 " in line]
    assert lines == [
        "pretrain: 260 of 1000 (26%), about 1 min 32 s left, loss 260",
        "pretrain: 420 of 1000 (42%), about 1 min 12 s left, loss 420",
        "pretrain: 580 of 1000 (58%), about 52 s left, loss 580",
        "pretrain: 740 of 1000 (74%), about 32 s left, loss 740",
        "pretrain: 900 of 1000 (90%), about 12 s left, loss 900",
    ]
    assert ("1000/1000" in text.getvalue()) == (not inner)


def test_a_terminal_has_its_bar_and_a_quiet_screen_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    for terminal, quiet in ((True, False), (False, True)):
        text = io.StringIO()
        with Screen(Console(file=text, width=120, force_terminal=terminal, quiet=quiet)).bar("train", 3) as bar:
            for step in range(4):
                clock.now += 60
                bar(step)
        assert " of 3 " not in text.getvalue()
        assert bool(text.getvalue()) == terminal


def test_the_demonstration_says_how_long_it_takes_and_changes_no_random_state() -> None:
    small = Training(steps=2, batch_size=2, accumulation=2, precision="fp32", device="cpu")
    config = DemoConfig(
        population=Population(source=6, target=6, side=8),
        model=Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4),
        pretraining=small,
        training=small,
        bias_norm=small,
        validation=Validation(every=1, buckets=2),
        sampling=Sampling(steps=2, count=2),
    )
    before = torch.get_rng_state()
    line = expected_time(config, populated=False, pretrained=False)
    assert torch.equal(before, torch.get_rng_state())
    assert line.startswith("About ")
    for part in ("population", "pretraining", "fine-tuning runs", "samples and metrics"):
        assert part in line
    line = expected_time(config, populated=True, pretrained=True)
    assert "population" not in line
    assert "pretraining" not in line


def test_the_estimate_counts_what_the_demonstration_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 0.1 s, a pass of 0.03 s, a subject of 0.05 s."""
    monkeypatch.setattr("ddpm_lab.training.estimate._network_times", lambda _: (0.1, 0.03))
    monkeypatch.setattr("ddpm_lab.training.estimate._painting", lambda _: None)
    monkeypatch.setattr("ddpm_lab.training.estimate._timed", lambda *_: 0.05)
    config = read_config(CONFIGS / "demo.yaml", [], DemoConfig)
    line = expected_time(config, populated=False, pretrained=False)
    # 180 subjects; 1100 steps; four times 120 steps and five errors of 6 x 10 x 4 samples in batches of 8.
    assert "population 9 s, pretraining 1 min 50 s, fine-tuning runs 1 min 13 s, samples and metrics " in line


def test_a_dry_run_says_why_tensors_stay_where_they_are() -> None:
    text = io.StringIO()
    methods = {
        "full": {"at_rest": ["middle_block.attention.attn.to_k.weight"]},
        "odd": {"at_rest": ["x.attn.to_q.base.weight", "lost.weight"]},
    }
    _explain(methods, Screen(Console(file=text, width=200)))
    assert text.getvalue().splitlines() == [
        "Queries and keys that did not move belong to an attention that sees a single voxel at this size: its weight "
        "is 1 whatever they are. They move on larger volumes.",
        "odd: no gradient moved `lost.weight`",
    ]


def test_the_notes_of_the_profiles_do_not_say_what_the_authors_ran() -> None:
    for name in ("study_cpu", "study_gpu", "study_paper"):
        config = read_config(CONFIGS / f"{name}.yaml", [], StudyConfig)
        note = config.methods["lora_zero"].note
        assert note == (
            "as the paper's scripts build it: the scale rank // 4 is 0, so that only biases and norms have an effect"
        )
        assert json.dumps(note)
