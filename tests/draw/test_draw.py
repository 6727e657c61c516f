"""Pictures: where things stand, that nothing covers anything, what the marks mean, and the files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import combinations
from pathlib import Path

import matplotlib
import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.lines import Line2D
from matplotlib.text import Text
from networks import hyperedge, make_network, network_of_graph, networks
from small import quick_if
from terminal import data, mistakes, run, text

import tnpeft
from tnpeft.draw import Picture, Quality, draw_network, is_current
from tnpeft.draw.diagram import diagram_of, mirrors, sides
from tnpeft.draw.files import write
from tnpeft.draw.page import Page, page_of
from tnpeft.draw.placing import place
from tnpeft.draw.render import figure_of, rendered
from tnpeft.draw.scene import scene_of
from tnpeft.draw.shapes import Disc

ROOT = Path(__file__).parents[2]
CONV3D = tnpeft.Layer("Conv3d", 64, 128, (3, 3, 3))
LINEAR = tnpeft.Layer("Linear", 64, 128)

GLORA = """\
tnpeft: 1
name: glora
layers: [Linear]
params: {r: 4}
bond: r
sizes: {o: out_features, i: in_features, j: in_features}
cores:
  base: {legs: o j, from: weight}
  a:    j r
  b:    r i
  up:   {legs: o s, shared: model}
  down: {legs: s i, shared: block}
terms:
  - {cores: [base, a, b], weight: o i}
  - {cores: [up, down], weight: o i, scale: -0.5}
start: frozen_copy
"""

LORA_XS = """\
tnpeft: 1
name: lora_xs
layers: [Linear]
params: {r: 4}
bond: r
sizes: {o: out_features, i: in_features}
cores:
  u:   {legs: o a, from: svd_u}
  mid: {legs: a b, init: zeros}
  v:   {legs: b i, from: svd_v}
