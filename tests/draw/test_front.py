"""The picture of many networks by their parameters, the time of a step, and their errors."""

from __future__ import annotations

import re

import pytest
from torch import nn

import tnpeft
from tnpeft.draw import Point, draw_front
from tnpeft.draw.front import front_of
from tnpeft.draw.strip import strip_of


def network(name: str, **params: int) -> tnpeft.Network:
    return tnpeft.load_spec(name).bind(nn.Linear(6, 8), **params)


def test_the_front_has_what_no_cheaper_network_betters():
    points = [Point(5, 0.5), Point(3, 0.6), Point(4, 0.6), Point(6, 0.2), Point(6, 0.3), Point(7, 0.2)]
    assert front_of(points) == [Point(3, 0.6), Point(5, 0.5), Point(6, 0.2)]
    timed = [Point(5, 0.5, step=2.0), Point(9, 0.6, step=0.5), Point(1, 0.1), Point(3, 0.5, step=0.0)]
    assert front_of(timed, lambda point: point.step) == [timed[3]]


@pytest.mark.parametrize("step", [None, 0.7])
def test_panels_captions_and_labels(step: float | None):
    named = Point(3, 0.6, "number 1", network("lora"), step)
    points = [Point(5, 0.5), Point(4, 0.6), named]
    svg = draw_front(points, [Point(4, 0.4, "other", step=step)], "time of a step").decode()
    panels = 1 if step is None else 2
    assert "<image" not in svg  # networks are lines and letters that scale
    assert svg.count(">A</text>") == svg.count(">other</text>") == panels
    assert (">time of a step</text>" in svg) == (step is not None)
    assert ">A  number 1</text>" in svg
    assert ">parameters</text>" in svg
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    places = re.findall(r'<text style="[^"]*" x="([-\d.]+)" y="([-\d.]+)"', svg)
    assert places
    assert all(0 <= float(x) <= float(size[1]) and 0 <= float(y) <= float(size[2]) for x, y in places)
    assert draw_front(points) == draw_front(points)


def test_networks_stand_apart_at_one_scale():
    several = [(f"number {count}", network("lora", r=count)) for count in range(1, 8)]
    page = strip_of(several, 10.0)
    assert page.width == 10.0
    assert len(page.panels) == 7
    boxes = [(x + scene.bounds[0], y + scene.bounds[1], x + scene.bounds[2], y + scene.bounds[3])
             for scene, x, y in page.panels]  # fmt: skip
    for number, one in enumerate(boxes):
        assert 0 <= one[0] < one[2] <= page.width
        assert 0 <= one[1] < one[3] <= page.height
        for other in boxes[:number]:
            assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
    radii = {disc.radius for scene, _, _ in page.panels for disc in scene.discs}
    assert len(radii) == 1
    captions = {text.text for text in page.texts}
    assert {"number 1", "number 7", "input", "output"} <= captions


def test_the_best_are_drawn_where_there_are_many():
    points = [Point(count, 1 / count, f"number {count}", network("lora", r=1)) for count in range(1, 10)]
    svg = draw_front(points).decode()
    drawn = re.findall(r">([A-F])  number (\d)</text>", svg)
    assert drawn == [*zip("ABCDEF", "456789", strict=True)]
