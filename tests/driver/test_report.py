"""The report of a study: tables, pictures and the page, from files that a finished study leaves."""

from __future__ import annotations

import base64
import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.study.columns import Column, set_intervals
from ddpm_lab.study.plots import spread
from ddpm_lab.study.report import report
from ddpm_lab.study.results import METRICS, Cell, Metric, Value, read_results
from ddpm_lab.study.run import Outcome
from ddpm_lab.study.tables import Row, Table, as_html, as_markdown, method_table
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import LabError
from studies import tiny_study, written_study

PNG = b"\x89PNG\r\n\x1a\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with its report."""
    folder = tmp_path_factory.mktemp("study")
    written_study(folder, tiny_study(folder))
    report(folder, Screen(quiet=True))
    return folder


class Page(HTMLParser):
    """What a page would ask a network for, its tables as text, and the bytes of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self._cell: list[str] | None = None
        self._best = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br" and self._cell is not None:
            self._cell.append(" ")
        given = {name: value or "" for name, value in attrs}
        self.addresses += [given[name] for name in ("src", "href", "srcset", "data", "action") if name in given]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell, self._best = [], "best" in given.get("class", "").split()

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            text = "".join(self._cell)
            self.tables[-1][-1].append(text)
            self.bold += [text] if self._best else []
            self._cell = None


def test_every_file_of_the_report_is_there(out: Path) -> None:
    names = {path.name for path in (out / "report").iterdir()}
    for study in ("table1", "table2", "table3", "figure4"):
        assert {f"{study}.csv", f"{study}-montage.png", f"{study}-curves-lesion.png"} <= names
    assert {"report.md", "index.html", "table4.csv", "figure4-parameters.png", "figure4-ms-ssim.png"} <= names
    assert not [name for name in names if ".part" in name]
    for path in (out / "report").glob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_the_page_asks_for_nothing_outside_itself(out: Path) -> None:
    text = (out / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    inside = [each for each in page.addresses if each.startswith(("data:", "#"))]
    assert page.addresses == inside
    assert len([each for each in inside if each.startswith("data:image/png;base64,")]) > 10
    for word in ("http:", "https:", "//cdn", "@import", "url(", "<script"):
        assert word not in text
    for each in inside:
        if each.startswith("data:image/png;base64,"):
            assert base64.b64decode(each.partition(",")[2]).startswith(PNG)
    anchors = {each[1:] for each in inside if each.startswith("#")}
    assert anchors == {"table1", "table2", "table3", "table4", "figure4", "start", "screen", "screen_linear", "setup"}
    assert all(f'id="{anchor}"' in text for anchor in anchors)


def test_the_page_and_the_markdown_say_what_the_files_hold(out: Path) -> None:
    page = Page((out / "report" / "index.html").read_text(encoding="utf-8"))
    first = page.tables[0]
    assert first[0] == ["", "", "T2-like", "Lesion"]
    assert first[1][:6] == ["Method", "#P", "of base", "FID* ↓ (1e-2)", "MMD* ↓", "MS-SSIM ↑"]
    assert [row[0] for row in first[2:]] == [
        "Real, held out",
        "Base, not fine-tuned",
        "Full fine-tuning",
        "LoRA",
        "TenVOO-L",
    ]
    # `written_study` gives method number 1 the FID 0.02 + 0.002 x seed on the first data set.
    assert first[4][:4] == ["Full fine-tuning", "1.80 M", "100.00%", "2.10 ± 0.10"]
    assert first[2][3] == "0.10 ± 0.01"  # the same for both seeds: the bootstrap's interval
    assert "2.10 ± 0.10" in page.bold
    assert "1.10 ± 0.10" not in page.bold  # the base is no competitor
    second = page.tables[1]
    assert second[0] == ["", "", "T2-like", "Lesion"]
    assert second[1] == ["Method", "#P", "of base", *["rate", "Error change ↓ (%)"] * 2]
    assert [row[0] for row in second[2:]] == ["Full fine-tuning", "LoRA", "TenVOO-L"]
    assert second[2][3:] == ["1.0e-03", "\N{MINUS SIGN}27.5 ± 0.5"] * 2  # -28 + seed
    assert "\N{MINUS SIGN}27.5 ± 0.5" in page.bold
    assert "1.0e-03" not in page.bold
    markdown = (out / "report" / "report.md").read_text(encoding="utf-8")
    for text in (
        "> All subjects are deformations of one average brain.",
        "| Full fine-tuning | 1.80 M | 100.00% | **2.10 ± 0.10** |",
        "- FID and MMD: * random features, not comparable; MMD is the paper's (kernel scaled by the median distance). "
        "MS-SSIM: 1 scale, window 5: non-standard, the volumes are small. Samples are compared with 60 real volumes.",
        "- Each number: mean of two seeds ± half their difference. #P: parameters that train. "
        "Bold: the best method of a column, where it is better than the base and its paired difference from the next "
        "one has a 95% interval without zero: over seeds and, for errors, volumes. (1e-3): in units of 0.001.",
        "- Fewer than five seeds: a first look, no result.",
        "- T2-like: Full fine-tuning less LoRA, -2.00 points (-2.00 to -2.00).",
        "- TenVOO-Q: a note",
        "| TenVOO-L, rank 1 |",
        "| TenVOO-L, rank 4 |",
        "| LoRA | 70.8 k | 3.93% | 100.0 % | 110.0 % | 98.0 % |",
        "| #P | of base | T2-like: rate | T2-like: Error change ↓ (%) | Lesion: rate | Lesion: Error change ↓ (%) |",
        "- Rates were given, not searched.",
        "- Change of the denoising error on test volumes from the first step to the last, in percent.",
        "- Machine: cpu, A processor",
        "- Versions: python 3.11, torch 2.13",
        "- Source revision: 0123abcd",
        "![Figure 4 (a). The number of parameters that train, by rank.](figure4-parameters.png)",
    ):
        assert text in markdown


def test_the_csv_has_every_number_behind_a_table(out: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((out / "report" / "table1.csv").read_text(encoding="utf-8"))))
    # The base and three methods, two data sets, two seeds; five metrics, and the change of error but for the base.
    assert len(rows) == 4 * 2 * 2 * 5 + 3 * 2 * 2
    chosen = [row for row in rows if (row["method"], row["dataset"], row["metric"]) == ("full", "lesion", "fid")]
    assert [(row["seed"], float(row["value"])) for row in chosen] == [("0", 0.04), ("1", pytest.approx(0.042))]
    assert (float(chosen[0]["low"]), float(chosen[0]["high"])) == (pytest.approx(0.036), pytest.approx(0.044))
    costs = list(csv.DictReader(io.StringIO((out / "report" / "table4.csv").read_text(encoding="utf-8"))))
    assert [row["method"] for row in costs] == ["full fine-tuning", "lora", "tenvoo_l"]
    assert float(costs[1]["training"]) == pytest.approx(1.1)


def test_intervals_by_the_number_of_seeds() -> None:
    def cell(*numbers: float) -> Cell:
        return Cell(tuple(Value(seed, number, number - 1, number + 3) for seed, number in enumerate(numbers)))

    assert (cell(5).mean, cell(5).half) == (5, 2)  # the bootstrap's
    assert (cell(5, 5).mean, cell(5, 5).half) == (5, 2)
    assert (cell(5, 6).mean, cell(5, 6).half) == (5.5, 0.5)
    # Student's 95 % quantile for two degrees of freedom is 4.303; the deviation of 1, 2, 3 is 1.
    assert cell(1, 2, 3).half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert Cell((Value(0, 5.0),)).half is None


def test_a_failed_run_is_missed_and_named(tmp_path: Path) -> None:
    config = tiny_study(tmp_path)
    written_study(tmp_path, config)
    folder = tmp_path / "runs" / "lora" / "lesion"
    Outcome("failed", "key", 3.0, "step 7: the loss: found nan").write(folder / "seed-0")
    shutil.rmtree(folder / "seed-1")
    table = method_table(read_results(tmp_path), "table1", "Table 1", config.table1)
    lora = next(row for row in table.rows if row.title == "LoRA")
    assert lora.cells[5:] == ("-", "-", "-")
    assert lora.cells[2] != "-"
    assert table.notes[-2:] == (
        "Missing: LoRA, Lesion, seed 0: step 7: the loss: found nan",
        "Missing: LoRA, Lesion, seed 1: not run yet",
    )


def test_the_best_is_marked_by_what_is_printed_and_by_the_direction(tmp_path: Path) -> None:
    config = tiny_study(tmp_path)
    written_study(tmp_path, config)
    results = read_results(tmp_path)
    table = method_table(results, "table1", "Table 1", config.table1)
    directions = [metric.less for metric in METRICS[:3]] * 2
    for place, less in enumerate(directions, 2):
        numbers = {row.title: float(row.cells[place].split(" ")[0]) for row in table.rows if not row.reference}
        best = (min if less else max)(numbers.values())
        assert {row.title for row in table.rows if place in row.best} == {
            title for title, number in numbers.items() if number == best
        }


def column(*numbers: dict[int, dict[str, float]], less: bool = True, part: str = "") -> Column:
    """A column whose first row is the base."""
    made = Column(Metric("x", "x", less, part=part))
    for each in numbers:
        means = tuple(Value(seed, sum(row.values()) / len(row)) for seed, row in each.items())
        made.cells.append(Cell(means) if means else None)
        made.numbers.append(each)
    return made


def seeds(*numbers: float) -> dict[int, dict[str, float]]:
    return {seed: {"": number} for seed, number in enumerate(numbers)}


def test_bold_needs_an_interval_without_zero_and_a_base_that_is_worse() -> None:
    base, clear, doubtful = seeds(9, 9, 9), seeds(1, 1.1, 0.9), seeds(0.9, 2.5, 1.5)
    next_one = seeds(2, 2.1, 1.9)
    assert column(base, next_one, clear).best([1, 2], 0) == {2}
    assert column(base, next_one, doubtful).best([1, 2], 0) == set(), "1.6 less 2.0, and seeds differ by as much"
    assert column(base, clear, clear).best([1, 2], 0) == set()
    assert column(seeds(0.5, 0.5, 0.5), next_one, clear).best([1, 2], 0) == set(), "the base is better"
    assert column(base, next_one, clear, less=False).best([1, 2], 0) == set()
    assert column(seeds(1, 1, 1), next_one, clear, less=False).best([1, 2], 0) == {1}
    assert column(base, {}, clear).best([1, 2], 0) == set(), "nothing to compare with"
    assert column(base, seeds(2), seeds(1)).best([1, 2], 0) == set(), "one seed"


def test_intervals_stand_beside_all_numbers_of_a_table_or_none() -> None:
    whole = Cell((Value(0, 1.0, 0.9, 1.1),))
    bare = Cell((Value(0, 2.0, None, None),))
    for cells, known in (([whole, None, whole], True), ([whole, bare], False), ([bare, None], False)):
        columns = [Column(METRICS[0], cells=[whole]), Column(METRICS[1], cells=list(cells))]
        assert set_intervals(columns) is known
        texts = [column.text(row) for column in columns for row in range(len(column.cells))]
        assert {" ± " in text for text in texts if text != "-"} == {known}


def test_the_page_on_a_phone(out: Path) -> None:
    text = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert text.count('class="scroll" tabindex="0"') == text.count('<p class="hint">') == text.count("<table>")
    assert ".scroll table tr > :first-child { position: sticky; left: 0;" in text
    pictures = text.count("<picture>")
    assert text.count('media="(max-width: 1111px)"') == pictures
    charts = text.count('media="(max-width: 1111px) and (prefers-color-scheme: dark)"')
    assert 0 < charts < pictures  # montages are dark on every screen
    widths = re.findall(r'<source media="\(max-width: 1111px\)[^>]*width="(\d+)"', text)
    assert len(widths) == pictures + charts
    assert all(int(width) <= 358 for width in widths)


def test_the_change_of_the_error_is_compared_volume_by_volume() -> None:
    def rows(shift: float, spread: float = 0.0) -> dict[int, dict[str, float]]:
        return {
            seed: {name: shift + 10 * place + spread * (-1) ** (seed + place) for place, name in enumerate("abcd")}
            for seed in range(3)
        }

    made = column({}, rows(-50), rows(-51), part="test")
    assert made.best([1, 2], 0) == {2}, "volumes differ by ten points, pairs by one"
    assert column({}, rows(-50), rows(-51, 8), part="test").best([1, 2], 0) == set()
    assert column({}, rows(2), rows(1), part="test").best([1, 2], 0) == set(), "the base has no change"


def test_names_are_text_and_no_markup() -> None:
    row = Row("<b>A & B</b>", ("-1.5 ± 0.2",), frozenset({0}))
    html = as_html(Table("t", "T", (("", 1),), ("<x>",), (row,)))
    assert "&lt;b&gt;A &amp; B&lt;/b&gt;" in html
    assert '<td class="best">&minus;1.5<span class="pm"> ± 0.2</span></td>' in html
    assert as_markdown(Table("t", "T", (("g", 1),), ("x",), (row,))) == (
        "| Method | g: x |\n|-|-:|\n| <b>A & B</b> | **-1.5 ± 0.2** |\n"
    )


@pytest.mark.parametrize(
    ("places", "expected"),
    [([0.0, 1.0], [0.0, 1.0]), ([0.5, 0.5], [0.45, 0.55]), ([0.5, 0.52, 0.54], [0.42, 0.52, 0.62]), ([], [])],
)
def test_labels_are_moved_apart_and_no_further(places: list[float], expected: list[float]) -> None:
    assert spread(places, 0.1) == pytest.approx(expected)


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError) as excinfo:
        report(tmp_path, Screen(quiet=True))
    assert str(excinfo.value) == (
        f"{tmp_path}: the results of a study: expected study.json, found none that can be read. "
        "Run `study` first, with the same `--out`."
    )


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = tiny_study(tmp_path)
    written_study(tmp_path, config)
    sample = tmp_path / "runs" / "lora" / "lesion" / "seed-0" / "samples" / "seed-0" / "sample-0001.nii.gz"
    sample.write_bytes(b"broken")
    with pytest.raises(LabError) as excinfo:
        report(tmp_path, Screen(quiet=True))
    assert str(excinfo.value).startswith(f"{sample}: a sample: expected a NIfTI file, found ")
    assert str(excinfo.value).endswith(" Remove it and the run's run.json; `study` then draws it again.")
    write_json(tmp_path / "study.json", {"version": 1, "studies": [], "config": {"a": 1}})
    with pytest.raises(LabError) as excinfo:
        report(tmp_path, Screen(quiet=True))
    assert str(excinfo.value) == (
        f"{tmp_path / 'study.json'}: the settings of a study: expected those of this version, found others. "
        "Run `study` again with the same `--out`."
    )


def test_a_report_of_a_study_that_has_only_begun(tmp_path: Path) -> None:
    config = tiny_study(tmp_path)
    settled = config.with_variants().settled().model_dump(mode="json")
    write_json(tmp_path / "study.json", {"version": 1, "studies": ["table1", "table4"], "config": settled})
    report(tmp_path, Screen(quiet=True))
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Missing: LoRA, Lesion, seed 1: not run yet" in page
    assert "Not measured yet." in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(out: Path, tmp_path: Path, scheme: str) -> None:
    """Chromium, without a network, sees the tables and draws a page that is not blank."""
    from matplotlib.image import imread

    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path}", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,1600"]
    page, picture = (out / "report" / "index.html").as_uri(), tmp_path / "page.png"
    command = [CHROMIUM, *flags, f"--screenshot={picture}", page]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    seen = imread(picture)[..., :3]
    assert seen.shape[:2] == (1600, 1280)
    assert (seen[0, 0].mean() > 0.9) == (scheme == "light")
    ink = np.abs(seen - seen[0, 0]).max(-1) > 0.2
    assert 0.02 < ink.mean() < 0.6
    assert ink[:400].any()  # the heading
    assert ink[400:].any()  # tables and charts
    dom = subprocess.run([CHROMIUM, *flags, "--dump-dom", page], check=True, timeout=120, capture_output=True)
    shown = Page(dom.stdout.decode())
    assert shown.tables[0][4][0] == "Full fine-tuning"
    assert (
        len(shown.tables) == 6 + 4 + 4 * 2
    )  # one for each study but the screens; changes, and details on two data sets, of four