weight: o i
compose: dora
start: zero
"""


def places_of(name: str, **params: int) -> dict[str, tuple[float, float]]:
    return draw_network(name, layer=CONV3D, **params).places[0]


def page_texts(page: Page) -> list[str]:
    return [text.text for text in page.texts]


def discs_of(picture: Picture, panel: int = 0) -> dict[str, Disc]:
    return {disc.node.name: disc for disc in picture.page.panels[panel][0].discs}


# where things stand


def check_columns(at: dict[str, tuple[float, float]]) -> None:
    """The columns that Figure 2(c) and (d) of the TenVOO paper have in common."""
    for column in (("in_12", "in_3", "kernel_d"), ("out_12", "out_3", "kernel_w")):
        assert len({at[core][0] for core in column}) == 1
        assert at[column[0]][1] > at[column[1]][1] > at[column[2]][1]
    middle = at["in_12"][0] + at["out_12"][0]
    mirrored = {"in_12": "out_12", "in_3": "out_3", "kernel_d": "kernel_w", "join_in": "join_out"}
    for left, right in mirrored.items():
        assert at[left][0] < at[right][0]
        assert at[left][0] + at[right][0] == pytest.approx(middle)
        assert at[left][1] == pytest.approx(at[right][1])
    assert min(x for x, _ in at.values()) == at["in_12"][0]
    assert at["kernel_h"][0] == pytest.approx(middle / 2)


def test_tenvoo_l_stands_as_in_figure_2c():
    at = places_of("tenvoo_l")
    check_columns(at)
    (left, y), (middle, level), (right, _) = at["join_in"], at["centre"], at["join_out"]
    assert left < middle < right
    assert y == pytest.approx(level)
    assert at["in_12"][1] > level > at["kernel_d"][1]
    assert at["kernel_h"][0] == pytest.approx(middle)
    assert at["kernel_h"][1] < level


def test_tenvoo_q_stands_as_in_figure_2d():
    at = places_of("tenvoo_q", r=8)
    check_columns(at)
    assert at["join_kernel"][0] == pytest.approx(at["kernel_h"][0])
    assert at["join_in"][1] > at["join_kernel"][1] > at["kernel_h"][1]


def test_input_left_output_right_kernel_between():
    cores = {"out": "o r", "in": "i r", "depth": "x r", "height": "y r", "width": "z r"}
    network = make_network(cores, "o i x y z", {"o": 8, "i": 8, "x": 3, "y": 3, "z": 3, "r": 4})
    (at,) = Picture(network, True).places
    assert at["in"][0] < at["height"][0] < at["out"][0]
    assert at["depth"][0] < at["height"][0] < at["width"][0]
    assert at["height"][1] < at["in"][1] == at["out"][1]
    assert sides(diagram_of(network)) == [1, -1, 0, 0, 0, None]


def test_a_matrix_product_operator_is_a_column():
    cores = {"first": "a e r", "second": "b f r s", "third": "c g s t", "fourth": "d h t"}
    network = make_network(cores, ["a b c d", "e f g h"], dict.fromkeys("abcdefghrst", 2))
    (at,) = Picture(network, True).places
    assert len({x for x, _ in at.values()}) == 1
    assert [name for name, _ in sorted(at.items(), key=lambda item: -item[1][1])] == list(cores)


def test_reflections_swap_input_and_output():
    diagram = diagram_of(tnpeft.load_spec("tenvoo_l").bind(CONV3D))
    names = [node.name for node in diagram.nodes]
    (reflection,) = mirrors(diagram)
    partners = {names[one]: names[other] for one, other in enumerate(reflection)}
    assert partners["in_12"] == "out_12"
    assert partners["kernel_d"] == "kernel_w"
    assert partners["centre"] == "centre"
    assert mirrors(diagram_of(tnpeft.load_spec("lora").bind(LINEAR))) == [(1, 0)]


# nothing covers anything

# Butterflies, whose indices stand in all cores: no plane holds LyCORIS's six factors without crossings.
TANGLED = {"boft_2": 1, "boft_lycoris": 240}


@pytest.mark.parametrize(
    "name", [quick_if(place % 4 == 0 or name in TANGLED, name) for place, name in enumerate(tnpeft.list_specs())]
)
def test_shipped_specs_are_readable(name: str):
    spec = tnpeft.load_spec(name)
    quality = draw_network(spec).quality
    assert quality == Quality(quality.crossings, 0, 0, 0)
    assert quality.crossings <= TANGLED.get(name, 0)


@pytest.mark.parametrize("name", ["tenvoo_l", "loha_tucker"])
def test_real_text_keeps_clear(name: str):
    """The boxes that labels are placed with, against what matplotlib draws."""
    page = draw_network(name, layer=CONV3D).page
    ((scene, x, y),) = page.panels
    figure = figure_of(page)
    renderer = figure.canvas.get_renderer()
    to_inches = figure.dpi_scale_trans.inverted()
    every = [
        (found.get_gid(), found.get_window_extent(renderer).transformed(to_inches)) for found in figure.findobj(Text)
    ]
    boxes = [box for name, box in every if name]
    assert len(boxes) == len(scene.labels)
    assert not [1 for one, other in combinations(boxes, 2) if one.overlaps(other)]
    for disc in scene.discs:
        centre = np.array([disc.x + x, disc.y + y])
        for box in boxes:
            nearest = np.clip(centre, box.min, box.max)
            assert np.hypot(*(nearest - centre)) > disc.radius
    for _, box in every:
        assert box.x0 > 0
        assert box.y0 > 0
        assert box.x1 < page.width
        assert box.y1 < page.height


@st.composite
def graphs(draw: st.DrawFn) -> tnpeft.Network:
    """Connected networks of up to 16 cores with some parallel bonds and open legs on up to ten of them."""
    count = draw(st.integers(2, 16))
    ends = [(draw(st.integers(max(0, core - 4), core - 1)), core) for core in range(1, count)]
    core = st.integers(0, count - 1)
    ends += draw(st.lists(st.tuples(core, core).filter(lambda pair: pair[0] != pair[1]), max_size=8))
    legs: list[list[str]] = [[] for _ in range(count)]
    for number, pair in enumerate(ends):
        for end in pair:
            legs[end].append(f"b{number}")
    axes: list[list[str]] = [[], [], []]
    for number, owner in enumerate(draw(st.lists(core, min_size=3, max_size=10))):
        legs[owner].append(f"o{number}")
        axes[number % 3].append(f"o{number}")
    sizes = {leg: draw(st.sampled_from((1, 2, 8, 64))) for own in legs for leg in own}
    return make_network(
        {f"core_{number}": " ".join(own) for number, own in enumerate(legs)}, [" ".join(axis) for axis in axes], sizes
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=12, derandomize=True)
@given(network=graphs())
def test_random_networks_are_readable(network: tnpeft.Network):
    quality = page_of(network, True).quality
    assert (quality.through_cores, quality.label_overlaps) == (0, 0)
    assert quality.crossings <= len(diagram_of(network).lines) // 2
    assert quality.label_crossings <= 4


@pytest.mark.slow
@settings(deadline=None, max_examples=15, derandomize=True)
@given(network=networks())
def test_hyperedges_and_outer_products_are_readable(network: tnpeft.Network):
    quality = page_of(network, False).quality
    assert (quality.through_cores, quality.label_overlaps) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        network_of_graph(networkx.complete_graph(8)),
        network_of_graph(networkx.star_graph(15)),
        network_of_graph(networkx.cycle_graph(16)),
        hyperedge(16),
        make_network({"a": "o p q r s t u v w x", "b": "p q r s t u v w x i"}, "o i", dict.fromkeys("opqrstuvwxi", 2)),
        make_network({"scalar": "", "matrix": "o i"}, "o i", {"o": 2, "i": 2}),
        make_network({"n" * 90: "channels_of_the_output bond", "b": "bond i"}, "channels_of_the_output i",
                     {"channels_of_the_output": 2, "bond": 2, "i": 2}),
    ],
    ids=["complete", "star", "ring", "hyperedge", "parallel", "scalar", "long names"],
)  # fmt: skip
def test_hard_cases_are_readable(network: tnpeft.Network):
    quality = page_of(network, True).quality
    assert (quality.through_cores, quality.label_overlaps) == (0, 0)


def test_many_terms_stand_in_rows():
    """Five in one row would be 18 inches wide, and tiny wherever they are shown."""
    terms = ", ".join(["{cores: [up, down], weight: o i k...}"] * 5)
    text = f"""
