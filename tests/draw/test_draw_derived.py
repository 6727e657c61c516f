"""Pictures of derived cores, references with legs and index cores: what stands where, and what the marks are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import RegularPolygon
from matplotlib.text import Text

import tnpeft
from tnpeft.draw import Picture, Quality, draw_network
from tnpeft.draw.derivation import MOST_DERIVED, sign_of
from tnpeft.draw.diagram import INNER, diagram_of
from tnpeft.draw.render import figure_of

TIMES = "\N{MULTIPLICATION SIGN}"
LINEAR = tnpeft.Layer("Linear", 64, 128)
HEAD = """\
tnpeft: 2
name: drawn
layers: [Linear]
params: {r: 4}
sizes: {o: out_features, i: in_features}
"""


def panel_texts(picture: Picture) -> list[list[str]]:
    return [[disc.node.text for disc in scene.discs if disc.node.core] for scene, _, _ in picture.page.panels]


def legend_of(picture: Picture) -> list[str]:
    return [kind for kind, _, _ in picture.page.legend]


def test_terms_come_first_then_each_derived_core_with_its_sources():
    picture = draw_network("hra")
    assert panel_texts(picture) == [["u", "T", "Wu"], ["u", "u"], ["T"], ["W", "u"], ["Wu"]]
    assert [arrow.maps for arrow, _, _ in picture.page.arrows] == [("reflections(r s)",), ()]
    assert len(picture.page.frames) == 2
    assert legend_of(picture)[-1] == "derived"
    assert [set(places) for places in picture.places] == [{"u((i k...) s)", "T", "Wu"}]


def test_a_core_with_other_legs_is_the_same_core_again():
    (term, *_) = panel_texts(draw_network("vblora"))
    assert sorted(term) == ["bank", "bank", "pick_a", "pick_b"]


def test_derived_cores_are_hexagons_that_hold_all_lines():
    picture = draw_network("oft")
    hexagons = figure_of(picture.page).findobj(RegularPolygon)
    assert all(patch.numvertices == 6 for patch in hexagons)
    (scene, _, _) = picture.page.panels[0]
    (disc,) = (disc for disc in scene.discs if disc.node.derived)
    assert min(patch.radius for patch in hexagons) * np.cos(np.pi / 6) < disc.radius + 1e-9
    assert max(patch.radius for patch in hexagons) * np.cos(np.pi / 6) == pytest.approx(disc.radius)


def test_index_cores_stand_below_the_arrow_of_the_map_that_reads_them():
    picture = draw_network("shira")
    ((arrow, x, y),) = picture.page.arrows
    assert arrow.indices == ("places",)
    assert "index" in legend_of(picture)
    texts = {text.get_text(): text.get_position() for text in figure_of(picture.page).findobj(Text)}
    below, above = texts["places"], texts["scatter(n -> o i k..., at=places)"]
    assert below[0] == above[0] == pytest.approx(x + arrow.width / 2)
    assert below[1] < y < above[1]
    assert panel_texts(picture) == [["update"], ["values"], ["update"]]


@pytest.mark.parametrize("name", ["hra", "waveft", "peanut_2", "unilora", "frod"])
def test_frames_hold_their_panels_and_keep_clear(name: str):
    page = draw_network(name).page
    terms = len(tnpeft.load_spec(name).terms)
    for number, (scene, x, y) in enumerate(page.panels):
        left, bottom, right, top = scene.bounds
        holding = [
            frame
            for frame in page.frames
            if frame[0] <= left + x and frame[1] <= bottom + y and right + x <= frame[2] and top + y <= frame[3]
        ]
        assert len(holding) == (number >= terms)
    for number, one in enumerate(page.frames):
        assert 0 < one[0] < one[2] < page.width
        for other in page.frames[number + 1 :]:
            assert one[2] < other[0] or other[2] < one[0] or one[1] > other[3] or other[1] > one[3]


def test_sums_and_scales_stand_before_panels():
    summands = "".join(f"{{cores: [c{number}], scale: {number}}}, " for number in range(1, 16))
    cores = "".join(f"  c{number}: r i\n" for number in range(1, 16))
    text = (
        f"{HEAD}cores:\n{cores}  up: {{legs: o r, init: zeros}}\n"
        f"  all: {{of: [{summands[:-2]}], legs: r i, map: tanh}}\nweight: o i\nstart: zero\n"
    )
    picture = Picture(tnpeft.Spec.from_yaml(text).bind(LINEAR), True)
    ((arrow, _, _),) = picture.page.arrows
    assert arrow.maps == ("and 3 more", "tanh")
    assert [sign.text for sign in picture.page.texts if TIMES in sign.text][:2] == [f"+ 2 {TIMES}", f"+ 3 {TIMES}"]
    assert sign_of(0, -0.5) == f"\N{MINUS SIGN} 0.5 {TIMES}"


def test_of_many_derived_cores_the_first_are_drawn():
    chain = "".join(
        f"  d{at}: {{of: {'down' if not at else f'd{at - 1}'}, legs: r i, map: tanh}}\n" for at in range(30)
    )
    text = (
        f"{HEAD}cores:\n  down: r i\n  up: {{legs: o r, init: zeros}}\n{chain}"
        "terms: [{cores: [up, d29], weight: o i}]\nstart: zero\n"
    )
    page = Picture(tnpeft.Spec.from_yaml(text).bind(LINEAR), False).page
    assert len(page.arrows) == len(page.frames) == MOST_DERIVED
    assert "the first 24 of 30 derived cores" in [text.text for text in page.texts]
    assert page.quality == Quality(0, 0, 0, 0)


def test_hyperedges_of_the_same_cores_share_a_dot():
    network = tnpeft.load_spec("road_2").bind(LINEAR)
    part = network.plain.parts[0]
    (dot,) = (node for node in diagram_of(part, network).nodes if node.core is None)
    assert dot.name == "n h c"
    (stub,) = (stub for stub in diagram_of(part, network).stubs if stub.role == "out")
    assert stub.size == 128
    assert INNER not in {stub.role for stub in diagram_of(part, network).stubs}