tnpeft: 1
name: many
layers: any
params: {{r: 4}}
sizes: {{o: out_channels, i: in_channels}}
cores: {{up: o r, down: {{legs: r i k..., init: zeros}}}}
terms: [{terms}]
start: zero
"""
    page = page_of(tnpeft.Spec.from_yaml(text).bind(LINEAR), True)
    assert page.width < 10
    rows = Counter(round(y + scene.bounds[3], 3) for scene, _, y in page.panels)
    assert list(rows.values()) == sorted(rows.values(), reverse=True)
    assert sum(rows.values()) == 5
    assert len(rows) > 1


def test_quality_counts():
    diagram = diagram_of(network_of_graph(networkx.complete_graph(4), open_legs=2))
    crossed = scene_of(diagram, [(0, 0), (2, 0), (2, 2), (0, 2)], False).quality
    assert crossed.crossings == 1
    assert scene_of(diagram, [(0, 0), (1, 0), (2, 0), (0, 2)], False).quality.through_cores == 1
    assert scene_of(diagram, place(diagram), False).quality.crossings == 0


@pytest.mark.parametrize("corner", [(2, 2), (2.5, 2), (3, 3), (2, 1.7)])
def test_a_crossing_counts_wherever_it_is(corner: tuple[float, float]):
    """The diagonals of a rectangle have a point in common; others cross between their points."""
    diagram = diagram_of(network_of_graph(networkx.Graph([(0, 1), (2, 3)]), open_legs=4))
    assert scene_of(diagram, [(0, 0), corner, (0, corner[1]), (corner[0], 0)], False).quality.crossings == 1


def test_lines_on_one_straight_line_do_not_cross():
    diagram = diagram_of(network_of_graph(networkx.path_graph(4), open_legs=0))
    assert scene_of(diagram, [(0, 0), (1, 1), (2, 2), (3, 3)], False).quality.crossings == 0


@pytest.mark.parametrize("name", ["loha_tucker", "randlora", "loha", "abba"])
def test_planar_networks_on_3d_layers_are_drawn_without_crossings(name: str):
    assert draw_network(name, None, tnpeft.Layer("Conv3d", 32, 64, (3, 3, 3))).quality.crossings == 0


# what the marks mean


def test_hyperedges_are_dots_and_named_once():
    page = draw_network("loha", layer=LINEAR).page
    ((scene, _, _),) = page.panels
    assert [disc.node.name for disc in scene.discs if disc.node.core is None] == ["o", "i"]
    assert sorted(label.text for label in scene.labels) == ["i=64", "o=128", "r=4", "s=4"]
    assert "one index of several cores" in page_texts(page)


def test_parallel_bonds_are_two_lines():
    network = make_network({"a": "o r s", "b": "r s i"}, "o i", {"o": 2, "i": 2, "r": 4, "s": 8})
    ((scene, _, _),) = page_of(network, True).panels
    one, other = (stroke for stroke in scene.strokes if len(stroke.ends) == 2)
    assert {one.index, other.index} == {"r", "s"}
    assert np.abs(one.path[len(one.path) // 2] - other.path[len(other.path) // 2]).max() > 0.2


def test_terms_stand_side_by_side_with_their_signs():
    picture = draw_network(tnpeft.Spec.from_yaml(GLORA), layer=LINEAR)
    assert [sorted(places) for places in picture.places] == [["a", "b", "base"], ["down", "up"]]
    assert "\N{MINUS SIGN} 0.5 \N{MULTIPLICATION SIGN}" in page_texts(picture.page)
    (_, first, _), (_, second, _) = picture.page.panels
    assert second > first
    assert {"the base weight", "shared between layers"} <= set(page_texts(picture.page))
    assert "frozen" not in page_texts(picture.page)
    assert discs_of(picture)["base"].lines == ("W",)
    assert discs_of(picture, 1)["down"].lines == ("down", "(block)")


def test_frozen_cores_and_dora():
    picture = draw_network(tnpeft.Spec.from_yaml(LORA_XS), layer=LINEAR)
    assert discs_of(picture)["u"].lines == ("u", "(svd_u)")
    said = page_texts(picture.page)
    assert "frozen" in said
    assert said[:2] == ["lora_xs", "Linear(64, 128), r = 4"]
    assert any(line.startswith("compose: dora") for line in said)
    assert "one index of several cores" not in said
    assert "kernel" not in said


def test_without_a_layer_labels_are_names():
    page = draw_network("tenvoo_l").page
    labels = {label.text for label in page.panels[0][0].labels}
    assert {"i1", "i2", "i3", "kd", "g"} <= labels
    assert not [label for label in labels if "=" in label]
    assert page_texts(page)[1].startswith("parameters: (i1 i2 + o1 o2) r^2")


def test_thickness_grows_with_size():
    network = make_network({"a": "o r", "b": "r i"}, "o i", {"o": 64, "i": 2, "r": 8})
    lines = figure_of(page_of(network, True)).findobj(Line2D)
    assert [line.get_linewidth() for line in lines] == pytest.approx([2.35, 4.0, 1.25])


def test_any_title_can_be_drawn():
    spec = tnpeft.Spec.from_yaml(LORA_XS.replace("layers:", 'title: "低秩 $x \\x01 <&> \\U0001F600"\nlayers:'))
    svg = draw_network(spec).data()
    assert "&lt;&amp;&gt;" in svg.decode()
    ElementTree.fromstring(svg)
    assert draw_network(spec).data("png").startswith(b"\x89PNG")


# files


def test_the_same_bytes_in_every_process():
    code = (
        "import sys, matplotlib, tnpeft;"
        "matplotlib.rcParams.update({'font.size': 20, 'lines.linewidth': 9, 'svg.fonttype': 'path'});"
        "sys.stdout.buffer.write(tnpeft.draw_network('quanta').data())"
    )
    here = draw_network("quanta").data()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT, env=environment)
        assert done.stdout == here


def test_users_of_matplotlib_are_not_disturbed():
    code = (
        "import sys, matplotlib; settings = lambda: {"
        "key: matplotlib.rcParams[key] for key in matplotlib.rcParams if 'backend' not in key};"  # which imports pyplot
        "before = settings(); import tnpeft;"
        "tnpeft.draw_network('lora').data('png');"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules;"
        "assert settings() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_svg_says_which_spec_it_shows(tmp_path: Path):
    spec = tnpeft.load_spec("lora")
    path = tmp_path / "lora.svg"
    assert not is_current(path, spec)
    tnpeft.draw_network(spec, path)
    assert is_current(path, spec)
    assert not is_current(path, tnpeft.Spec.from_yaml(spec.text + "# changed\n"))
    found = path.read_text()
    assert re.search(r"<dc:identifier>sha256:[0-9a-f]{64}</dc:identifier>", found)
    assert "<dc:date>" not in found
    assert ">down</text>" in found  # text, not outlines
    assert str(ROOT) not in found
    tnpeft.draw_network(spec, tmp_path / "lora.PNG")
    assert is_current(tmp_path / "lora.PNG", spec)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora.PNG", "lora.svg"]


def test_a_bound_network_is_drawn_as_it_is(tmp_path: Path):
    network = tnpeft.load_spec("lora").bind(LINEAR, r=2)
    picture = draw_network(network)
    assert picture.network is network
    assert "384 parameters = (o + i) r" in page_texts(picture.page)
    with pytest.raises(tnpeft.DrawError) as error:
        draw_network(network, r=8)
    assert str(error.value) == (
        "draw_network: expected a bound network alone, found a layer or params beside it. Pass the spec instead."
    )


def test_where_it_cannot_be_written(tmp_path: Path):
    with pytest.raises(tnpeft.DrawError) as error:
        draw_network("lora", tmp_path / "lora.eps")
    assert str(error.value) == (
        f"{tmp_path / 'lora.eps'}: picture: expected a name in .svg, .png or .pdf, found '.eps'. "
        "Name the file like `picture.svg`."
    )
    with pytest.raises(tnpeft.DrawError) as error:
        draw_network("lora", tmp_path / "lora")
    assert "found no suffix." in str(error.value)
    missing = tmp_path / "missing" / "lora.svg"
    with pytest.raises(tnpeft.DrawError) as error:
        draw_network("lora", missing)
    assert str(error.value) == (
        f"{missing}: picture: expected to be written, found No such file or directory. "
        "Choose a folder that exists and can be written to."
    )
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    with pytest.raises(tnpeft.DrawError):
        write(folder, b"")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.svg"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tnpeft.errors.find_spec", lambda name: None)
    with pytest.raises(tnpeft.DrawError) as error:
        draw_network("lora")
    assert str(error.value) == (
        "pictures: expected the package matplotlib, found none installed. Run `pip install 'tnpeft[draw]'`."
    )


def test_a_spec_without_a_layer_is_drawn_on_one_that_it_fits():
    odd = tnpeft.Spec.from_yaml(LORA_XS.replace("o: out_features", "o: 13"))
    picture = draw_network(odd)
    assert str(picture.network.layer) == "Linear(7, 13)"
    assert str(draw_network("lora").network.layer) == "Conv1d(64, 128, 3)"
    with pytest.raises(tnpeft.BindError) as error:
        draw_network(odd, r=-1)
    assert "Linear(64, 128)" in str(error.value)


def labels_of(picture: Picture) -> set[str]:
    return {label.text for scene, _, _ in picture.page.panels for label in scene.labels}


def test_any_kernel_is_one_leg_until_a_layer_is_named():
    assert labels_of(draw_network("lora")) == {"i", "k...", "r", "o"}
    assert labels_of(draw_network("lora", layer=tnpeft.Layer("Conv1d", 4, 8, (3,)))) == {"i=4", "k.0=3", "r=4", "o=8"}
    assert "k..." not in labels_of(draw_network("quanta"))  # of Linear layers
    with_kernel = [name for name in tnpeft.list_specs() if "k..." in tnpeft.load_spec(name).text.partition("cores:")[2]]
    kinds = {draw_network(name).network.layer.kind for name in with_kernel}
    assert kinds <= {"Conv1d", "Conv2d", "Conv3d"}


def test_a_pdf_for_latex(tmp_path: Path):
    for name in ("a.pdf", "b.pdf"):
        draw_network("lora", tmp_path / name)
    data = (tmp_path / "a.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    assert data == (tmp_path / "b.pdf").read_bytes()
    assert b"CreationDate" not in data
    assert b"/Type /Font" in data  # text stays text
    assert is_current(tmp_path / "a.pdf", tnpeft.load_spec("lora"))
    assert not is_current(tmp_path / "a.pdf", tnpeft.load_spec("loha"))


MARKS = {
    "lora": {"in", "out", "kernel", "line"},
    "quanta": {"in", "out", "line"},
    "vera": {"in", "out", "kernel", "inner", "line", "dot", "frozen", "shared"},
    "boft": {"in", "out", "kernel", "line", "dot", "weight", "derived"},
}


@pytest.mark.parametrize("name", MARKS)
def test_the_legend_has_what_is_in_the_picture_and_nothing_else(name: str):
    page = draw_network(name).page
    nodes = [disc.node for scene, _, _ in page.panels for disc in scene.discs]
    strokes = [stroke for scene, _, _ in page.panels for stroke in scene.strokes]
    cores = [node.core for node in nodes if node.core is not None]
    seen = {stroke.role for stroke in strokes if stroke.role in ("in", "out", "kernel")}
    seen |= {"inner"} if any(node.core is not None and not node.roles for node in nodes) else set()
    seen |= {"dot"} if len(cores) < len(nodes) else set()
    seen |= {"weight"} if any(core.origin == "weight" for core in cores) else set()
    seen |= {"frozen"} if any(core.frozen and core.origin is None for core in cores) else set()
    seen |= {"shared"} if any(core.shared for core in cores) else set()
    seen |= {"derived"} if any(node.derived for node in nodes) else set()
    seen |= {"line"} if len({min(stroke.size, 64) for stroke in strokes}) > 1 else set()
    assert {kind for kind, _, _ in page.legend} == seen == MARKS[name]


def test_the_same_page_twice_is_the_same_file():
    page = draw_network("lora").page
    assert rendered(page, "png", "a", "b") == rendered(page, "png", "a", "b")
    assert matplotlib.rcParams["svg.hashsalt"] != "tnpeft"


# the command line


def test_draw_a_file(tmp_path: Path):
    path = tmp_path / "tenvoo.svg"
    assert text("draw", "tenvoo_q", "-o", path, "--layer", "Conv3d:32,64,3", "--set", "r=2") == f"drew {path}"
    assert is_current(path, tnpeft.load_spec("tenvoo_q"))
    drawn = path.read_text()
    assert "Conv3d(32, 64, 3x3x3), r = 2" in drawn
    assert ">i1=4</text>" in drawn
    assert json.loads(run("draw", "lora", "-o", tmp_path / "lora.png", "--json").stdout) == {
        "pictures": [
            {
                "spec": "lora",
                "file": str(tmp_path / "lora.png"),
                "layer": "Conv1d(64, 128, 3)",
                "params": {"r": 4, "alpha": 4},
                "crossings": 0,
                "through_cores": 0,
                "label_overlaps": 0,
                "label_crossings": 0,
            }
        ]
    }


def test_draw_a_folder(tmp_path: Path):
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "one.yaml").write_text(GLORA)
    (specs / "recipe.yaml").write_text("adapters: []\n")
    pictures = tmp_path / "new" / "pictures"
    assert text("draw", specs, "-o", pictures) == f"drew {pictures / 'glora.svg'}"
    drawn = data("draw", "lora", "loha", "-o", pictures)["pictures"]
    assert [picture["file"] for picture in drawn] == [str(pictures / name) for name in ("lora.svg", "loha.svg")]
    assert sorted(file.name for file in pictures.iterdir()) == ["glora.svg", "loha.svg", "lora.svg"]


def test_draw_says_what_is_wrong(tmp_path: Path):
    assert mistakes("draw", "lora", "-o", tmp_path / "lora.gif") == [
        f"{tmp_path / 'lora.gif'}: picture: expected a name in .svg, .png or .pdf, found '.gif'. "
        "Name the file like `picture.svg`."
    ]
    (empty := tmp_path / "empty").mkdir()
    assert mistakes("draw", empty, "-o", tmp_path / "x.svg", status=2) == [
        f"{empty}: nothing to draw: expected specs in this folder, found none. Name another folder."
    ]
    (tmp_path / "file").write_text("")
    assert mistakes("draw", "lora", "loha", "-o", tmp_path / "file", status=2) == [
        f"{tmp_path / 'file'}: -o: expected a folder, found File exists. "
        "Name a folder for several pictures, with -o pictures/."
    ]
    assert mistakes("draw", "lora", "loha", "-o", tmp_path / "x.svg", status=2) == [
        f"{tmp_path / 'x.svg'}: -o: expected a folder, found the name of one picture. "
        "Name a folder for several pictures, with -o pictures/."
    ]
    assert mistakes("draw", "tenvool", "-o", tmp_path / "x.svg")[0].endswith("Did you mean `tenvoo_l`?")
    assert len(mistakes("draw", "lora", "-o", tmp_path / "x.svg", "--set", "rank=3")) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("name", ["tenvoo_l", "loha", "hra"])
def test_lines_are_drawn_by_few_points_and_look_the_same(name: str):
    (scene, *_) = (panel[0] for panel in draw_network(name).page.panels)
    for stroke in scene.strokes:
        start, way = stroke.thinned[:-1, None], np.diff(stroke.thinned, axis=0)[:, None]
        along = np.clip(((stroke.path - start) * way).sum(-1) / (way**2).sum(-1), 0, 1)
        away = np.hypot(*np.moveaxis(start + along[..., None] * way - stroke.path, -1, 0)).min(0)
        assert away.max() < 0.002, "inches"
        straight = np.allclose(np.linspace(stroke.path[0], stroke.path[-1], len(stroke.path)), stroke.path, atol=1e-4)
        assert (len(stroke.thinned) == 2) == straight
